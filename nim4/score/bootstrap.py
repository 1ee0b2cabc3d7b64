"""95 % intervals of error rates by bootstrap, and of the difference between two systems by paired bootstrap.

What is drawn is a block: a speaker where a test set has at least 10, since the errors of one speaker go together; otherwise an
utterance. The ends are the 2.5 and 97.5 percentiles of 1000 draws; with few blocks such an interval is somewhat too narrow.

Source: Bisani and Ney 2004, Bootstrap estimates for confidence intervals in ASR performance evaluation (ICASSP).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 1000
SEED = 0
MIN_SPEAKERS = 10
_PICKS_AT_ONCE = 2_000_000  # bounds the memory of one slice of draws to about 50 MB


@dataclass(frozen=True)
class Difference:
    """Rate of a second system less that of a first on the same utterances, in percentage points; below 0 the second is better."""

    points: float
    low: float
    high: float
    p_better: float  # share of draws in which the second has fewer errors; a tie counts half


def choose_block(speakers: Sequence[str | None]) -> str:
    """`speaker` where every utterance has one and at least 10 differ, else `utterance`."""
    return "speaker" if all(speakers) and len(set(speakers)) >= MIN_SPEAKERS else "utterance"


def interval(errors: Sequence[int], ref_units: Sequence[float], speakers: Sequence[str | None]) -> tuple[float, float]:
    """The 95 % interval of the pooled error rate, in percent.

    Args:
        errors, ref_units: per utterance. At least one reference unit in all.
        speakers: per utterance; they decide the block.
    """
    draws = _resampled_sums(np.stack([errors, ref_units], axis=1), speakers)
    low, high = np.percentile(_rate(draws[:, 0], draws[:, 1]), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(errors: Sequence[int], other_errors: Sequence[int], ref_units: Sequence[int], speakers: Sequence[str | None]) -> Difference:
    """How much worse or better the system of `other_errors` is: both are drawn on the same blocks, so that hard speakers cancel out.

    Args: all per utterance, in the same order.
    """
    table = np.stack([errors, other_errors, ref_units], axis=1)
    total = table.sum(axis=0, dtype=np.float64)
    draws = _resampled_sums(table, speakers)
    changes = _rate(draws[:, 1] - draws[:, 0], draws[:, 2])
    low, high = np.percentile(changes, [2.5, 97.5])
    p_better = np.mean(changes < 0) + 0.5 * np.mean(changes == 0)
    return Difference(float(100 * (total[1] - total[0]) / total[2]), float(low), float(high), float(p_better))


def _rate(errors: np.ndarray, ref_units: np.ndarray) -> np.ndarray:
    """Percent; draws that happen to hold empty references only have no rate and are left out."""
    some = ref_units > 0
    return 100.0 * errors[some] / ref_units[some]


def _resampled_sums(table: np.ndarray, speakers: Sequence[str | None]) -> np.ndarray:
    """(N, C) per utterance -> (NUM_DRAWS, C) float64: the columns' sums over blocks drawn with replacement."""
    if choose_block(speakers) == "speaker":
        _, block_ids = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
        columns = [np.bincount(block_ids, weights=column) for column in table.T]
    else:
        columns = [column.astype(np.float64) for column in table.T]
    num_blocks = len(columns[0])
    rng = np.random.default_rng(SEED)
    step = max(1, _PICKS_AT_ONCE // num_blocks)
    sums = np.empty((NUM_DRAWS, len(columns)))
    for start in range(0, NUM_DRAWS, step):
        picks = rng.integers(num_blocks, size=(min(step, NUM_DRAWS - start), num_blocks))
        for index, column in enumerate(columns):
            sums[start : start + len(picks), index] = column[picks].sum(axis=1)
    return sums


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent; it also says something about 0 of n.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    z, share = 1.959964, count / total
    middle, spread = share + z * z / (2 * total), z * ((share * (1 - share) + z * z / (4 * total)) / total) ** 0.5
    scale = 100.0 / (1 + z * z / total)
    return max(scale * (middle - spread), 0.0), min(scale * (middle + spread), 100.0)
