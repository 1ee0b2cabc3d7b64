"""Error counts of hypotheses against references: PER, MER, CER and WER.

Every utterance of the test set is scored. Where there is no hypothesis (no row, a failed row, an empty one), all its reference
units are deletions: a decoder cannot improve its score by staying silent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import kaldialign

from nim4.corpus import text as corpus_text
from nim4.score.decoded import Hypothesis, Reference

METRICS = ("PER", "MER", "CER", "WER")
GAP = ""  # the missing side of an insertion or a deletion; no unit is empty, so it cannot be taken for one

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance, aligned."""

    id: str
    speaker: str | None
    ref: tuple[str, ...]
    hyp: tuple[str, ...]
    pairs: Pairs  # (reference unit, hypothesis unit), GAP on the side that has none
    missing: str | None  # absent | failed | empty: why there is no hypothesis; None = there is one

    @property
    def insertions(self) -> int:
        return sum(ref == GAP for ref, _ in self.pairs)

    @property
    def deletions(self) -> int:
        return sum(hyp == GAP for _, hyp in self.pairs)

    @property
    def substitutions(self) -> int:
        return sum(ref != hyp and GAP not in (ref, hyp) for ref, hyp in self.pairs)

    @property
    def errors(self) -> int:
        return sum(ref != hyp for ref, hyp in self.pairs)


def align(ref: Sequence[str], hyp: Sequence[str]) -> Pairs:
    """A least-cost alignment of two unit sequences, each error costing 1; the same one every time."""
    return tuple(kaldialign.align(ref, hyp, GAP))


def edit_distance(ref: Sequence[int], hyp: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions between two sequences of ids."""
    return kaldialign.edit_distance(ref, hyp)["total"]


def units_of(metric: str, *, phones: str, text: str) -> list[str]:
    """The units that `metric` counts, after profile `plain` where they come from text.

    PER: phones. MER: one unit per Chinese character, Latin word or digit run. CER: every character but blanks, Latin letters
    included. WER: what blanks separate, so Chinese text, which has none, wants MER or CER.
    """
    if metric == "PER":
        return phones.split()
    if metric == "MER":
        return corpus_text.split_tokens(text)
    plain = corpus_text.normalise(text)
    if metric == "CER":
        return [character for character in plain if not character.isspace()]
    if metric == "WER":
        return plain.split()
    raise ValueError(f"metric must be one of {METRICS}, but is {metric!r}")


def score(refs: Sequence[Reference], hyps: Mapping[str, Hypothesis], metric: str) -> list[ScoredUtterance]:
    """Every reference aligned with its hypothesis, in the order of `refs`.

    Args:
        hyps: by utterance id. One that is not there, has failed, is empty, or (word metrics) has no text counts as all deletions.
        metric: one of METRICS.
    """
    scored = []
    for ref in refs:
        ref_units = tuple(units_of(metric, phones=ref.phones, text=ref.text))
        hyp_units, missing = _hyp_units(hyps.get(ref.id), metric)
        if missing == "empty" and not ref_units:
            missing = None  # nothing was said and nothing was written: right
        scored.append(ScoredUtterance(ref.id, ref.speaker, ref_units, hyp_units, align(ref_units, hyp_units), missing))
    return scored


def _hyp_units(hyp: Hypothesis | None, metric: str) -> tuple[tuple[str, ...], str | None]:
    if hyp is None:
        return (), "absent"
    if hyp.error is not None:
        return (), "failed"
    if metric != "PER" and hyp.text is None:
        return (), "absent"
    units = tuple(units_of(metric, phones=hyp.phones or "", text=hyp.text or ""))
    return units, None if units else "empty"
