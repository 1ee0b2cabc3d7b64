"""Text to phones: Mandarin, English, letters, digits and all of them mixed. The only door to pypinyin.

Mandarin gets citation tones; 一 and 不 are never changed by what follows; 儿 is a syllable of its own. Polyphones are resolved by
the phrase they stand in. Dialects get Mandarin readings.
"""

import functools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nim4.config import RecipeError
from nim4.corpus import g2p_numbers
from nim4.corpus.g2p_en import LETTER_NAMES, LEXICON_DIR, Phones, read_word, spell
from nim4.corpus.text import HAN, fold, has_han, is_han, normalise, split_tokens
from nim4.corpus.units import UNKNOWN, PhonemeInventory, syllable_phones
from nim4.corpus.word_list import WordList
from nim4.stage import atomic_write

log = logging.getLogger("nim4")

LANGUAGES = ("zh", "en", "zh-en")
MAX_CACHED_TEXTS = 200_000
_LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_LATIN_OR_NUMBER = rf"(?:[{_LATIN}\d]|(?<=[{_LATIN}\d])'(?=[{_LATIN}])|(?<=\d)\.(?=\d))+"
_DOTTED = rf"(?<![{_LATIN}\d.])[A-Za-z](?:\.[A-Za-z])+(?![{_LATIN}\d])\.?"  # a.m., U.S.A.
_PIECES = re.compile(rf"(?P<dotted>{_DOTTED})|(?P<latin>{_LATIN_OR_NUMBER})|(?P<han>[{HAN}]+)|(?P<space>\s+)|(?P<other>.)", re.DOTALL)
_WORDS = re.compile(rf"(?P<dotted>{_DOTTED})|(?P<latin>{_LATIN_OR_NUMBER})")
_LETTER, _DIGIT, _OTHER_DIGIT = re.compile(f"[{_LATIN}]"), re.compile(r"\d"), re.compile(r"[^\D0-9]")
_HAN_AND_BLANKS = re.compile(f"[{HAN} ]+")
_ENGLISH_NUMBER = re.compile(r"\d+(st|nd|rd|th)|\d+0s")
_PLAIN_WORD = re.compile("[A-Za-z0-9'.]+")
_PARTS_OF_WORD = re.compile(r"[A-Za-z']+|[\d.]+")
_EXTRA_LATIN = str.maketrans({"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"})
_SPOKEN_SYMBOLS = {"&": ("and", "and"), "@": ("at", "at"), "+": ("加", "plus"), "=": ("等于", "equals")}  # in Chinese text, in English text
_SILENT_SYMBOLS = "~|<>"
# Readings that surnames have and hardly anything else.
_SURNAMES = dict(pair.split(":") for pair in ("单:shan4", "解:xie4", "仇:qiu2", "区:ou1", "查:zha1", "盖:ge3", "任:ren2", "朴:piao2", "覃:qin2"))
MIN_PHRASES, MIN_PHRASE_SHARE = 2, 0.01  # ours: of a further reading; archaic ones, of which dictionaries list many, stand in fewer
_UNREADABLE = ("Ll", "Lu", "Lt", "Lm", "Lo", "Nl", "No", "Nd", "Sm", "Sc", "So", "Co", "Cn")  # categories that stand for something spoken


class Reading(NamedTuple):
    """A word, its phones, and where they are from: dictionary | letters | spelled | parts | letter-to-sound | pronunciations | unk."""

    word: str
    phones: Phones
    how: str


class Lexicon:
    """Reads text aloud, on paper; remembers what it read, and counts what it did not know.

    Args:
        language: zh | en: digits are read in that language. zh-en: in Mandarin where the text has a Chinese character, else in English.
        pronunciations: word -> phones that win over every dictionary; see read_pronunciations.
    """

    def __init__(self, language: str = "zh-en", pronunciations: Mapping[str, Phones] | None = None):
        if language not in LANGUAGES:
            raise RecipeError("--language", expected=" or ".join(LANGUAGES), found=repr(language), fix="correct it")
        self.language = language
        own = dict(pronunciations or {})
        self._own = _corrections() | own
        phrases = [word for word in own if is_han(word[0]) and len(word) > 1]
        self._own_phrases = WordList(phrases) if phrases else None
        self._read: dict[str, tuple[Reading, ...]] = {}
        self._read_tokens: dict[tuple[str, str, bool, bool], tuple[Reading, ...]] = {}
        self.met: Counter[tuple[str, Phones]] = Counter()  # (word, phones) -> times
        self.unknown: Counter[tuple[str, str]] = Counter()  # (word, how it was read) -> times

    def words(self, text: str) -> list[tuple[str, Phones]]:
        """The words of `text` in normal form, with their phones: Chinese as phrases or single characters, English word by word.

        Numbers come as the words they are read as. What nobody can read is ("x", ("<unk>",)), once for each character.
        """
        return [(reading.word, reading.phones) for reading in self.read(text)]

    def phones(self, text: str) -> list[str]:
        """The phones of `text`. Example: "银行" -> 0 in2 h ang2."""
        return [phone for reading in self.read(text) for phone in reading.phones]

    def read(self, text: str) -> tuple[Reading, ...]:
        """The words of `text` with everything known about them; counted in `met` and `unknown` at each call."""
        readings = self._read.get(text)
        if readings is None:
            readings = tuple(self.read_folded(fold(text)))
            if len(self._read) >= MAX_CACHED_TEXTS:
                self._read.clear()
            self._read[text] = readings
        for reading in readings:
            if reading.how == "unk":
                self.unknown[reading.word, UNKNOWN] += 1
                continue
            self.met[reading.word, reading.phones] += 1
            if reading.how in ("letter-to-sound", "spelled"):
                self.unknown[reading.word, f"{reading.how}: {' '.join(reading.phones)}"] += 1
        return readings

    def save(self, path: Path) -> None:
        """Writes the words met, `word<TAB>phones`, sorted by word; a word's readings from the most to the least frequent."""
        rows = sorted(self.met.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        with atomic_write(path) as file:
            file.writelines(f"{word}\t{' '.join(phones)}\n" for (word, phones), _ in rows)

    def save_unknown(self, path: Path) -> None:
        """Writes `word<TAB>count<TAB>how it was read`, the most frequent first."""
        with atomic_write(path) as file:
            file.writelines(f"{word}\t{count}\t{how}\n" for (word, how), count in self.top_unknown())

    def top_unknown(self, num: int | None = None) -> list[tuple[tuple[str, str], int]]:
        """((word, how it was read), count), the most frequent first."""
        return sorted(self.unknown.items(), key=lambda item: (-item[1], item[0]))[:num]

    def read_folded(self, folded: str) -> Iterator[Reading]:
        """As `read`, of a text that `fold` has been through; neither remembered nor counted."""
        for piece in self.pieces(folded):
            yield from self.read_han(piece) if isinstance(piece, str) else (piece,)

    def pieces(self, folded: str) -> Iterator[Reading | str]:
        """As `read_folded`, with Chinese characters still to be read, in runs."""
        if not folded.isascii():
            folded = folded.replace("°C", "℃").replace("°F", "℉")
            folded = _OTHER_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), folded)
        is_chinese = has_han(folded)
        language = self.language if self.language != "zh-en" else "zh" if is_chinese else "en"
        pieces = _split_pieces(folded, language)
        latin = [piece for kind, piece in pieces if kind == "latin" and _LETTER.search(piece)]
        case_counts = is_chinese or len(latin) < 2 or any(piece != piece.upper() for piece in latin)
        spelled = _spelled_runs(pieces)
        for i, (kind, piece) in enumerate(pieces):
            if kind == "han":
                yield piece
            elif kind == "dotted":
                yield from (Reading(letter.lower(), LETTER_NAMES[letter.lower()], "letters") for letter in piece if letter != ".")
            elif kind == "latin":
                by_letter = i in spelled or (is_chinese and len(piece) == 1)
                token = (piece, language, case_counts, by_letter)
                if token not in self._read_tokens:
                    if len(self._read_tokens) >= MAX_CACHED_TEXTS:
                        self._read_tokens.clear()
                    self._read_tokens[token] = tuple(self._read_latin(*token))
                yield from self._read_tokens[token]
            elif kind == "other":
                yield from self._read_symbol(piece, language)

    def read_han(self, run: str) -> Iterator[Reading]:
        """The words of a run of Chinese characters; nothing is counted."""
        for stretch, is_own in self._own_phrases.split(run) if self._own_phrases else [(run, False)]:
            if is_own:
                yield Reading(stretch, self._own[stretch], "pronunciations")
                continue
            for word, is_phrase in _phrases().split(stretch):
                if is_phrase:
                    yield _read_phrase(word)
                else:
                    for char in word:
                        yield Reading(char, self._own[char], "pronunciations") if char in self._own else _read_han_char(char)

    def _read_latin(self, token: str, language: str, case_counts: bool, by_letter: bool) -> Iterator[Reading]:
        """A Latin word, a number of English text, or letters and digits that touch."""
        word = token.lower() if token.isascii() and token.isalnum() else normalise(token)
        plain = token
        if not token.isascii():
            plain = "".join(char for char in unicodedata.normalize("NFKD", token.translate(_EXTRA_LATIN)) if not unicodedata.combining(char))
        if word in self._own:
            yield Reading(word, self._own[word], "pronunciations")
        elif not _LETTER.search(token) or _ENGLISH_NUMBER.fullmatch(token):
            yield from (self._read_english(spoken, False) for spoken in g2p_numbers.read_english(token))
        elif not _PLAIN_WORD.fullmatch(plain):
            yield from (Reading(char.lower(), (UNKNOWN,), "unk") for char in token)
        elif by_letter and plain.lower() in LETTER_NAMES:
            yield Reading(word, spell(plain), "letters")
        elif _DIGIT.search(plain):
            yield self._read_mixed(word, plain, language)
        else:
            yield self._read_english(plain, case_counts, word)

    def _read_english(self, plain: str, case_counts: bool, word: str = "") -> Reading:
        phones, how = read_word(plain, case_counts)
        return Reading(word or plain, phones, how)

    def _read_mixed(self, word: str, plain: str, language: str) -> Reading:
        """Letters and digits that touch, as one word: A4L, iPhone6, PM2.5."""
        readings: list[Reading] = []
        for part in _PARTS_OF_WORD.findall(plain):
            part = part.strip("'")
            if part[:1].isdecimal():
                for spoken in g2p_numbers.read_in_word(part, language):
                    readings += self.read_han(spoken) if language == "zh" else [self._read_english(spoken, False)]
            elif len(part) == 1:
                readings.append(Reading(part, spell(part), "letters"))
            elif part:
                readings.append(self._read_english(part, True))
        how = next((how for how in ("letter-to-sound", "spelled") if any(reading.how == how for reading in readings)), "parts")
        return Reading(word, tuple(phone for reading in readings for phone in reading.phones), how)

    def _read_symbol(self, char: str, language: str) -> Iterator[Reading | str]:
        """A character that is no Chinese or Latin letter: silent if it is punctuation, else spoken, perhaps in Han, or unknown."""
        if char in self._own:
            yield Reading(char, self._own[char], "pronunciations")
        elif char in _SPOKEN_SYMBOLS:
            in_chinese, in_english = _SPOKEN_SYMBOLS[char]
            spoken = in_chinese if language == "zh" else in_english
            yield spoken if is_han(spoken[0]) else self._read_english(spoken, False)
        elif unicodedata.category(char) in _UNREADABLE and char not in _SILENT_SYMBOLS:
            yield Reading(char, (UNKNOWN,), "unk")


def read_pronunciations(path: Path) -> dict[str, Phones]:
    """A file of `word<TAB>phones` lines; empty lines and lines that begin with # are passed over.

    A word is one Latin word, or Chinese characters only. Several characters win wherever they occur; a single character replaces its
    reading outside phrases.

    Raises:
        RecipeError: with the line number, on anything else or on a phone that is not in the inventory.
    """
    inventory = PhonemeInventory.default()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a file of word<TAB>phones", found=error, fix="correct --pronunciations") from error
    found: dict[str, Phones] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, phones = line.partition("\t")
        listed = tuple(phones.split())
        tokens = split_tokens(word)
        one_word = len(tokens) == 1 or (tokens and all(map(is_han, tokens)))
        wrong = [phone for phone in listed if phone not in inventory or phone.startswith("<")]
        if not one_word or not listed or wrong:
            expected = "word<TAB>phones, the word one Latin word or Chinese characters only, the phones from tokens.txt"
            raise RecipeError(
                f"{path}, line {number}", expected=expected, found=repr(wrong[0] if one_word and wrong else line), fix="correct the line"
            )
        found["".join(tokens)] = listed
    return found


def load_lexicon(path: Path) -> dict[str, list[Phones]]:
    """What Lexicon.save wrote: each word's readings, the most frequent first. Raises RecipeError when it is missing or broken."""
    readings: dict[str, list[Phones]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            word, phones = line.split("\t")
            readings.setdefault(word, []).append(tuple(phones.split()))
    except (OSError, ValueError) as error:
        raise RecipeError(path, expected="word<TAB>phones lines", found=error, fix="run local/02_units.py again") from error
    return readings


def _split_pieces(folded: str, language: str) -> list[tuple[str, str]]:
    """(kind, piece) along the text without its blanks, kind being dotted | latin | han | other. Numbers of Chinese text are already spoken in
    Han; those of English text are `latin` pieces."""
    pieces: list[tuple[str, str]] = []
    start = 0
    for match in _WORDS.finditer(folded):
        if match.lastgroup == "dotted" or _LETTER.search(match[0]):
            pieces += _between_words(folded[start : match.start()], language)
            pieces.append((match.lastgroup or "latin", match[0]))
            start = match.end()
    return pieces + _between_words(folded[start:], language)


def _between_words(text: str, language: str) -> list[tuple[str, str]]:
    if not text or text.isspace():
        return []
    if not _DIGIT.search(text):
        return _kinds(text)
    if language == "zh":
        text = g2p_numbers.read_chinese(text)
    pieces: list[tuple[str, str]] = []
    start = 0
    for number in g2p_numbers.ENGLISH_NUMBER.finditer(text):
        pieces += [*_kinds(text[start : number.start()]), ("latin", number[0])]
        start = number.end()
    return pieces + _kinds(text[start:])


def _kinds(text: str) -> list[tuple[str, str]]:
    if _HAN_AND_BLANKS.fullmatch(text):
        return [("han", run) for run in text.split()]
    return [(match.lastgroup or "other", match[0]) for match in _PIECES.finditer(text) if match.lastgroup != "space"]


def _spelled_runs(pieces: list[tuple[str, str]]) -> set[int]:
    """Places of single letters that follow one another, as in "n l n s"; "i a" and the like are words."""
    spelled: set[int] = set()
    run: list[tuple[int, str]] = []
    if sum(len(piece) == 1 for _, piece in pieces) < 2:
        return spelled
    for i, piece in enumerate([*(piece for _, piece in pieces), ""]):
        if piece.lower() in LETTER_NAMES:
            run.append((i, piece))
            continue
        if len(run) > 1 and not all(letter in "aioAIO" for _, letter in run):
            spelled.update(place for place, _ in run)
        run = []
    return spelled


@functools.cache
def _corrections() -> dict[str, Phones]:
    """Readings shipped with the code, for words that the dictionaries lack or get wrong."""
    return read_pronunciations(LEXICON_DIR / "pronunciations.tsv")


@functools.cache
def _phrases() -> WordList:
    from pypinyin.constants import PHRASES_DICT

    return WordList([*PHRASES_DICT, *(word for word in _corrections() if is_han(word[0]) and len(word) > 1)])


def split_phrases(run: str) -> list[tuple[str, bool]]:
    """Cuts Chinese characters into the phrases of the dictionary and what is between them: (piece, is a phrase)."""
    return _phrases().split(run)


@functools.cache
def _read_phrase(phrase: str) -> Reading:
    """A phrase in citation tones."""
    if phrase in _corrections():
        return Reading(phrase, _corrections()[phrase], "pronunciations")
    return Reading(
        phrase, tuple(phone for char, syllable in zip(phrase, _pinyin(phrase), strict=True) for phone in _citation(char, syllable)), "dictionary"
    )


@functools.cache
def _read_han_char(char: str) -> Reading:
    """A character outside phrases, in its most frequent reading; unknown when there is none."""
    try:
        (syllable,) = _pinyin(char)
        return Reading(char, _citation(char, syllable), "dictionary")
    except ValueError:
        return Reading(char, (UNKNOWN,), "unk")


def _pinyin(word: str) -> list[str]:
    from pypinyin import Style, lazy_pinyin

    return lazy_pinyin([word], style=Style.TONE3, neutral_tone_with_five=True, v_to_u=False, errors="ignore")


def _citation(char: str, syllable: str) -> Phones:
    """The phones of a syllable; 一 and 不 keep their own tone, which the dictionary changes in some phrases and not in others."""
    return syllable_phones({"一": "yi1", "不": "bu4"}.get(char, syllable))


@functools.cache
def han_readings(char: str) -> tuple[Phones, ...]:
    """All readings of a character that are in use, the most frequent first; empty when nobody can read it.

    The first is the one that Lexicon gives outside phrases. A further one counts when enough phrases of the dictionary have it, when it is
    a surname's, or when there are too few phrases to tell.
    """
    first = _corrections().get(char) or _read_han_char(char).phones
    if first == (UNKNOWN,):
        return ()
    if char in "一不儿":
        return (first,)
    from pypinyin import Style, pinyin

    counts = _phrase_readings().get(char, Counter())
    listed = pinyin(char, style=Style.TONE3, heteronym=True, neutral_tone_with_five=True, v_to_u=False, errors="ignore")
    total = sum(counts.values())
    wanted = max(MIN_PHRASES, MIN_PHRASE_SHARE * total) if total >= MIN_PHRASES else 0
    used = [syllable for syllable in (listed[0] if listed else []) if counts[syllable] >= wanted]
    used = sorted(used, key=lambda syllable: -counts[syllable]) + ([_SURNAMES[char]] if char in _SURNAMES else [])
    return tuple(dict.fromkeys([first, *(syllable_phones(syllable) for syllable in used if _is_syllable(syllable))]))


def _is_syllable(syllable: str) -> bool:
    try:
        syllable_phones(syllable)
    except ValueError:
        return False
    return True


@functools.cache
def _phrase_readings() -> dict[str, Counter[str]]:
    """Character -> how many phrases of the dictionary have it in which reading."""
    from pypinyin.constants import PHRASES_DICT
    from pypinyin.contrib.tone_convert import to_tone3

    convert = functools.cache(lambda marked: to_tone3(marked, v_to_u=False, neutral_tone_with_five=True))
    counts: dict[str, Counter[str]] = {}
    for phrase, syllables in PHRASES_DICT.items():
        for char, syllable in zip(phrase, syllables, strict=False):
            counts.setdefault(char, Counter())[convert(syllable[0])] += 1
    return counts
