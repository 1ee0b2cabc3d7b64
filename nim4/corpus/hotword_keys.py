"""The ways in which a name may be said: phone strings under which a hotword index files it.

Training labels have one reading per text; a name gets all that a speaker may choose (ours, but for the polyphones of arXiv 2604.18105):

- every reading of its Chinese characters, those of the dictionary's phrases first (朝阳: zhao1 yang2, then chao2 yang2);
- 一 and 不 with their own tone, as training labels have them, and as they change before the next syllable;
- a final or inner 儿 as a syllable of its own, and gone into the syllable before it, which the inventory writes without it;
- capitals letter by letter and as a word (NASA), short unknown words too (awt);
- digits as a number and one by one, 1 then also as yao1; without Chinese characters in Mandarin and in English.
"""

import functools
import itertools
import re
from collections.abc import Iterable
from operator import itemgetter

from nim4.corpus.g2p import Lexicon, Reading, han_readings, split_phrases
from nim4.corpus.g2p_en import Phones, dictionary, read_word
from nim4.corpus.g2p_numbers import read_chinese, read_english
from nim4.corpus.text import HAN, fold, has_han
from nim4.corpus.units import PhonemeInventory, syllable_phones

MAX_KEYS = 8  # per name; the likeliest
MAX_CACHED_WORDS = 100_000
MAX_SPELLED_LETTERS = 6  # ours: a longer word in capitals is not spelled
MAX_SPELLED_UNKNOWN = 4  # ours: of a word in small letters that no dictionary has
# Words in which 儿 means child: it is never swallowed there.
_CHILD = frozenset("女婴幼孤宠胎孩托健患弃侄育少产生")
_DIGITS = "零一二三四五六七八九"
_SINGLY = str.maketrans("0123456789", _DIGITS)
_WORD = re.compile("[A-Za-z]+")
_DIGIT, _TWO_DIGITS, _THREE_DIGITS = re.compile(r"\d"), re.compile(r"\d{2}"), re.compile(r"\d{3}")
_WORDS_AND_NUMBERS = re.compile("(?:[A-Za-z][a-z]+|[0-9]+)(?: (?:[A-Za-z][a-z]+|[0-9]+))*")
_CHANGING = re.compile("[一不儿]")
_CHINESE = re.compile(f"[0-9]*[{HAN}][{HAN}0-9]*")

_INVENTORY = PhonemeInventory.default()
_UNKNOWN = bytes([PhonemeInventory.unk_id])

Option = tuple[bytes, int]  # phones of one syllable or word, and how unlikely it is beside the first option
_cost = itemgetter(1)


class KeyMaker:
    """Phone strings of names; remembers readings of Latin words and numbers, so that one object should do a whole list.

    Phones are ids of our inventory here, a byte each: names are many, and bytes are joined and compared at once.
    """

    def __init__(self) -> None:
        self._reader, self._mandarin = Lexicon(), Lexicon("zh")

    def keys(self, name: str) -> list[bytes]:
        """At most MAX_KEYS phone strings, the likeliest first; none when nobody can read the name."""
        text = fold(name)
        if _CHINESE.fullmatch(text):  # most names: the same as below, but quick, and so for plain Latin words and numbers
            return _likeliest([_han_options(spoken, _run_options(spoken)) for spoken in _spoken(text)])
        if _WORDS_AND_NUMBERS.fullmatch(text):
            pieces = text.split()
            if not any(map(_may_be_spelled, pieces)):
                return _likeliest(_plain_options(pieces))
        readers = [self._reader, self._mandarin] if _DIGIT.search(text) and not has_han(text) else [self._reader]
        variants = [fold(variant) for variant in _variants(text)]
        return _likeliest([_options(reader.pieces(variant)) for reader in readers for variant in variants])


def parse_pronunciations(written: str, inventory: PhonemeInventory) -> list[Phones]:
    """The readings that a user gives: phones of the inventory, or pinyin with tones, separated by blanks; several separated by `|`.

    Raises:
        ValueError: if a symbol is neither.
    """
    readings = []
    for part in written.split("|"):
        phones: list[str] = []
        for symbol in part.split():
            if symbol in inventory and not symbol.startswith("<"):
                phones.append(symbol)
            else:
                phones += syllable_phones(symbol)
        if not phones:
            raise ValueError("an empty pronunciation")
        readings.append(tuple(phones))
    return readings


def _likeliest(ways: Iterable[list[list[Option]]]) -> list[bytes]:
    """The combinations with the least sum of unlikelihood over all ways, which are themselves in order; those with an unknown phone go."""
    found: dict[bytes, int] = {}
    for number, way in enumerate(ways):
        beam: list[Option] = [(b"", number)]
        sure = b""  # what all continue with
        for options in way:
            if len(options) > 1 and len(beam) == MAX_KEYS:  # the first option alone makes as many, none dearer than the last by more than this
                spread = beam[-1][1] - beam[0][1]
                options = [option for option in options if option[1] <= spread]
            if len(options) == 1:
                sure += options[0][0]
            else:
                longer = [(phones + sure + more, cost + extra) for phones, cost in beam for more, extra in options]
                beam, sure = sorted(longer, key=_cost)[:MAX_KEYS], b""
        for phones, cost in beam:
            phones += sure
            if phones and _UNKNOWN not in phones:
                found[phones] = min(found.get(phones, cost), cost)
    return sorted(found, key=found.__getitem__)[:MAX_KEYS]


def _plain_options(pieces: list[str]) -> list[list[list[Option]]]:
    """What words, of which none is spelled, and numbers may be: numbers in English, digit by digit too, and then in Mandarin."""
    numbers = [piece for piece in pieces if piece.isdecimal()]
    ways = [[[(b"".join(map(_read_in_english, pieces)), 0)]]]
    singly = any(len(number) > 1 for number in numbers)
    if singly:
        digits = [digit for piece in pieces for digit in (piece if piece.isdecimal() else (piece,))]
        ways.append([[(b"".join(map(_read_in_english, digits)), 0)]])
    for by_digit in (False, True) if singly else (False,) if numbers else ():
        way: list[list[Option]] = []
        for is_number, group in itertools.groupby(pieces, str.isdecimal):
            if not is_number:
                way.append([(b"".join(map(_read_in_english, group)), 0)])
            elif by_digit:
                spoken = "".join(group).translate(_SINGLY)
                way += _han_options(spoken, [_char_options(char) for char in spoken])
            else:
                runs = list(map(read_chinese, group))
                way += _han_options("".join(runs), [options for run in runs for options in _run_options(run)])
        ways.append(way)
    return ways


@functools.lru_cache(MAX_CACHED_WORDS)
def _read_in_english(piece: str) -> bytes:
    """The phones of a word with a small letter in it, or of a number."""
    if piece.isdecimal():
        return b"".join(map(_number_word, read_english(piece)))
    return b"".join(_encoded(reading.phones) for reading in _lexicon().pieces(piece))


@functools.cache
def _number_word(word: str) -> bytes:
    return _encoded(read_word(word, False)[0])


def _may_be_spelled(piece: str) -> bool:
    return len(piece) <= MAX_SPELLED_UNKNOWN and not piece.isdecimal() and piece.lower() not in dictionary()


def _options(pieces: Iterable[Reading | str]) -> list[list[Option]]:
    """What each syllable or word of a text may be; Chinese ones that follow one another change together."""
    found: list[list[Option]] = []
    chars, han = "", []
    for piece in pieces:
        if isinstance(piece, str):
            chars, han = chars + piece, han + _run_options(piece)
            continue
        found += _han_options(chars, han)
        chars, han = "", []
        found.append([(_encoded(piece.phones), 0)])
    return found + _han_options(chars, han)


def _run_options(run: str) -> list[list[Option]]:
    """What each of the characters of a run may be, before its neighbours change it."""
    found: list[list[Option]] = []
    for word, is_phrase in split_phrases(run):
        if is_phrase:
            found += _phrase_options(word)
        else:
            found += map(_char_options, word)
    return found


def _han_options(chars: str, found: list[list[Option]]) -> list[list[Option]]:
    """What each of these characters may be, before a neighbour that changes it or is swallowed too."""
    for match in _CHANGING.finditer(chars):
        place, char = match.start(), match[0]
        if char in "一不" and place + 1 < len(chars):
            found[place] = found[place] + [(changed, 1) for changed in _changed_tone(char, found[place + 1][0][0][-1])]
        elif char == "儿" and place > 0 and chars[place - 1] not in _CHILD and len(chars) > 2:
            found[place] = [*found[place], (b"", 1)]
    return found


@functools.lru_cache(MAX_CACHED_WORDS)
def _phrase_options(phrase: str) -> list[list[Option]]:
    """Readings of each character of a phrase: its own there, then the others, which the phrase speaks against, after all else."""
    (reading,) = _lexicon().read_han(phrase)
    phones = _encoded(reading.phones)
    return [
        [(own, 0), *((other, MAX_KEYS + rank) for rank, other in enumerate(_readings(char)) if other != own)]
        for char, own in zip(phrase, (phones[place : place + 2] for place in range(0, len(phones), 2)), strict=True)
    ]


@functools.cache
def _char_options(char: str) -> list[Option]:
    """Readings of a character outside phrases; nobody can read some."""
    (reading,) = _lexicon().read_han(char)
    own = _encoded(reading.phones)
    return [(own, 0), *((other, rank) for rank, other in enumerate(_readings(char)) if other != own)]


@functools.cache
def _lexicon() -> Lexicon:
    return Lexicon()


@functools.cache
def _readings(char: str) -> list[bytes]:
    return [_encoded(phones) for phones in han_readings(char)]


@functools.lru_cache(MAX_CACHED_WORDS)
def _encoded(phones: Phones) -> bytes:
    return bytes(_INVENTORY.encode(phones))


@functools.cache
def _changed_tone(char: str, following: int) -> tuple[bytes, ...]:
    """一 and 不 as they sound before a syllable with this final; none where nothing changes."""
    tone = _INVENTORY.tokens[following][-1]
    if char == "一" and tone in "1234":
        return (_encoded(syllable_phones("yi2" if tone == "4" else "yi4")),)
    return (_encoded(syllable_phones("bu2")),) if char == "不" and tone == "4" else ()


def _variants(text: str) -> list[str]:
    """The text, and the text with its capitals and digits written as they may also be read."""
    variants = dict.fromkeys([text, _WORD.sub(_spell, text), _WORD.sub(_unspell, text)])
    if _TWO_DIGITS.search(text):
        if has_han(text):
            singly = [_DIGIT.sub(lambda match: _DIGITS[int(match[0])], variant) for variant in variants]
            if "1" in text and _THREE_DIGITS.search(text):  # of shorter numbers nobody reads 1 as yao1
                singly += [variant.replace("一", "幺") for variant in singly]
        else:
            singly = [_DIGIT.sub(r" \g<0> ", variant) for variant in variants]
        variants |= dict.fromkeys(singly)
    return list(variants)


def _spoken(text: str) -> list[str]:
    """Chinese text, its digits as they may be said: the variants of the text, read."""
    if not _DIGIT.search(text):
        return [text]
    spoken = [read_chinese(text)]
    if _TWO_DIGITS.search(text):
        spoken.append(text.translate(_SINGLY))
        if "1" in text and _THREE_DIGITS.search(text):
            spoken.append(spoken[1].replace("一", "幺"))
    return spoken


def _spell(match: re.Match[str]) -> str:
    """The letters of a word that may be an abbreviation, with blanks between them; any other word as it is."""
    word = match[0]
    short = 1 < len(word) <= (MAX_SPELLED_LETTERS if word.isupper() else MAX_SPELLED_UNKNOWN)
    return f" {' '.join(word)} " if short and (word.isupper() or word.lower() not in dictionary()) else word


def _unspell(match: re.Match[str]) -> str:
    """An abbreviation in small letters, so that it is read as a word; any other word as it is."""
    word = match[0]
    return word.lower() if word.isupper() and 2 < len(word) <= MAX_SPELLED_LETTERS else word
