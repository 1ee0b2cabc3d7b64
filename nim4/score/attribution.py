"""What kinds of errors a system makes: how many of them are a way of writing, and how many are words.

The steps of the profile `fair` are taken one after the other, and the errors that vanish with a step are of its kind; those that `fair` still
counts are `lexical`. Where a step adds errors (a name of letters that becomes one unit), they are taken from what it and later steps remove, so
that the kinds always add up to the errors there were. Source: ours.
"""

from collections import Counter
from collections.abc import Mapping

from nim4.score import profiles
from nim4.score.error_rate import edit_distance, merge_compounds

KINDS = (*profiles.LADDER, "lexical")


def attribute(ref: str, hyp: str, errors: int, *, chinese: bool) -> Mapping[str, int]:
    """How many of `errors` are of each kind; kinds without any are left out. All are lexical where `fair` counts as many.

    Args:
        ref, hyp: texts as published, or as a profile wrote them.
        errors: mixed errors of `hyp` before the first step, under the profile whose errors are explained.
        chinese: as of profiles.normalise.
    """
    ref_units, hyp_units = (tuple(profiles.units(profiles.fair(text, profiles.LADDER, chinese=chinese), "MER", "fair")) for text in (ref, hyp))
    if distance(ref_units, merge_compounds(ref_units, hyp_units)) >= errors:
        return Counter(lexical=errors)  # so most are, and there is no need to take the steps
    kinds: Counter[str] = Counter()
    left = errors
    steps: list[str] = []
    for step in profiles.LADDER:
        if not left:
            break
        if step not in ("punctuation", "compound"):
            steps.append(step)
        if step != "compound":
            ref_units, hyp_units = (tuple(profiles.units(profiles.fair(text, steps, chinese=chinese), "MER", "fair")) for text in (ref, hyp))
        else:
            hyp_units = merge_compounds(ref_units, hyp_units)
        now = distance(ref_units, hyp_units)
        if now < left:
            kinds[step] += left - now
            left = now
    if left:
        kinds["lexical"] = left
    return kinds


def distance(ref: tuple[str, ...], hyp: tuple[str, ...]) -> int:
    """Least number of insertions, deletions and substitutions."""
    return 0 if ref == hyp else edit_distance(ref, hyp)
