"""Numbers as they are spoken, by rules for the plain ones and for the others by wetext, which is loaded when the first is met.

wetext reads dates, money, fractions and telephone numbers. It never sees: 第 + digits (it would read 第2名 as 第两名), digits that
touch Latin letters (A4L would end in litres), or Chinese characters in its English mode (which it cannot bear).

Its Chinese grammar takes a millisecond a name. Most numbers of names are plain: among Chinese characters alone their reading depends on the
number and the character behind it. They are read here, in microseconds, exactly as the grammar does (a property test compares both).
"""

import functools
import logging
import re

from nim4.corpus.grammars import reader
from nim4.corpus.text import HAN

log = logging.getLogger("nim4")
NUM_REMEMBERED = 100_000  # texts; a list has the same numbers again and again
_DIGITS_ZH = "零一二三四五六七八九"
# A stretch of Chinese text around digits: what wetext needs to see to tell 2个 (两个) from 2号 (二号).
_STRETCH = re.compile(rf"[{HAN}\d%‰℃℉:/~.+\-=$£€¥]*\d[{HAN}\d%‰℃℉:/~.+\-=$£€¥]*")
ENGLISH_NUMBER = re.compile(r"[$£€¥]?\d+(?:[.:/]\d+)*[%℃℉]?")
_ENGLISH_WORDS = re.compile(r"[a-z]+(?:[ '-][a-z]+)*")
# What changes how the grammar reads numbers near it: ranges, what is about so much, ends of telephone numbers.
_NOT_PLAIN = re.compile(rf"到|约|人均|尾号|(?<!\d)%|[^\d%{HAN}]")
_PLAIN = re.compile(r"(\d+)(%?)")
# What the grammar reads digit by digit, several in a row too; with a unit behind it is a number like any other.
_HOTLINES = "110|111|112|114|119|120|122|10010|10086|12110|12306|12315|12320|12328|12333|12345|12366|95(?:1[12]0|188|500|511|533|555|566|588|59[89])"
_ONLY_HOTLINES = re.compile(f"(?:{_HOTLINES})+")
_LONGER_UNITS = "公小平微摄立纳年"  # 2小时 is 两小时, though 小 alone is no unit
_DIGITS_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_TEENS_EN = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS_EN = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def cardinal_zh(digits: str) -> str:
    """A whole number in Chinese: "12" -> 十二, "2" -> 二, "105" -> 一百零五. Leading zeros or more than 12 digits: digit by digit."""
    if len(digits) > 12 or (digits[0] == "0" and digits != "0"):
        return _one_by_one(digits)
    if digits == "0":
        return "零"
    spoken, number, skipped = "", int(digits), False
    for power, unit in ((10**8, "亿"), (10**4, "万"), (1, "")):
        group, number = divmod(number, power)
        if group:
            gap = spoken and (skipped or group < 1000)
            spoken += ("零" if gap else "") + _below_10000_zh(group) + unit
        skipped = not group
    return spoken[1:] if spoken.startswith("一十") else spoken


def _below_10000_zh(number: int) -> str:
    spoken, gap = "", False
    for power, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, power)
        if digit:
            spoken += ("零" if gap else "") + _DIGITS_ZH[digit] + unit
            gap = False
        else:
            gap = bool(spoken)
    return spoken


def read_chinese(text: str) -> str:
    """Chinese text without Latin letters, its numbers replaced by how they are spoken in Mandarin; the rest is unchanged."""
    return _STRETCH.sub(lambda match: _read_stretch(match[0]), text)


def _read_stretch(stretch: str) -> str:
    stretch = re.sub(r"第(\d+)", lambda match: "第" + cardinal_zh(match[1]), stretch)
    if not re.search(r"\d", stretch):
        return stretch
    plain = [None] if _NOT_PLAIN.search(stretch) else [_read_plain(match) for match in _PLAIN.finditer(stretch)]
    if None in plain:
        return read_by_grammar(stretch)
    return _PLAIN.sub(lambda match: plain.pop(0), stretch)


def read_by_grammar(stretch: str) -> str:
    """What wetext makes of the numbers of a Chinese text; those that it leaves are read as whole numbers."""
    return re.sub(r"\d+", lambda match: cardinal_zh(match[0]), _speak(stretch, "zh") or stretch)


def _read_plain(number: re.Match[str]) -> str | None:
    """The reading of a number or percentage among Chinese characters; None where only the grammar knows it."""
    length, digits = len(number[1]), number[1].lstrip("0")
    zeros, following = "零" * (length - len(digits)), number.string[number.end() : number.end() + 2]
    if length == 11 or length > 12 or (zeros and (length > 10 or number[2])):
        return None
    if not digits:
        return zeros
    spoken = re.sub("^二(?=[百千万亿])", "两", cardinal_zh(digits))
    if number[2]:
        return "百分之" + spoken
    if following[:1] == "年" and length > (1 if zeros else 3):  # a year, but 3000年前 is a number of years
        return _one_by_one(digits) if length == 4 and not zeros and following[1:] not in list("前后内来") else None
    if following[:1] == "后":
        return None
    if digits == "2" or _ONLY_HOTLINES.fullmatch(digits):
        return None if zeros or following[:1] in list(_LONGER_UNITS) else _read_before(digits, following[:1])
    return zeros + spoken


@functools.cache
def _read_before(digits: str, char: str) -> str:
    """A number before this character, or at the end; for the few whose reading depends on it."""
    return read_by_grammar(digits + char).removesuffix(char)


def _one_by_one(digits: str) -> str:
    return "".join(_DIGITS_ZH[int(digit)] for digit in digits)


def read_english(number: str) -> list[str]:
    """The English words of a number such as "175", "3.5", "50%", "$35", "21st", "1990s"; of digits wetext cannot read, one by one."""
    if re.fullmatch(r"0|[1-9]\d{0,2}", number):
        return _below_1000_en(int(number))
    decade = re.fullmatch(r"(\d*0)s", number)
    spoken = (_speak(decade[1] if decade else number, "en") or "").lower().strip()
    if not _ENGLISH_WORDS.fullmatch(spoken):
        return [_DIGITS_EN[int(digit)] for digit in number if digit.isdecimal()]
    words = re.split("[ -]", spoken)
    if decade:
        words[-1] = re.sub("y$", "ie", words[-1]) + "s"
    return words


def _below_1000_en(number: int) -> list[str]:
    """As wetext reads it, in microseconds."""
    hundreds, rest = divmod(number, 100)
    spoken = [_DIGITS_EN[hundreds], "hundred", *(["and"] if rest else [])] if hundreds else []
    if rest >= 20:
        return [*spoken, _TENS_EN[rest // 10 - 2], *([_DIGITS_EN[rest % 10]] if rest % 10 else [])]
    return [*spoken, *([(*_DIGITS_EN, *_TEENS_EN)[rest]] if rest or not hundreds else [])]


def read_in_word(digits: str, language: str) -> list[str]:
    """Digits that touch letters, as in A4L or PM2.5: a number up to 99, digit by digit from three digits on.

    Args:
        digits: e.g. "4", "2.5".
        language: zh | en.
    Returns:
        one string of Chinese characters, or the English words.
    """
    whole, point, fraction = digits.partition(".")
    if language == "zh":
        read = cardinal_zh(whole) if len(whole) < 3 else _one_by_one(whole)
        return [read + ("点" if point else "") + _one_by_one(fraction.replace(".", ""))]
    short = len(whole) < 3 and (whole[0] != "0" or whole == "0")
    words = read_english(whole) if short else [_DIGITS_EN[int(digit)] for digit in whole]
    return words + (["point"] if point else []) + [_DIGITS_EN[int(digit)] for digit in fraction if digit.isdecimal()]


@functools.lru_cache(NUM_REMEMBERED)
def _speak(text: str, language: str) -> str | None:
    """What wetext makes of `text`; None, with a warning, where its grammar has no path."""
    try:
        return reader(language)(text)
    except ValueError:
        log.warning("%r: no grammar of numbers reads this; it is read digit by digit", text)
        return None
