"""Normal form and units of text: exact strings, and what must hold for any string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nim4.corpus.text import fold, is_han, normalise, split_tokens, stands_alone


@pytest.mark.parametrize(
    ("published", "normal"),
    [
        ("打开 CarPlay，Apple  Pay！", "打开carplay apple pay"),
        ("第 2 名", "第2名"),
        ("ＡＢＣ　１２３．５", "abc 123.5"),  # full width
        ("ｶﾀｶﾅ", "カタカナ"),  # half width
        ("O’Brien’s ‘yes’ — dogs' 'cause", "o'brien's yes dogs cause"),  # curly apostrophes, apostrophes outside words
        ("90's rock'n'roll", "90's rock'n'roll"),
        ("3.5, 1,234,567. 12,34 1.", "3.5 1234567 12 34 1"),
        ("一共200，300只", "一共200 300只"),  # a full-width comma is a comma of the sentence
        ("state-of-the-art well–known", "state of the art well known"),
        ("cafe\u0301 Zu\u0308rich", "caf\u00e9 z\u00fcrich"),  # combining accents are composed
        ("so\u00adft zero\u200bwidth jo\u200diner", "soft zero width joiner"),
        ("snake_case a@b", "snake case a b"),
        ("😀👍🏽 ok ❤\ufe0f", "ok"),
        ("奥迪A4L 3G网络", "奥迪a4l 3g网络"),
        ("𠮷野家〇々", "𠮷野家〇々"),
        ("我 ’好’ 他", "我好他"),
        ("", ""),
        ("。！ -- ...", ""),
    ],
)
def test_normal_form(published, normal):
    assert normalise(published) == normal


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("打开CarPlay第2名", ["打", "开", "carplay", "第", "2", "名"]),
        ("ひらカナー漢", ["ひ", "ら", "カ", "ナ", "ー", "漢"]),
        ("ㄅㄆ", ["ㄅ", "ㄆ"]),
        ("Привет 한국어 नमस्ते", ["привет", "한국어", "नमस्ते"]),
        ("3.5% $1,000", ["3.5", "1000"]),
        ("I'm Jo's 'n'", ["i'm", "jo's", "n"]),
    ],
)
def test_units(text, tokens):
    assert split_tokens(text) == tokens


def test_every_han_extension_stands_alone():
    one_of_each = [0x3400, 0x4E00, 0x9FFF, 0xFA0E, 0x20000, 0x2A700, 0x2B740, 0x2B820, 0x2CEB0, 0x2EBF0, 0x30000, 0x31350]
    assert all(is_han(chr(code)) and split_tokens("a" + chr(code) + "b") == ["a", chr(code), "b"] for code in one_of_each)
    assert not any(is_han(char) for char in "aÀあア가1，。 ー")


def test_fold_keeps_case_and_punctuation():
    assert fold("Ｃａｒ’ｓ，OK") == "Car's,OK"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_any_text(text):
    normal = normalise(text)
    assert normalise(normal) == normal
    assert split_tokens(normal) == split_tokens(text)
    assert "".join(split_tokens(text)) == normal.replace(" ", "")
    assert all(len(token) == 1 for token in split_tokens(text) if any(map(stands_alone, token)))
