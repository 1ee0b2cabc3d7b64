"""What acts on a Zipformer in training alone: schedules, constraints on activations, limits of parameters, dropped sequences.

None of it changes a forward pass in evaluation. Written from arXiv 2310.11230 (sections 3.3 and 3.4, appendix A) and from what icefall's
recipes set. Ours: every gradient here is a closed formula, and nothing remembers earlier batches, so a resumed run draws what an
uninterrupted one would. Padding counts in the statistics, as in icefall.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

Schedule = float | tuple[tuple[float, float], ...]  # a constant, or (batch, value) points with straight lines between them


class Pace:
    """How far a training is, in batches of the schedules; one for a whole encoder. At the end of all schedules unless it is told."""

    def __init__(self) -> None:
        self.batch = math.inf

    def __call__(self, schedule: Schedule) -> float:
        """The value of a schedule now."""
        if not isinstance(schedule, tuple):
            return schedule
        before = schedule[0]
        for point in schedule:
            if self.batch < point[0]:
                share = (self.batch - before[0]) / (point[0] - before[0]) if point is not before else 1.0
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]


def happens(probability: float) -> bool:
    """A draw from torch's generator, which the training loop seeds for each batch."""
    return bool(torch.rand(()) < probability)


def drop_sequences(x: Tensor, rate: float) -> Tensor:
    """(B, ...) with whole utterances set to 0 at this rate; the others keep their scale."""
    if rate == 0.0:
        return x
    return x * (torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate).to(x.dtype)


def shared_dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout of channels of (B, S, D), the same at all frames of an utterance."""
    if rate == 0.0:
        return x
    return x * nn.functional.dropout(x.new_ones(len(x), 1, x.shape[2]), rate)


class _Limited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        wrong = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return torch.where(wrong, -grad, grad), None, None


def limited(x: Tensor, low: float, high: float) -> Tensor:
    """A parameter as it is; where it is beyond a limit, its gradient may only lead it back."""
    return _Limited.apply(x, low, high)


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_dim: int, mean: tuple[float, float], rms: tuple[float, float], scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = channel_dim, mean, rms, scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        channel_dim, mean_limits, rms_limits, scale = ctx.settings
        x, others = x.float(), [dim for dim in range(x.ndim) if dim != channel_dim % x.ndim]
        mean = x.mean(others, keepdim=True)
        square = x.square().mean(others, keepdim=True).clamp(min=1e-20)
        std = (square - mean.square()).clamp(min=1e-20).sqrt()
        ratio, rms = mean / std, square.sqrt()
        mean_side = (ratio - ratio.clamp(*mean_limits)).sign()  # 1 = too high, -1 = too low
        rms_side = (rms - rms.clamp(*rms_limits)).sign()
        push = mean_side * (1 / std - mean * (x - mean) / std**3) + rms_side * x / square  # N times the gradient of |ratio| + |log rms| there
        push = push * (scale / push.square().mean(others, keepdim=True).sqrt().clamp(min=1e-20))
        wide = grad.float()
        return (wide + wide.abs() * push).to(grad.dtype), None, None, None, None


class Balancer(nn.Module):
    """Holds each channel's share of positive values, and its mean absolute value, between limits, by a term in the gradient.

    The term is as large as `SCALE` times the gradient, element by element. Limits are schedules, meant for Gaussian values: mean over
    deviation, and root mean square, are what is limited.

    Args:
        prob: share of batches in which it acts.
    Source: arXiv 2310.11230, section 3.4 (Balancer); icefall's approximate inverse of the error function.
    """

    SCALE = 0.04
    USUAL_PROB = ((0.0, 0.5), (8000.0, 0.125))

    def __init__(
        self,
        pace: Pace,
        min_positive: Schedule = 0.05,
        max_positive: Schedule = 0.95,
        min_abs: Schedule = 0.2,
        max_abs: Schedule = 100.0,
        prob: Schedule = USUAL_PROB,
        channel_dim: int = -1,
    ):
        super().__init__()
        self._pace, self._prob, self._channel_dim = pace, prob, channel_dim
        self._positive, self._abs = (min_positive, max_positive), (min_abs, max_abs)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        if not (self.training and x.requires_grad and happens(self._pace(self._prob))):
            return x
        mean = tuple(_mean_over_deviation(self._pace(limit)) for limit in self._positive)
        rms = tuple(math.sqrt(math.pi / 2) * self._pace(limit) for limit in self._abs)
        return _Balanced.apply(x, self._channel_dim, mean, rms, self.SCALE)


def _mean_over_deviation(share_positive: float) -> float:
    """Of Gaussian values of which this share is positive; roughly, and finite for 0 and 1."""
    eps = 1e-10
    return 0.8139535143 * (math.log(2 * share_positive + eps) - math.log(2 - 2 * share_positive + eps)) / 2


class _Whitened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, limit: float, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = num_groups, limit, scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        num_groups, limit, scale = ctx.settings
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float().reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1)
            centred = centred - centred.mean(1, keepdim=True)
            covariance = centred.mT @ centred  # (groups, channels, channels)
            variance = covariance.diagonal(dim1=1, dim2=2).sum() / x.shape[-1]
            squared = covariance.square().sum() / x.shape[-1]
            push = centred @ covariance - squared / (variance + 1e-20) * centred  # along the gradient of squared / variance^2
            push = push.transpose(0, 1).reshape(x.shape)
            wide = grad.float()
            push = push * (scale * wide.norm() / (push.norm() + 1e-20))
            is_white = squared / (variance.square() + 1e-20) < limit
        return (wide + torch.where(is_white, 0.0, push)).to(grad.dtype), None, None, None


class Whiten(nn.Module):
    """Draws the covariance of the channels, within each group, towards a multiple of the identity, by a term in the gradient.

    It acts while the mean square of the covariance's eigenvalues is more than `limit` times the square of their mean. The term's norm is
    `scale` times that of the gradient.

    Source: arXiv 2310.11230, section 3.4 (Whitener). Ours: it looks in a quarter of all batches; in icefall in a fortieth after one in which
    the limit held.
    """

    PROB = 0.25

    def __init__(self, pace: Pace, limit: Schedule, scale: float = 0.01, num_groups: int = 1):
        super().__init__()
        self._pace, self._limit, self._scale, self._num_groups = pace, limit, scale, num_groups

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., D) as it is."""
        if not (self.training and x.requires_grad and happens(self.PROB)):
            return x
        return _Whitened.apply(x, self._num_groups, self._pace(self._limit), self._scale)
