"""Phoneme CTC: the head, the model of stage 3, CTC and CR-CTC losses, greedy search."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import ModelConfig
from nim4.model.conformer import FULL_CONTEXT, Conformer, Context, valid_mask

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
    """Feature normalisation, Conformer and phoneme head: what stage 3 trains and CTC decoding runs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Conformer(config.encoder)
        self.head = PhonemeHead(config.encoder.dim, config.vocab_size, config.encoder.dropout)
        self.register_buffer("mean", torch.zeros(config.encoder.num_mel_bins))
        self.register_buffer("inverse_std", torch.ones(config.encoder.num_mel_bins))

    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Takes the global mean and standard deviation of the features, (80,) each, into the weights."""
        self.mean.copy_(mean)
        self.inverse_std.copy_(1.0 / std)

    def normalise(self, x: Tensor) -> Tensor:
        """(B, T, 80) log-Mel features -> the same, mean 0 and variance 1 over the training data."""
        return (x - self.mean) * self.inverse_std

    def forward(self, x: Tensor, x_lens: Tensor, context: Context = FULL_CONTEXT) -> tuple[Tensor, Tensor]:
        """Log-Mel features (B, T, 80) -> (B, S, V) log-probabilities and (B,) encoder lengths."""
        x, x_lens = self.encoder(self.normalise(x), x_lens, context)
        return self.head(x), x_lens


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


def consistency_loss(log_probs: Tensor, x_lens: Tensor) -> Tensor:
    """Symmetric KL divergence between two views, summed over valid frames: the CR term of CR-CTC.

    Args:
        log_probs: (2B, S, V) float32, first views then second views of the same B utterances.
        x_lens: (2B,) int64.
    Returns:
        () float32: 1/2 [KL(sg(z2) || z1) + KL(sg(z1) || z2)]; each target side is detached.
    Source: arXiv 2410.05101, section 3.2.
    """
    assert log_probs.shape[0] % 2 == 0, log_probs.shape
    target = log_probs.detach().roll(log_probs.shape[0] // 2, dims=0)
    divergence = F.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)
    return 0.5 * divergence.masked_fill(~valid_mask(x_lens, log_probs.shape[1]), 0.0).sum()


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
