"""Cutting text into the words of a list."""

from collections.abc import Iterable, Iterator


class WordList:
    """Words found by longest match from left to right, the rule of pypinyin's own segmentation."""

    def __init__(self, words: Iterable[str]):
        self._words = frozenset(words)
        self._lengths: dict[str, list[int]] = {}  # first two characters -> lengths of the words that begin so, the longest first
        for start, length in sorted({(word[:2], len(word)) for word in self._words}, key=lambda pair: -pair[1]):
            self._lengths.setdefault(start, []).append(length)

    def split(self, run: str) -> Iterator[tuple[str, bool]]:
        """Cuts `run` into the words of the list and what is between them: (piece, is a word of the list)."""
        lengths_of, words, start, i = self._lengths, self._words, 0, 0
        while i < len(run):
            for length in (*lengths_of.get(run[i : i + 2], ()), 1):
                if run[i : i + length] in words:
                    break
            else:
                i += 1
                continue
            if start < i:
                yield run[start:i], False
            yield run[i : i + length], True
            start = i = i + length
        if start < len(run):
            yield run[start:], False
