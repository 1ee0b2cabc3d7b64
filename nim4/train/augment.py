"""What training does to a batch of features: one time warp, masks drawn per view, and one draw of the chunk context.

Vectorised over the batch. All random numbers come from the generator that is passed in, so a step can be repeated exactly.
"""

import math

import torch
from torch import Generator, Tensor

from nim4.config import AugmentConfig, ChunkConfig
from nim4.model.conformer import FULL_CONTEXT, Context, valid_mask

NUM_RESPONSE = 4  # ours: loudness, tilt and two bends; speech has its own information in finer ones


def draw_context(config: ChunkConfig, generator: Generator) -> Context:
    """The context of one training batch; the same on every process that seeds `generator` alike."""
    kind, left_kind, size, left = torch.rand(4, generator=generator).tolist()
    if kind < config.full_prob:
        return FULL_CONTEXT
    if kind < config.full_prob + config.deployed_prob:
        return Context(16, 4)
    chunk_frames = config.sizes[int(size * len(config.sizes))]
    return Context(chunk_frames, -1 if left_kind < config.all_left_prob else 1 + int(left * config.max_left_chunks))


def time_warp(x: Tensor, x_lens: Tensor, max_shift: int, generator: Generator) -> Tensor:
    """Moves one point of each utterance along time and stretches both sides to fit; lengths stay.

    Args:
        x: (B, T, F) float.
        x_lens: (B,) int64. Utterances not longer than 2 * max_shift + 1 are left alone.
        max_shift: largest shift of the point, in frames; 0 switches the warp off.
    Returns:
        (B, T, F), linearly interpolated.
    Source: SpecAugment (arXiv 1904.08779), with the piece-wise linear map used by CR-CTC's recipe.
    """
    if max_shift == 0:
        return x
    num_frames = x.shape[1]
    u = torch.rand(2, x.shape[0], generator=generator).to(x.device)
    last = (x_lens - 1).to(torch.float32)
    warped = x_lens > 2 * max_shift + 1
    source = max_shift + u[0] * (last - 2 * max_shift)
    target = source + (2 * u[1] - 1) * (max_shift - 1)
    source, target = torch.where(warped, source, last / 2), torch.where(warped, target, last / 2)
    t = torch.arange(num_frames, device=x.device, dtype=torch.float32)[None]
    source, target, last = source[:, None], target[:, None], last[:, None]
    left = t * source / target.clamp(min=1e-3)
    right = source + (t - target) * (last - source) / (last - target).clamp(min=1e-3)
    position = torch.where(t <= target, left, right).clamp(min=0.0)
    position = torch.where(t > last, t, torch.minimum(position, last))
    below = position.floor().long().clamp(max=num_frames - 1)
    above = (below + 1).clamp(max=num_frames - 1)
    weight = (position - below)[..., None].to(x.dtype)
    index = [i[..., None].expand(-1, -1, x.shape[2]) for i in (below, above)]
    return torch.where(warped[:, None, None], torch.lerp(x.gather(1, index[0]), x.gather(1, index[1]), weight), x)


def time_stretch(x: Tensor, x_lens: Tensor, least: Tensor, max_change: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Another speaking rate for each utterance: its frames are resampled in time, so lengths change.

    Args:
        x: (B, T, F) float.
        x_lens: (B,) int64.
        least: (B,) int64, frames an utterance keeps in any case: CTC needs room for its phonemes.
        max_change: the rate changes by a factor of exp(-max_change) to exp(max_change); 0 switches it off.
    Returns:
        (B, T', F), linearly interpolated, and the new lengths.
    Source: speed perturbation (Ko et al. 2015) without its change of pitch, on features, so that no audio is read again.
    """
    if max_change == 0:
        return x, x_lens
    rate = torch.exp(max_change * (2 * torch.rand(x.shape[0], generator=generator) - 1)).to(x.device)
    new_lens = torch.maximum((x_lens / rate).round().long(), torch.minimum(least, x_lens))
    position = torch.arange(int(new_lens.max()), device=x.device) * ((x_lens - 1) / (new_lens - 1).clamp(min=1))[:, None]
    position = torch.minimum(position, (x_lens - 1)[:, None].to(position.dtype))
    below = position.floor().long()
    index = [i[..., None].expand(-1, -1, x.shape[2]) for i in (below, torch.minimum(below + 1, (x_lens - 1)[:, None]))]
    return torch.lerp(x.gather(1, index[0]), x.gather(1, index[1]), (position - below)[..., None].to(x.dtype)), new_lens


def freq_warp(x: Tensor, max_shift: float, generator: Generator) -> Tensor:
    """Stretches the mel axis of each utterance by a factor between 1 - max_shift and 1 + max_shift, as if another speaker spoke.

    Args:
        x: (B, T, F) float.
        max_shift: 0 switches it off.
    Source: vocal tract length perturbation (Jaitly and Hinton 2013); here on the log-Mel bins themselves, which is cheap.
    """
    if max_shift == 0:
        return x
    factor = 1 + max_shift * (2 * torch.rand(x.shape[0], 1, generator=generator) - 1)
    position = (torch.arange(x.shape[2]) * factor).clamp(max=x.shape[2] - 1).to(x.device)
    below = position.floor().long()
    index = [i[:, None].expand_as(x) for i in (below, (below + 1).clamp(max=x.shape[2] - 1))]
    return torch.lerp(x.gather(2, index[0]), x.gather(2, index[1]), (position - below)[:, None].to(x.dtype))


def freq_response(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Gives each row another loudness and a smooth frequency response, as if another microphone had heard it in another room.

    Args:
        x: (B, T, F) float, natural logarithms of energies.
        deviation: of each of NUM_RESPONSE cosines over the mel axis, the first of which is a constant; 0 switches it off.
    Source: ours; FilterAugment (Nam et al. 2022) weighs bands of frequencies for the same purpose.
    """
    if deviation == 0:
        return x
    place = math.pi * (torch.arange(x.shape[2]) + 0.5) / x.shape[2]
    cosines = torch.cos(torch.arange(NUM_RESPONSE)[:, None] * place)
    weights = deviation * torch.randn(x.shape[0], NUM_RESPONSE, generator=generator)
    return x + (weights @ cosines)[:, None].to(x)


def _spans(num_masks: Tensor, max_width: Tensor, axis_lens: Tensor, axis_size: int, generator: Generator) -> Tensor:
    """Union of random spans: (B,) each -> (B, axis_size) bool. Widths are uniform in 0..max_width, places uniform inside."""
    most = int(num_masks.max()) if len(num_masks) else 0
    u = torch.rand(2, len(num_masks), most, generator=generator).to(axis_lens.device)
    width = (u[0] * (max_width[:, None] + 1)).floor()
    start = (u[1] * (axis_lens[:, None] - width + 1)).floor()
    at = torch.arange(axis_size, device=axis_lens.device)
    used = torch.arange(most, device=axis_lens.device) < num_masks[:, None]
    return ((at >= start[..., None]) & (at < (start + width)[..., None]) & used[..., None]).any(1)


def mask(x: Tensor, x_lens: Tensor, fill: Tensor, config: AugmentConfig, ratio: float, generator: Generator) -> Tensor:
    """SpecAugment masks.

    Args:
        x: (B, T, F) float; each row gets masks of its own.
        x_lens: (B,) int64.
        fill: (F,) what masked values become: the global mean of the features.
        ratio: multiplies the number of time masks and the share of time they may cover (2.5 in CR-CTC, 1 in plain CTC).
    Source: SpecAugment; how a short utterance gets fewer and narrower time masks follows lhotse's SpecAugment.
    """
    lens = x_lens.to(torch.float32)
    most_masked = (config.max_time_mask_fraction * ratio * lens).floor()
    num_masks = (most_masked / max(config.max_time_mask_frames, 1)).ceil().clamp(max=int(config.num_time_masks * ratio))
    max_width = torch.minimum(torch.full_like(lens, config.max_time_mask_frames), (most_masked / num_masks.clamp(min=1)).floor())
    time = _spans(num_masks, max_width, lens, x.shape[1], generator)
    batch = torch.ones_like(lens)
    frequency = _spans(batch * config.num_freq_masks, batch * config.max_freq_mask_bins, batch * x.shape[2], x.shape[2], generator)
    masked = (time[:, :, None] | frequency[:, None, :]) & valid_mask(x_lens, x.shape[1])[..., None]
    return torch.where(masked, fill, x)
