"""The loss of stage 3: consistency-regularised CTC on phonemes (CR-CTC, arXiv 2410.05101), or plain CTC.

Each utterance is warped in time once and then masked twice, independently; both views go through one forward pass, under one chunk
context, or the first one sees the whole utterance (`full_view`; ours, after dual-mode ASR, arXiv 2010.06030). Besides each view's CTC
loss their frame distributions are drawn together; a view that does not know what follows may be a little late (`view_delay`), else it
is made to guess the last phonemes of a chunk. Alpha is ramped up linearly, without which the consistency term can pull an untrained
model towards blanks only. Validation numbers of the stage are here too.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nim4.config import RecipeError, TrainConfig
from nim4.corpus.batch import Batch
from nim4.model.conformer import FULL_CONTEXT, SUBSAMPLING, Context, valid_mask
from nim4.model.ctc import BLANK, PhonemeModel, consistency_loss, ctc_loss, greedy_search
from nim4.score.error_rate import edit_distance
from nim4.train.augment import draw_context, freq_response, freq_warp, mask, time_stretch, time_warp
from nim4.train.loop import Draw

DEPLOYED = Context(16, 4)  # 640 ms chunks, 4 chunks of left context (paper, section 3.6)


def cr_ctc(mean: Tensor, config: TrainConfig) -> Callable[[nn.Module, Batch, Draw], dict[str, Tensor]]:
    """The loss function for the training loop.

    Args:
        mean: (80,) global mean of the features; masked values become it.
        config: `cr_weight` 0 gives plain CTC: one view, ordinary SpecAugment.
    Returns:
        a function of (model, batch, draw) that gives `loss` = `ctc` + alpha `cr`, each summed over the batch:
        1/2 [CTC(z1) + CTC(z2)] + alpha 1/2 [KL(sg(z2) || z1) + KL(sg(z1) || z2)].
    Raises:
        RecipeError: for a `view_delay` without two views of different contexts, or below 0.
    """
    if config.view_delay < 0 or (config.view_delay > 0 and not config.full_view):
        expected = "0, or a number of frames above it with train.full_view=true"
        raise RecipeError("train.view_delay", expected=expected, found=config.view_delay, fix="--set train.view_delay=0")
    views = 2 if config.cr_weight > 0 else 1
    time_mask_ratio = config.augment.time_mask_ratio if views == 2 else 1.0

    def loss(model: nn.Module, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        contexts = _contexts(config, draw, views)
        least = (2 * SUBSAMPLING * batch.phone_lens).clamp(min=1)  # an encoder frame for each phoneme, and one for a blank behind it
        x, x_lens = time_stretch(batch.x, batch.x_lens, least, config.augment.time_stretch, draw.own)
        x = time_warp(x, x_lens, config.augment.time_warp_frames, draw.own)
        x = freq_warp(x, config.augment.freq_warp, draw.own)
        x = freq_response(x, config.augment.freq_response, draw.own)
        x, x_lens = x.repeat(views, 1, 1), x_lens.repeat(views)
        x = mask(x, x_lens, mean, config.augment, time_mask_ratio, draw.own)
        log_probs, out_lens = model(x, x_lens, *contexts)
        ctc = ctc_loss(log_probs, out_lens, batch.phones.repeat(views, 1), batch.phone_lens.repeat(views)) / views
        if views == 1:
            return {"loss": ctc, "ctc": ctc}
        consistency = consistency_loss(log_probs, out_lens, config.view_delay)
        alpha = config.cr_weight * min(draw.step / max(config.cr_warmup_steps, 1), 1.0)
        return {"loss": ctc + alpha * consistency, "ctc": ctc, "cr": consistency}

    return loss


def _contexts(config: TrainConfig, draw: Draw, views: int) -> list[Context]:
    """One context for the batch; under `full_view` one for each of two views, while a single view has either of them."""
    drawn = draw_context(config.chunk, draw.shared)
    if not config.full_view:
        return [drawn]
    if views == 2:
        return [FULL_CONTEXT, drawn]
    return [FULL_CONTEXT if torch.rand((), generator=draw.shared) < 0.5 else drawn]


def validate(model: PhonemeModel, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Validation numbers of a phoneme model.

    Returns:
        `per` and `per_streaming`: phoneme error rate in percent, greedy, with full and with the deployed context;
        `score`: their mean, which decides on the best weights (ours: both uses count);
        `blank_share`, `entropy`: share of frames whose best label is blank, and mean entropy of the frame posteriors in nats;
        `nse`: normalised spectral entropy of the encoder frames, in [0, 1]; lower = fewer directions are used (our formula:
        the companion paper, arXiv 2604.08003, names the measure; of its definition we had only the name).
    """
    errors, units = {FULL_CONTEXT: 0, DEPLOYED: 0}, 0
    blanks = entropy = frames = 0.0
    second_moment = torch.zeros(model.config.encoder.dim, model.config.encoder.dim, dtype=torch.float64)
    total = torch.zeros(model.config.encoder.dim, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(device)
        refs = [row[:length].tolist() for row, length in zip(batch.phones, batch.phone_lens.tolist(), strict=True)]
        units += sum(map(len, refs))
        for context in errors:
            encoded, lens = model.encoder(model.normalise(batch.x), batch.x_lens, context)
            log_probs = model.head(encoded)
            hyps = greedy_search(log_probs, lens)
            errors[context] += sum(edit_distance(ref, hyp) for ref, hyp in zip(refs, hyps, strict=True))
            if context == FULL_CONTEXT:
                valid = valid_mask(lens, encoded.shape[1])
                blanks += float((log_probs.argmax(-1)[valid] == BLANK).sum())
                entropy -= float((log_probs.exp() * log_probs).sum(-1)[valid].sum())
                kept = encoded[valid].double().cpu()
                second_moment, total, frames = second_moment + kept.T @ kept, total + kept.sum(0), frames + len(kept)
    per, per_streaming = (100.0 * count / max(units, 1) for count in errors.values())
    numbers = {"score": (per + per_streaming) / 2, "per": per, "per_streaming": per_streaming}
    covariance = second_moment / frames - torch.outer(total, total) / frames**2
    return numbers | {"blank_share": blanks / frames, "entropy": entropy / frames, "nse": spectral_entropy(covariance, int(frames))}


def spectral_entropy(covariance: Tensor, num_frames: int) -> float:
    """NSE of frames with this (D, D) covariance: the entropy of its normalised eigenvalues over log of their greatest number."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-30)
    most = min(len(covariance), num_frames - 1)
    return float(-torch.special.xlogy(share, share).sum() / math.log(most)) if most > 1 else 0.0
