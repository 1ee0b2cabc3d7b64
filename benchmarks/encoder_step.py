#!/usr/bin/env python3
"""Milliseconds of a chunk of the streaming encoder for many streams at once: as torch starts it, compiled block by block, and as a CUDA graph.

All of what a step of many streams does with the encoder counts (nim4/decode/encoder.py): features go to the GPU, caches are put together,
frames and the phoneme head's log-probabilities are made, the latter go back, and each stream has its caches. Random weights, 640 ms.
The floor is the reading of all weights and the reading and writing of the caches, over the bandwidth of a copy in the same run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import torch
from common import SEED, median_ratio, parser_for, publish, take_turns
from decode_speed import ceilings
from full_size import make_model

import nim4.stage
from nim4.config import RecipeError
from nim4.decode import encoder as encoder_module
from nim4.decode.encoder import Encode
from nim4.decode.streaming import DEPLOYED
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING
from nim4.model.ctc import PhonemeModel
from nim4.train.distributed import pick_device

EAGER, COMPILED, GRAPH = "eager", "compiled", "graph"


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="numbers of streams")
    parser.add_argument("--ways", nargs="+", choices=(EAGER, COMPILED, GRAPH), default=[EAGER, COMPILED, GRAPH], help="to measure")
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="of random weights: the paper's; ci: tiny, to see that it runs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; graphs need a GPU")
    return parser


def steps(model: PhonemeModel, chunks: Sequence[Encode], ways: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Name of the way -> a step of all chunks."""
    forward = encoder_module._encode_fast
    plain = [block.forward_chunk for block in model.encoder.blocks]
    compiled = [torch.compile(own, dynamic=False) for own in plain] if COMPILED in ways else plain

    def step(way: str) -> None:
        for block, own in zip(model.encoder.blocks, compiled if way == COMPILED else plain, strict=True):
            block.forward_chunk = own
        encoder_module._encode_fast = forward if way == GRAPH else encoder_module._encode
        try:
            with torch.inference_mode():
                Encode.together(chunks)
            if chunks[0].state.keys.is_cuda:
                torch.cuda.synchronize()
        finally:
            encoder_module._encode_fast = forward

    return {way: lambda way=way: step(way) for way in ways}


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if min(*args.batches, args.rounds) < 1 or max(args.batches) > encoder_module.BATCHES[-1]:
        expected = f"numbers from 1 to {encoder_module.BATCHES[-1]}"
        raise RecipeError("--batches, --rounds", expected=expected, found=(args.batches, args.rounds), fix="correct them")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(args.size, device).eval().acoustic
    for part in (model.encoder, model.head):
        part.to(dtype)
    bandwidth, _ = ceilings(device, dtype)
    generator, rows = torch.Generator().manual_seed(SEED), []
    num_features = SUBSAMPLING * DEPLOYED.chunk_frames + LOOKAHEAD_FRAMES
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for batch in args.batches:
        states = [model.encoder.initial_state(1, DEPLOYED) for _ in range(batch)]
        features = [torch.randn(num_features, 80, generator=generator) for _ in states]
        chunks = [
            Encode(model, *pair, DEPLOYED.chunk_frames, state) for *pair, state in zip(features, [DEPLOYED.chunk_frames] * batch, states, strict=True)
        ]
        ways = steps(model, chunks, args.ways)
        for run in ways.values():
            run()  # memory, kernels and graphs are set up before the clock starts
        seconds = take_turns(ways, args.rounds)
        cache_bytes = sum(part.numel() * part.element_size() for part in (states[0].keys, states[0].values, states[0].conv))
        floor_s = (weight_bytes + 2 * batch * cache_bytes) / bandwidth
        for way, own in seconds.items():
            line: dict[str, Any] = {
                "streams": batch,
                "way": way,
                "ms": 1000 * statistics.median(own),
                "ms_per_stream": 1000 * statistics.median(own) / batch,
            }
            line |= {"floor_ms": 1000 * floor_s, "time_to_first_way": median_ratio(own, seconds[args.ways[0]])}
            rows.append(line)
            print(line, file=sys.stderr, flush=True)
    about = f"chunks of 640 ms, 2.56 s of left context; random weights, {weight_bytes / 1e9:.2f} GB; a copy moves {bandwidth / 1e12:.2f} TB/s"
    publish(args, __doc__.split("\n")[0], about, rows, device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
