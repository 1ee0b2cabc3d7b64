"""Marks taken away and marks scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nim4.corpus.punctuation import marked_tokens, without_punctuation
from nim4.corpus.text import split_tokens
from nim4.score.punctuation import MarkScore, punctuation_scores


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("总工，open 3.5, please！", "总工open 3.5 please"),
        ("O'Brien's 'yes' at 12:30.", "O'Brien's yes at 12:30"),
        ("“好”——《书》……50% & well-known; a,b", "好书50% & well-known a b"),
        ("U.S. 1,000。", "U.S 1,000"),
        ("，。", ""),
        ("", ""),
    ],
)
def test_marks_go_and_words_stay(text, plain):
    assert without_punctuation(text) == plain
    assert split_tokens(without_punctuation(text)) == split_tokens(text)


@given(st.text("总工ab19 ,.:'’!?，。“”…-—(", max_size=14))
def test_the_beginning_of_a_text_gives_the_beginning(text):
    whole = without_punctuation(text)
    assert without_punctuation(whole) == whole
    for end in range(len(text)):
        assert whole.startswith(without_punctuation(text[:end]))


def test_tokens_have_the_first_mark_behind_them():
    assert marked_tokens("？好！，Open “it”.") == [("好", "!"), ("open", ""), ("it", ".")]
    assert [token for token, _ in marked_tokens("a4l 3.5, o'brien")] == split_tokens("a4l 3.5, o'brien")


def test_scores_by_alignment_with_words():
    pairs = [
        ("总工，打开语音。", "总工,打开语言?"),  # the comma is right, in either width; behind a wrong word stands another mark
        ("好？是。", "是。"),  # a word is missing, and its mark
        ("一", "一，二。"),  # a mark too many; an inserted word with one
        ("no marks", "no marks"),
    ]
    scores = punctuation_scores(pairs)
    assert scores[","] == MarkScore(1, 2, 1)
    assert scores["."] == MarkScore(2, 2, 1)
    assert scores["?"] == MarkScore(1, 1, 0)
    assert scores["all"] == MarkScore(4, 5, 2)
    assert scores["all"].f1 == pytest.approx(200 * 2 / 9)
    assert list(scores) == ["all", ".", ",", "?"]
    assert punctuation_scores([("a", "a")])["all"].f1 is None
