#!/usr/bin/env python3
"""Trains the language model of egs/mini, which is kept in egs/mini/llm: Qwen3 in shape, of a few million parameters, with its own tokenizer.

    python egs/mini/train_llm.py                                    # as it was made: minutes on a GPU, most of an hour on two CPU cores
    python egs/mini/train_llm.py --out exp/trial --set steps=50     # a trial

The text is made first (egs/mini/llm_text.py), then the tokenizer, then the model (llm_network.py, llm_training.py), in --work; what is there already
and was made with the same settings is kept. The product is measured against an n-gram on texts it has not seen, and written to --out
with a README.md that says all this in numbers.
"""

import argparse
import dataclasses
import logging
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # so that it also runs alone
sys.path.insert(0, str(Path(__file__).resolve().parent))
import llm_card
import llm_measure
import llm_text
from llm_network import MiniLlmConfig, build_model
from llm_tokens import Encoder, train_tokenizer
from llm_training import batches, train

import nim4.stage
from nim4.config import RecipeError, apply_overrides, build
from nim4.corpus.ngram import KneserNey

log = logging.getLogger("nim4")
HERE = Path(__file__).resolve().parent
INPUTS = ["grammar.txt", "words.txt", *(f"audio/{name}.tsv" for name in ("dspspeech20", "aishell1_s0150", "an4"))]
NGRAM_ORDERS = range(2, 7)
NUM_HELD_OUT, HELD_OUT_SEED = 500, 2  # texts of each kind


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "llm", help="folder of the product (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("exp/mini/llm"), help="folder of the training (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of MiniLlmConfig in llm_network.py")
    return parser


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
