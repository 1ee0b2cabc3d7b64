"""Our features as a part of a graph: two matrix products and a logarithm, in operators that every runtime has."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.corpus.feats import SHIFT_SAMPLES, WINDOW_SAMPLES, Fbank

FLOOR = torch.finfo(torch.float32).eps  # of an energy, as everywhere in nim4/corpus/feats.py


class GraphFbank(nn.Module):
    """Frames of samples that need no more mirroring, equal to Fbank's to 1e-3.

    Ours: what is done to a window before its power is taken (mean removed, pre-emphasis, window, Fourier transform) is linear, so it is one matrix,
    made in float64 by asking what becomes of each sample alone.
    """

    def __init__(self) -> None:
        super().__init__()
        extractor = Fbank().lhotse.extractor.double()
        window, _ = extractor.wav2win._forward_strided(torch.eye(WINDOW_SAMPLES, dtype=torch.float64)[:, None])
        spectrum = torch.fft.rfft(window[:, 0])  # (400, bins), of a window that is zero but for one sample
        self.register_buffer("basis", torch.cat([spectrum.real, spectrum.imag], 1).t().float().contiguous()[:, None])
        self.register_buffer("mel", extractor._fb.detach().float())

    def forward(self, samples: Tensor) -> Tensor:
        """(B, N) float32 in [-1, 1] -> (B, (N - 240) // 160, 80)."""
        real, imaginary = F.conv1d(samples[:, None], self.basis, stride=SHIFT_SAMPLES).transpose(1, 2).chunk(2, dim=-1)
        return ((real.square() + imaginary.square()) @ self.mel).clamp(min=FLOOR).log()
