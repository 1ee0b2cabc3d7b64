"""Muon for the hidden weight matrices, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest matrix whose singular values are all about 1, so every
direction is learnt at the same speed; steps are then worth more, which counts where only few are affordable. Here a matrix is taken
in blocks of rows, an attention head's for example, each by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # of one entry, as AdamW's updates have it, so that both share a learning rate (Moonlight, arXiv 2502.16982)
BLOCK_ROWS = 64  # ours: the same error on egs/mini as whole matrices, for a quarter of the cost; other numbers of rows stay whole
ITERATIONS = 3  # ours: 5 are usual; 3 gave the same error on egs/mini
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that is iterated (Jordan et al.)


def orthogonalised(x: Tensor) -> Tensor:
    """Newton-Schulz iteration on (N, R, C) matrices: the same singular vectors, singular values near 1.

    In the precision of `x`; torch.optim.Muon iterates in bfloat16, which is several times slower on a CPU that cannot multiply it.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon` true, of matrices only, are stepped by Muon. Arguments as of AdamW."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        return super().step(closure)  # passes over parameters without a gradient

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            for parameter in parameters:
                if not self.state[parameter]:  # AdamW wants a `step` in every state it loads
                    self.state[parameter] = {"step": torch.zeros((), device=parameter.device), "momentum": torch.zeros_like(parameter)}
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            directions = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            blocks = directions.reshape(-1, BLOCK_ROWS, shape[1]) if shape[0] % BLOCK_ROWS == 0 else directions
            updates = orthogonalised(blocks).reshape(directions.shape)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * UPDATE_RMS * max(blocks.shape[1:]) ** 0.5)
            for parameter in parameters:
                parameter.grad = None
