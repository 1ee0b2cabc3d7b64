"""The network of egs/mini's language model, Qwen3 in shape, and its training.

Loss is on answers and on plain documents. Everything else of a prompt is given whenever the model is used: the prefix and the instructions never
vary, and hints are drawn at random, so that predicting them would only cost capacity.
"""

import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from llm_examples import draw_example
from llm_tokens import NOT_PREDICTED, Encoder, collate, embed

log = logging.getLogger("nim4")


@dataclass(frozen=True)
class MiniLlmConfig:
    """Everything that decides the weights; ours throughout, the paper's LLM is Qwen3-1.7B."""

    num_grammar: int = 16_000  # phrases drawn from the grammar; it has 16,782 different ones, most of them rare
    num_joins: int = 16_000  # random joins: there a language model has nothing to know, and should know that; with 6,000 it guessed
    vocab_size: int = 2_500  # at most; the text has fewer
    dim: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    ffn_dim: int = 512
    plain: float = 0.15  # share of documents without a prompt; the following are shares of those with one
    spoken: float = 0.7  # the pronunciation stands where speech will
    hints: float = 0.3
    partial: float = 0.3
    steps: int = 5_000
    batch: int = 128  # documents
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1


def build_model(config: MiniLlmConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model."""
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(shape)


def batches(texts: Sequence[str], encode: Encoder, config: MiniLlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, one document of each text per pass; those of similar length together, in pools of 16 batches."""
    rng = random.Random(f"{config.seed} examples")
    shares = {name: getattr(config, name) for name in ("plain", "spoken", "hints", "partial")}
    while True:
        pool: list[tuple[list[tuple[int, ...]], int]] = []
        for text in rng.sample(texts, len(texts)):
            pool.append(encode(draw_example(text, texts, rng, **shares)))
            if len(pool) == 16 * config.batch:
                pool.sort(key=lambda document: len(document[0]))
                starts = list(range(0, len(pool), config.batch))
                rng.shuffle(starts)
                yield from (collate(pool[start : start + config.batch]) for start in starts)
                pool = []


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[Tensor, Tensor]], config: MiniLlmConfig, device: str) -> list[dict[str, float]]:
    """AdamW with a warm-up and a cosine; gives the mean loss of every 100 steps. The matrices decay, gains of norms and embeddings do not."""
    model.to(device).train()
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min((step + 1) / config.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    curve, losses = [], []
    for step in range(1, config.steps + 1):
        x, labels = (tensor.to(device) for tensor in next(data))
        logits = model(inputs_embeds=embed(model.get_input_embeddings(), x)).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_PREDICTED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == config.steps:
            curve.append({"step": step, "loss": round(float(torch.stack(losses).mean()), 4)})
            log.info("step %d of %d: loss %.4f", step, config.steps, curve[-1]["loss"])
            losses = []
    return curve
