"""The reward of a transcript (paper, section 3.5), and signs that a model games it. Texts in, numbers out.

    R = R_accuracy + 0.5 R_hallucination + 0.5 R_context

Both sides are normalised alike first: one unit per Chinese character, Latin word or number. Where the reference is empty, or an
utterance has no keyword, the paper says nothing; those cases are ours and are told below.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nim4.config import RewardConfig
from nim4.corpus.keywords import contains
from nim4.corpus.text import split_tokens
from nim4.score.error_rate import edit_distance

LONG, SHORT = 2.0, 0.5  # paper: a hypothesis of more or less than this many times the reference's length is taken for a hallucination
KEYWORD_SCORE = 0.5  # paper
LOOP_TIMES, LOOP_UNITS = 4, 8  # ours: up to 8 units, 4 times in a row; people do say a word three times


@dataclass(frozen=True)
class Reward:
    """The parts of a reward, before they are weighted, and their sum."""

    accuracy: float  # 0..1; 0 only where exp() has no smaller number
    hallucination: float  # -1 or 0
    context: float  # -0.5..0.5, in the form `agreement` 0..1
    total: float


def reward(hyp: str, ref: str, keywords: Sequence[str], config: RewardConfig) -> Reward:
    """The reward of the transcript `hyp` of an utterance in which `ref` was said.

    Args:
        keywords: what the context part looks for.
    """
    hyp_units, ref_units = split_tokens(hyp), split_tokens(ref)
    accurate = accuracy(hyp_units, ref_units, config.accuracy_slope)
    hallucinated = hallucination(hyp_units, ref_units)
    in_context = (agreement if config.context == "agreement" else recall)(hyp_units, ref_units, [split_tokens(word) for word in keywords])
    total = accurate + config.hallucination_weight * hallucinated + config.context_weight * in_context
    return Reward(accurate, hallucinated, in_context, total)


def accuracy(hyp: Sequence[str], ref: Sequence[str], slope: float) -> float:
    """exp(-slope * error rate); with an empty reference every unit counts as one whole error rate (ours)."""
    return math.exp(-slope * edit_distance(ref, hyp) / max(len(ref), 1))


def hallucination(hyp: Sequence[str], ref: Sequence[str]) -> float:
    """-1 where the length is far from the reference's, or something was written though nothing was said; else 0."""
    if not ref:
        return -1.0 if hyp else 0.0
    return -1.0 if len(hyp) > LONG * len(ref) or len(hyp) < SHORT * len(ref) else 0.0


def recall(hyp: Sequence[str], ref: Sequence[str], keywords: Sequence[Sequence[str]]) -> float:
    """Mean over the keywords that were said of +0.5 where the hypothesis has it and -0.5 where not; 0 when none was said (ours)."""
    said = [keyword for keyword in keywords if contains(ref, keyword)]
    scores = [KEYWORD_SCORE if contains(hyp, keyword) else -KEYWORD_SCORE for keyword in said]
    return sum(scores) / len(scores) if scores else 0.0


def agreement(hyp: Sequence[str], ref: Sequence[str], keywords: Sequence[Sequence[str]]) -> float:
    """Share of the keywords, said or not, on which hypothesis and reference agree; 0 without keywords.

    Source: arXiv 2512.21828; it also punishes a hint that was copied though nobody said it.
    """
    return sum(contains(hyp, keyword) == contains(ref, keyword) for keyword in keywords) / max(len(keywords), 1)


def is_loop(text: str) -> bool:
    """Whether some 1 to 8 units stand at least 4 times in a row."""
    units = split_tokens(text)
    for width in range(1, min(LOOP_UNITS, len(units) // LOOP_TIMES) + 1):
        in_row = 0  # places in a row whose unit is also `width` places before
        for i in range(width, len(units)):
            in_row = in_row + 1 if units[i] == units[i - width] else 0
            if in_row == width * (LOOP_TIMES - 1):
                return True
    return False


def length_ratio(hyp: str, ref: str) -> float:
    """Units of the hypothesis per unit of the reference; an empty reference counts as one unit."""
    return len(split_tokens(hyp)) / max(len(split_tokens(ref)), 1)


def copied_hints(hyp: str, ref: str, hints: Sequence[str]) -> float:
    """Share of the hints that are in the hypothesis though nobody said them; 0 without hints."""
    hyp_units, ref_units = split_tokens(hyp), split_tokens(ref)
    split = [split_tokens(hint) for hint in hints]
    return sum(contains(hyp_units, hint) and not contains(ref_units, hint) for hint in split) / max(len(hints), 1)
