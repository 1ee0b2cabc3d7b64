"""What the language model of egs/mini is worth: its perplexity beside that of an n-gram and of the text's source, and its cost."""

import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import llm_text
from llm_examples import Example, draw_example
from llm_tokens import NOT_PREDICTED, Encoder, collate, embed

from nim4.corpus.ngram import KneserNey


@torch.inference_mode()
def cost(model: Qwen3ForCausalLM, documents: Sequence[tuple[list[tuple[int, ...]], int]]) -> float:
    """Negative log probability, in nats, of all that is predicted in the documents."""
    total = 0.0
    for start in range(0, len(documents), 64):
        x, labels = collate(documents[start : start + 64])
        logits = model(inputs_embeds=embed(model.get_input_embeddings(), x)).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_PREDICTED, reduction="sum").item()
    return total


def perplexities(
    model: Qwen3ForCausalLM, encode: Encoder, ngrams: Sequence[KneserNey], held_out: dict[str, list[str]]
) -> dict[str, dict[str, object]]:
    """For each kind of text: how many, and the perplexities per token and per character of model, best n-gram and source; ends are predicted, too.

    `heard` is the model's with the pronunciation, with errors, in the speech's place. The best order is chosen on the held-out texts themselves.
    """
    rng, rows = random.Random(0), {}
    for kind, texts in held_out.items():
        num_tokens, num_chars = sum(len(encode.text(text)) for text in texts), sum(len(text) + 1 for text in texts)
        heard = [draw_example(text, texts, rng, plain=0, spoken=1, hints=0, partial=0) for text in texts]
        by_order = {ngram.order: sum(ngram.cost(encode.text(text)) for text in texts) for ngram in ngrams}
        order = min(by_order, key=by_order.__getitem__)
        nats = {"model": cost(model, [encode(Example(text)) for text in texts]), "ngram": by_order[order]}
        nats["heard"] = cost(model, [encode(example) for example in heard])
        if kind != "sentences":
            nats["source"] = llm_text.source_cost(kind, texts) * len(texts)
        rows[kind] = {"texts": len(texts), "tokens": num_tokens, "chars": num_chars, "ngram_order": order}
        rows[kind] |= {f"{name}_per_token": round(math.exp(value / num_tokens), 3) for name, value in nats.items()}
        rows[kind] |= {f"{name}_per_char": round(math.exp(value / num_chars), 3) for name, value in nats.items()}
    return rows


def facts(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, encode: Encoder) -> dict[str, object]:
    """What a user has to know of the model, for the record: sizes, tokens of a prompt, the size of its embeddings, its cost."""
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "prefix_tokens": len(encode.prompt.prefix),
        "suffix_tokens": len(encode.prompt.suffix()),
        "embedding_rms": round(model.get_input_embeddings().weight.detach().square().mean().sqrt().item(), 4),
        "ms_per_batch": round(1000 * seconds_per_batch(model)),
    }


def seconds_per_batch(model: Qwen3ForCausalLM, shape: tuple[int, int] = (16, 70), repeats: int = 10) -> float:
    """Processor time of forward and backward on one thread, for a batch of `shape` (B, L): the least of `repeats`, since other jobs disturb it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(repeats):
        start_s = time.process_time()
        model(input_ids=x, labels=x).loss.backward()
        seconds.append(time.process_time() - start_s)
        model.zero_grad()
    torch.set_num_threads(num_threads)
    return min(seconds)
