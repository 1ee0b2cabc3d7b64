#!/usr/bin/env python3
"""What a recording of hours costs: `python -m nim4 transcribe` of clips of a manifest, joined with pauses, in a process of its own.

The clips are drawn with a fixed seed, the pauses last 0.3 to 2 s. Memory is looked at every half second; the table has its median in each quarter
of the time, the reading of the file included, and the peak. It ends with exit code 2 unless the program ends well and has heard all of it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
import soundfile
from common import SEED, parser_for, publish

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, read_samples
from nim4.corpus.manifest import load_cuts
from nim4.stage import ROOT

PAUSES_S = (0.3, 2.0)
PROC = Path("/proc")
EVERY_S = 0.5


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=None)
    parser.add_argument("--model", type=Path, default=ROOT / "exp/mini/base/9_phoneme_head", help="model folder of stages 4 to 9")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/mini/manifests/test_grammar.jsonl.gz", help="what is said")
    parser.add_argument("--hours", type=float, default=3.0, help="length of the recording, at least")
    return parser


def write_recording(manifest: Path, hours: float, path: Path) -> float:
    """A FLAC file of clips and pauses; returns its seconds."""
    rng, clips, written = random.Random(SEED), [read_samples(cut) for cut in load_cuts(manifest)], 0
    with soundfile.SoundFile(path, "w", SAMPLING_RATE_HZ, 1, "PCM_16", format="FLAC") as file:
        while written < hours * 3600 * SAMPLING_RATE_HZ:
            pause = np.zeros(round(rng.uniform(*PAUSES_S) * SAMPLING_RATE_HZ), np.float32)
            for part in (rng.choice(clips), pause):
                file.write(part)
                written += len(part)
    return written / SAMPLING_RATE_HZ


def transcribe(model: Path, path: Path, threads: int) -> tuple[int, float, list[float], str]:
    """Exit code, seconds, memory in MB every EVERY_S, and what was printed."""
    if not PROC.is_dir():
        raise RecipeError(PROC, expected="Linux, which tells the memory of a process", found="another system", fix="run this benchmark on Linux")
    command = [sys.executable, "-m", "nim4", "transcribe", str(path), "--model", str(model), "--device", "cpu"]
    memory, started_s = [], time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=out)
        while process.poll() is None:
            fields = (PROC / str(process.pid) / "statm").read_text().split()
            memory.append(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if fields else 0.0)
            time.sleep(EVERY_S)
        out.seek(0)
        return process.returncode, time.monotonic() - started_s, memory, out.read()


def main() -> None:
    args = build_parser().parse_args()
    if args.hours <= 0:
        raise RecipeError("--hours", expected="a number above 0", found=args.hours, fix="correct it")
    with tempfile.TemporaryDirectory(prefix="nim4-") as folder:
        audio_s = write_recording(args.manifest, args.hours, Path(folder, "long.flac"))
        code, seconds, memory, printed = transcribe(args.model, Path(folder, "long.flac"), args.threads)
    row = json.loads(printed) if code == 0 else {"audio_s": 0.0, "segments": []}
    quarters = [statistics.median(part.tolist()) for part in np.array_split(memory, 4)]
    values = {"exit_code": code, "audio_s": row["audio_s"], "segments": len(row["segments"])}
    values |= {"seconds": seconds, "real_time_factor": seconds / audio_s}
    values |= {f"memory_quarter_{number}_mb": mb for number, mb in enumerate(quarters, 1)} | {"memory_peak_mb": max(memory)}
    rows = [{"measure": name.replace("_", " "), "value": value} for name, value in values.items()]
    publish(args, __doc__.split("\n")[0], f"{audio_s / 3600:.2g} h of clips and pauses; {os.path.relpath(args.model, ROOT)}", rows)
    if abs(row["audio_s"] - audio_s) > 0.01:
        raise RecipeError("nim4 transcribe", expected=f"{audio_s:.3f} s of audio, exit code 0", found=f"{row['audio_s']} s, {code}", fix="see above")


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
