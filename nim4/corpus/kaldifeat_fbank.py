"""The features of `Fbank` by kaldifeat, many recordings at once, on a GPU if there is one. The only door to kaldifeat, which is optional.

Stage 1 does without it: there, reading and compressing take longer than the features.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from nim4.config import RecipeError
from nim4.corpus.feats import FRAME_SHIFT_S, NUM_MEL_BINS, SAMPLING_RATE_HZ, WINDOW_SAMPLES, checked_samples, mirrored, num_frames

INSTALL = "python -m pip install --no-build-isolation git+https://github.com/csukuangfj/kaldifeat"


class KaldifeatFbank:
    """Equal to `Fbank` to 1e-3 (mean 1e-5), for a batch.

    Raises:
        RecipeError: if kaldifeat is not installed, or was built for another torch.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        library = _load_kaldifeat()
        self.device = torch.device(device)
        options = library.FbankOptions()
        options.device = self.device
        options.frame_opts.samp_freq = SAMPLING_RATE_HZ
        options.frame_opts.frame_length_ms = 1000 * WINDOW_SAMPLES / SAMPLING_RATE_HZ
        options.frame_opts.frame_shift_ms = 1000 * FRAME_SHIFT_S
        options.frame_opts.dither = 0.0
        options.frame_opts.window_type = "povey"
        options.frame_opts.snip_edges = True  # the edges are mirrored here, as `Fbank` does it for any length
        options.mel_opts.num_bins = NUM_MEL_BINS
        options.mel_opts.low_freq = 20.0
        options.mel_opts.high_freq = -400.0
        self._fbank = library.Fbank(options)

    def extract(self, recordings: Sequence[np.ndarray | Tensor], sampling_rate_hz: int = SAMPLING_RATE_HZ) -> list[Tensor]:
        """Log-Mel frames of recordings of any lengths.

        Args:
            recordings: (N,) float32 in [-1, 1] each; N may be 0.
        Returns:
            a (T, 80) float32 tensor on the device for each, T = (N + 80) // 160.
        Raises:
            ValueError: if samples are of another rate, shape, type or scale.
        """
        checked = [checked_samples(samples, sampling_rate_hz) for samples in recordings]
        spoken = [mirrored(samples).to(self.device) for samples in checked if num_frames(samples.numel())]
        frames = iter(self._fbank(spoken) if spoken else [])
        return [next(frames) if num_frames(samples.numel()) else torch.zeros(0, NUM_MEL_BINS, device=self.device) for samples in checked]


def _load_kaldifeat() -> ModuleType:
    spec = importlib.util.find_spec("kaldifeat")
    if spec is None:
        raise RecipeError("kaldifeat", expected="it to be installed", found="no such package", fix=INSTALL)
    path, torch_version = Path(spec.origin or "").parent / "torch_version.py", torch.__version__.partition("+")[0]
    built_for = re.search(r'^kaldifeat_torch_version = "([^"+]+)', path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    if built_for and built_for[1] != torch_version:
        raise RecipeError(
            "kaldifeat", expected=f"one built for the installed torch {torch_version}", found=f"one for torch {built_for[1]}", fix=INSTALL
        )
    try:
        import kaldifeat
    except (ImportError, OSError) as error:
        found = " ".join(str(error).split())[:200]
        raise RecipeError("kaldifeat", expected=f"one that can be imported with torch {torch_version}", found=found, fix=INSTALL) from error
    return kaldifeat
