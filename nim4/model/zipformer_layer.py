"""One layer of the Zipformer and its parts, for whole utterances and chunks alike: a chunk is a short utterance with a past.

Names of parameters and arithmetic are those of icefall's `zipformer` recipes of 2023. What is before a chunk comes as caches, empty for
a whole utterance. Left out of icefall's training: the penalty on attention scores above 25 and the scaling of the first gradients; both
serve half precision, and the weight of the first hangs on the scale of the loss.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import ZipformerConfig
from nim4.model.regularisers import Balancer, Pace, Schedule, Whiten, drop_sequences, happens, limited, shared_dropout

BLOCKED = -1000.0  # score of a frame that may not be attended to; finite, so that padding without any other is not NaN


@dataclass(frozen=True)
class Frames:
    """What there is to know of the frames of a batch at one rate.

    Attributes:
        lens: (B,) int64.
        valid: (B, S) bool.
        blocked: (B or 1, 1, S, left + S) bool, True where a frame may not attend to another; `left` cached ones come first.
        chunk_frames: 0 = the whole utterance.
    """

    lens: Tensor
    valid: Tensor
    blocked: Tensor
    chunk_frames: int


class LayerCache(NamedTuple):
    """A layer's past, in icefall's order. Left frames hold what attention needs, newest last; `conv` ones the convolutions' last inputs.

    All (B, left, its channels), but `conv1` and `conv2` (B, D, K // 2).
    """

    key: Tensor
    nonlin_attn: Tensor
    val1: Tensor
    val2: Tensor
    conv1: Tensor
    conv2: Tensor


def swoosh_l(x: Tensor) -> Tensor:
    """For layers that are usually off (arXiv 2310.11230, section 3.3)."""
    return F.softplus(x - 4.0).sub_(x, alpha=0.08).sub_(0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """For convolutions; 0 at 0 (arXiv 2310.11230, section 3.3)."""
    return F.softplus(x - 1.0).sub_(x, alpha=0.08).sub_(0.313261687)


def scaled(layer: nn.Module, scale: float) -> nn.Module:
    """A fresh linear or convolution layer with smaller weights, and a bias of the same size."""
    with torch.no_grad():
        layer.weight.mul_(scale)
        if layer.bias is not None:
            layer.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return layer


def relative_positions(num_frames: int, left: int, dim: int, like: Tensor) -> Tensor:
    """(left + 2 S - 1, `dim`): how far a frame is from another, first the past, at the finest around 0.

    Source: icefall's CompactRelPositionalEncoding: distances on a logarithmic scale, bent to a finite interval, as a Fourier series.
    """
    distance = torch.arange(1 - left - num_frames, num_frames, device=like.device, dtype=torch.float32)[:, None]
    length = dim**0.5
    compressed = length * distance.sign() * ((distance.abs() + length).log() - math.log(length))
    angles = (compressed * (2 * math.pi / dim)).atan() * torch.arange(1, dim // 2 + 1, device=like.device)
    waves = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
    return torch.cat([waves[:, :-1], torch.ones_like(distance)], dim=1).to(like.dtype)  # the last one serves as a bias


class BiasNorm(nn.Module):
    """x / RMS(x - bias) * exp(log_scale): layer normalisation that keeps the length of a frame in one learned direction (section 3.2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(1e-4 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same."""
        log_scale = limited(self.log_scale, -1.5, 1.5) if self.training else self.log_scale
        return x * ((x - self.bias).square().mean(-1, keepdim=True) ** -0.5 * log_scale.exp())


class Bypass(nn.Module):
    """A learned mix, by channel, of what went into some layers and what came out; in training some utterances pass them by (section 3.1)."""

    def __init__(self, dim: int, pace: Pace, skip_rate: Schedule = 0.0):
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self._pace, self._skip_rate = pace, skip_rate

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """(B, S, D) each."""
        if not self.training:
            return before + (after - before) * self.bypass_scale
        least = self._pace(((0.0, 0.9), (20_000.0, 0.2)))  # at first nearly straight through, so that every layer learns
        return before + drop_sequences((after - before) * limited(self.bypass_scale, least, 1.0), self._pace(self._skip_rate))


class ActivatedLinear(nn.Linear):
    """Swoosh, dropout, linear layer."""

    def __init__(self, channels: int, dim: int, swoosh_l_or_r, scale: float, pace: Pace, dropout: Schedule = 0.0):
        super().__init__(channels, dim)
        scaled(self, scale)
        self._activation, self._pace, self._dropout = swoosh_l_or_r, pace, dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, channels) -> (B, S, D)."""
        x = self._activation(x)
        return super().forward(shared_dropout(x, self._pace(self._dropout)) if self.training else x)


class FeedForward(nn.Module):
    """One hidden layer."""

    def __init__(self, dim: int, hidden_dim: int, pace: Pace, dropout: Schedule):
        super().__init__()
        self.in_proj = nn.Linear(dim, hidden_dim)
        self.hidden_balancer = Balancer(pace, 0.3, 1.0, 0.75, 5.0)
        self.out_proj = ActivatedLinear(hidden_dim, dim, swoosh_l, 0.1, pace, dropout)
        self.out_whiten = Whiten(pace, _whitening(7.5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.out_whiten(self.out_proj(self.hidden_balancer(self.in_proj(x))))


class AttentionWeights(nn.Module):
    """Who attends to whom, from content and relative position; the weights serve three modules of the layer (section 3.1)."""

    def __init__(self, dim: int, num_heads: int, config: ZipformerConfig, pace: Pace):
        super().__init__()
        self._num_heads, self._pace = num_heads, pace
        self._sizes = [num_heads * size for size in (config.query_head_dim, config.query_head_dim, config.pos_head_dim)]
        self.in_proj = scaled(nn.Linear(dim, sum(self._sizes)), config.query_head_dim**-0.25)
        self.whiten_keys = Whiten(pace, _whitening(3.0), scale=0.025, num_groups=num_heads)
        self.balance_keys = Balancer(pace, 0.4, 0.6, 0.0, 100.0, prob=0.025)  # their mean has no effect, and might grow
        self.linear_pos = scaled(nn.Linear(config.pos_dim, self._sizes[2], bias=False), 0.05)

    def forward(self, x: Tensor, positions: Tensor, frames: Frames, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (left + 2 S - 1, pos_dim), and (B, left, H Q) cached keys -> (B, H, S, left + S) weights, and the keys to cache."""
        query, key, at = self.in_proj(x).split(self._sizes, dim=-1)
        key = torch.cat([cache, self.whiten_keys(self.balance_keys(key))], dim=1)
        query, keys, at = (part.unflatten(-1, (self._num_heads, -1)).transpose(1, 2) for part in (query, key, at))
        position = self.linear_pos(positions).unflatten(-1, (self._num_heads, -1)).permute(1, 2, 0)  # (H, P, left + 2 S - 1)
        by_position = self._of_frames(at @ position, keys.shape[2])
        if self.training and happens(self._pace(((0.0, 0.5), (4000.0, 0.0)))):
            by_position = by_position * 0.0  # not left out: under DDP every parameter takes part in every step
        scores = query @ keys.transpose(2, 3) + by_position
        return scores.masked_fill(frames.blocked, BLOCKED).softmax(-1), key[:, key.shape[1] - cache.shape[1] :]

    @staticmethod
    def _of_frames(scores: Tensor, num_keys: int) -> Tensor:
        """Scores of distances, (B, H, S, left + 2 S - 1) -> of frames, (B, H, S, left + S): row i begins at column S - 1 - i."""
        num_frames, num_distances = scores.shape[2:]
        flat = F.pad(scores, (0, 1)).flatten(2)[..., num_frames - 1 :]  # rows one longer: each begins one earlier than the one before
        return flat[..., : num_frames * num_distances].unflatten(2, (num_frames, num_distances))[..., :num_keys]


class SelfAttention(nn.Module):
    """Values, averaged by attention weights that are given."""

    def __init__(self, dim: int, num_heads: int, config: ZipformerConfig, pace: Pace):
        super().__init__()
        channels = num_heads * config.value_head_dim
        self.in_proj = nn.Linear(dim, channels)
        self.out_proj = scaled(nn.Linear(channels, dim), 0.05)
        self.whiten = Whiten(pace, _whitening(7.5, 3.0))

    def forward(self, x: Tensor, weights: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, H, S, left + S), (B, left, H V) -> (B, S, D), and the values to cache."""
        values = torch.cat([cache, self.in_proj(x)], dim=1)
        x = weights @ values.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        return self.whiten(self.out_proj(x.transpose(1, 2).flatten(2))), values[:, values.shape[1] - cache.shape[1] :]


class NonlinAttention(nn.Module):
    """A gate, an average over frames by the first head's weights, and a second gate (section 3.1)."""

    def __init__(self, dim: int, pace: Pace):
        super().__init__()
        channels = 3 * dim // 4
        self.in_proj = nn.Linear(dim, 3 * channels)
        self.balancer = Balancer(pace, ((0.0, 0.25), (20_000.0, 0.05)), ((0.0, 0.75), (20_000.0, 0.95)), 0.5, 5.0)
        self.out_proj = scaled(nn.Linear(channels, dim), 0.05)
        self.whiten1 = Whiten(pace, _whitening(5.0))
        self.whiten2 = Whiten(pace, _whitening(5.0, 3.0))

    def forward(self, x: Tensor, weights: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, S, left + S), (B, left, 3 D / 4) -> (B, S, D), and what to cache."""
        gate, x, second = self.in_proj(x).chunk(3, dim=-1)
        x = torch.cat([cache, self.whiten1(x) * self.balancer(gate).tanh()], dim=1)
        return self.whiten2(self.out_proj(weights @ x * second)), x[:, x.shape[1] - cache.shape[1] :]


def depthwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A depthwise convolution of (B, S, D).

    On a CPU it is one of images with the channels last: a training step of it then takes a third to a half of Conv1d's. On a GPU that layout
    leads to cuDNN, which is many times slower at it than torch's own kernel.
    """
    x = x.transpose(1, 2)
    if x.is_cuda:
        return conv(x).transpose(1, 2)
    image = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, padding=(0, *conv.padding), groups=conv.groups)
    return image.squeeze(2).transpose(1, 2)


class ChunkCausalConv(nn.Module):
    """The sum of a depthwise convolution that looks left, and one that looks both ways within its chunk.

    The second is scaled by how far the frame is from both edges of the chunk, or of the utterance where there are no chunks.
    """

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self._kernel = kernel
        self.causal_conv = nn.Conv1d(dim, dim, (kernel + 1) // 2, groups=dim)
        self.chunkwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim, padding=kernel // 2)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, dim, kernel))

    def forward(self, x: Tensor, frames: Frames, cache: Tensor) -> Tensor:
        """(B, S, D), zeros beyond each utterance, and (B, K // 2, D) before it -> (B, S, D)."""
        num_frames, size = x.shape[1], frames.chunk_frames
        causal = depthwise(self.causal_conv, torch.cat([cache, x], dim=1))
        if size == 0:
            place = torch.arange(num_frames, device=x.device)
            return causal + depthwise(self.chunkwise_conv, x) * self._scale(place[None], frames.lens[:, None])
        num_chunks = -(-num_frames // size)
        chunks = F.pad(x, (0, 0, 0, num_chunks * size - num_frames)).unflatten(1, (num_chunks, size)).flatten(0, 1)
        place = torch.arange(size, device=x.device)[None]
        chunks = depthwise(self.chunkwise_conv, chunks) * self._scale(place, torch.full_like(place, size))
        return causal + chunks.unflatten(0, (-1, num_chunks)).flatten(1, 2)[:, :num_frames]

    def _scale(self, place: Tensor, size: Tensor) -> Tensor:
        """(B, S, D) for frames at `place` (B or 1, S) from the left of chunks of `size` (B or 1, 1 or S)."""
        left, right = F.pad(self.chunkwise_conv_scale, (0, 1)).transpose(1, 2)  # the zero behind is for frames far from an edge
        from_right = self._kernel - (size - place)
        near = (from_right >= 0) & (from_right < self._kernel)
        return 1.0 + left[place.clamp(max=self._kernel)] + right[torch.where(near, from_right, self._kernel)]


class Convolution(nn.Module):
    """Gate, depthwise convolution, activation."""

    def __init__(self, dim: int, kernel: int, causal: bool, pace: Pace):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.balancer1 = Balancer(pace, ((0.0, 0.05), (8000.0, 0.025)), 1.0, 1.5, ((0.0, 5.0), (8000.0, 10.0)))
        self.depthwise_conv = ChunkCausalConv(dim, kernel) if causal else nn.Conv1d(dim, dim, kernel, groups=dim, padding=kernel // 2)
        self.balancer2 = Balancer(pace, ((0.0, 0.1), (8000.0, 0.05)), 1.0, ((0.0, 0.2), (20_000.0, 0.5)), 10.0)
        self.whiten = Whiten(pace, _whitening(7.5))
        self.out_proj = ActivatedLinear(dim, dim, swoosh_r, 0.05, pace)

    def forward(self, x: Tensor, frames: Frames, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, D, K // 2) -> (B, S, D), and the last inputs of the depthwise convolution."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = (x * self.balancer1(gate).sigmoid()).masked_fill(~frames.valid[..., None], 0.0)
        past = cache.transpose(1, 2)
        last = torch.cat([past, x], dim=1)[:, x.shape[1] :].transpose(1, 2)
        x = self.depthwise_conv(x, frames, past) if isinstance(self.depthwise_conv, ChunkCausalConv) else depthwise(self.depthwise_conv, x)
        return self.out_proj(self.whiten(self.balancer2(x))), last


def _whitening(limit: float, ratio: float = 2.0) -> Schedule:
    return (0.0, limit), (20_000.0, ratio * limit)


class ZipformerLayer(nn.Module):
    """A layer of one stack (arXiv 2310.11230, figure 2). `stack` is the number of its stack; `skip_rate` is that of the whole layer."""

    DYNAMIC_SKIP = ((0.0, 0.2), (4000.0, 0.05), (16_000.0, 0.0))
    FFN_SKIP = ((0.0, 0.1), (4000.0, 0.01), (50_000.0, 0.0))
    CONSTANT_ATTENTION = ((0.0, 0.25), (4000.0, 0.025))

    def __init__(self, config: ZipformerConfig, stack: int, skip_rate: Schedule, pace: Pace):
        super().__init__()
        dim, heads, ffn_dim, kernel = (sizes[stack] for sizes in (config.dims, config.num_heads, config.ffn_dims, config.conv_kernels))
        dropout = (0.0, 3 * config.dropout), (20_000.0, config.dropout)
        self._pace, self._config, self._heads, self._kernel = pace, config, heads, kernel
        self.bypass = Bypass(dim, pace, skip_rate)
        self.bypass_mid = Bypass(dim, pace)
        self.self_attn_weights = AttentionWeights(dim, heads, config, pace)
        self.self_attn1, self.self_attn2 = (SelfAttention(dim, heads, config, pace) for _ in range(2))
        self.feed_forward1 = FeedForward(dim, ffn_dim * 3 // 4, pace, dropout)
        self.feed_forward2 = FeedForward(dim, ffn_dim, pace, dropout)
        self.feed_forward3 = FeedForward(dim, ffn_dim * 5 // 4, pace, dropout)
        self.nonlin_attention = NonlinAttention(dim, pace)
        self.conv_module1, self.conv_module2 = (Convolution(dim, kernel, config.causal, pace) for _ in range(2))
        self.register_buffer("bypass_scale", torch.full((dim,), 0.5))  # in every checkpoint of icefall, and used nowhere
        self.norm = BiasNorm(dim)
        self.balancer1 = Balancer(pace, 0.45, 0.55, 0.2, 4.0)
        self.balancer2 = Balancer(pace, 0.45, 0.55, 0.1, 4.0)
        self.balancer_na = Balancer(pace, 0.3, 0.7, ((0.0, 0.004), (4000.0, 0.02)), prob=0.05)
        self.balancer_ff2 = Balancer(pace, 0.3, 0.7, ((0.0, 0.0), (4000.0, 0.1)), 2.0, prob=0.05)
        self.balancer_ff3 = Balancer(pace, 0.3, 0.7, ((0.0, 0.0), (4000.0, 0.2)), 4.0, prob=0.05)
        self.whiten = Whiten(pace, _whitening(4.0, 3.0))

    def empty_cache(self, batch_size: int, left: int, like: Tensor) -> LayerCache:
        """The past of utterances that begin, with room for `left` frames; in the type and on the device of `like`."""
        dim, config = len(self.norm.bias), self._config
        channels = self._heads * config.query_head_dim, 3 * dim // 4, *[self._heads * config.value_head_dim] * 2
        seen = [like.new_zeros(batch_size, left, size) for size in channels]
        return LayerCache(*seen, *[like.new_zeros(batch_size, dim, self._kernel // 2) for _ in range(2)])

    def _dropped(self, x: Tensor, schedule: Schedule) -> Tensor:
        return drop_sequences(x, self._pace(schedule)) if self.training else x

    def forward(self, x: Tensor, positions: Tensor, frames: Frames, cache: LayerCache) -> tuple[Tensor, LayerCache]:
        """(B, S, D), positions of relative_positions, and the past -> (B, S, D), and the past of what follows."""
        start = x
        weights, key = self.self_attn_weights(x, positions, frames, cache.key)
        x = x + self.feed_forward1(x)
        first_head = weights[:, 0]
        if self.training and happens(self._pace(self.CONSTANT_ATTENTION)):
            first_head = (first_head > 0).to(x.dtype)
            first_head = first_head / first_head.sum(-1, keepdim=True)
        kept = self._dropped(x.new_ones(len(x), 1, 1), self.DYNAMIC_SKIP) if self.training else 1.0  # one draw for all three that attend
        added, nonlin_attn = self.nonlin_attention(x, first_head, cache.nonlin_attn)
        x = x + self.balancer_na(added) * kept
        added, val1 = self.self_attn1(x, weights, cache.val1)
        x = x + added * kept
        added, conv1 = self.conv_module1(x, frames, cache.conv1)
        x = x + self._dropped(added, self.DYNAMIC_SKIP)
        x = x + self._dropped(self.balancer_ff2(self.feed_forward2(x)), self.FFN_SKIP)
        x = self.bypass_mid(start, x)
        added, val2 = self.self_attn2(x, weights, cache.val2)
        x = x + added * kept
        added, conv2 = self.conv_module2(x, frames, cache.conv2)
        x = x + self._dropped(added, self.DYNAMIC_SKIP)
        x = x + self._dropped(self.balancer_ff3(self.feed_forward3(x)), self.FFN_SKIP)
        x = self.bypass(start, self.norm(self.balancer1(x)))
        return self.whiten(self.balancer2(x)), LayerCache(key, nonlin_attn, val1, val2, conv1, conv2)
