"""Cutting text into the words of a list."""

from collections.abc import Iterable
from operator import add


class WordList:
    """Words found by longest match from left to right, the rule of pypinyin's own segmentation."""

    def __init__(self, words: Iterable[str]):
        self._words = frozenset(words)
        self._singles = frozenset(word for word in self._words if len(word) == 1)
        self._lengths: dict[str, list[int]] = {}  # first two characters -> lengths of the words that begin so, the longest first
        for start, length in sorted({(word[:2], len(word)) for word in self._words - self._singles}, key=lambda pair: -pair[1]):
            self._lengths.setdefault(start, []).append(length)

    def split(self, run: str) -> list[tuple[str, bool]]:
        """Cuts `run` into the words of the list and what is between them: (piece, is a word of the list)."""
        lengths, words, singles = self._lengths, self._words, self._singles
        begins = map(lengths.__contains__, map(add, run, run[1:]))  # most places begin no word: they are passed over without a loop of ours
        places = range(len(run)) if singles else [i for i, may_begin in enumerate(begins) if may_begin]
        pieces: list[tuple[str, bool]] = []
        start = 0
        for i in places:
            if i < start:
                continue
            word = run[i] if run[i] in singles else ""
            for length in lengths.get(run[i : i + 2], ()):
                if run[i : i + length] in words:
                    word = run[i : i + length]
                    break
            if word:
                if start < i:
                    pieces.append((run[start:i], False))
                pieces.append((word, True))
                start = i + len(word)
        if start < len(run):
            pieces.append((run[start:], False))
        return pieces
