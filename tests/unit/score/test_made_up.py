"""Hallucinations, loops and kinds of errors, on texts made for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nim4.score.attribution import KINDS, attribute
from nim4.score.error_rate import ScoredUtterance
from nim4.score.made_up import common_units, is_hallucinated, is_repetition, made_up, num_loops, share


def common_by_table(a, b):
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if left == right else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


@given(st.text(alphabet="abc", max_size=9), st.text(alphabet="abc", max_size=9))
def test_common_units_are_those_of_the_plain_table(a, b):
    assert common_units(a, b) == common_by_table(a, b)


@pytest.mark.parametrize(
    ("ref", "hyp", "expected"),
    [
        ("好的", "哈那那那", True),
        ("好的", "好的那那那那那", True),  # 2 of 7 are not below 0.2, see the next line
        ("好的", "好的那那那", False),  # 2 of 5 are common
        ("好的去吧", "哈那那那那那", False),  # not more than 1.5 times as long
        ("", "哈", True),
        ("", "", False),
    ],
)
def test_hallucinations_by_the_papers_rule(ref, hyp, expected):
    overlap = 0.3 if hyp == "好的那那那那那" else 0.2
    assert is_hallucinated(ref, hyp, overlap) is expected


@pytest.mark.parametrize(("units", "loops"), [("abcabcabc", 3), ("xaaaa", 4), ("ab", 1), ("", 1), ("ababa", 2), ("那那哈哈哈", 3)])
def test_loops_are_counted(units, loops):
    assert num_loops(units) == loops


def test_a_repetition_is_one_that_the_reference_has_not():
    assert is_repetition("阿弥陀佛", "阿弥陀佛" * 5)
    assert not is_repetition("阿弥陀佛", "阿弥陀佛" * 4)
    assert not is_repetition("哈" * 6, "哈" * 6)
    assert is_repetition("哈" * 6, "哈" * 9)


def utterance(ref, hyp, missing=None):
    return ScoredUtterance("u", None, tuple(ref), tuple(hyp), 0, 0, 0, missing)


def test_shares_count_every_utterance():
    scored = [utterance("好的", "哈" * 9), utterance("好的", "", "empty"), utterance("好的", "", "absent"), utterance("", "啦"), utterance("", "")]
    shares = made_up(scored)
    assert [(shares[key]["k"], shares[key]["n"]) for key in ("hallucination", "repetition", "non_speech_text", "empty")] == [
        (2, 5),
        (1, 5),
        (1, 2),
        (1, 3),
    ]
    assert "1.5" in shares["rule"]
    assert "0.2" in shares["rule"]
    assert "0.33" in made_up(scored, 0.33)["rule"]
    assert share(0, 0)["rate"] is None
    assert share(0, 14721)["ci_high"] == pytest.approx(0.0261, abs=1e-4)


@pytest.mark.parametrize(
    ("ref", "hyp", "errors", "kinds"),
    [
        ("D S C", "DSC", 3, {"letters": 3}),
        ("D S C", "ESC", 3, {"letters": 2, "lexical": 1}),
        ("his dog cart", "his dogcart", 2, {"compound": 2}),
        ("二零二四年", "2024年", 4, {"number": 4}),
        ("嗯好", "嗯，好。", 2, {"punctuation": 2}),
        ("好的", "呃好的", 1, {"filler": 1}),
        ("colour", "color", 1, {"script": 1}),
        ("台湾", "臺灣", 2, {"script": 2}),
        ("好的", "坏的", 1, {"lexical": 1}),
        ("brandon arms", "brand and arms", 2, {"lexical": 2}),
    ],
)
def test_errors_are_attributed_to_what_would_take_them_away(ref, hyp, errors, kinds):
    assert attribute(ref, hyp, errors, chinese="二" in ref) == kinds


@given(st.text(alphabet="ab 2二,.呃", max_size=10), st.text(alphabet="ab 2二,.呃", max_size=10), st.integers(0, 9))
def test_kinds_add_up_to_the_errors(ref, hyp, errors):
    kinds = attribute(ref, hyp, errors, chinese=True)
    assert sum(kinds.values()) == errors
    assert kinds.keys() <= set(KINDS)
