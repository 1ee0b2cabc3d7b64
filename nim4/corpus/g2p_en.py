"""English words to ARPAbet phones without stress: CMUdict's first reading, letter names, or the letter-to-sound model.

The dictionary is CMUdict (BSD licence, see lexicon/LICENSE.cmudict) as packed by utils/train_letter_to_sound.py.
"""

import functools
import lzma
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nim4.corpus.letter_to_sound import LetterToSound

LEXICON_DIR = Path(__file__).resolve().parent / "lexicon"
Phones = tuple[str, ...]

LETTER_NAMES: dict[str, Phones] = {
    "a": ("EY",),
    "b": (
        "B",
        "IY",
    ),
    "c": (
        "S",
        "IY",
    ),
    "d": (
        "D",
        "IY",
    ),
    "e": ("IY",),
    "f": (
        "EH",
        "F",
    ),
    "g": (
        "JH",
        "IY",
    ),
    "h": (
        "EY",
        "CH",
    ),
    "i": ("AY",),
    "j": (
        "JH",
        "EY",
    ),
    "k": (
        "K",
        "EY",
    ),
    "l": (
        "EH",
        "L",
    ),
    "m": (
        "EH",
        "M",
    ),
    "n": (
        "EH",
        "N",
    ),
    "o": ("OW",),
    "p": (
        "P",
        "IY",
    ),
    "q": (
        "K",
        "Y",
        "UW",
    ),
    "r": (
        "AA",
        "R",
    ),
    "s": (
        "EH",
        "S",
    ),
    "t": (
        "T",
        "IY",
    ),
    "u": (
        "Y",
        "UW",
    ),
    "v": (
        "V",
        "IY",
    ),
    "w": (
        "D",
        "AH",
        "B",
        "AH",
        "L",
        "Y",
        "UW",
    ),
    "x": (
        "EH",
        "K",
        "S",
    ),
    "y": (
        "W",
        "AY",
    ),
    "z": (
        "Z",
        "IY",
    ),
}
_ENDINGS = {"n't": "AH N T", "'ll": "AH L", "'re": "ER", "'ve": "V", "'d": "D", "'m": "M"}
_SIBILANTS = ("S", "Z", "SH", "ZH", "CH", "JH")
_VOICELESS = ("P", "T", "K", "F", "TH")
MAX_SPELLED_CAPITALS = 3  # VIP, AI: capitals of at most this length are spelled even when they are also a word
MAX_SPELLED_UNKNOWN = 5  # ours: capitals outside the dictionary are spelled up to this length; HUAWEI is a word
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+|[A-Z]")


@functools.cache
def dictionary() -> dict[str, str]:
    """Word -> phones, 127 thousand words."""
    lines = lzma.decompress((LEXICON_DIR / "cmudict.tsv.xz").read_bytes()).decode("ascii").splitlines()
    return dict(line.split("\t") for line in lines)


@functools.cache
def letter_to_sound() -> "LetterToSound":
    from nim4.corpus.letter_to_sound import LetterToSound  # numba comes with it: most texts need neither

    return LetterToSound.load(LEXICON_DIR / "letter_to_sound.npz")


def spell(letters: str) -> Phones:
    """The names of the letters, one after the other; characters other than a-z are passed over."""
    return tuple(phone for letter in letters.lower() for phone in LETTER_NAMES.get(letter, ()))


@functools.cache
def read_word(word: str, case_counts: bool) -> tuple[Phones, str]:
    """The reading of one English word, and where it is from.

    Args:
        word: letters a-z in the published case, with inner apostrophes; accents removed.
        case_counts: False where the text is all capitals, so that capitals say nothing.
    Returns:
        phones, and how they were found: dictionary | letters (capitals, by rule) | spelled (an unknown word that must be letters) |
        parts (of a camel-case word or before 's) | letter-to-sound.
    """
    lower = word.lower()
    capitals = case_counts and word.isupper() and "'" not in word
    if capitals and len(word) <= MAX_SPELLED_CAPITALS:
        return spell(word), "letters"
    if lower in dictionary():
        return tuple(dictionary()[lower].split()), "dictionary"
    if "'" in word:
        return _read_with_ending(word, case_counts)
    parts = _CAMEL.findall(word) if case_counts else [word]
    if len(parts) > 1:
        readings = [read_word(part, case_counts) for part in parts]
        known = all(how != "letter-to-sound" for _, how in readings)
        return tuple(phone for phones, _ in readings for phone in phones), "parts" if known else "letter-to-sound"
    if (capitals and len(word) <= MAX_SPELLED_UNKNOWN) or not re.search("[aeiouy]", lower):
        return spell(word), "spelled"
    return tuple(letter_to_sound().phones(lower)) or spell(word), "letter-to-sound"


def _read_with_ending(word: str, case_counts: bool) -> tuple[Phones, str]:
    """A word with an apostrophe: its stem, and the sound of the ending."""
    lower = word.lower()
    for ending, sound in _ENDINGS.items():
        if lower.endswith(ending) and len(lower) > len(ending):
            phones, how = read_word(word[: -len(ending)], case_counts)
            return phones + tuple(sound.split()), _known(how)
    if lower.endswith("'s"):
        phones, how = read_word(word[:-2], case_counts)
        sound = ("IH", "Z") if phones[-1] in _SIBILANTS else ("S",) if phones[-1] in _VOICELESS else ("Z",)
        return phones + sound, _known(how)
    parts = [read_word(part, case_counts) for part in word.split("'")]  # O'Neal, rock'n'roll
    known = all(_known(how) == "parts" for _, how in parts)
    return tuple(phone for phones, _ in parts for phone in phones), "parts" if known else "letter-to-sound"


def _known(how: str) -> str:
    return how if how == "letter-to-sound" else "parts"
