"""Text that nobody said: hallucinations, loops, words where nothing is said, and outputs that are empty.

A hallucination is a hypothesis more than half as long again as its reference that shares next to nothing with it (arXiv 2604.18105, evaluation).
The paper gives no threshold of "next to nothing": here the longest common subsequence must be less than OVERLAP of the hypothesis, ours, and
every table shows it. Units are mixed ones. Where nothing was said, any output is a hallucination.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from nim4.score.bootstrap import wilson
from nim4.score.error_rate import ScoredUtterance

LONGER = 1.5
OVERLAP = 0.2
LOOPS = 5  # times in a row that the same units stand in a hypothesis, for it to be a repetition
MAX_LOOP_UNITS = 20


def common_units(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence. Source: Hyyro 2004, bit-parallel LCS: time grows with len(b), memory with len(a)."""
    places: dict[str, int] = {}
    for i, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << i
    everything = row = (1 << len(a)) - 1
    for unit in b:
        hits = row & places.get(unit, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(a) - row.bit_count()


def is_hallucinated(ref: Sequence[str], hyp: Sequence[str], overlap: float = OVERLAP) -> bool:
    """The paper's rule, with the share of the hypothesis below which there is no overlap."""
    return len(hyp) > LONGER * len(ref) and common_units(ref, hyp) < overlap * len(hyp)


def num_loops(units: Sequence[str]) -> int:
    """The most times that the same 1 to 20 units follow themselves; 1 = nothing repeats."""
    most = 1
    for length in range(1, min(MAX_LOOP_UNITS, len(units) // 2) + 1):
        alike = longest = 0
        for i in range(length, len(units)):
            alike = alike + 1 if units[i] == units[i - length] else 0
            longest = max(longest, alike)
        most = max(most, 1 + longest // length)
    return most


def is_repetition(ref: Sequence[str], hyp: Sequence[str]) -> bool:
    """The hypothesis says the same thing LOOPS times in a row, and oftener than the reference does."""
    if len(hyp) < LOOPS or max(Counter(hyp).values()) < LOOPS:
        return False  # a loop has a unit that is there often
    return num_loops(hyp) > max(LOOPS - 1, num_loops(ref))


def share(count: int, total: int) -> dict[str, Any]:
    """k of n, the rate in percent, and its 95 % interval (Wilson); without any n, no rate."""
    if not total:
        return {"k": count, "n": 0, "rate": None, "ci_low": None, "ci_high": None}
    low, high = wilson(count, total)
    return {"k": count, "n": total, "rate": round(100 * count / total, 4), "ci_low": round(low, 4), "ci_high": round(high, 4)}


def made_up(scored: Sequence[ScoredUtterance], overlap: float = OVERLAP) -> dict[str, Any]:
    """Shares of one system: hallucination, repetition, text where nothing is said, empty output where something is.

    Args:
        scored: of mixed units (MER), all utterances; those without a hypothesis made nothing up, and still count in n.
    """
    spoken = [utt for utt in scored if utt.ref]
    silent = [utt for utt in scored if not utt.ref]
    return {
        "rule": f"more than {LONGER} times the reference's units, and common ones below {overlap} of the hypothesis",
        "hallucination": share(sum(is_hallucinated(utt.ref, utt.hyp, overlap) for utt in scored), len(scored)),
        "repetition": share(sum(is_repetition(utt.ref, utt.hyp) for utt in scored), len(scored)),
        "non_speech_text": share(sum(bool(utt.hyp) for utt in silent), len(silent)),
        "empty": share(sum(utt.missing == "empty" for utt in spoken), len(spoken)),
    }
