"""Positions of the Conformer as Transformer-XL has them: a score for how far two frames are apart, with weights of its own.

Source: arXiv 1901.02860, section 3.3, without its limit to the past; FireRedASR-AED's encoder (arXiv 2501.14350) has them, and its weights
load into these (nim4/published/firered.py). Whoever has no such weights takes rotary positions, which need no scores beside the attention's own.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import ConformerConfig


class Distances(NamedTuple):
    """Sinusoids of all distances between S_q frames and S_k frames that end together, the same in all blocks.

    Attributes:
        sinusoids: (S_q + S_k - 1, D) float32, sines and cosines in turn, from the largest distance to the past to the largest to the future.
    """

    sinusoids: Tensor

    @classmethod
    def of(cls, num_queries: int, num_keys: int, dim: int, device: torch.device) -> "Distances":
        """Queries stand on the last positions of the keys."""
        distance = torch.arange(num_keys - 1, -num_queries, -1, device=device, dtype=torch.float32)
        frequencies = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
        angles = distance[:, None] * frequencies
        return cls(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))


class RelativeScores(nn.Module):
    """What positions add to a query's scores: one part for what it is, one for where the key is from there."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        shape = config.num_heads, config.dim // config.num_heads
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.content_bias = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        self.position_bias = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def forward(self, query: Tensor, distances: Distances, mask: Tensor) -> tuple[Tensor, Tensor]:
        """For scaled-dot-product attention: the query to use, and what is added to its scores.

        Args:
            query: (B, H, S_q, D/H).
            mask: bool, broadcastable to (B, 1, S_q, S_k), True = may attend.
        Returns:
            (B, H, S_q, D/H), and (B, H, S_q, S_k), -inf where the mask is False.
        """
        num_queries, num_distances = query.shape[2], len(distances.sinusoids)
        positions = self.project(distances.sinusoids.to(query.dtype)).unflatten(-1, self.content_bias.shape)  # (S_q + S_k - 1, H, D/H)
        scores = (query + self.position_bias[:, None]) @ positions.permute(1, 2, 0) * query.shape[-1] ** -0.5
        # Row i wants the distances from S_q - 1 - i on: with a column more each row begins one place later in memory.
        scores = F.pad(scores, (1, 0)).flatten(2)[..., num_queries:].unflatten(2, (num_queries, num_distances))
        scores = scores[..., : num_distances - num_queries + 1]
        return query + self.content_bias[:, None], scores.masked_fill(~mask, -math.inf)
