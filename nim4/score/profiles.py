"""What a text goes through before its errors are counted. A score without its profile says little; scores of different hashes are not comparable.

- `fair`: every way of writing the same words counts the same, for every system. Ours.
- `page`: as the demo page of arXiv 2604.18105 seems to score, found from its clips: WeTextProcessing's grammar, then marks deleted without a
  blank ("post-office" is one word, "Im" another than "I'm"), spelled letters one unit each where they were written apart. It writes faults of the
  grammar into texts (第2个 as 第两个, A4L as A四升); tests pin them. Case is folded, which no clip shows.
- `speechio`: after the SpeechIO leaderboard's description: fillers and erhua removed, numbers as words, British spelling as American; count CER
  for Chinese, WER for English. Numbers are read by the engine's grammars, where the board has its own, and NeMo's.
- `openasr`: Whisper's English normaliser, with "dogcart" taken for "dog cart", as on the Open ASR leaderboard, without the names and acronyms that
  it added in 2026. English only.
- `raw`: NFKC and case alone; a mark is a unit.
- `plain`: `raw` without marks; what stage 12 counts unless it is told otherwise.

All of them but `raw` and `openasr` end as nim4/corpus/text.py writes texts. Sources: the boards' public descriptions; code is ours, but for the
packages wetext and whisper-normalizer.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from nim4.config import RecipeError
from nim4.corpus import g2p_numbers, grammars
from nim4.corpus import text as corpus_text
from nim4.corpus.text import HAN, fold
from nim4.score import error_rate

log = logging.getLogger("nim4")
PROFILES = ("fair", "page", "speechio", "openasr", "raw", "plain")
LADDER = ("punctuation", "script", "filler", "number", "letters", "compound")  # of `fair`, in the order in which errors are attributed to them
_GRAMMAR = ("page", "speechio")  # profiles whose grammars --engine chooses
_MERGES = ("fair", "openasr")  # profiles that take "dogcart" for "dog cart"
_FLAGS = {"remove_erhua": True, "remove_interjections": True, "traditional_to_simple": True, "full_to_half": True, "remove_puncts": True}

_LETTER = re.compile(r"[^\W\d_]")
_SINGLE = corpus_text._IS_SINGLE.pattern  # private there: a change of that file would change the hashes of all records
_UNITS = re.compile(rf"{_SINGLE}|[^\s{_SINGLE[1:-1]}]+")
_DIGIT = re.compile(r"\d")
_NUMBER = r"(?:(?<![a-z\d-])-)?[$£€¥]?\d+(?:[.,:/+=-]\d+)*[%‰℃℉]?"
# A number that no letter touches; where it stands decides in which language it is read.
_LONE_NUMBER = re.compile(rf"(?<![^\W{HAN}])(?<!\d[.,:/]){_NUMBER}(?![^\W{HAN}])")
_BESIDE = 8  # characters on each side of a number that are looked at
_LETTER_NUMBER = re.compile(r"(?<=[a-z])-(?=\d)")
_FILLERS_ZH = re.compile("[呃啊]")  # as WeTextProcessing's grammar has them
_IS_IT = re.compile(r"\b(it|he|she|that|what|there|here|who|where|how|when|why)'s\b")
# What Whisper's normaliser must not see as numbers: words of letters and digits, such as a4l, which it would split, and the letter o.
_MIXED = re.compile(r"((?<!\S)(?:(?=\S*[a-z])(?=\S*\d)\S+|o(?!\S)))")
_CURRENCIES = {"$": "dollars", "£": "pounds", "€": "euros", "¢": "cents"}
_AMOUNT = re.compile(r"([$£€¢])(\d[\d.]*)")
_MAY_READ = re.compile(r"[^A-Za-z\s',?!.]|\.(?=\s*\S)")  # what the English grammar could read otherwise than it stands
_LETTER_RUN = re.compile(rf"(?<![^\s{HAN}])[a-z](?: [a-z])+(?![^\s{HAN}])")


def check(profile: str, engine: str) -> None:
    """Raises RecipeError for a profile that does not exist, an engine that it does not use, or a package that is missing."""
    if profile not in (*PROFILES, "phones"):
        raise RecipeError("--profile", expected=f"one of {', '.join(PROFILES)}", found=profile, fix="name a profile that exists")
    if engine != "wetext" and profile not in _GRAMMAR:
        fix = "leave --engine out"
        raise RecipeError(f"--engine {engine}", expected=f"profile {' or '.join(_GRAMMAR)}", found=f"profile {profile}", fix=fix)
    made_with(profile, engine)


def made_with(profile: str, engine: str = "wetext") -> dict[str, str]:
    """The packages, with versions, whose rules decide a profile's texts. Raises RecipeError when one is missing."""
    if profile in ("plain", "raw", "phones"):
        return {}
    engines = {} if profile == "openasr" else {engine: grammars.version(engine)}
    return engines if profile == "page" else engines | {"whisper-normalizer": _whisper_version()}


def profile_of(metric: str, profile: str) -> str:
    """What a metric's units went through: `phones` for PER, which compares labels as they are, else the text profile."""
    return "phones" if metric == "PER" else profile


@functools.cache
def profile_hash(profile: str, engine: str = "wetext") -> str:
    """Twelve hex digits that change with what defines the profile: its code, and engine, version and flags of the packages it uses."""
    check(profile, engine)
    definition = profile + inspect.getsource(error_rate.units_of)
    if profile != "phones":
        definition += inspect.getsource(corpus_text)
    if profile not in ("phones", "plain"):
        parts = [*_STEPS[profile], *((error_rate.merge_compounds,) if profile in _MERGES else ())]
        definition += "".join(inspect.getsource(part) for part in parts) + repr(made_with(profile, engine))
        rules = (value for name, value in sorted(globals().items()) if re.fullmatch(r"_[A-Z_]+", name) and name not in ("_STEPS", "_SIMPLIFIED"))
        definition += repr([getattr(rule, "pattern", rule) for rule in rules])
    return hashlib.sha256(definition.encode()).hexdigest()[:12]


def merges_compounds(profile: str) -> bool:
    """Whether "dogcart" counts as "dog cart", and the other way round."""
    return profile in _MERGES


def normalise(text: str, profile: str, *, engine: str = "wetext", chinese: bool = False) -> str:
    """A text as `profile` has it; `units` splits it.

    Args:
        chinese: the reference has Chinese characters, so that a hypothesis of digits alone is read in Chinese.
    """
    if profile == "fair":
        return fair(text, LADDER, chinese=chinese)
    if profile == "page":
        return _page(text, engine)
    if profile == "speechio":
        return _speechio(text, engine)
    if profile == "openasr":
        return _whisper()(text)
    return text


def units(text: str, metric: str, profile: str) -> list[str]:
    """The units of a text that `normalise` made: MER, CER or WER as of error_rate.units_of; of `raw`, each mark is one too."""
    if profile == "plain":
        return error_rate.units_of(metric, phones="", text=text)
    spaced = _raw(text) if profile == "raw" else text
    if metric == "CER":
        return [char for char in spaced if not char.isspace()]
    return spaced.split() if metric == "WER" else _UNITS.findall(spaced)


def _raw(text: str) -> str:
    """NFKC and lower case, with blanks around each mark, but for those inside a word or number: don't, dog-cart, 3.5, 10:30."""
    text = unicodedata.normalize("NFKC", text).lower()
    spaced = ""
    for i, char in enumerate(text):
        if unicodedata.category(char)[0] in "PS":
            inside = 0 < i < len(text) - 1 and all(side.isalnum() and not corpus_text.is_han(side) for side in (text[i - 1], text[i + 1]))
            spaced += char if inside and char in "'’-.,:" else f" {char} "
        else:
            spaced += char
    return spaced


def fair(text: str, steps: Sequence[str], *, chinese: bool = False) -> str:
    """`fair` with some of its steps, all but marks and compounds, which `units` and the alignment see to.

    script: simplified characters, no erhua, American spelling, contractions and titles written out, no accents. filler: 呃, 啊, uh, um and the like
    are removed. number: among Chinese, digits that touch no letter become characters; among English, numbers become digits. letters: "D S C"
    becomes "DSC".
    """
    text = re.sub(r"\s+", " ", fold(text).lower())
    text = _LETTER_NUMBER.sub(" ", text)
    if "number" in steps:
        text = _read_among_chinese(text, chinese)
    parts = re.split(rf"([{HAN}，。？！、；：]+)", text)
    parts = [_fair_chinese(part, steps) if i % 2 else _fair_latin(part, steps) for i, part in enumerate(parts)]
    text = corpus_text.normalise("".join(parts))
    return _LETTER_RUN.sub(_joined_letters, text) if "letters" in steps else text


def _joined_letters(run: re.Match[str]) -> str:
    """A word of spelled letters; "a", "i" and "o" alone are words of their own."""
    return run[0] if set(run[0]) <= set("aio ") else run[0].replace(" ", "")


def _read_among_chinese(text: str, chinese: bool) -> str:
    """Digits next to a Chinese character, blanks and marks aside, as characters; all of them where nothing else says which language it is."""
    if not _DIGIT.search(text):
        return text
    text = text.replace("°c", "℃")  # NFKC has taken it apart
    alone = chinese and not _LETTER.search(text)

    def read(number: re.Match[str]) -> str:
        before, after = text[max(0, number.start() - _BESIDE) : number.start()], text[number.end() : number.end() + _BESIDE]
        beside = before.rstrip(" ,.-")[-1:], after.lstrip(" ,.-")[:1]
        if not alone and not any(char and corpus_text.is_han(char) for char in beside):
            return number[0]
        # The grammar sees the neighbours that touch, to tell 2个 from 2号; they stay as they are.
        left, right = re.search(rf"[{HAN}]{{0,4}}$", before)[0], re.match(rf"[{HAN}]{{0,4}}", after)[0]
        spoken = g2p_numbers.read_chinese(left + number[0] + right)
        kept = spoken.startswith(left) and spoken.endswith(right)
        return spoken[len(left) : len(spoken) - len(right)] if kept else g2p_numbers.read_chinese(number[0])

    return _LONE_NUMBER.sub(read, text)


def _fair_chinese(text: str, steps: Sequence[str]) -> str:
    if "script" in steps:
        text = text.replace("〇", "零").translate(_SIMPLIFIED)
        if "儿" in text:
            text = grammars.in_pieces(text, _grammar("zh", "wetext", remove_erhua=True))
    return _FILLERS_ZH.sub("", text) if "filler" in steps else text


def _fair_latin(text: str, steps: Sequence[str]) -> str:
    """English words by the parts of Whisper's normaliser; unlike it, what stands in brackets stays, and "dog's" is no "dog is"."""
    if not text.strip():
        return text
    whisper = _whisper()
    if "filler" in steps:
        text = re.sub(whisper.ignore_patterns, "", text)
    if "script" in steps:
        text = _IS_IT.sub(r"\1 is", text)
        for pattern, written_out in _written_out():
            text = pattern.sub(written_out, text)
        text = "".join(char for char in unicodedata.normalize("NFKD", text) if unicodedata.category(char) != "Mn").replace("'", "")
    if "number" in steps:
        spaced = re.sub(r"(?<!\d)[.,;:?!-]|[.,;:?!-](?!\d)", " ", text)
        text = "".join(part if i % 2 else _number_words(part) for i, part in enumerate(_MIXED.split(spaced)))
        text = _AMOUNT.sub(lambda amount: f"{amount[2]} {_CURRENCIES[amount[1]]}", text).replace("%", " percent")
    return " " + (whisper.standardize_spellings(re.sub(r"[^\w%$£€¢.']+", " ", text)) if "script" in steps else text) + " "


def _number_words(text: str) -> str:
    """English numbers as digits; blanks at the ends stay."""
    return re.sub(r"\S(?:.*\S)?", lambda words: _whisper().standardize_numbers(words[0]), text, flags=re.DOTALL)


def _page(text: str, engine: str) -> str:
    """The grammar, with all its flags; then every mark goes, blanks stay."""
    text = grammars.in_pieces(text, _grammar("auto", engine, **_FLAGS))
    return corpus_text.normalise("".join(char for char in fold(text) if unicodedata.category(char)[0] not in "PS"))


def _speechio(text: str, engine: str) -> str:
    """`page` with blanks for marks, and English fillers and spelling."""
    words = grammars.in_pieces(fold(text), _grammar("auto", engine, **{**_FLAGS, "remove_puncts": False}))
    words = re.sub(r"[^\w\s']", " ", words).lower()
    return corpus_text.normalise(_whisper().standardize_spellings(re.sub(_whisper().ignore_patterns, "", words)))


@functools.cache
def _grammar(language: str, engine: str, **flags: bool) -> Callable[[str], str]:
    """A grammar that leaves a text alone, with a warning, where it has no path, and is not asked for texts in which it finds nothing."""
    read = grammars.reader(language, engine, **flags)

    def written(text: str) -> str:
        if text.isascii() and not _MAY_READ.search(text):
            return text  # the English grammar takes a millisecond a text, and has nothing to say to most
        try:
            return read(text)
        except ValueError as error:
            log.warning("%s; it is scored as it stands", error)
            return text

    return written


class _Simplified(dict[int, str]):
    """wetext's simplified form of each character, asked for when it is first met: the grammar knows single characters only."""

    def __missing__(self, code: int) -> str:
        self[code] = _grammar("zh", "wetext", traditional_to_simple=True)(chr(code))
        return self[code]


_SIMPLIFIED = _Simplified()


@functools.cache
def _written_out() -> list[tuple[re.Pattern[str], str]]:
    """Whisper's contractions and titles, but "'s": "dog's" is no "dog is"."""
    return [(re.compile(pattern), written) for pattern, written in _whisper().replacers.items() if pattern != r"'s\b"]


def _whisper_version() -> str:
    try:
        return importlib.metadata.version("whisper-normalizer")
    except importlib.metadata.PackageNotFoundError as error:
        fix = "pip install whisper-normalizer==0.1.15"
        raise RecipeError("--profile", expected="the package whisper-normalizer", found="none", fix=fix) from error


@functools.cache
def _whisper() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


_STEPS = {
    "fair": (
        fair,
        _joined_letters,
        _read_among_chinese,
        _fair_chinese,
        _fair_latin,
        _number_words,
        _Simplified,
        _written_out,
        _grammar,
        grammars,
        g2p_numbers,
    ),
    "page": (_page, _grammar, grammars),
    "speechio": (_speechio, _grammar, grammars),
    "openasr": (normalise, units),
    "raw": (_raw, units),
}
