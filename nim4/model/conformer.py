"""Streaming Conformer: 4x subsampling, attention under chunk masks, convolution that never looks past its chunk.

One set of weights serves offline and streaming. `forward` runs whole utterances, with full context or under a chunk mask;
`forward_chunk` runs one chunk with fixed-size caches and gives the same output as the masked whole pass.

Deviations from the encoder the paper takes over (FireRedASR-AED, arXiv 2501.14350), and why:
- rotary positions instead of relative-position attention, unless `positions` says so: no scores of their own, and no weights;
- depthwise convolution over the left frames and its own chunk only (Dynamic Chunk Convolution, arXiv 2304.09325):
  a symmetric kernel of 33 frames in every block would look 640 ms ahead per block.
Layer normalisation everywhere (none over the batch), so that an utterance scores the same alone and in a padded batch.
"""

import importlib.util
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import ConformerConfig, RecipeError
from nim4.model.relative import Distances, RelativeScores

# The depthwise convolution as a GPU kernel. Triton comes with torch's CUDA builds. Looked up here: inside of a block it would cut what is compiled.
if importlib.util.find_spec("triton") is None:
    chunk_depthwise = None
else:
    from nim4.model.depthwise import chunk_depthwise

SUBSAMPLING = 4  # feature frames per encoder frame
LOOKAHEAD_FRAMES = 3  # feature frames the last encoder frame of a chunk sees beyond its own four


class Context(NamedTuple):
    """What a frame may see: its own chunk of `chunk_frames` encoder frames and `left_chunks` before it.

    `chunk_frames` 0 means the whole utterance; `left_chunks` -1 means everything before the chunk.
    """

    chunk_frames: int = 0
    left_chunks: int = -1


FULL_CONTEXT = Context()


@dataclass
class ConformerState:
    """Caches of a batch of streams; every field has a fixed size, so work per chunk does not grow.

    Attributes:
        keys, values: (blocks, B, H, left frames, D/H) float, newest frame last; keys without positions.
        conv: (blocks, B, conv_expansion D, K // 2) float, the convolution's last inputs; zeros at the start of a stream.
        filled: (B,) int64, cached frames that are real, at most the left frames.
    """

    keys: Tensor
    values: Tensor
    conv: Tensor
    filled: Tensor

    @property
    def shape(self) -> Hashable:
        """Streams with equal ones can be joined."""
        return self.keys.shape[3]

    @classmethod
    def join(cls, states: Sequence["ConformerState"]) -> "ConformerState":
        """Streams under one context as one batch."""
        parts = [(state.keys, state.values, state.conv) for state in states]
        return cls(*(torch.cat(part, 1) for part in zip(*parts, strict=True)), torch.cat([state.filled for state in states]))

    def split(self) -> list["ConformerState"]:
        """Each stream of the batch on its own; none holds the memory of the others."""
        parts = [torch.split_copy(part, 1, 1) for part in (self.keys, self.values, self.conv)]
        return [ConformerState(*own) for own in zip(*parts, torch.split_copy(self.filled, 1), strict=True)]


def encoder_lens(feature_lens: Tensor) -> Tensor:
    """Encoder frames of utterances with these numbers of feature frames: the tail is padded, never dropped."""
    return torch.div(feature_lens + SUBSAMPLING - 1, SUBSAMPLING, rounding_mode="floor")


def valid_mask(x_lens: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths -> (B, num_frames) bool, True on frames inside the utterance."""
    return torch.arange(num_frames, device=x_lens.device) < x_lens[:, None]


def chunk_mask(num_frames: int, context: Context, device: torch.device) -> Tensor:
    """(S, S) bool, True where frame i may attend to frame j under `context`."""
    if context.chunk_frames == 0:
        return torch.ones(num_frames, num_frames, dtype=torch.bool, device=device)
    chunk = torch.arange(num_frames, device=device) // context.chunk_frames
    distance = chunk[:, None] - chunk[None, :]
    mask = distance >= 0
    return mask & (distance <= context.left_chunks) if context.left_chunks >= 0 else mask


class Rotation(NamedTuple):
    """Rotary position embedding (arXiv 2104.09864) of S positions, the same in all blocks: cosines and sines, each (S, D/2H) float32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, num_positions: int, head_dim: int, device: torch.device) -> "Rotation":
        """Positions 0 to `num_positions` - 1."""
        half = head_dim // 2
        frequencies = torch.exp(torch.arange(half, device=device, dtype=torch.float32) * (-math.log(10_000.0) / half))
        angles = torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * frequencies
        return cls(angles.cos(), angles.sin())

    def apply(self, x: Tensor) -> Tensor:
        """(B, H, S_x, D/H) on the last S_x positions."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = (part[len(part) - x.shape[2] :].to(x.dtype) for part in self)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_shape(config: ConformerConfig) -> None:
    """Raises RecipeError for a shape that no Conformer can have."""
    rules = {
        "num_blocks": (config.num_blocks >= 1, "at least 1"),
        "num_heads": (config.num_heads >= 1 and config.dim % (2 * config.num_heads) == 0, f"a divisor of dim / 2 = {config.dim / 2:g}"),
        "positions": (config.positions in ("rotary", "relative"), "rotary or relative"),
        "conv_kernel": (config.conv_kernel >= 1 and config.conv_kernel % 2 == 1, "an odd number"),
        "dropout": (0 <= config.dropout < 1, "a share from 0 to below 1"),
    }
    for name, (holds, expected) in rules.items():
        if not holds:
            raise RecipeError(f"model.encoder.{name}", expected=expected, found=getattr(config, name), fix="correct the model config or --set")


class Subsampling(nn.Module):
    """Two stride-2 convolutions over 80-bin features: one encoder frame sees 7 feature frames and covers 4."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        channels = config.subsampling_channels
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        bins = ((config.num_mel_bins - 1) // 2 - 1) // 2
        self.out = nn.Linear(channels * bins, config.dim)
        # Ours: without it the frames start several times smaller than what the blocks add to them, which is nearly the same
        # for all frames, and CTC training then starts from outputs that hardly depend on the input.
        self.norm = nn.LayerNorm(config.dim) if config.subsampling_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4 S + 3, 80) -> (B, S, D); the last 3 frames are the look-ahead of the last output frame."""
        x = F.relu(self.conv1(x.unsqueeze(1)))
        x = F.relu(self.conv2(x))
        return self.norm(self.out(x.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """The Conformer's half-step feed-forward: the caller adds half of it."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.dropout(self.down(self.dropout(F.silu(self.up(self.norm(x))))))


class Attention(nn.Module):
    """Multi-head self-attention with rotary or relative positions; separate norms for query, key and value, no bias (FireRedASR)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(config.dim) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout = config.dropout
        self.relative = RelativeScores(config) if config.positions == "relative" else None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> query, key, value, each (B, H, S, D/H), without positions."""
        return self._heads(self.query(self.norm_q(x))), self._heads(self.key(self.norm_k(x))), self._heads(self.value(self.norm_v(x)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Rotation | Distances, mask: Tensor) -> Tensor:
        """Queries stand on the last S_q of the S_k `positions`. `mask`: broadcastable to (B, 1, S_q, S_k), True = may attend."""
        dropout = self.attention_dropout if self.training else 0.0
        if self.relative is not None:
            query, mask = self.relative(query, positions, mask)
        else:
            query, key = positions.apply(query), positions.apply(key)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))


class ChunkConvolution(nn.Module):
    """Conformer convolution module whose depthwise kernel sees all frames to the left and only its own chunk to the right."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        width = config.conv_expansion * config.dim
        self.reach = config.conv_kernel // 2
        self.norm = nn.LayerNorm(config.dim)
        self.expand = nn.Linear(config.dim, 2 * width)
        self.depthwise = nn.Conv1d(width, width, config.conv_kernel, groups=width)
        self.norm_out = nn.LayerNorm(width)
        self.reduce = nn.Linear(width, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def gate(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, E, S), E = conv_expansion D: the input of the depthwise convolution."""
        return F.glu(self.expand(self.norm(x)), dim=-1).transpose(1, 2)

    def finish(self, x: Tensor) -> Tensor:
        """(B, E, S) from the depthwise convolution -> (B, S, D)."""
        return self.dropout(self.reduce(F.silu(self.norm_out(x.transpose(1, 2)))))

    def forward(self, x: Tensor, valid: Tensor, chunk_frames: int) -> Tensor:
        """(B, S, D) under `chunk_frames` (0 = whole utterance); frames outside `valid` (B, S) count as zeros."""
        x = self.gate(x).masked_fill(~valid[:, None], 0.0)
        if x.is_cuda and chunk_depthwise is not None:
            return self.finish(chunk_depthwise(x.transpose(1, 2), self.depthwise.weight[:, 0], self.depthwise.bias, chunk_frames).transpose(1, 2))
        num_frames = x.shape[-1]
        if chunk_frames == 0 or chunk_frames >= num_frames:
            return self.finish(self.depthwise(F.pad(x, (self.reach, self.reach))))
        num_chunks = -(-num_frames // chunk_frames)
        x = F.pad(x, (self.reach, num_chunks * chunk_frames - num_frames))
        windows = x.unfold(-1, self.reach + chunk_frames, chunk_frames)  # (B, E, chunks, reach + chunk)
        windows = F.pad(windows.transpose(1, 2).flatten(0, 1), (0, self.reach))
        y = self.depthwise(windows).unflatten(0, (-1, num_chunks)).transpose(1, 2).flatten(2)
        return self.finish(y[..., :num_frames])

    def forward_chunk(self, x: Tensor, cache: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """One chunk (B, C, D) after `cache` (B, E, K // 2) -> output (B, C, D) and the next cache; frames outside `valid` (B, C) count as zeros."""
        gated = self.gate(x)
        x = torch.cat([cache, gated if valid is None else gated.masked_fill(~valid[:, None], 0.0)], dim=-1)
        return self.finish(self.depthwise(F.pad(x, (0, self.reach)))), x[..., x.shape[-1] - self.reach :]


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.ffn1 = FeedForward(config)
        self.attention = Attention(config)
        self.conv = ChunkConvolution(config)
        self.ffn2 = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, positions: Rotation | Distances, mask: Tensor, valid: Tensor, chunk_frames: int) -> Tensor:
        x = x + 0.5 * self.ffn1(x)
        x = x + self.attention.attend(*self.attention.project(x), positions, mask)
        x = x + self.conv(x, valid, chunk_frames)
        x = x + 0.5 * self.ffn2(x)
        return self.norm(x)

    def forward_chunk(
        self, x: Tensor, positions: Rotation | Distances, mask: Tensor, valid: Tensor | None, keys: Tensor, values: Tensor, conv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One chunk; returns the output and the next keys, values and convolution cache of the same sizes."""
        x = x + 0.5 * self.ffn1(x)
        query, key, value = self.attention.project(x)
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        x = x + self.attention.attend(query, key, value, positions, mask)
        y, conv = self.conv.forward_chunk(x, conv, valid)
        x = x + y
        x = x + 0.5 * self.ffn2(x)
        left = keys.shape[2]
        return self.norm(x), key[:, :, key.shape[2] - left :], value[:, :, value.shape[2] - left :], conv


class Conformer(nn.Module):
    """The streaming encoder: log-Mel features at 100 Hz in, frames of width D at 25 Hz out."""

    lookahead_frames = LOOKAHEAD_FRAMES
    pad_value = 0.0  # of features behind an utterance: their mean

    def __init__(self, config: ConformerConfig):
        check_shape(config)
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_blocks))

    def forward(self, x: Tensor, x_lens: Tensor, context: Context = FULL_CONTEXT) -> tuple[Tensor, Tensor]:
        """Whole utterances.

        Args:
            x: (B, T, 80) float, normalised features; what lies beyond `x_lens` is ignored.
            x_lens: (B,) int64, feature frames per utterance.
            context: what each frame may see.
        Returns:
            (B, S, D) encoder frames, and (B,) int64 valid frames, ceil(x_lens / 4).
        """
        assert x.ndim == 3, x.shape
        x = x.masked_fill(~valid_mask(x_lens, x.shape[1])[..., None], 0.0)
        num_frames = -(-x.shape[1] // SUBSAMPLING)
        x = F.pad(x, (0, 0, 0, SUBSAMPLING * num_frames + LOOKAHEAD_FRAMES - x.shape[1]))
        x = self.dropout(self.subsampling(x))
        out_lens = encoder_lens(x_lens)
        valid = valid_mask(out_lens, num_frames)
        # Every frame attends at least to itself: a padded frame without any key would be NaN, and NaN spreads.
        mask = (chunk_mask(num_frames, context, x.device) & valid[:, None]) | torch.eye(num_frames, dtype=torch.bool, device=x.device)
        positions = self._positions(num_frames, num_frames, x.device)
        for block in self.blocks:
            x = block(x, positions, mask[:, None], valid, context.chunk_frames)
        return x, out_lens

    def _positions(self, num_queries: int, num_keys: int, device: torch.device) -> Rotation | Distances:
        config = self.config
        if config.positions == "relative":
            return Distances.of(num_queries, num_keys, config.dim, device)
        return Rotation.of(num_keys, config.dim // config.num_heads, device)

    def initial_state(self, batch_size: int, context: Context) -> ConformerState:
        """Empty caches for streams under `context`, which needs a chunk size and a limited left context."""
        assert context.chunk_frames > 0, context
        assert context.left_chunks >= 0, context
        config, weight = self.config, self.subsampling.out.weight
        heads = (config.num_blocks, batch_size, config.num_heads, context.chunk_frames * context.left_chunks, config.dim // config.num_heads)
        return ConformerState(
            keys=weight.new_zeros(heads),
            values=weight.new_zeros(heads),
            conv=weight.new_zeros(config.num_blocks, batch_size, config.conv_expansion * config.dim, config.conv_kernel // 2),
            filled=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        )

    def forward_chunk(self, x: Tensor, state: ConformerState, lens: Tensor | None = None) -> tuple[Tensor, ConformerState]:
        """The next chunk of each stream.

        Args:
            x: (B, 4 C + 3, 80) float, normalised features of C encoder frames and 3 frames of look-ahead; at the end of a
                stream zeros stand for the missing ones. C is the context's chunk size, or less in the last chunk.
            state: the caches after the chunk before; left unchanged.
            lens: (B,) int64, encoder frames of each row, at least 1, so that last chunks can be padded to the others; what lies beyond is
                ignored, and the caches of a row that is shorter than C are of no use. None = C of all.
        Returns:
            (B, C, D) encoder frames, and the caches for the next chunk.
        """
        assert x.ndim == 3, x.shape
        assert x.shape[1] % SUBSAMPLING == LOOKAHEAD_FRAMES, x.shape
        x = self.subsampling(x)
        num_frames, left = x.shape[1], state.keys[0].shape[2]
        cached = torch.arange(left, device=x.device) >= left - state.filled[:, None]  # (B, left)
        valid = None if lens is None else valid_mask(lens, num_frames)
        mask = torch.cat([cached, cached.new_ones(x.shape[0], num_frames) if valid is None else valid], dim=1)[:, None, None]
        positions = self._positions(num_frames, left + num_frames, x.device)
        keys, values, conv = [], [], []
        for block, *caches in zip(self.blocks, state.keys, state.values, state.conv, strict=True):
            x, key, value, conv_inputs = block.forward_chunk(x, positions, mask, valid, *caches)
            keys.append(key)
            values.append(value)
            conv.append(conv_inputs)
        return x, ConformerState(*map(torch.stack, (keys, values, conv)), torch.clamp(state.filled + num_frames, max=left))
