"""The reward of a transcript: its parts by hand, its range on anything a model may write, and the signs of gaming."""

import math
import random

import pytest

from nim4.config import RewardConfig
from nim4.train.rewards import copied_hints, is_loop, length_ratio, reward

PAPER = RewardConfig()
AGREEMENT = RewardConfig(context="agreement")


def parts(hyp, ref, keywords=(), config=PAPER):
    found = reward(hyp, ref, keywords, config)
    return found.accuracy, found.hallucination, found.context


def test_a_right_transcript():
    assert parts("打开 CarPlay。", "打开carplay") == (1.0, 0.0, 0.0)  # one normalisation of both sides
    assert reward("打开 CarPlay", "打开carplay!", ["CarPlay"], PAPER).total == 1.25


@pytest.mark.parametrize(
    ("hyp", "ref", "accuracy", "hallucination"),
    [
        ("好的 off course", "好的of course", math.exp(-2 * 1 / 4), 0),  # mixed units: a character or a word
        ("一二三", "一二三四五六", math.exp(-2 * 0.5), 0),  # half as long is not yet too short
        ("一二", "一二三四五", math.exp(-2 * 0.6), -1),
        ("一二三四", "一二", math.exp(-2 * 1), 0),  # nor twice as long too long
        ("一二三四五", "一二", math.exp(-2 * 1.5), -1),
        ("", "一二", math.exp(-2), -1),
        ("", "", 1.0, 0),
        ("。！", "…", 1.0, 0),  # punctuation is nothing said
        ("嗯", "", math.exp(-2), -1),
        ("one two three", "", math.exp(-6), -1),
    ],
)
def test_accuracy_and_hallucination(hyp, ref, accuracy, hallucination):
    assert parts(hyp, ref) == pytest.approx((accuracy, hallucination, 0))
    assert reward(hyp, ref, (), PAPER).total == pytest.approx(accuracy + 0.5 * hallucination)


@pytest.mark.parametrize(
    ("hyp", "keywords", "recall", "agreement"),
    [
        ("去北京饭店", [], 0, 0),
        ("去北京饭店", ["北京饭店"], 0.5, 1),
        ("去背景饭店", ["北京饭店"], -0.5, 0),
        ("去北京", ["北京", "饭店"], 0, 0.5),
        ("去北京饭店", ["北京", "上海"], 0.5, 1),  # 上海 was not said: no valid keyword for the paper, agreed upon for the other form
        ("去上海饭店", ["北京", "上海"], -0.5, 0),
        ("去上海饭店", ["上海"], 0, 0),
    ],
)
def test_context(hyp, keywords, recall, agreement):
    assert reward(hyp, "去北京饭店", keywords, PAPER).context == recall
    assert reward(hyp, "去北京饭店", keywords, AGREEMENT).context == agreement


def test_a_keyword_is_whole_words():
    assert reward("start now", "start now", ["art"], PAPER).context == 0  # it was not said
    assert reward("the artist", "the art", ["art"], PAPER).context == -0.5


def test_the_range_on_whatever_a_model_may_write():
    rng = random.Random(0)
    refs = ["", "北", "打开 carplay 去北京", "a b c d e f g h"]
    odd = ["", "北" * 5000, "ab " * 700, "\ufffd\ufffd", "<|im_start|>", "。。。", "\u200b", "0 " * 300]
    drawn = ["".join(rng.choice("北京打开 ab,.") for _ in range(rng.randrange(40))) for _ in range(200)]
    for ref in refs:
        for hyp in [*odd, *drawn, ref, ref * 3]:
            keywords = rng.sample(["北京", "carplay", "上海", "b"], rng.randrange(3))
            one, other = reward(hyp, ref, keywords, PAPER), reward(hyp, ref, keywords, AGREEMENT)
            assert 0 <= one.accuracy <= 1
            assert one.hallucination in (-1, 0)
            assert -0.5 <= one.context <= 0.5
            assert 0 <= other.context <= 1
            assert -0.75 <= one.total <= 1.25
            assert reward(ref, ref, keywords, PAPER).total >= one.total  # nothing beats what was said


def test_weights():
    config = RewardConfig(accuracy_slope=1.0, hallucination_weight=2.0, context_weight=3.0)
    assert reward("", "北", ["北"], config).total == pytest.approx(math.exp(-1) - 2 - 1.5)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", False),
        ("好好好", False),
        ("好好好好", True),
        ("no no no yes no", False),
        ("well the cat the cat the cat the cat", True),
        ("the cat the cat the cat the dog", False),
        ("我要去北京" * 4, True),
        ("我要去北京" * 3 + "我要去北", False),
        ("一二三四五六七八九" * 4, False),  # nine units are longer than what is looked for
        ("开一下窗户谢谢 of of of of course", True),
    ],
)
def test_loops(text, loop):
    assert is_loop(text) is loop


def test_length_and_copies():
    assert length_ratio("一二三", "一 two") == 1.5
    assert length_ratio("一二三", "") == 3.0
    assert copied_hints("去上海", "去北京", ["上海", "北京"]) == 0.5
    assert copied_hints("去北京", "去北京", ["上海", "北京"]) == 0
    assert copied_hints("去北京", "去北京", []) == 0
