#!/usr/bin/env python3
"""Whether a long stream stays as fast and as small as it began: one stream through the streaming recogniser, minute by minute.

Samples go in as a microphone gives them, 640 ms at a time: features, cached encoder (16 frames, 4 chunks of left context), phoneme head,
greedy search. Noise, and random weights unless --model names a folder. Each minute is the median of the rounds; the memory is what the
process holds at the end of the minute beyond the end of the first one, in the last round.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
import torch
from common import SEED, parser_for, publish

import nim4.stage
from nim4.config import ModelConfig, RecipeError, build, read_yaml
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.corpus.units import PhonemeInventory
from nim4.decode.ctc import StreamingCtc
from nim4.model.checkpoint import load_model, with_vocab_size
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel
from nim4.stage import ROOT

PUSH_SAMPLES = 10_240  # 640 ms, the deployed chunk
STATM = Path("/proc/self/statm")


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--model-config", type=Path, default=ROOT / "local/conf/model/mini.yaml", help="size of a model with random weights")
    parser.add_argument("--model", type=Path, help="model folder to use instead")
    parser.add_argument("--minutes", type=int, default=10, help="length of the stream")
    return parser


def resident_mb() -> float:
    """Memory of this process that is in RAM, in MB."""
    if not STATM.is_file():
        raise RecipeError(STATM, expected="Linux, which tells the memory of a process", found="another system", fix="run this benchmark on Linux")
    return int(STATM.read_text().split()[1]) * 4096 / 1e6


def run_stream(model: PhonemeModel, minutes: int) -> tuple[list[list[float]], list[float]]:
    """One stream: seconds of each chunk, minute by minute, and the resident memory in MB at the end of each minute."""
    rng = np.random.default_rng(SEED)
    stream = StreamingCtc(model, Context(16, 4))
    seconds: list[list[float]] = [[] for _ in range(minutes)]
    memory: list[float] = []
    for start in range(0, minutes * 60 * SAMPLING_RATE_HZ, PUSH_SAMPLES):
        minute = start // (60 * SAMPLING_RATE_HZ)
        if minute > len(memory):
            memory.append(resident_mb())
        samples = 0.1 * rng.standard_normal(PUSH_SAMPLES, dtype=np.float32)
        started_s = time.perf_counter()
        stream.accept(samples)
        seconds[minute].append(time.perf_counter() - started_s)
    return seconds, [*memory, resident_mb()]


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.minutes < 2 or args.rounds < 1:
        raise RecipeError("--minutes, --rounds", expected="at least 2, and at least 1", found=(args.minutes, args.rounds), fix="name larger numbers")
    if args.model:
        model, _ = load_model(args.model, torch.device("cpu"))
    else:
        torch.manual_seed(SEED)
        config = build(ModelConfig, read_yaml(args.model_config), str(args.model_config))
        model = PhonemeModel(with_vocab_size(config, PhonemeInventory.default())).eval()
    run_stream(model, 1)  # memory and kernels are set up before the clock starts
    rounds = []
    for number in range(args.rounds):
        rounds.append(run_stream(model, args.minutes))
        print(f"\rround {number + 1} of {args.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    middles = [[statistics.median(minute) for minute in seconds] for seconds, _ in rounds]  # per round and minute
    slowest = [[sorted(minute)[int(0.95 * len(minute))] for minute in seconds] for seconds, _ in rounds]
    memory = rounds[-1][1]
    rows = [
        {
            "minute": minute + 1,
            "chunk_ms": 1000 * statistics.median(middle[minute] for middle in middles),
            "chunk_p95_ms": 1000 * statistics.median(slow[minute] for slow in slowest),
            "time_to_first_minute": statistics.median(middle[minute] / middle[0] for middle in middles),
            "memory_grown_mb": memory[minute] - memory[0],
        }
        for minute in range(args.minutes)
    ]
    print(f"last minute : first minute {rows[-1]['time_to_first_minute']:.3f}, memory grown by {rows[-1]['memory_grown_mb']:.1f} MB\n")
    source = os.path.relpath(args.model, ROOT) if args.model else f"{args.model_config.stem} model"
    publish(args, __doc__.split("\n")[0], f"one stream of {args.minutes} min, noise; {source}", rows)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
