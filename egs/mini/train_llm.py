#!/usr/bin/env python3
"""Trains the language model of egs/mini, which is kept in egs/mini/llm: Qwen3 in shape, of a few million parameters, with its own tokenizer.

    python egs/mini/train_llm.py                                    # as it was made: minutes on a GPU, most of an hour on two CPU cores
    python egs/mini/train_llm.py --out exp/trial --set steps=50     # a trial

The text is made first (egs/mini/llm_text.py), then the tokenizer, then the model, in --work; what is there already and was made with the same
settings is kept. The product is measured against an n-gram (egs/mini/llm_ngram.py) on texts it has not seen, and written to --out with a README.md
that says all this in numbers.
Loss is on answers and on plain documents. Everything else of a prompt is given whenever the model is used: the prefix and the instructions never
vary, and hints are drawn at random, so that predicting them would only cost capacity.
"""

import argparse
import dataclasses
import logging
import math
import platform
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # so that it also runs alone
sys.path.insert(0, str(Path(__file__).resolve().parent))
import llm_card
import llm_measure
import llm_text
from llm_ngram import KneserNey
from llm_tokens import NOT_PREDICTED, Encoder, collate, embed, train_tokenizer

import nim4.stage
from nim4.config import RecipeError, apply_overrides, build

log = logging.getLogger("nim4")
HERE = Path(__file__).resolve().parent
INPUTS = ["grammar.txt", "words.txt", *(f"audio/{name}.tsv" for name in ("dspspeech20", "aishell1_s0150", "an4"))]
NGRAM_ORDERS = range(2, 7)
NUM_HELD_OUT, HELD_OUT_SEED = 500, 2  # texts of each kind


@dataclass(frozen=True)
class MiniLlmConfig:
    """Everything that decides the weights; ours throughout, the paper's LLM is Qwen3-1.7B."""

    num_grammar: int = 16_000  # phrases drawn from the grammar; it has 16,782 different ones, most of them rare
    num_joins: int = 6_000  # random joins: there a language model has nothing to know, and should know that
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
    steps: int = 4_000
    batch: int = 128  # documents
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "llm", help="folder of the product (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("exp/mini/llm"), help="folder of the training (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of MiniLlmConfig in this file")
    return parser


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
            pool.append(encode(llm_text.draw_example(text, texts, rng, **shares)))
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


def make_model(config: MiniLlmConfig, texts: Sequence[str], out: nim4.stage.StageOutput, device: str) -> None:
    """Tokenizer and trained weights in `out`, in Hugging Face layout, with the losses in done.json."""
    folder = out.begin()
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = build_model(config, tokenizer)
    log.info("%d texts, %d tokens in the vocabulary, %d parameters, on %s", len(texts), len(tokenizer), model.num_parameters(), device)
    curve = train(model, batches(texts, Encoder(tokenizer), config), config, device)
    tokenizer.save_pretrained(folder)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    out.finish(loss=curve, hardware=hardware(device))


def hardware(device: str) -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def write_product(work: Path, out: Path, config: MiniLlmConfig, settings: Sequence[str]) -> None:
    """The trained model of `work`, measured, as the folder `out` with record.json and README.md."""
    tokenizer = AutoTokenizer.from_pretrained(work)
    model = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval()  # the weights are bf16, as shipped; the sums are not
    encode = Encoder(tokenizer)
    texts = llm_text.training_texts(config.num_grammar, config.num_joins, config.seed)
    held_out = llm_text.held_out_texts(texts, NUM_HELD_OUT, HELD_OUT_SEED)
    ngrams = [KneserNey([encode.text(text) for text in texts], order, len(tokenizer)) for order in NGRAM_ORDERS]
    record = {
        "command": shlex.join(["python", "egs/mini/train_llm.py", *(["--set", *settings] if settings else [])]),
        "settings": dataclasses.asdict(config),
        "training": {key: value for key, value in nim4.stage.read_json(work / "done.json").items() if key != "made_from"},
        "measured": {"commit": nim4.stage.git_commit(), "hardware": hardware("cpu")},
        "text": llm_text.facts(texts),
        "model": llm_measure.facts(model, tokenizer, encode),
        "held_out": llm_measure.perplexities(model, encode, ngrams, held_out),
    }
    partial = out.with_name(out.name + ".tmp")
    if partial.exists():
        shutil.rmtree(partial)
    tokenizer.save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False).save_pretrained(partial)
    record["model"]["bytes"] = sum(path.stat().st_size for path in partial.iterdir())
    nim4.stage.write_json(partial / "record.json", record)
    (partial / "README.md").write_text(llm_card.card(record), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    log.info("%s: written, %.1f MB", out, record["model"]["bytes"] / 1e6)


def main() -> None:
    options = build_parser().parse_args()
    config = build(MiniLlmConfig, apply_overrides({}, options.set), "--set")
    if options.device not in ("auto", "cpu", "cuda"):
        raise RecipeError("--device", expected="auto, cpu or cuda", found=options.device, fix="correct it")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    made_of = {name: nim4.stage.file_hash(HERE / name) for name in INPUTS}
    trained = nim4.stage.StageOutput(options.work, config=dataclasses.asdict(config) | {"inputs": made_of})
    if not trained.is_done():
        make_model(config, llm_text.training_texts(config.num_grammar, config.num_joins, config.seed), trained, device)
    write_product(options.work, options.out, config, options.set)


if __name__ == "__main__":
    nim4.stage.run(main, "llm")
