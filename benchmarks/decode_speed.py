#!/usr/bin/env python3
"""Milliseconds that the language model takes for the next token of each of many rows, beside the memory's floor and transformers' generate.

`ours` is what streams use: rows of one table that read one token each (nim4/model/rows.py), the choice of the next one and its way to Python
included. `generate` is transformers' own, greedy, with its default cache, on the same model and prompts; its time for a token is that of --tokens
more of them. The floor is what must be read for a token, all weights once and the keys and values of all rows, over the bandwidth of a
copy in the same run; or the products that it takes, over the rate of a large product, if that is more. `ids differ`: of the choices behind
every token of the prompts, those that are not the model's own in one plain pass; random weights, as they are, hardly prefer one id to another.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import torch
from common import SEED, median_ratio, parser_for, publish, take_turns
from full_size import make_model
from torch import nn

import nim4.stage
from nim4.config import RecipeError
from nim4.model.rows import Read, Rows
from nim4.train.distributed import pick_device

MAX_DIFFERENT = 0.15  # of the ids, which random weights hardly prefer; more are no rounding of bf16


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="numbers of rows")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="in each row beforehand")
    parser.add_argument("--tokens", type=int, default=32, help="written by each row")
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="of random weights: the paper's; ci: tiny, to see that it runs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The shortest of some runs."""
    seconds = []
    for _ in range(times):
        synchronise(device)
        started_s = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a copy, read and written; operations per second of a product."""
    count, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 512)
    generator = torch.Generator(device).manual_seed(SEED)
    source = torch.randn(count, device=device, generator=generator).to(dtype)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    copied = 2 * source.numel() * source.element_size() / best_seconds(lambda: target.copy_(source), device)
    return copied, 2 * side**3 / best_seconds(lambda: a @ a, device)


def written_by_rows(rows: Rows, prompts: list[list[int]], num_tokens: int) -> Callable[[], None]:
    """Writes so many tokens behind each prompt, and forgets them."""
    held = [rows.new() for _ in prompts]
    ids = [best[0] for best in rows.read([Read(rows, row, prompt, 1) for row, prompt in zip(held, prompts, strict=True)])]

    def run() -> None:
        last = ids
        for _ in range(num_tokens):
            last = [best[0] for best in rows.read([Read(rows, row, [token], 1) for row, token in zip(held, last, strict=True)])]
        for row in held:
            row.drop(num_tokens)

    return run


def written_by_generate(llm: nn.Module, prompts: torch.Tensor, num_tokens: int) -> Callable[[], None]:
    mask = torch.ones_like(prompts)

    def run() -> None:
        with torch.inference_mode():
            length = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
            llm.generate(prompts, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0, **length)
        synchronise(prompts.device)

    return run


@torch.inference_mode()
def ids_that_differ(llm: nn.Module, rows: Rows, prefix: list[int], prompts: list[list[int]]) -> tuple[int, int]:
    """How many of the ids that rows choose behind every token of their prompts are not the model's choice in a pass of its own; and of how many."""
    reads = [Read(rows, rows.new(), prompt, len(prompt)) for prompt in prompts]
    ours = torch.tensor(rows.read(reads))
    whole = torch.tensor([prefix + prompt for prompt in prompts], device=llm.get_input_embeddings().weight.device)
    own = llm.lm_head(llm.model(input_ids=whole, use_cache=False).last_hidden_state[:, len(prefix) :]).argmax(-1).cpu()
    return int((ours != own).sum()), own.numel()


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if min(*args.batches, args.prompt_tokens, args.tokens, args.rounds) < 1:
        found = (args.batches, args.prompt_tokens, args.tokens, args.rounds)
        raise RecipeError("--batches, --prompt-tokens, --tokens, --rounds", expected="numbers above 0", found=found, fix="correct them")
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(args.size, device).eval().to(dtype)
    llm, prefix = model.llm, model.prompt.prefix
    bandwidth, rate = ceilings(device, dtype)
    rows = Rows(llm, prefix)
    rows.reserve(max(args.batches) + 2, len(prefix) + args.prompt_tokens + args.tokens)
    rows.record()
    config, size = llm.config, torch.finfo(dtype).bits // 8
    num_weights = sum(parameter.numel() for parameter in llm.parameters())
    num_kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers of a token in the table
    generator = torch.Generator().manual_seed(SEED)
    lines: list[dict[str, Any]] = []
    for batch in args.batches:
        prompts = torch.randint(0, config.vocab_size, (batch, args.prompt_tokens), generator=generator)
        differ, of = ids_that_differ(llm, rows, prefix, prompts[:4].tolist())
        if differ > MAX_DIFFERENT * of:
            raise RuntimeError(f"{differ} of {of} ids are not the model's own choice")
        whole = torch.cat([torch.tensor(prefix).expand(batch, -1), prompts], 1).to(device)
        runs = {
            "ours": written_by_rows(rows, prompts.tolist(), args.tokens),
            "generate": written_by_generate(llm, whole, args.tokens + 1),
            "generate, 1 token": written_by_generate(llm, whole, 1),
        }
        for run in runs.values():
            run()
        seconds = take_turns(runs, args.rounds)
        times = {
            "ours": seconds["ours"],
            "generate": [a - b for a, b in zip(seconds["generate"], seconds["generate, 1 token"], strict=True)],
        }
        num_read = num_weights + batch * (whole.shape[1] + args.tokens / 2) * num_kept
        floor_s = max(num_read * size / bandwidth, 2 * batch * num_weights / rate)
        for way, own in times.items():
            step_s = statistics.median(own) / args.tokens
            lines.append(
                {
                    "rows": batch,
                    "way": way,
                    "ms_per_token": 1000 * step_s,
                    "tokens_per_s": batch / step_s,
                    "floor_ms": 1000 * floor_s,
                    "floor_percent": 100 * floor_s / step_s,
                    "time_to_generate": median_ratio(own, times["generate"]),
                    "ids_differ": f"{differ} of {of}" if way == "ours" else "-",
                }
            )
            print(lines[-1], file=sys.stderr, flush=True)
    about = f"prompts of {whole.shape[1]} ids, {args.tokens} written; random weights, {num_weights / 1e6:.1f} M, {str(dtype).removeprefix('torch.')}"
    about += f"; a copy moves {bandwidth / 1e12:.2f} TB/s, a product does {rate / 1e12:.0f} TFLOP/s"
    publish(args, __doc__.split("\n")[0], about, lines, device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
