"""Supervised fine-tuning (stages 4 to 7): cross-entropy on the transcript, and its validation numbers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nim4.config import SftConfig
from nim4.corpus.batch import TextBatch
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import FULL_CONTEXT
from nim4.train.augment import draw_context, freq_response, freq_warp, mask, time_stretch, time_warp
from nim4.train.cr_ctc import DEPLOYED
from nim4.train.loop import Draw


def sft_loss(mean: Tensor, config: SftConfig) -> Callable[[nn.Module, TextBatch, Draw], dict[str, Tensor]]:
    """The loss function for the training loop.

    Args:
        mean: (80,) global mean of the features; masked values become it.
        config: chunk contexts are drawn in every stage, as in pre-training: an encoder seen only offline would stream badly.
    Returns:
        a function of (model, batch, draw) that gives `loss`, nats summed over the answers' ids, and `accuracy`, how many were right.
    """

    def loss(model: nn.Module, batch: TextBatch, draw: Draw) -> dict[str, Tensor]:
        context = draw_context(config.chunk, draw.shared)
        x, x_lens = time_stretch(batch.x, batch.x_lens, torch.ones_like(batch.x_lens), config.augment.time_stretch, draw.own)
        x = time_warp(x, x_lens, config.augment.time_warp_frames, draw.own)
        x = freq_warp(x, config.augment.freq_warp, draw.own)
        x = freq_response(x, config.augment.freq_response, draw.own)
        x = mask(x, x_lens, mean, config.augment, config.augment.time_mask_ratio, draw.own)
        total, num_right = model(x, x_lens, batch.suffixes, batch.answers, context)
        return {"loss": total, "accuracy": num_right.to(total.dtype)}

    return loss


def validate_sft(model: SpeechLlm, batches: Iterable[TextBatch], device: torch.device) -> dict[str, float]:
    """Validation numbers with the transcript given up to each id.

    Returns:
        `loss` and `loss_streaming`: nats per id, with full and with the deployed context; `accuracy`, `accuracy_streaming`: shares;
        `score`: the mean of the two losses, which decides on the best weights (ours: both uses count).
    """
    sums = torch.zeros(2, 2, dtype=torch.float64)
    num_ids = 0.0
    for batch in batches:
        batch = batch.to(device)
        num_ids += batch.num_targets
        for row, context in enumerate((FULL_CONTEXT, DEPLOYED)):
            total, num_right = model(batch.x, batch.x_lens, batch.suffixes, batch.answers, context)
            sums[row] += torch.stack([total, num_right.to(total.dtype)]).double().cpu()
    (loss, accuracy), (loss_streaming, accuracy_streaming) = (sums / max(num_ids, 1.0)).tolist()
    numbers = {"score": (loss + loss_streaming) / 2, "loss": loss, "loss_streaming": loss_streaming}
    return numbers | {"accuracy": accuracy, "accuracy_streaming": accuracy_streaming}
