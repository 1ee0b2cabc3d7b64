"""Zipformer: stacks of layers at several frame rates, with the Conformer's interface: whole utterances, or chunks with fixed-size caches.

Source: arXiv 2310.11230. Names of parameters and arithmetic are those of icefall's `zipformer` recipes of 2023: what their checkpoints hold
under `encoder_embed.` and `encoder.` loads as it is. Frames go in at 100 Hz, through the stacks at 50 Hz and slower, and come out at 25 Hz.

Deviations, and why:
- icefall drops the last 7 feature frames of an utterance; here it is padded, and has as many encoder frames as the Conformer makes of it;
- edges are those of each utterance, not of the batch (the last frame is repeated for downsampling, scales in the convolution count from the
  end of the utterance), so that an utterance scores the same alone and in a padded batch, and a stream ends as the masked whole pass does.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import RecipeError, ZipformerConfig
from nim4.model.conformer import FULL_CONTEXT, SUBSAMPLING, Context, chunk_mask, encoder_lens, valid_mask
from nim4.model.regularisers import Balancer, Pace, Whiten, drop_sequences, shared_dropout
from nim4.model.zipformer_layer import BiasNorm, Bypass, Frames, LayerCache, ZipformerLayer, relative_positions, scaled, swoosh_l, swoosh_r

EMBED_REACH = 3  # frames of 20 ms that the embedding's last convolution looks to each side
LAYER_SKIP_BATCHES = 4000.0  # over which layers, from the first to the last, stop being passed by
POSITION_DROPOUT = 0.15
FEATURE_MASK_PROB = 0.125


@dataclass
class ZipformerState:
    """Caches of a batch of streams; every field has a fixed size, so work per chunk does not grow.

    Attributes:
        embed: (B, C, 3, F) float, last inputs of the embedding's last convolution.
        layers: of all stacks, in order.
        filled: (B,) int64, frames of 20 ms that are cached and real, at most the left context.
        chunk_frames: encoder frames per chunk, the same for all streams.
    """

    embed: Tensor
    layers: list[LayerCache]
    filled: Tensor
    chunk_frames: int

    @property
    def shape(self) -> Hashable:
        """Streams with equal ones can be joined."""
        return self.chunk_frames, self.layers[0].key.shape[1]

    @classmethod
    def join(cls, states: Sequence["ZipformerState"]) -> "ZipformerState":
        """Streams under one context as one batch."""
        layers = [LayerCache(*map(torch.cat, zip(*caches, strict=True))) for caches in zip(*(state.layers for state in states), strict=True)]
        embed, filled = (torch.cat([getattr(state, name) for state in states]) for name in ("embed", "filled"))
        return cls(embed, layers, filled, states[0].chunk_frames)

    def split(self) -> list["ZipformerState"]:
        """Each stream of the batch on its own; none holds the memory of the others."""

        def row(part: Tensor, number: int) -> Tensor:
            return part[number : number + 1].clone()

        return [
            ZipformerState(
                row(self.embed, number),
                [LayerCache(*(row(part, number) for part in cache)) for cache in self.layers],
                row(self.filled, number),
                self.chunk_frames,
            )
            for number in range(len(self.filled))
        ]


def check_shape(config: ZipformerConfig) -> None:
    """Raises RecipeError for a shape that no Zipformer can have."""
    stacks = len(config.dims)
    lists = ("downsampling", "num_layers", "num_heads", "ffn_dims", "conv_kernels", "unmasked_dims")
    rules = {"dims": (stacks >= 1 and all(dim >= 4 and dim % 4 == 0 for dim in config.dims), "at least one stack, of a width that 4 divides")}
    rules |= {name: (len(getattr(config, name)) == stacks and min(getattr(config, name)) >= 1, f"{stacks} numbers, as in dims") for name in lists}
    fits = rules["downsampling"][0] and all(max(config.downsampling) % factor == 0 for factor in config.downsampling)
    rules["downsampling"] = (fits, f"{stacks} numbers, as in dims, that divide the largest")
    rules["conv_kernels"] = (rules["conv_kernels"][0] and all(kernel % 2 for kernel in config.conv_kernels), f"{stacks} odd numbers")
    rules["pos_dim"] = (config.pos_dim >= 2 and config.pos_dim % 2 == 0, "an even number")
    rules["dropout"] = (0 <= config.dropout < 1 / 3, "a share from 0 to below a third: training begins with three times as much")
    rules["relax_steps"] = (config.relax_steps >= 1, "at least 1")
    for name, (holds, expected) in rules.items():
        if not holds:
            raise RecipeError(f"model.encoder.{name}", expected=expected, found=getattr(config, name), fix="correct the model config or --set")


class ConvNeXt(nn.Module):
    """Depthwise 7x7 convolution and two pointwise ones, added to their input."""

    def __init__(self, channels: int, pace: Pace):
        super().__init__()
        self._pace = pace
        self.depthwise_conv = nn.Conv2d(channels, channels, 2 * EMBED_REACH + 1, groups=channels, padding=(0, EMBED_REACH))
        self.pointwise_conv1 = nn.Conv2d(channels, 3 * channels, 1)
        self.pointwise_conv2 = scaled(nn.Conv2d(3 * channels, channels, 1), 0.01)
        self.hidden_balancer = Balancer(pace, 0.3, 1.0, 0.75, 5.0)
        self.out_balancer = Balancer(pace, 0.4, 0.6, 1.0, 6.0)
        self.out_whiten = Whiten(pace, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 3 + S + 3, F) -> (B, S, F, C)."""
        first, second = self.pointwise_conv1, self.pointwise_conv2
        added = F.linear(self.depthwise_conv(x).permute(0, 2, 3, 1), first.weight[:, :, 0, 0], first.bias)
        added = F.linear(swoosh_l(self.hidden_balancer(added)), second.weight[:, :, 0, 0], second.bias)
        if self.training:
            added = drop_sequences(added, self._pace(((0.0, 0.2), (20_000.0, 0.015))))
        return self.out_whiten(self.out_balancer(x[:, :, EMBED_REACH:-EMBED_REACH].permute(0, 2, 3, 1) + added))


class Swoosh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """swoosh_r, as a module."""
        return swoosh_r(x)


class Subsampling(nn.Module):
    """Features at 100 Hz to frames at 50 Hz: one sees 15 feature frames, 3 before its own and 10 behind."""

    def __init__(self, config: ZipformerConfig, pace: Pace):
        super().__init__()
        first, second, third = config.subsampling_channels
        self._pace, self._dropout = pace, ((0.0, 3 * config.dropout), (20_000.0, config.dropout))
        self.conv = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=(0, 1)),
            nn.Identity(),  # where icefall scales gradients
            Balancer(pace, max_abs=1.0, channel_dim=1),
            Swoosh(),
            nn.Conv2d(first, second, 3, stride=2),
            Balancer(pace, max_abs=4.0, channel_dim=1),
            Swoosh(),
            nn.Conv2d(second, third, 3, stride=(1, 2)),
            Balancer(pace, max_abs=4.0, channel_dim=1),
            Swoosh(),
        )
        self.convnext = ConvNeXt(third, pace)
        self.out = nn.Linear(third * (((config.num_mel_bins - 1) // 2 - 1) // 2), config.dims[0])
        self.out_whiten = Whiten(pace, ((0.0, 4.0), (20_000.0, 8.0)), scale=0.02)
        self.out_norm = BiasNorm(config.dims[0])

    def empty_cache(self, batch_size: int) -> Tensor:
        """(B, C, 3, F): the past of an utterance that begins."""
        channels = self.conv[7].out_channels
        return self.out.weight.new_zeros(batch_size, channels, EMBED_REACH, self.out.in_features // channels)

    def forward(self, x: Tensor, cache: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 2 S + 13, 80) -> (B, S, D), and the next cache.

        Args:
            ends: (B,) int64, frames behind which an utterance has ended, and what the last convolution sees is 0; None = it sees what there is.
        """
        x = self.conv[0](x.unsqueeze(1))
        if x.device.type == "cpu":  # there the backward pass of the convolutions that follow is two to three times as fast with the channels last
            x, cache = (part.contiguous(memory_format=torch.channels_last) for part in (x, cache))
        x = self.conv[1:](x)
        if ends is not None:
            x = x.masked_fill(~valid_mask(ends, x.shape[2])[:, None, :, None], 0.0)
        x = torch.cat([cache.to(x.dtype), x], dim=2)
        num_frames = x.shape[2] - 2 * EMBED_REACH
        last = x[:, :, num_frames : num_frames + EMBED_REACH]
        x = self.out_norm(self.out_whiten(self.out(self.convnext(x).transpose(2, 3).flatten(2))))
        return (shared_dropout(x, self._pace(self._dropout)) if self.training else x), last


class Stack(nn.Module):
    """Layers of one width, at one rate."""

    def __init__(self, config: ZipformerConfig, stack: int, pace: Pace):
        super().__init__()
        self._pos_dim = config.pos_dim
        number, part = config.num_layers[stack], LAYER_SKIP_BATCHES / (len(config.dims) + 1)
        last_rate = 0.035 * config.downsampling[stack] ** 0.5

        def skip_rate(layer: int) -> tuple[tuple[float, float], ...]:  # the layers' turns follow each other; the first turn is the embedding's
            begin = part * (stack + 1 + layer / number)
            return (begin, 0.5), (begin + part / number, last_rate)

        self.layers = nn.ModuleList(ZipformerLayer(config, stack, skip_rate(layer), pace) for layer in range(number))

    def forward(self, x: Tensor, frames: Frames, caches: Sequence[LayerCache], channels: Tensor | None) -> tuple[Tensor, list[LayerCache]]:
        """(B, S, D) -> the same, and the next caches. `channels`: (B, 1, D), those that an utterance has; None = all."""
        left = frames.blocked.shape[-1] - x.shape[1]
        positions = relative_positions(x.shape[1], left, self._pos_dim, x)
        positions = F.dropout(positions, POSITION_DROPOUT, self.training)
        x = x if channels is None else x * channels
        made = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, positions, frames, cache)
            x = x if channels is None else x * channels
            made.append(cache)
        return x, made


class Downsample(nn.Module):
    """A learned average of each `factor` frames."""

    def __init__(self, factor: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """(B, S, D), (B,) -> (B, ceil(S / factor), D); the last frame of an utterance stands for those behind it."""
        factor, num_frames = len(self.bias), x.shape[1]
        last = x[torch.arange(x.shape[0], device=x.device), (lens - 1).clamp(min=0)][:, None]
        padded = -(-num_frames // factor) * factor
        x = torch.where(valid_mask(lens, padded)[..., None], F.pad(x, (0, 0, 0, padded - num_frames)), last)
        return (x.unflatten(1, (-1, factor)) * self.bias.softmax(0).to(x.dtype)[:, None]).sum(2)


class DownsampledStack(nn.Module):
    """A stack at a lower rate: down, through it, up again by repetition, mixed with what went in."""

    def __init__(self, config: ZipformerConfig, stack: int, pace: Pace):
        super().__init__()
        self.downsample = Downsample(config.downsampling[stack])
        self.encoder = Stack(config, stack, pace)
        self.out_combiner = Bypass(config.dims[stack], pace)

    @property
    def layers(self) -> nn.ModuleList:
        """Those of the stack."""
        return self.encoder.layers

    def forward(
        self, x: Tensor, lens: Tensor, frames: Frames, caches: Sequence[LayerCache], channels: Tensor | None
    ) -> tuple[Tensor, list[LayerCache]]:
        """(B, S, D) at 50 Hz -> the same, and the next caches. `lens` is of these frames, `frames` is of the lower rate."""
        y, made = self.encoder(self.downsample(x, lens), frames, caches, channels)
        return self.out_combiner(x, y.repeat_interleave(len(self.downsample.bias), dim=1)[:, : x.shape[1]]), made


class Stacks(nn.Module):
    """All stacks, and the last step to 25 Hz."""

    def __init__(self, config: ZipformerConfig, pace: Pace):
        super().__init__()
        self._config = config
        # Not a ModuleList: the blocks that are sharded or compiled are the layers (nim4/train/speed.py).
        self.encoders = nn.Sequential(
            *((Stack if factor == 1 else DownsampledStack)(config, stack, pace) for stack, factor in enumerate(config.downsampling))
        )
        self.downsample_output = Downsample(2)

    def forward(self, x: Tensor, frames: dict[int, Frames], caches: Sequence[LayerCache]) -> tuple[Tensor, list[LayerCache]]:
        """(B, S, D) at 50 Hz -> (B, ceil(S / 2), widest D), and the next caches. `frames`: by downsampling."""
        config, outputs, made = self._config, [], []
        masks = self._channels(x)
        lens = frames[1].lens
        for stack, (factor, dim, channels) in enumerate(zip(config.downsampling, config.dims, masks, strict=True)):
            x = x[..., :dim] if dim <= x.shape[2] else F.pad(x, (0, dim - x.shape[2]))
            own = caches[len(made) : len(made) + config.num_layers[stack]]
            at = (frames[1],) if factor == 1 else (lens, frames[factor])
            x, new = self.encoders[stack](x, *at, own, channels)
            outputs.append(x)
            made += new
        widest = outputs.pop()
        for output in reversed(outputs):  # channels that the last stack does not have come from the last that had them
            widest = torch.cat([widest, output[..., widest.shape[2] :]], dim=-1)
        return self.downsample_output(widest, lens), made

    def _channels(self, x: Tensor) -> list[Tensor | None]:
        """In training some utterances keep the first channels only, the same in all stacks; others half of the rest, too."""
        config = self._config
        if not self.training:
            return [None] * len(config.dims)
        draws = torch.rand(2, len(x), 1, device=x.device) >= FEATURE_MASK_PROB
        half, rest = draws[0], draws[0] & draws[1]
        masks = []
        for dim, unmasked in zip(config.dims, config.unmasked_dims, strict=True):
            middle = unmasked + (dim - unmasked) // 2
            channel = torch.arange(dim, device=x.device)
            masks.append(((channel < unmasked) | (half & (channel < middle)) | rest)[:, None].to(x.dtype))
        return masks


class Zipformer(nn.Module):
    """The encoder: log-Mel features at 100 Hz in, frames of width D, that of the widest stack, at 25 Hz out."""

    lookahead_frames = 4 * EMBED_REACH + 1  # feature frames the last encoder frame of a chunk sees beyond its own four

    def __init__(self, config: ZipformerConfig):
        check_shape(config)
        super().__init__()
        self.config, self.pad_value = config, config.pad_value
        self._pace = Pace()
        self.encoder_embed = Subsampling(config, self._pace)
        self.encoder = Stacks(config, self._pace)

    def at_step(self, step: int) -> None:
        """Tells where in its first training the encoder is; until told it is at the end of all schedules, as a trained one should be."""
        self._pace.batch = step * 20_000.0 / self.config.relax_steps

    def forward(self, x: Tensor, x_lens: Tensor, context: Context = FULL_CONTEXT) -> tuple[Tensor, Tensor]:
        """Whole utterances.

        Args:
            x: (B, T, 80) float, normalised features; what lies beyond `x_lens` is ignored.
            x_lens: (B,) int64, feature frames per utterance.
            context: what each frame may see.
        Returns:
            (B, S, D) encoder frames, and (B,) int64 valid frames, ceil(x_lens / 4).
        Raises:
            RecipeError: for chunks, if the encoder is not causal or the slowest stack has no whole frames in them.
        """
        assert x.ndim == 3, x.shape
        self._check_context(context)
        num_frames = -(-x.shape[1] // SUBSAMPLING)
        x = F.pad(x, (0, 0, 0, SUBSAMPLING * num_frames + self.lookahead_frames - x.shape[1]))
        x = x.masked_fill(~valid_mask(x_lens, x.shape[1])[..., None], self.pad_value)
        out_lens = encoder_lens(x_lens)
        whole = context.chunk_frames == 0  # as in icefall an utterance then ends with zeros, and a stream with padding
        x, _ = self.encoder_embed(x, self.encoder_embed.empty_cache(len(x)), 2 * out_lens if whole else None)
        frames = {}
        for factor in {1, *self.config.downsampling}:
            lens, size = self._at_rate(2 * out_lens, factor), -(-x.shape[1] // factor)
            valid = valid_mask(lens, size)
            seen = chunk_mask(size, Context(2 * context.chunk_frames // factor, context.left_chunks), x.device)
            frames[factor] = Frames(lens, valid, ~(seen & valid[:, None])[:, None], 2 * context.chunk_frames // factor)
        caches = [layer.empty_cache(len(x), 0, x) for stack in self.encoder.encoders for layer in stack.layers]
        return self.encoder(x, frames, caches)[0], out_lens

    def initial_state(self, batch_size: int, context: Context) -> ZipformerState:
        """Empty caches for streams under `context`, which needs a chunk size and a limited left context.

        Raises:
            RecipeError: as `forward` does.
        """
        assert context.chunk_frames > 0, context
        assert context.left_chunks >= 0, context
        self._check_context(context)
        left, like = 2 * context.chunk_frames * context.left_chunks, self.encoder_embed.out.weight
        stacks = zip(self.encoder.encoders, self.config.downsampling, strict=True)
        return ZipformerState(
            embed=self.encoder_embed.empty_cache(batch_size),
            layers=[layer.empty_cache(batch_size, left // factor, like) for stack, factor in stacks for layer in stack.layers],
            filled=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
            chunk_frames=context.chunk_frames,
        )

    def forward_chunk(self, x: Tensor, state: ZipformerState, lens: Tensor | None = None) -> tuple[Tensor, ZipformerState]:
        """The next chunk of each stream.

        Args:
            x: (B, 4 C + 13, 80) float, normalised features of C encoder frames and 13 frames of look-ahead; at the end of a stream
                `pad_value` stands for the missing ones. C is the context's chunk size, or less in the last chunk.
            state: the caches after the chunk before; left unchanged.
            lens: as in Conformer.forward_chunk.
        Returns:
            (B, C, D) encoder frames, and the caches for the next chunk.
        """
        assert x.ndim == 3, x.shape
        assert (x.shape[1] - self.lookahead_frames) % SUBSAMPLING == 0, x.shape
        num_frames = (x.shape[1] - self.lookahead_frames) // SUBSAMPLING
        x, embed = self.encoder_embed(x, state.embed)
        x = F.pad(x, (0, 0, 0, 2 * (state.chunk_frames - num_frames)))
        all_lens = torch.full_like(state.filled, 2 * num_frames) if lens is None else 2 * lens
        frames, left = {}, state.layers[0].key.shape[1] * self.config.downsampling[0]
        for factor in {1, *self.config.downsampling}:
            lens = self._at_rate(all_lens, factor)
            valid = valid_mask(lens, x.shape[1] // factor)
            cached = torch.arange(left // factor, device=x.device) >= (left - state.filled[:, None]) // factor
            frames[factor] = Frames(lens, valid, ~torch.cat([cached, valid], dim=1)[:, None, None], x.shape[1] // factor)
        x, layers = self.encoder(x, frames, state.layers)
        filled = torch.clamp(state.filled + 2 * num_frames, max=left)
        return x[:, :num_frames], ZipformerState(embed, layers, filled, state.chunk_frames)

    @staticmethod
    def _at_rate(lens: Tensor, factor: int) -> Tensor:
        return torch.div(lens + factor - 1, factor, rounding_mode="floor")

    def _check_context(self, context: Context) -> None:
        slowest = max(self.config.downsampling)
        if context.chunk_frames == 0:
            return
        if not self.config.causal:
            raise RecipeError(
                "model.encoder.causal",
                expected="true for chunks: an encoder that was trained to stream",
                found="false: its convolutions look ahead",
                fix="decode with configs that do not stream, and train with train.chunk.full_prob=1",
            )
        if 2 * context.chunk_frames % slowest:
            raise RecipeError(
                "chunk size",
                expected=f"a multiple of {20 * slowest} ms, a frame of the slowest stack",
                found=f"{40 * context.chunk_frames} ms",
                fix="change chunk_ms or train.chunk.sizes",
            )
