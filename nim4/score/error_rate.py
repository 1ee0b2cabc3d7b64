"""Error counts of hypotheses against references: PER, MER, CER and WER.

Every utterance of the test set is scored. Where there is no hypothesis (no row, a failed row, an empty one), all its reference
units are deletions: a decoder cannot improve its score by staying silent.
"""

from collections.abc import Callable, Mapping, Sequence
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
    insertions: int
    deletions: int
    substitutions: int
    missing: str | None  # absent | failed | empty: why there is no hypothesis; None = there is one

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def pairs(self) -> Pairs:
        """(reference unit, hypothesis unit), GAP on the side that has none; aligned again, since those of a large test set would fill memory."""
        return align(self.ref, self.hyp)


def align(ref: Sequence[str], hyp: Sequence[str]) -> Pairs:
    """A least-cost alignment of two unit sequences, each error costing 1; the same one every time."""
    if ref == hyp:
        return tuple(zip(ref, hyp, strict=True))
    return tuple(kaldialign.align(ref, hyp, GAP))


def merge_compounds(ref: Sequence[str], hyp: Sequence[str]) -> tuple[str, ...]:
    """`hyp` with the reference's spelling where two words of one side are one of the other: "dogcart" becomes "dog cart" if the reference has that.

    The reference stays as it is, so that all systems are measured against the same units.
    """
    if ref == hyp or not any(len(unit) > 1 for unit in (*ref, *hyp)):
        return tuple(hyp)
    units: list[str] = []
    for ref_side, hyp_side in kaldialign.align(ref, hyp, GAP, merge_compounds=True):
        compound = " " in ref_side or " " in hyp_side
        units += (ref_side if compound else hyp_side).split()
    return tuple(units)


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


def score(
    refs: Sequence[Reference],
    hyps: Mapping[str, Hypothesis],
    metric: str,
    text_units: Callable[[str], Sequence[str]] | None = None,
    compounds: bool = False,
) -> list[ScoredUtterance]:
    """Every reference aligned with its hypothesis, in the order of `refs`.

    Args:
        hyps: by utterance id. One that is not there, has failed, is empty, or (word metrics) has no text counts as all deletions.
        metric: one of METRICS.
        text_units: the units of a text, of another profile than `plain`; not asked for PER.
        compounds: see merge_compounds.
    """

    def units(phones: str, text: str) -> tuple[str, ...]:
        return tuple(units_of(metric, phones=phones, text=text) if text_units is None or metric == "PER" else text_units(text))

    scored = []
    for ref in refs:
        ref_units, hyp = units(ref.phones, ref.text), hyps.get(ref.id)
        missing = _reason(hyp, metric)
        hyp_units = () if missing else units(hyp.phones or "", hyp.text or "")
        if compounds:
            hyp_units = merge_compounds(ref_units, hyp_units)
        if not hyp_units and not missing and ref_units:
            missing = "empty"  # unless nothing was said: then nothing written is right
        scored.append(ScoredUtterance(ref.id, ref.speaker, ref_units, hyp_units, *_counts(ref_units, hyp_units), missing))
    return scored


def _counts(ref: tuple[str, ...], hyp: tuple[str, ...]) -> tuple[int, int, int]:
    """Insertions, deletions and substitutions."""
    if ref == hyp:
        return 0, 0, 0
    pairs = align(ref, hyp)
    insertions, deletions = len(pairs) - len(ref), len(pairs) - len(hyp)
    return insertions, deletions, sum(left != right for left, right in pairs) - insertions - deletions


def _reason(hyp: Hypothesis | None, metric: str) -> str | None:
    """Why there is nothing to score; None = there is a hypothesis, if only an empty one."""
    if hyp is None:
        return "absent"
    if hyp.error is not None:
        return "failed"
    return "absent" if metric != "PER" and hyp.text is None else None
