"""The phoneme inventory: what the CTC head writes.

Mandarin: an initial and a final with its tone for every syllable; a syllable without an initial has the zero-initial `0`, so each
syllable is two symbols. `i` after z c s and after zh ch sh r is the same symbol as elsewhere: the initial tells them apart.
English: the 39 phones of ARPAbet without stress, in upper case, so the two languages never collide.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nim4.config import RecipeError
from nim4.stage import atomic_write

BLANK = "<blk>"
UNKNOWN = "<unk>"
ZERO_INITIAL = "0"


def _listed(line: str) -> tuple[str, ...]:
    return tuple(line.split())


INITIALS = _listed("b p m f d t n l g k h j q x zh ch sh r z c s")
FINALS = (
    *_listed("a o e ai ei ao ou an en ang eng er ong"),
    *_listed("i ia io ie iao iu ian in iang ing iong"),
    *_listed("u ua uo uai ui uan un uang ueng"),
    *_listed("v ve van vn"),
)  # v is ü; iu, ui and un also stand for you, wei and wen
TONES = "12345"  # 5 is the neutral tone
# Tones that a standard syllable with this final has, the neutral one included; all others have the five.
FEWER_TONES = {"er": "2345", "io": "15", "ueng": "1345"}
ARPABET = _listed("AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH")

# Pinyin of a syllable without an initial -> final; the two lists run in step.
_ZERO_INITIAL_SPELLING = dict(
    zip(
        _listed("yi ya yo ye yao you yan yin yang ying yong yu yue yuan yun wu wa wo wai wei wan wen wang weng"),
        _listed("i ia io ie iao iu ian in iang ing iong v ve van vn u ua uo uai ui uan un uang ueng"),
        strict=True,
    )
)
_INTERJECTIONS = {"n": "en", "ng": "en", "hm": "heng", "hng": "heng", "m": "mu", "ê": "ei"}  # ours: 嗯 噷 呣 诶 as the nearest full syllable


def syllable_phones(syllable: str) -> tuple[str, str]:
    """The initial and the toned final of a Mandarin syllable written in pinyin with its tone as a digit.

    Args:
        syllable: e.g. "yin2" -> ("0", "in2"), "ju4" or "jü4" or "jv4" -> ("j", "v4").
    Raises:
        ValueError: if it is no syllable of standard Mandarin.
    """
    match = re.fullmatch(r"([a-zêü]+)([1-5])", syllable)
    if match is None:
        raise ValueError(f"{syllable!r} must be pinyin and a tone 1-5")
    spelling = _INTERJECTIONS.get(match[1], match[1]).replace("ü", "v")
    initial = next((initial for initial in sorted(INITIALS, key=len, reverse=True) if spelling.startswith(initial)), ZERO_INITIAL)
    final = spelling.removeprefix(initial)
    if initial == ZERO_INITIAL:
        final = _ZERO_INITIAL_SPELLING.get(final, final)
    elif initial in ("j", "q", "x"):
        final = re.sub("^u", "v", final)
    elif final == "ue":
        final = "ve"  # lüe and nüe are also written without the dots
    if final not in FINALS or match[2] not in FEWER_TONES.get(final, TONES):
        raise ValueError(f"{syllable!r} is no syllable of standard Mandarin")
    return initial, final + match[2]


def symbols() -> list[str]:
    """All symbols, in the order of their ids."""
    toned = [final + tone for final in FINALS for tone in FEWER_TONES.get(final, TONES)]
    return [BLANK, UNKNOWN, ZERO_INITIAL, *INITIALS, *toned, *ARPABET]


class PhonemeInventory:
    """The symbols of a model and their ids; kept as `tokens.txt` beside its weights.

    Args:
        tokens: symbols in the order of their ids; the first is <blk>, the second <unk>.
    """

    blank_id = 0
    unk_id = 1

    def __init__(self, tokens: Sequence[str]):
        if list(tokens[:2]) != [BLANK, UNKNOWN]:
            raise ValueError(f"the first tokens must be {BLANK} and {UNKNOWN}, but are {list(tokens[:2])}")
        if len(set(tokens)) != len(tokens):
            raise ValueError("tokens must differ")
        self.tokens = tuple(tokens)
        self._ids = {token: number for number, token in enumerate(self.tokens)}

    @classmethod
    def default(cls) -> "PhonemeInventory":
        return cls(symbols())

    @classmethod
    def load(cls, path: Path) -> "PhonemeInventory":
        """Reads `symbol id` lines. Raises RecipeError when the file is missing or broken."""
        fix = "run local/02_units.py again, or take tokens.txt from the model's folder"
        tokens: list[str] = []
        try:
            for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
                token, number_read = line.split(" ")
                if int(number_read) != number:
                    raise ValueError(f"id {number_read} in line {number + 1}")
                tokens.append(token)
            return cls(tokens)
        except (OSError, ValueError) as error:
            raise RecipeError(path, expected="`symbol id` lines, ids from 0 on, <blk> and <unk> first", found=error, fix=fix) from error

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.writelines(f"{token} {number}\n" for number, token in enumerate(self.tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def encode(self, phones: str | Iterable[str]) -> list[int]:
        """Ids of space-separated (or listed) phones. Raises RecipeError for a symbol that the inventory lacks."""
        listed = phones.split() if isinstance(phones, str) else list(phones)
        missing = [phone for phone in listed if phone not in self._ids]
        if missing:
            raise RecipeError(
                f"phones {' '.join(listed)!r}", expected="symbols of the inventory", found=repr(missing[0]), fix="correct the reading; see tokens.txt"
            )
        return [self._ids[phone] for phone in listed]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Symbols of ids. Raises IndexError for an id outside 0..len-1."""
        listed = [int(number) for number in ids]
        outside = [number for number in listed if not 0 <= number < len(self.tokens)]
        if outside:
            raise IndexError(f"id {outside[0]} must be in 0..{len(self.tokens) - 1}")
        return [self.tokens[number] for number in listed]


def num_encoder_frames(num_feature_frames: int) -> int:
    """Encoder frames S (40 ms) of T feature frames (10 ms): the last, partial one counts."""
    return -(-num_feature_frames // 4)


def ctc_fits(num_encoder_frames: int, phones: Sequence[str]) -> bool:
    """Whether CTC has an alignment: a frame for each phone, and a blank between two equal neighbours."""
    repeats = sum(left == right for left, right in itertools.pairwise(phones))
    return num_encoder_frames >= len(phones) + repeats
