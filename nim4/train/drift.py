"""How far the encoder has moved since a stage began: the drift alarm of joint fine-tuning.

Ours: the paper reports what end-to-end training does to an encoder that was fine-tuned too early, and gives no alarm. It is the measure of
its swap trigger (section 3.3), between the encoder in training and the one the stage started from.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from nim4.corpus.batch import Batch
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import valid_mask
from nim4.train.cka import PooledCka, take_frames

log = logging.getLogger("nim4")


class DriftAlarm:
    """Linear CKA (unbiased, see nim4/train/cka.py) of the encoder with itself as it was when this was made, on a fixed list.

    Args:
        model: on the device it trains on, with the weights to compare with.
        batches: the list; the frames of its first batches count, `max_frames` of them.
        threshold: a warning is logged below it.
    """

    def __init__(self, model: SpeechLlm, batches: Iterable[Batch], max_frames: int, threshold: float):
        self._model, self._max_frames, self._threshold = model, max_frames, threshold
        self._batches = take_frames(iter(batches), max_frames)
        self._reference = self._frames()

    def measure(self) -> dict[str, float]:
        """`encoder_cka`, 1 for an encoder that has not moved; called in evaluation mode."""
        pooled = PooledCka(unbiased=True)
        pooled.add(self._frames(), self._reference)
        cka = pooled.value()
        if not cka >= self._threshold:  # also when it is not a number
            log.warning(
                "drift alarm: CKA of the encoder with the one this stage started from is %.4f, below drift_alarm %g; "
                "a lower train.encoder_lr_ratio keeps it nearer",
                cka,
                self._threshold,
            )
        return {"encoder_cka": cka}

    @torch.inference_mode()
    def _frames(self) -> Tensor:
        """(N, D) float32 valid encoder frames on the CPU, under full context."""
        was_training = self._model.training
        self._model.eval()
        frames, left = [], self._max_frames
        for batch in self._batches:
            batch = batch.to(self._model.acoustic.mean.device)
            encoded, lens = self._model.encode(batch.x, batch.x_lens)
            frames.append(encoded[valid_mask(lens, encoded.shape[1])].float().cpu()[:left])
            left -= len(frames[-1])
        self._model.train(was_training)
        return torch.cat(frames)
