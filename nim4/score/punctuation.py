"""Punctuation of hypotheses against references: F1 of each mark, and of all.

Words are aligned first, as for the error rate, without regard to marks. A mark is right when the reference has the same one behind the word that
the hypothesis's word stands for, whether or not that word is right. Behind a word that is missing, marks of the reference are missed; behind one
that is inserted, marks of the hypothesis are wrong. Source: ours, as it is usual to score punctuation on recognised text; arXiv 2604.18105 has none.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from nim4.corpus.punctuation import marked_tokens
from nim4.score.error_rate import GAP, align


@dataclass(frozen=True)
class MarkScore:
    """Of one mark, or of all: how many the references and the hypotheses have, and how many of both are the same."""

    in_refs: int
    in_hyps: int
    right: int

    @property
    def f1(self) -> float | None:
        """In percent; None where neither has any."""
        total = self.in_refs + self.in_hyps
        return 200 * self.right / total if total else None


def punctuation_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, MarkScore]:
    """Scores by mark, the most frequent in the references first, and under "all" those of all together; full-width marks count as ASCII ones.

    Args:
        pairs: texts of (reference, hypothesis), with their marks.
    """
    in_refs, in_hyps, right = Counter(), Counter(), Counter()
    for pair in pairs:
        ref, hyp = (marked_tokens(text) for text in pair)
        in_refs.update(mark for _, mark in ref if mark)
        in_hyps.update(mark for _, mark in hyp if mark)
        ref_at = hyp_at = 0
        for left, other in align([token for token, _ in ref], [token for token, _ in hyp]):
            if GAP not in (left, other) and ref[ref_at][1] == hyp[hyp_at][1] != "":
                right[ref[ref_at][1]] += 1
            ref_at, hyp_at = ref_at + (left != GAP), hyp_at + (other != GAP)
    marks = sorted(in_refs.keys() | in_hyps.keys(), key=lambda mark: (-in_refs[mark], mark))
    scores = {mark: MarkScore(in_refs[mark], in_hyps[mark], right[mark]) for mark in marks}
    return {"all": MarkScore(in_refs.total(), in_hyps.total(), right.total()), **scores}
