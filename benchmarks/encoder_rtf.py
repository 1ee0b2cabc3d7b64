#!/usr/bin/env python3
"""Real-time factor of the streaming encoder for each chunk size, beside the offline pass over the same features.

RTF is seconds of computing per second of audio, the audio of all streams of a batch added up. Features are made beforehand, weights are
random, and a stream keeps as many chunks of left context as --left-chunks says, with caches of that size from its first chunk on.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import torch
from common import SEED, median_ratio, parser_for, publish, take_turns
from torch import Tensor

import nim4.stage
from nim4.config import ConformerConfig, RecipeError, build, read_yaml
from nim4.model.checkpoint import count_parameters
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Conformer, Context
from nim4.stage import ROOT
from nim4.train.distributed import pick_device

CHUNKS = (4, 8, 16, 24, 32)  # encoder frames of 40 ms
BATCHES = (1, 16)
WHOLE_CHUNKS = 96  # encoder frames that every chunk size divides


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    models = [ROOT / f"local/conf/model/{name}.yaml" for name in ("mini", "base")]
    parser.add_argument("--model-config", type=Path, nargs="+", default=models, help="sizes of the encoder")
    parser.add_argument("--seconds", type=float, default=7.68, help="length of each stream, in multiples of 3.84 s")
    parser.add_argument("--left-chunks", type=int, default=4, help="chunks of left context")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    return parser


def read_encoder(path: Path) -> Conformer:
    """The encoder of a model config, with random weights."""
    torch.manual_seed(SEED)
    return Conformer(build(ConformerConfig, read_yaml(path).get("encoder", {}), str(path))).eval()


def ways(encoder: Conformer, x: Tensor, left_chunks: int) -> dict[str, Callable[[], object]]:
    """Name of the pass -> the pass over `x` (B, T, 80)."""
    lens = torch.full((len(x),), x.shape[1], device=x.device)
    ahead = torch.nn.functional.pad(x, (0, 0, 0, LOOKAHEAD_FRAMES))

    def synchronised(run: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            with torch.inference_mode():
                run()
            if x.device.type == "cuda":
                torch.cuda.synchronize()

        return timed

    def stream(chunk_frames: int) -> None:
        state, step = encoder.initial_state(len(x), Context(chunk_frames, left_chunks)), SUBSAMPLING * chunk_frames
        for start in range(0, x.shape[1], step):
            _, state = encoder.forward_chunk(ahead[:, start : start + step + LOOKAHEAD_FRAMES], state)

    passes = {"offline": synchronised(lambda: encoder(x, lens))}
    for chunk_frames in CHUNKS:
        passes[f"chunk {chunk_frames} ({40 * chunk_frames} ms)"] = synchronised(lambda chunk_frames=chunk_frames: stream(chunk_frames))
    return passes


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    num_frames = round(args.seconds * 25 / WHOLE_CHUNKS) * WHOLE_CHUNKS
    if num_frames == 0:
        raise RecipeError("--seconds", expected="at least 3.84", found=args.seconds, fix="name a larger number")
    audio_s = num_frames / 25
    rows, sizes = [], []
    for path in args.model_config:
        encoder = read_encoder(path).to(device)
        sizes.append(f"{path.stem} encoder {count_parameters(encoder.parameters())}")
        for batch in BATCHES:
            generator = torch.Generator().manual_seed(SEED)
            x = torch.randn(batch, SUBSAMPLING * num_frames, encoder.config.num_mel_bins, generator=generator).to(device)
            passes = ways(encoder, x, args.left_chunks)
            for run in passes.values() if device.type == "cuda" else (passes["offline"],):
                run()  # memory and kernels are set up before the clock starts
            seconds = take_turns(passes, args.rounds)
            for (name, times), chunk_frames in zip(seconds.items(), (num_frames, *CHUNKS), strict=True):
                middle_s = statistics.median(times)
                rows.append(
                    {
                        "model": path.stem,
                        "streams": batch,
                        "pass": name,
                        "rtf": middle_s / (batch * audio_s),
                        "ms_per_call": 1000 * middle_s * chunk_frames / num_frames,
                        "cost_to_offline": median_ratio(times, seconds["offline"]),
                    }
                )
    data = f"streams of {audio_s:.2f} s, random features; {', '.join(sizes)}; left context {args.left_chunks} chunks"
    publish(args, __doc__.split("\n")[0], data, rows, device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
