"""Numbers as they are spoken. The only door to wetext, which is loaded when the first number is met.

wetext reads dates, money, fractions and telephone numbers. It never sees: 第 + digits (it would read 第2名 as 第两名), digits that
touch Latin letters (A4L would end in litres), or Chinese characters in its English mode (which it cannot bear).
"""

import functools
import logging
import re
from typing import Any

from nim4.config import RecipeError
from nim4.corpus.text import HAN

log = logging.getLogger("nim4")
_DIGITS_ZH = "零一二三四五六七八九"
# A stretch of Chinese text around digits: what wetext needs to see to tell 2个 (两个) from 2号 (二号).
_STRETCH = re.compile(rf"[{HAN}\d%‰℃℉:/~.+\-=$£€¥]*\d[{HAN}\d%‰℃℉:/~.+\-=$£€¥]*")
ENGLISH_NUMBER = re.compile(r"[$£€¥]?\d+(?:[.:/]\d+)*[%℃℉]?")
_ENGLISH_WORDS = re.compile(r"[a-z]+(?:[ '-][a-z]+)*")
_DIGITS_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def cardinal_zh(digits: str) -> str:
    """A whole number in Chinese: "12" -> 十二, "2" -> 二, "105" -> 一百零五. Leading zeros or more than 12 digits: digit by digit."""
    if len(digits) > 12 or (digits[0] == "0" and digits != "0"):
        return "".join(_DIGITS_ZH[int(digit)] for digit in digits)
    if digits == "0":
        return "零"
    spoken, number = "", int(digits)
    for power, unit in ((10**8, "亿"), (10**4, "万"), (1, "")):
        group, number = divmod(number, power)
        if group:
            gap = spoken and group < 1000
            spoken += ("零" if gap else "") + _below_10000_zh(group) + unit
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
    spoken = _speak(stretch, "zh") or stretch
    return re.sub(r"\d+", lambda match: cardinal_zh(match[0]), spoken)


def read_english(number: str) -> list[str]:
    """The English words of a number such as "175", "3.5", "50%", "$35", "21st", "1990s"; of digits wetext cannot read, one by one."""
    decade = re.fullmatch(r"(\d*0)s", number)
    spoken = (_speak(decade[1] if decade else number, "en") or "").lower().strip()
    if not _ENGLISH_WORDS.fullmatch(spoken):
        return [_DIGITS_EN[int(digit)] for digit in number if digit.isdecimal()]
    words = re.split("[ -]", spoken)
    if decade:
        words[-1] = re.sub("y$", "ie", words[-1]) + "s"
    return words


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
        read = cardinal_zh(whole) if len(whole) < 3 else "".join(_DIGITS_ZH[int(digit)] for digit in whole)
        return [read + ("点" if point else "") + "".join(_DIGITS_ZH[int(digit)] for digit in fraction if digit.isdecimal())]
    short = len(whole) < 3 and (whole[0] != "0" or whole == "0")
    words = read_english(whole) if short else [_DIGITS_EN[int(digit)] for digit in whole]
    return words + (["point"] if point else []) + [_DIGITS_EN[int(digit)] for digit in fraction if digit.isdecimal()]


def _speak(text: str, language: str) -> str | None:
    """What wetext makes of `text`; None, with a warning, where its grammar has no path, which it tells by an AssertionError."""
    try:
        return _normaliser(language).normalize(text)
    except AssertionError:
        log.warning("%r: no grammar of numbers reads this; it is read digit by digit", text)
        return None


@functools.cache
def _normaliser(language: str) -> Any:
    try:
        from wetext import Normalizer
    except ImportError as error:
        raise RecipeError("numbers in text", expected="the package wetext", found=error, fix="pip install wetext==0.1.8") from error
    return Normalizer(lang=language, operator="tn")
