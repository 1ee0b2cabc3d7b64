"""ScaledAdam: Adam whose step is a share of each parameter's size, and which learns that size (arXiv 2310.11230, section 3.5).

A parameter of twice the size moves twice as far, so what a rate means does not depend on how large a layer happens to be; rates are
far above Adam's (0.045 with the Eden schedule in the paper). The size itself, the root mean square, has a step of its own, ten times
smaller, and bounds.

As in icefall's training of Zipformer, and beyond the paper's formulas: the sizes are updated every 4 steps; the average of the first
moment is taken over steps, not over gradients, without a correction for its start; and gradients larger than twice the median of the
last 100 steps are scaled down. Same numbers as icefall's optimiser, in our own code.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
SCALAR_RATE = 0.1  # rate of sizes, and of parameters with one entry, relative to the others'
MIN_RMS, MAX_RMS = 1e-5, 3.0  # of a parameter
MAX_SCALAR = 10.0  # of a parameter with one entry, in size
MAX_SIZE_STEP = 0.1  # relative change of a size at once
SIZE_PERIOD = 4  # steps between two updates of the sizes
NORM_PERIOD = 100  # steps over which the median of the gradient's norm is taken ...
EARLY_MEDIANS = (10, 20, 40)  # ... but at first after so many, with twice the limit, since norms then change fast
CLIPPING = 2.0  # limit of the norm, in medians


class ScaledAdam(torch.optim.Optimizer):
    """See the module. A missing gradient counts as zeros; gradients must be finite.

    Args:
        params: parameters, or groups of them; each group is clipped by itself.
        lr: peak rate.
        betas: of the first and the second moment.
        clipping: limit of the norm, in medians; None = gradients stay as they are.

    Parameters of one shape are stacked, and so is their state, which is kept with the first of them.
    """

    def __init__(self, params: Iterable, lr: float = 0.045, betas: tuple[float, float] = (0.9, 0.98), clipping: float | None = CLIPPING):
        super().__init__(params, {"lr": lr, "betas": betas, "clipping": clipping, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault((parameter.dtype, parameter.shape), []).append(parameter)
        stacks = []
        for parameters in by_shape.values():
            gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
            values, state = _stacked(parameters), self.state[parameters[0]]
            if not state:
                state.update(_new_state(values))
            stacks.append((values, _stacked(gradients), state))
        scale = self._clip(group, stacks)
        for parameters, (values, gradients, state) in zip(by_shape.values(), stacks, strict=True):
            values += _update(values, gradients if scale is None else gradients * scale, state, group)
            if values.shape[1] == 1:
                values.clamp_(-MAX_SCALAR, MAX_SCALAR)
            torch._foreach_copy_(parameters, [row.view_as(parameter) for row, parameter in zip(values, parameters, strict=True)])
        group["step"] += 1

    def _clip(self, group: dict[str, Any], stacks: list[tuple]) -> Tensor | None:
        """What gradients are multiplied by, () at most 1; None = 1. The norm counts every parameter in its own size, as the update does."""
        step = group["step"]
        if group["clipping"] is None or step == 0:
            return None
        first = self.state[group["params"][0]]
        square = sum((gradients * (SCALAR_RATE if values.shape[1] == 1 else state["rms"])).square().sum() for values, gradients, state in stacks)
        norm = square.sqrt()
        norms = first.setdefault("norms", torch.zeros(NORM_PERIOD, device=norm.device))
        norms[step % NORM_PERIOD] = norm
        early = step in EARLY_MEDIANS
        if early or step % NORM_PERIOD == 0:
            known = norms.sort().values[-step:]
            first["max_norm"] = group["clipping"] * (2 if early else 1) * known[len(known) // 4 * 2]
        return (first["max_norm"] / (norm + 1e-20)).clamp(max=1) if "max_norm" in first else None


def _stacked(tensors: list[Tensor]) -> Tensor:
    """N tensors of one shape as (N, size)."""
    return torch.stack([tensor.flatten() for tensor in tensors])


def _new_state(values: Tensor) -> dict[str, Tensor]:
    """The state of (N, size) parameters before the first step."""
    state = {"square": torch.zeros_like(values), "delta": torch.zeros_like(values)}
    if values.shape[1] > 1:
        rms = _rms(values)
        state |= {"rms": rms, "size_grads": rms.new_zeros(SIZE_PERIOD, *rms.shape), "size_square": torch.zeros_like(rms)}
    return state


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(1, keepdim=True).sqrt()


def _update(values: Tensor, gradients: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """What is added to (N, size) parameters; `state` moves on by one step."""
    step, rate, (beta1, beta2) = group["step"], group["lr"], group["betas"]
    square = state["square"].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    correction = 1 - beta2 ** (step + 1)
    if correction < 0.99:
        square = square / correction
    delta = -rate * gradients / (square.sqrt() + EPS)
    if values.shape[1] == 1:
        delta *= SCALAR_RATE
    else:
        state["size_grads"][step % SIZE_PERIOD] = (values * gradients).sum(1, keepdim=True)
        due = step % SIZE_PERIOD == SIZE_PERIOD - 1
        if due:
            state["rms"].copy_(_rms(values))
        delta *= state["rms"].clamp(min=MIN_RMS)
        if due:
            delta += values * _size_step(state, (step + 1) // SIZE_PERIOD, rate, beta2**SIZE_PERIOD)
    return state["delta"].mul_(beta1).add_(delta, alpha=1 - beta1)


def _size_step(state: dict[str, Tensor], update: int, rate: float, beta: float) -> Tensor:
    """The relative change of the sizes, (N, 1), at their `update`-th update."""
    gradients, square, rms = state["size_grads"], state["size_square"], state["rms"]
    square.mul_(beta).add_(gradients.square().mean(0), alpha=1 - beta)
    step = -SCALAR_RATE * rate * (1 - beta**update) ** 0.5 * gradients.sum(0) / (square.sqrt() + EPS)
    step = step.masked_fill(rms < MIN_RMS, 0.0).clamp(-MAX_SIZE_STEP, MAX_SIZE_STEP)
    return torch.minimum(step, (MAX_RMS - rms) / rms)
