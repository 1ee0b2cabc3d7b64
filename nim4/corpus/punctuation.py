"""Punctuation: what of a text is written and not said; taken away for those who do not want it, and found for scoring.

Only marks of sentences count. What belongs to a word stays: 3.5, 12:30, O'Brien, U.S, well-known; so do signs that are read aloud, as % and &.
"""

import re

from nim4.corpus.text import joined, split_tokens

_MARKS = re.compile(
    r"[\uff0c\u3002\uff1f\uff01\u3001\uff1b\uff1a\u2026\u2014\u00b7\u201c\u201d\uff08\uff09\u300a-\u300f\u3010\u3011?!;\"()\[\]{}]"
    r"|(?<!\d)[,:]|[,:](?!\d)|(?<!\w)\.|\.(?!\w)|(?<!\w)['\u2018\u2019]|['\u2018\u2019](?!\w)"
)
# Marks that say the same, by the one that stands for them in scores.
_ALIKE = {"\uff0c": ",", "\u3002": ".", "\uff1f": "?", "\uff01": "!", "\uff1b": ";", "\uff1a": ":"}

_SCORED = ",.?!;:\u3001\u2026\u2014"  # what stands behind a word; quotation marks and brackets stand around several


def without_punctuation(text: str) -> str:
    """The text without its marks. Example: "总工，open 3.5, please！" -> "总工open 3.5 please".

    The beginning of a text gives the beginning of what its whole gives.
    """
    return joined([piece.strip() for piece in _MARKS.split(text) if piece.strip()])


def marked_tokens(text: str) -> list[tuple[str, str]]:
    """The tokens that an error rate counts (nim4/corpus/text.py), each with the first mark behind it, or "".

    Example: "好，Open it." -> (好 ,) (open "") (it .)
    """
    tokens: list[tuple[str, str]] = []
    start = 0
    for mark in [*_MARKS.finditer(text), None]:
        found = split_tokens(text[start : mark.start() if mark else len(text)])
        tokens += [(token, "") for token in found]
        if mark is not None:
            name = _ALIKE.get(mark[0], mark[0])
            if tokens and not tokens[-1][1] and name in _SCORED:
                tokens[-1] = (tokens[-1][0], name)
            start = mark.end()
    return tokens
