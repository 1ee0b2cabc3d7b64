"""Phoneme CTC: the head, the model of stage 3, CTC and CR-CTC losses, greedy search, forced alignment."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import ModelConfig, ZipformerConfig
from nim4.model.conformer import FULL_CONTEXT, Conformer, Context, valid_mask
from nim4.model.zipformer import Zipformer

BLANK = 0


class PhonemeHead(nn.Module):
    """Three linear layers from encoder frames to phonemes (paper, section 3.1; widths and SiLU are ours)."""

    def __init__(self, dim: int, vocab_size: int, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(dim, vocab_size)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):  # keeps the scale of the frames; torch's default shrinks it to a few per cent in three layers
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V) float32 log-probabilities."""
        return F.log_softmax(self.layers(x).float(), dim=-1)


class PhonemeModel(nn.Module):
    """Feature normalisation, encoder and phoneme head: what stage 3 trains and CTC decoding runs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = (Zipformer if isinstance(config.encoder, ZipformerConfig) else Conformer)(config.encoder)
        self.head = PhonemeHead(config.encoder.dim, config.vocab_size, config.encoder.dropout)
        self.register_buffer("mean", torch.zeros(config.encoder.num_mel_bins))
        self.register_buffer("inverse_std", torch.ones(config.encoder.num_mel_bins))

    def train(self, mode: bool = True) -> "PhonemeModel":
        """Like any module's, but parts that are frozen as a whole stay in evaluation mode: without dropout."""
        super().train(mode)
        frozen_in_evaluation(self.encoder, self.head)
        return self

    def at_step(self, step: int) -> None:
        """Tells where in its first training the model is, for a Zipformer's schedules; a trained one is at their end and needs no telling."""
        if isinstance(self.encoder, Zipformer):
            self.encoder.at_step(step)

    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Takes the global mean and standard deviation of the features, (80,) each, into the weights."""
        self.mean.copy_(mean)
        self.inverse_std.copy_(1.0 / std)

    def normalise(self, x: Tensor) -> Tensor:
        """(B, T, 80) log-Mel features -> the same, mean 0 and variance 1 over the training data, in the type of the weights."""
        return ((x - self.mean) * self.inverse_std).to(next(self.encoder.parameters()).dtype)

    def forward(self, x: Tensor, x_lens: Tensor, *contexts: Context) -> tuple[Tensor, Tensor]:
        """Log-Mel features (B, T, 80) -> (B, S, V) log-probabilities and (B,) encoder lengths.

        `contexts`: what frames may see, one for each equal part of the batch, in order; none means the whole utterance.
        """
        contexts = contexts or (FULL_CONTEXT,)
        parts = zip(self.normalise(x).chunk(len(contexts)), x_lens.chunk(len(contexts)), contexts, strict=True)
        encoded, lens = zip(*(self.encoder(*part) for part in parts), strict=True)
        return self.head(torch.cat(encoded)), torch.cat(lens)


def frozen_in_evaluation(*parts: nn.Module) -> None:
    """Puts the parts without a trainable parameter into evaluation mode."""
    for part in parts:
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def ctc_loss(log_probs: Tensor, x_lens: Tensor, phones: Tensor, phone_lens: Tensor) -> Tensor:
    """CTC loss summed over the batch.

    Args:
        log_probs: (B, S, V) float32.
        x_lens: (B,) int64, valid frames.
        phones: (B, P) int64, padded with anything.
        phone_lens: (B,) int64.
    Returns:
        () float32; infinite when an utterance has fewer frames than its phonemes need.
    """
    return F.ctc_loss(log_probs.transpose(0, 1), phones, x_lens, phone_lens, blank=BLANK, reduction="sum")


def consistency_loss(log_probs: Tensor, x_lens: Tensor, delay: int = 0) -> Tensor:
    """Symmetric KL divergence between two views, summed over valid frames: the CR term of CR-CTC.

    Args:
        log_probs: (2B, S, V) float32, first views then second views of the same B utterances.
        x_lens: (2B,) int64.
        delay: frames by which the second views may be late: their frame s is compared with the first views' s - `delay`.
    Returns:
        () float32: 1/2 [KL(sg(z2) || z1) + KL(sg(z1) || z2)]; each target side is detached.
    Source: arXiv 2410.05101, section 3.2; the delay is ours.
    """
    assert log_probs.shape[0] % 2 == 0, log_probs.shape
    first, second = log_probs.chunk(2)
    first, second = first[:, : first.shape[1] - delay], second[:, delay:]
    compared, to = torch.cat([first, second]), torch.cat([second, first]).detach()
    divergence = F.kl_div(compared, to, reduction="none", log_target=True).sum(-1)
    return 0.5 * divergence.masked_fill(~valid_mask(x_lens - delay, compared.shape[1]), 0.0).sum()


def collapse(frame_ids: Sequence[int], last: int = BLANK) -> list[int]:
    """Frame labels -> phoneme ids: repeats merged, blanks dropped. `last` is the label before the first frame, in a stream."""
    phones = []
    for label in frame_ids:
        if label != last and label != BLANK:
            phones.append(label)
        last = label
    return phones


def greedy_search(log_probs: Tensor, x_lens: Tensor) -> list[list[int]]:
    """Best phoneme per frame, collapsed: (B, S, V), (B,) -> B lists of phoneme ids."""
    best = log_probs.argmax(-1).cpu()
    return [collapse(row[:length].tolist()) for row, length in zip(best, x_lens.tolist(), strict=True)]


def forced_align(log_probs: np.ndarray, phones: Sequence[int]) -> np.ndarray:
    """Where each phone is said: the most probable CTC path that spells `phones` (Viterbi).

    Args:
        log_probs: (S, V) float32, natural logarithms, of one utterance without padding.
        phones: P ids, without blanks.
    Returns:
        (P, 2) int64, first and last encoder frame of each phone, both inclusive, in order and without overlap; the frames between
        are the path's blanks. Of equally probable paths, one is chosen, always the same.
    Raises:
        ValueError: if CTC does not fit: more phones than frames, counting the blank that two equal neighbours need between them,
            or no path with a probability above 0; or if an id is the blank, or no column of `log_probs`.
    """
    if len(phones) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    num_frames, vocab_size = log_probs.shape
    labels = np.full(2 * len(phones) + 1, BLANK)  # a state for each phone, and one for the blanks before, between and behind them
    labels[1::2] = own = np.asarray(phones, dtype=np.int64)
    if own.min() < 0 or own.max() >= vocab_size or BLANK in own:
        raise ValueError(f"phones must be ids from 0 to {vocab_size - 1} other than the blank {BLANK}, but are {own.tolist()}")
    differs = own[1:] != own[:-1]
    least = len(own) + int((~differs).sum())
    if num_frames < least:
        raise ValueError(f"{len(own)} phones need at least {least} frames, but there are {num_frames}")
    may_skip = np.zeros(len(labels), dtype=bool)  # the blank before this state
    may_skip[3::2] = differs
    emitted = log_probs[:, labels].astype(np.float64)
    score = np.full(len(labels), -np.inf)
    score[:2] = emitted[0, :2]
    moved = np.zeros((num_frames, len(labels)), dtype=np.int8)  # states that the best path into here went forward: 0, 1 or 2
    by_move = np.full((3, len(labels)), -np.inf)
    for frame in range(1, num_frames):
        by_move[0], by_move[1, 1:], by_move[2, 2:] = score, score[:-1], np.where(may_skip[2:], score[:-2], -np.inf)
        moved[frame] = by_move.argmax(0)
        score = by_move.max(0) + emitted[frame]
    state = len(labels) - 1 - int(score[-2] >= score[-1])
    if not score[state] > -np.inf:
        raise ValueError("no alignment has a probability above 0")
    path = np.empty(num_frames, dtype=np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = state
        state -= int(moved[frame, state])
    states = np.arange(1, len(labels), 2)
    return np.stack([np.searchsorted(path, states), np.searchsorted(path, states, side="right") - 1], axis=1)
