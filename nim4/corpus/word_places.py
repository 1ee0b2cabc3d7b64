"""Where the words that a text is read as stand in it: what cutting it short, and telling when each word is said, need."""

import re
import unicodedata
from collections.abc import Sequence

from nim4.corpus.text import fold, is_han

PHONES_PER_HAN = 2  # of a Mandarin syllable

# where a word ends in the text, and the number of phonemes up to its end
Placed = list[tuple[int, int]]


def place_words(text: str, words: Sequence[tuple[str, Sequence[str]]]) -> Placed | None:
    """Finds the words of `text` in it.

    Args:
        words: see Lexicon.words. Chinese phrases with two phonemes for each character are placed character by character.
    Returns:
        for each word (end in `text`, phonemes up to there), both rising; None when a word is not written as it is read, or when
        something written is not read.
    """
    folded, origin = "", []  # `text` as words are written, and the place in `text` of each of its characters
    for place, char in enumerate(text):
        plain = unicodedata.normalize("NFKC", fold(char).lower())
        folded += plain
        origin += [place] * len(plain)
    ends: Placed = []
    cursor = num_phones = 0
    for word, phones in words:
        start = folded.find(word, cursor)
        if not word or not phones or start < 0 or _is_spoken(folded[cursor:start]):
            return None
        cursor = start + len(word)
        if len(word) > 1 and all(map(is_han, word)) and len(phones) == PHONES_PER_HAN * len(word):
            ends += [(origin[start + i] + 1, num_phones + PHONES_PER_HAN * (i + 1)) for i in range(len(word))]
        else:
            ends.append((origin[cursor - 1] + 1, num_phones + len(phones)))
        num_phones += len(phones)
    return None if _is_spoken(folded[cursor:]) else ends


def _is_spoken(gap: str) -> bool:
    """Whether there is a letter or a digit in what was passed over."""
    return re.search(r"[^\W_]", gap) is not None
