"""Profiles of text: what each counts as the same, the faults of grammars that some carry, and the page's clips."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nim4.config import RecipeError
from nim4.corpus import grammars
from nim4.corpus.text import is_han
from nim4.report import page_clips
from nim4.score import profiles
from nim4.score.error_rate import units_of

ROOT = Path(__file__).resolve().parents[3]
CLIPS = ROOT / "results" / "reported" / "clips.json"
SAME_WHEN_FAIR = [
    ("第2个", "第二个"),
    ("价格2,000元", "价格两千元"),
    ("2024年5月20日", "二零二四年五月二十日"),
    ("涨了3.5%", "涨了百分之三点五"),
    ("零下3.5℃", "零下三点五摄氏度"),
    ("1+1=2吗", "一加一等于二吗"),
    ("气温-5度", "气温负五度"),
    ("2024-05-20到货", "二零二四年五月二十日到货"),
    ("COVID-19疫情", "covid十九疫情"),
    ("89", "八十九"),
    ("臺灣", "台湾"),
    ("二〇二四", "二零二四"),
    ("呃我啊觉得，这儿的花儿很好。", "我觉得这的花很好"),
    ("D S C车身", "DSC车身"),
    ("iPhone 手机", "iphone手机"),
    ("I'm fine", "i am fine"),
    ("it's Dr. Smith's colour", "It is doctor Smiths color"),
    ("um, one hundred and five dollars", "$105"),
    ("twenty first", "21st"),
    ("café", "cafe"),
    ("post-office", "post office"),
    ("\u202bhello\u200f world", "hello world"),
    ("hello\tworld", "hello world"),
]


def form(text, profile, **kwargs):
    return profiles.units(profiles.normalise(text, profile, **kwargs), "MER", profile)


@pytest.mark.parametrize(("one", "other"), SAME_WHEN_FAIR)
def test_fair_takes_ways_of_writing_for_the_same(one, other):
    chinese = any(map(is_han, one + other))
    assert form(one, "fair", chinese=chinese) == form(other, "fair", chinese=chinese)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("A4L很好", ["a4l", "很", "好"]),
        ("第2名", ["第", "二", "名"]),
        ("hello (laughs) world", ["hello", "laughs", "world"]),  # what a system made up in brackets stays
        ("女儿和儿子", ["女", "儿", "和", "儿", "子"]),
        ("买了3个apple", ["买", "了", "三", "个", "apple"]),
        ("1,234 items", ["1234", "items"]),
        ("i a m", ["iam"]),
        ("f o b", ["fob"]),
        ("give a i o", ["give", "a", "i", "o"]),
    ],
)
def test_fair_leaves_alone_what_is_said(text, units):
    assert form(text, "fair") == units


def test_digits_alone_are_read_in_the_language_of_the_reference():
    assert form("89", "fair", chinese=True) == ["八", "十", "九"]
    assert form("89", "fair", chinese=False) == ["89"]


@pytest.mark.parametrize(
    ("text", "faulty"),
    [
        ("第2个", "第两个"),
        ("第2名", "第两名"),
        ("A4L很好", "a四升很好"),
        ("COVID-19疫情", "covid负十九疫情"),
        ("1,234 items", "thousand two hundred and thirty four items"),
        ("2024年5月20日-3.5℃", "二零二四年五月二十日到三点五摄氏度"),
        ("post-office", "postoffice"),
        ("I'm", "im"),
    ],
)
def test_page_carries_the_faults_of_its_grammar(text, faulty):
    assert profiles.normalise(text, "page") == faulty


def test_openasr_is_whispers_normaliser():
    assert form("Dr. Smith's colour (noise) um twenty-one %", "openasr") == ["doctor", "smith", "is", "color", "21"]
    assert profiles.merges_compounds("openasr")


def test_raw_counts_marks_and_folds_case_only():
    assert form("Ｈello, don't!", "raw") == ["hello", ",", "don't", "!"]
    assert form("你好，世界", "raw") == ["你", "好", ",", "世", "界"]


def test_speechio_counts_letters_as_characters():
    normal = profiles.normalise("呃，打开 DSC", "speechio")
    assert profiles.units(normal, "CER", "speechio") == list("打开dsc")


def test_every_rate_of_the_clips_follows_or_is_explained():
    rows = page_clips.rescored(CLIPS)
    assert len(rows) == 48
    assert sum(row["shown"] == row["reported"] for row in rows) == 37
    not_shown = {row["id"] for row in rows if row["shown"] != row["reported"]}
    assert not_shown == {"A1109CO0001", "9uELWl5vOJM_0093", "ZFWalpHS0wg_0035"}
    assert [row for row in rows if (row["restored"] or row["shown"]) != row["reported"]] == []


def test_fair_takes_compounds_and_letters_away_and_nothing_else():
    fair = {(row["id"], row["system"]): row["fair"] for row in page_clips.rescored(CLIPS)}
    assert fair["5442-32873-00140000009853", "Fun-ASR-Nano-2512"] == "5.08"
    assert fair["5442-32873-00140000009853", "FireRedASR2S-LLM"] == "1.69"
    assert fair["ZFWalpHS0wg_0035", "Qwen3-ASR-1.7B"] == fair["ZFWalpHS0wg_0035", "Qwen3-Omni-30B-A3B-Instruct"] == "1.92"
    assert fair["ZH-CN_U0018_S0_32", "Qwen3-ASR-1.7B"] == "50.00"


@given(st.text(alphabet="你好二2 aIx'-.,%$第个儿0\u200f", max_size=12), st.sampled_from(profiles.PROFILES))
def test_any_text_has_units_and_its_form_is_one_of_its_own(text, profile):
    normal = profiles.normalise(text, profile)
    for metric in ("MER", "CER", "WER"):
        found = profiles.units(normal, metric, profile)
        assert all(unit and not unit.isspace() for unit in found)
        if profile not in ("raw", "openasr"):
            assert found == units_of(metric, phones="", text=normal)


def test_a_hash_tells_engine_profile_and_kind(monkeypatch):
    hashes = [profiles.profile_hash(profile) for profile in profiles.PROFILES]
    assert len(set(hashes)) == len(hashes)
    profiles.profile_hash.cache_clear()
    monkeypatch.setattr(grammars, "version", lambda engine: "9.9")
    assert profiles.profile_hash("page") not in hashes
    assert profiles.profile_hash("plain") in hashes
    profiles.profile_hash.cache_clear()


def test_an_engine_must_be_there_and_be_used(monkeypatch):
    with pytest.raises(RecipeError, match="--engine WeTextProcessing: expected profile page or speechio, found profile fair"):
        profiles.check("fair", "WeTextProcessing")
    monkeypatch.setitem(grammars.INSTALL, "no-such-package", "pip install it")
    with pytest.raises(RecipeError, match=r"expected the package no-such-package, found none\. Fix: pip install it"):
        grammars.version("no-such-package")


def test_a_long_text_is_read_in_pieces():
    long = "那么" * 3000 + "第2个 " + "12" * 1000
    normal = profiles.normalise(long, "page")
    assert normal.startswith("那么那么")
    assert "第两个" in normal
    assert not re.search(r"\d", normal)
    assert form("我" * 5000 + "2个", "fair")[-2:] == ["两", "个"]


@pytest.mark.parametrize("text", ["第2个", "A4L 很好", "呃，这儿的花儿有2,000朵", "臺灣", "I'm here on the 21st", "1,234 items"])
def test_both_engines_write_the_same(text):
    pytest.importorskip("tn", reason="WeTextProcessing is optional")
    assert profiles.normalise(text, "page", engine="WeTextProcessing") == profiles.normalise(text, "page")
