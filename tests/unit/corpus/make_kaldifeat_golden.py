"""Writes kaldifeat_golden.safetensors, what kaldifeat makes of a signal, so that tests can compare with it where there is no kaldifeat:

    python tests/unit/corpus/make_kaldifeat_golden.py

It was made with kaldifeat 1.24, built from its source for torch 2.13.0, on a CPU.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that it also runs alone
from nim4.corpus.kaldifeat_fbank import KaldifeatFbank

GOLDEN = Path(__file__).with_name("kaldifeat_golden.safetensors")


def main():
    rng = np.random.default_rng(5)
    samples = 0.1 * np.clip(np.sin(np.arange(6000) / 500), 0, None) ** 2 * rng.standard_normal(6000)
    samples = torch.from_numpy(np.round(samples * 32768).clip(-32768, 32767).astype(np.int16))
    (frames,) = KaldifeatFbank().extract([samples.float() / 32768])
    save_file({"samples": samples, "frames": frames}, GOLDEN)


if __name__ == "__main__":
    main()
