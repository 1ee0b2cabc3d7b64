#!/usr/bin/env python3
"""Speed of the features: hours of audio per second, ours beside lhotse, kaldi-native-fbank and, where it is installed, kaldifeat, in one run.

The ways take turns on the same audio, in rounds, and each round begins with another way; the table gives the median of the rounds and
the ratio to ours. Audio is noise of 2 to 15 s (seed 0), or the files below --wav. Before timing, every way must agree with ours.
"""

import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import lhotse
import numpy as np
import soundfile
import torch
from common import SEED, median_ratio, parser_for, publish, take_turns

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, Fbank, KaldiFbank, StreamingFbank
from nim4.corpus.kaldifeat_fbank import KaldifeatFbank

PUSH_SAMPLES = 10_240  # 640 ms, the deployed chunk
BATCH = 16

Way = Callable[[list[np.ndarray]], list[np.ndarray]]


def build_parser():
    parser = parser_for(__doc__, rounds=7)
    parser.add_argument("--minutes", type=float, default=10.0, help="audio per round, in minutes")
    parser.add_argument("--wav", type=Path, help="folder with 16 kHz audio files to use instead of noise")
    return parser


def read_audio(folder: Path | None, minutes: float) -> list[np.ndarray]:
    """(N,) float32 signals, `minutes` long in all."""
    rng = np.random.default_rng(SEED)
    files = iter(sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac", ".opus")) if folder else [])
    signals, left = [], round(minutes * 60 * SAMPLING_RATE_HZ)
    while left > 0:
        if folder is None:
            signal = 0.1 * rng.standard_normal(rng.integers(2 * SAMPLING_RATE_HZ, 15 * SAMPLING_RATE_HZ), dtype=np.float32)
        elif (path := next(files, None)) is not None:
            signal, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
            if rate_hz != SAMPLING_RATE_HZ:
                raise RecipeError(path, expected=f"{SAMPLING_RATE_HZ} Hz", found=f"{rate_hz} Hz", fix="give a folder of 16 kHz audio")
            signal = np.ascontiguousarray(signal[:, 0])
        else:
            break
        signals.append(signal[:left])
        left -= len(signal)
    if not signals:
        raise RecipeError(folder or "--minutes", expected="some audio", found="none", fix="correct --wav or --minutes")
    return signals


def ways() -> dict[str, Way]:
    """Name -> a function from signals to frames. The first is ours, as stage 1 uses it."""
    ours, kaldi = Fbank(), KaldiFbank()
    theirs = lhotse.Fbank(lhotse.FbankConfig(sampling_rate=SAMPLING_RATE_HZ, num_filters=80))

    def streaming(signals: list[np.ndarray]) -> list[np.ndarray]:
        frames = []
        for signal in signals:
            stream = StreamingFbank(ours)
            pushes = [stream.accept(signal[start : start + PUSH_SAMPLES]) for start in range(0, len(signal), PUSH_SAMPLES)]
            frames.append(torch.cat([*pushes, stream.finish()]).numpy())
        return frames

    def batches(signals: list[np.ndarray]) -> list[np.ndarray]:
        frames = []
        for start in range(0, len(signals), BATCH):
            frames += list(theirs.extract_batch(signals[start : start + BATCH], SAMPLING_RATE_HZ))
        return frames

    found = {
        "ours, one by one (stage 1)": lambda signals: [ours.extract(signal) for signal in signals],
        "ours, streaming 640 ms": streaming,
        "lhotse, one by one": lambda signals: [theirs.extract(signal, SAMPLING_RATE_HZ) for signal in signals],
        f"lhotse, padded batches of {BATCH}": batches,
        "kaldi-native-fbank, offline": lambda signals: [kaldi.extract(signal) for signal in signals],
        "kaldi-native-fbank, streaming 640 ms": lambda signals: [kaldi.extract(signal, PUSH_SAMPLES) for signal in signals],
    }
    if importlib.util.find_spec("kaldifeat"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        theirs_too = KaldifeatFbank(device)
        found[f"kaldifeat on {device}, {BATCH} at a time"] = lambda signals: [
            frames.cpu().numpy() for start in range(0, len(signals), BATCH) for frames in theirs_too.extract(signals[start : start + BATCH])
        ]
    return found


def differences(functions: dict[str, Way], signals: list[np.ndarray]) -> dict[str, float]:
    """Largest difference of each way's frames from ours; ends the program when one computes something else."""
    expected = next(iter(functions.values()))(signals)
    largest = {}
    for name, function in functions.items():
        found = function(signals)
        # padded batches mirror the end of the padding rather than that of the signal: the last two frames are compared by no one
        pairs = [(a[: len(b) - 2], b[:-2]) if "batches" in name else (a, b) for a, b in zip(found, expected, strict=True)]
        largest[name] = max(float(np.abs(a - b).max()) for a, b in pairs)
        if largest[name] > 1e-2:
            raise RecipeError(name, expected="the frames of ours", found=f"a difference of {largest[name]:.2g}", fix="compare the settings")
    return largest


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    signals = read_audio(args.wav, args.minutes)
    hours = sum(map(len, signals)) / SAMPLING_RATE_HZ / 3600
    functions = ways()
    largest = differences(functions, signals[:32])
    seconds = take_turns({name: partial(function, signals) for name, function in functions.items()}, args.rounds)
    first = seconds[next(iter(functions))]
    rows = [
        {
            "way": name,
            "audio_h_per_s": hours / statistics.median(times),
            "speed_to_ours": median_ratio(first, times),
            "largest_difference": largest[name],
        }
        for name, times in seconds.items()
    ]
    source = f"files of {os.path.relpath(args.wav, nim4.stage.ROOT)}" if args.wav else "noise"
    publish(args, __doc__.split("\n")[0], f"{len(signals)} signals, {hours * 60:.1f} min, {source}", rows)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
