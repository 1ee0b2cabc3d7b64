#!/usr/bin/env python3
"""What vLLM reads, adapts and takes for each step of a stream, beside the same texts from nothing: tokens, chunks adapted, milliseconds.

One stream after another of random encoder frames: `append` is a chunk, `partial` a text behind all of them, `final` a text with the last partial
as its draft. `partial from nothing` is the same request under names that vLLM has never seen: all of it is sent, adapted and read, as by an
engine that is asked anew for every text. `at_most` is what a step may read and write: a chunk its own speech tokens, a partial one block, since
vLLM finds whole ones only, its instruction and its text; `within` says whether each did. Needs vLLM, see docs/vllm.md.
"""

import argparse
import asyncio
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import torch
from common import SEED, parser_for, publish

import nim4.stage
from nim4.serve.vllm_client import EngineSettings, SpeechPrompt

SECONDS = (2.56, 5.12, 10.24, 20.48, 40.96)
CHUNK_S, CHUNK_FRAMES = 0.64, 16
MAX_NEW_TOKENS = 16  # of a partial
Measured = dict[tuple[float, str], list[dict[str, float]]]


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, required=True, help="model folder of stages 4 to 9")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the weights")
    return parser


async def step(engine: Any, found: list[dict[str, float]], work: Awaitable[Any]) -> Any:
    """The result of some work; what it cost is added to `found`."""
    before = await engine.client.counts()
    started_s = time.perf_counter()
    result = await work
    ms = 1000 * (time.perf_counter() - started_s)
    after = await engine.client.counts()
    done = {name: after.get(name, 0) - before.get(name, 0) for name in ("tokens", "adapted_items")}
    found.append({**done, "ms": ms})
    return result


async def measure(engine: Any, seconds: float, measured: Measured, generator: torch.Generator) -> None:
    """One stream of so many seconds."""
    prompt, client = engine.prompt, engine.client
    chunks = [torch.randn(CHUNK_FRAMES, engine.frame_dim, generator=generator) for _ in range(round(seconds / CHUNK_S))]
    stream = await engine.open()
    for number, chunk in enumerate(chunks[:-1]):
        await stream.append(chunk, number + 1)
    appends, partials = (measured.setdefault((seconds, name), []) for name in ("append", "partial"))
    await step(engine, appends, stream.append(chunks[-1], len(chunks)))
    appends[-1]["at_most"] = CHUNK_FRAMES // engine.stack
    text = await step(engine, partials, stream.partial())
    partials[-1]["at_most"] = engine.room.block_size + len(prompt.suffix(partial=True)) + len(text.ids)
    ids = [*prompt.prefix, *[client.speech_id] * len(chunks), *prompt.suffix(partial=True)]
    unknown = uuid.uuid4().hex
    request = SpeechPrompt(ids, chunks, [f"{unknown}-{number}" for number in range(len(chunks))], unknown)
    again = measured.setdefault((seconds, "partial from nothing"), [])
    await step(engine, again, client.answer(unknown, request, MAX_NEW_TOKENS, prompt.end))
    await step(engine, measured.setdefault((seconds, "final"), []), stream.final())


async def run(args: argparse.Namespace) -> tuple[Measured, int]:
    from nim4.serve.vllm_engine import VllmEngine  # here, since vLLM's processes import this file, and its worker must not have numba yet

    engine = await VllmEngine.start(args.model, EngineSettings(max_streams=8, precision=args.precision))
    try:
        measured: Measured = {}
        generator = torch.Generator().manual_seed(SEED)
        await measure(engine, SECONDS[0], {}, generator)  # memory and kernels are set up before the clock starts
        for _ in range(args.rounds):
            for seconds in SECONDS:
                await measure(engine, seconds, measured, generator)
        return measured, engine.room.block_size
    finally:
        await engine.close()


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """The table: medians of the rounds, but of chunks adapted the most."""
    rows = []
    for (seconds, name), found in measured.items():
        row = {"audio_s": seconds, "step": name, "tokens": statistics.median(x["tokens"] for x in found), "at_most": "-", "within": "-"}
        if "at_most" in found[0]:
            row["at_most"] = statistics.median(x["at_most"] for x in found)
            row["within"] = "yes" if all(x["tokens"] <= x["at_most"] for x in found) else "no"
        row |= {"chunks_adapted": max(x["adapted_items"] for x in found), "ms": statistics.median(x["ms"] for x in found)}
        pairs = list(zip(found, measured[seconds, "partial from nothing"], strict=True)) if name == "partial" else []
        for key in ("tokens", "ms"):
            row[f"{key}_to_nothing"] = statistics.median(a[key] / b[key] for a, b in pairs) if pairs else "-"
        rows.append(row)
    return rows


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    measured, block_size = asyncio.run(run(args))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = f"streams of random frames, model {args.model.name}; blocks of {block_size} tokens"
    publish(args, __doc__.split("\n")[0], size, rows_of(measured), device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
