"""What hotwords did to a test set: what was retrieved, what the decoder made of it, and what leaked where nobody said it.

- Retrieval: of the names of the list that were said in an utterance, how many were hints (recall), and how many hints were said (precision).
- Adoption: hints that were said and are written; hints that were not said and are written all the same, which is the price.
- Leak: utterances whose transcript holds a hint that was not said there, e.g. silence, noise, speech about something else.
- B-WER and U-WER: error rates of the words inside and outside the list's names (Le et al. 2021, arXiv 2104.02194, section 4.1); an insertion
  counts where a name of the list is inserted, else outside.

Names are looked for as whole words, the longest at each place (nim4/corpus/keywords.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.corpus.keywords import Keywords, contains
from nim4.corpus.text import split_tokens
from nim4.score.bootstrap import interval, wilson
from nim4.score.error_rate import GAP, align


@dataclass(frozen=True)
class HotwordUtterance:
    """One utterance of a test set.

    Attributes:
        ref: what was said; empty in silence and noise.
        hyp: what was written; None = only retrieval is looked at.
        hints: in the order of the prompt.
        speaker: None = not known.
        id: for the list of leaks.
    """

    ref: str
    hyp: str | None
    hints: Sequence[str]
    audio_s: float
    speaker: str | None = None
    id: str = ""


@dataclass(frozen=True)
class Share:
    """k of n, with a 95 % interval in percent; all None where n is 0."""

    count: int
    total: int
    percent: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class HotwordScores:
    """Of one test set. `f1` and the rates are in percent; None where there is nothing to count."""

    recall: Share
    precision: Share
    f1: float | None
    false_alarms_per_hour: float | None
    false_alarms_interval: tuple[float, float] | None  # 95 %
    adopted: Share
    wrongly_adopted: Share
    leaks: Share
    leaked: list[tuple[str, str, str]]  # (id, what was said, hint that was written)
    b_wer: float | None
    u_wer: float | None


def score_hotwords(utterances: Sequence[HotwordUtterance], keywords: Keywords) -> HotwordScores:
    """Counts over a test set; `keywords` are the whole list, also those that nobody says."""
    spoken, found, hinted, false = [], [], [], []
    adopted, wrong, leaked = [0, 0], [0, 0], []
    errors = np.zeros((2, 2), np.int64)  # (outside, inside) by (errors, reference units)
    for own in utterances:
        said = {tuple(split_tokens(name)) for name in keywords.within(own.ref)}
        hints = list(dict.fromkeys(tuple(split_tokens(hint)) for hint in own.hints))
        ref = split_tokens(own.ref)
        spoken.append(len(said))
        found.append(sum(hint in said for hint in hints))
        hinted.append(len(hints))
        false.append(sum(not contains(ref, hint) for hint in hints))
        if own.hyp is None:
            continue
        hyp = split_tokens(own.hyp)
        for hint in hints:
            count = adopted if contains(ref, hint) else wrong
            count[0] += contains(hyp, hint)
            count[1] += 1
        leaked += [(own.id, own.ref, "".join(hint)) for hint in hints if contains(hyp, hint) and not contains(ref, hint)]
        errors += _errors_by_place(ref, hyp, keywords)
    written = [own for own in utterances if own.hyp is not None]
    leaks = sum(_leaks(own) for own in written)
    hours = [own.audio_s / 3600 for own in utterances]
    speakers = [own.speaker for own in utterances]
    recall, precision = share_of(found, spoken, speakers), share_of([a - b for a, b in zip(hinted, false, strict=True)], hinted, speakers)
    f1 = None
    if recall.percent is not None and precision.percent is not None:
        f1 = 2 * recall.percent * precision.percent / max(recall.percent + precision.percent, 1e-9)
    rates = [100.0 * float(row[0]) / float(row[1]) if row[1] else None for row in errors]
    return HotwordScores(
        recall,
        precision,
        f1,
        sum(false) / sum(hours) if sum(hours) > 0 else None,
        tuple(percent / 100 for percent in interval(false, hours, speakers)) if sum(hours) > 0 else None,
        Share(*adopted, *_wilson(*adopted)),
        Share(*wrong, *_wilson(*wrong)),
        Share(leaks, len(written), *_wilson(leaks, len(written))),
        leaked,
        b_wer=rates[1],
        u_wer=rates[0],
    )


def _leaks(own: HotwordUtterance) -> bool:
    ref, hyp = split_tokens(own.ref), split_tokens(own.hyp or "")
    return any(contains(hyp, hint) and not contains(ref, hint) for hint in map(split_tokens, own.hints))


def _errors_by_place(ref: Sequence[str], hyp: Sequence[str], keywords: Keywords) -> np.ndarray:
    """(2, 2): errors and reference units, outside the list's names and inside."""
    in_ref, in_hyp = (_inside(units, keywords) for units in (ref, hyp))
    counts = np.zeros((2, 2), np.int64)
    ref_at = hyp_at = 0
    for left, right in align(ref, hyp):
        place = in_hyp[hyp_at] if left == GAP else in_ref[ref_at]
        counts[place] += (left != right, left != GAP)
        ref_at, hyp_at = ref_at + (left != GAP), hyp_at + (right != GAP)
    return counts


def _inside(units: Sequence[str], keywords: Keywords) -> list[int]:
    inside = [0] * len(units)
    for start, end, _ in keywords.spans(units):
        inside[start:end] = [1] * (end - start)
    return inside


def share_of(counts: Sequence[int], totals: Sequence[int], speakers: Sequence[str | None]) -> Share:
    """With an interval over utterances or speakers: what one utterance holds goes together."""
    count, total = sum(counts), sum(totals)
    if total == 0:
        return Share(count, total, None, None, None)
    return Share(count, total, 100.0 * count / total, *interval(counts, totals, speakers))


def _wilson(count: int, total: int) -> tuple[float | None, float | None, float | None]:
    return (100.0 * count / total, *wilson(count, total)) if total else (None, None, None)


def pair_rates(refs: Sequence[str], hyps: Sequence[str | None], pairs: Iterable[tuple[str, str]]) -> list[dict[str, object]]:
    """For names that sound alike, both ways round: of the utterances in which only the first is said, how many have it, or the other one.

    Args:
        refs, hyps: texts of the same utterances.
        pairs: names.
    """
    rows: list[dict[str, object]] = []
    for said, other in (both for pair in pairs for both in (pair, pair[::-1])):
        units = split_tokens(said), split_tokens(other)
        texts = [split_tokens(hyp or "") for ref, hyp in zip(refs, hyps, strict=True) if _only(split_tokens(ref), *units)]
        right, wrong = (sum(contains(text, name) for text in texts) for name in units)
        rows.append({"said": said, "other": other, "utterances": len(texts), "right": right, "other_written": wrong})
    return rows


def _only(units: Sequence[str], name: Sequence[str], other: Sequence[str]) -> bool:
    return contains(units, name) and not contains(units, other)
