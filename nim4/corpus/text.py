"""Text as it is compared and counted: the `plain` profile, and its units.

Chinese characters, kana and Bopomofo stand alone; everything else is words between spaces. Punctuation, symbols and emoji go.
Nothing is translated: numbers stay digits, accents stay, traditional characters stay.
"""

import re
import unicodedata
from collections.abc import Sequence

# Characters that are a unit each: Han (all extensions, compatibility forms, 〇 and the iteration marks), kana, Bopomofo.
HAN = r"\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA_BOPOMOFO = r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\U0001aff0-\U0001b16f"
_IS_HAN = re.compile(f"[{HAN}]")
_IS_SINGLE = re.compile(f"[{HAN}{_KANA_BOPOMOFO}]")

_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u2032\u00b4\u0060\uff07\uff40"), "'")
_HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"), "-")
_STRAIGHTEN = _APOSTROPHES | _HYPHENS | {0x200B: " "}
# Invisible: variation selectors, joiners, soft hyphen, byte order mark, directions. Taken out before letters and accents are composed.
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]")
_FOLDED = re.compile(r"[ -+\--_a-~\u4e00-\u9fff]*")  # what stays as it is: ASCII but for , and `, and most Chinese characters
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def is_han(char: str) -> bool:
    """True for one Chinese character, of any Unicode extension."""
    return _IS_HAN.fullmatch(char) is not None


def has_han(text: str) -> bool:
    """True when one of the characters is Chinese."""
    return not text.isascii() and _IS_HAN.search(text) is not None


def stands_alone(char: str) -> bool:
    """True for a character that is a unit by itself: Han, kana, Bopomofo."""
    return _IS_SINGLE.fullmatch(char) is not None


def fold(text: str) -> str:
    """NFKC form with straight apostrophes and hyphens, no invisible characters, and 1,234 as 1234. Case and punctuation stay.

    A full-width comma between digits is a comma of the sentence, so thousands are joined before NFKC makes the two alike.
    """
    if _FOLDED.fullmatch(text):
        return text
    text = _INVISIBLE.sub("", text.translate(_STRAIGHTEN))
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))


def split_tokens(text: str) -> list[str]:
    """The units that an error rate counts: one per Chinese character, Latin word or number.

    An apostrophe stays between two letters and after a digit ("o'brien's", "90's"), a point between two digits ("3.5"). Letters and digits that touch
    are one word ("a4l"). A hyphen separates.
    """
    text = unicodedata.normalize("NFKC", fold(text).lower())
    tokens: list[str] = []
    word = ""
    for i, char in enumerate(text):
        if stands_alone(char):
            tokens += [word, char]
            word = ""
        elif _belongs_to_word(text, i, word):
            word += char
        else:
            tokens.append(word)
            word = ""
    return [token for token in [*tokens, word] if token]


def _belongs_to_word(text: str, i: int, word: str) -> bool:
    category = unicodedata.category(text[i])
    if category[0] in "LN":
        return True
    if category[0] == "M":
        return bool(word)  # an accent with nothing to stand on is dropped
    following = text[i + 1] if i + 1 < len(text) else " "
    if text[i] == "'":
        return bool(word) and word[-1] != "." and following.isalpha() and not stands_alone(following)
    return text[i] == "." and word[-1:].isdecimal() and following.isdecimal()


def normalise(text: str) -> str:
    """The `plain` profile: split_tokens joined again, with a space only between two units that are both words.

    Example: "打开 CarPlay，Apple Pay！" -> "打开carplay apple pay".
    """
    joined = ""
    for token in split_tokens(text):
        if joined and not stands_alone(joined[-1]) and not stands_alone(token[0]):
            joined += " "
        joined += token
    return joined


def joined(texts: Sequence[str]) -> str:
    """Texts behind each other, with a space where neither side is Chinese, Japanese or their punctuation.

    Example: ["打开", "CarPlay", "Apple"] -> "打开CarPlay Apple".
    """
    whole = ""
    for text in texts:
        if whole and text and not {unicodedata.east_asian_width(char) for char in (whole[-1], text[0])} & {"W", "F"}:
            whole += " "
        whole += text
    return whole
