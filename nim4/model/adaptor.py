"""The adaptor: encoder frames at 25 Hz become embeddings of the language model at 6.25 Hz."""

import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import AdaptorConfig
from nim4.model.conformer import valid_mask


class SpeechAdaptor(nn.Module):
    """Stacks neighbouring frames and maps them through two linear layers (paper, section 3.1; width and SiLU are ours).

    Each embedding depends on its own `stack` frames alone, so a stream is adapted chunk by chunk with the same result.
    """

    def __init__(self, config: AdaptorConfig, encoder_dim: int, llm_dim: int):
        super().__init__()
        self.stack = config.stack
        self.norm = nn.LayerNorm(config.stack * encoder_dim)  # ours: the encoder changes scale while it trains, and is swapped
        self.up = nn.Linear(config.stack * encoder_dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, llm_dim)

    def lens(self, x_lens: Tensor) -> Tensor:
        """Embeddings of utterances with these numbers of encoder frames: ceil(x_lens / stack)."""
        return (x_lens + self.stack - 1).div(self.stack, rounding_mode="floor")

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Frames to embeddings.

        Args:
            x: (B, S, D) float, encoder frames; what lies beyond `x_lens` is ignored.
            x_lens: (B,) int64.
        Returns:
            (B, A, D_llm) float embeddings and (B,) int64 lengths. The tail is padded with zeros, never dropped: FireRedASR's
            adapter drops up to 3 frames, 120 ms of the last word.
        """
        assert x.ndim == 3, x.shape
        x = x.masked_fill(~valid_mask(x_lens, x.shape[1])[..., None], 0.0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stack))
        x = x.unflatten(1, (-1, self.stack)).flatten(2)
        return self.down(F.silu(self.up(self.norm(x)))), self.lens(x_lens)
