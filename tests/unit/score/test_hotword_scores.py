"""Scores of hotwords, against counts by hand."""

import pytest

from nim4.corpus.keywords import Keywords
from nim4.score.bootstrap import wilson
from nim4.score.hotword import HotwordUtterance, pair_rates, score_hotwords

NAMES = Keywords(["北京饭店", "北京", "art", "惠新西街"])


def test_counts():
    utterances = [
        HotwordUtterance("去北京饭店", "去北京饭店", ["北京饭店", "惠新西街"], 1800),  # found, adopted; one false alarm, not written
        HotwordUtterance("看art", "看惠新西街", ["惠新西街"], 1800),  # missed; a false alarm that is written
        HotwordUtterance("", "北京", ["北京"], 1800, id="hiss"),  # silence: a leak
        HotwordUtterance("start", "start", [], 1800),  # art is not in start
    ]
    scores = score_hotwords(utterances, NAMES)
    assert (scores.recall.count, scores.recall.total) == (1, 2)
    assert (scores.precision.count, scores.precision.total) == (1, 4)
    assert scores.f1 == pytest.approx(2 * 50 * 25 / 75)
    assert scores.false_alarms_per_hour == pytest.approx(3 / 2)
    low, high = scores.false_alarms_interval
    assert 0 <= low <= 3 / 2 <= high
    assert low < high
    assert (scores.adopted.count, scores.adopted.total) == (1, 1)
    assert (scores.wrongly_adopted.count, scores.wrongly_adopted.total) == (2, 3)
    assert (scores.leaks.count, scores.leaks.total) == (2, 4)
    assert scores.leaked == [("", "看art", "惠新西街"), ("hiss", "", "北京")]


def test_word_errors_inside_and_outside_names():
    substituted = score_hotwords([HotwordUtterance("去北京看看", "去南京看", [], 1.0)], NAMES)
    assert (substituted.b_wer, substituted.u_wer) == (pytest.approx(50.0), pytest.approx(100 / 3))
    inserted = score_hotwords([HotwordUtterance("去北京", "去北京 art 了", [], 1.0)], NAMES)
    assert (inserted.b_wer, inserted.u_wer) == (pytest.approx(50.0), pytest.approx(100.0))


def test_nothing_to_count_is_none_and_retrieval_alone_needs_no_text():
    scores = score_hotwords([HotwordUtterance("完全没有", None, [], 0.0)], NAMES)
    assert (scores.recall.percent, scores.precision.percent, scores.f1, scores.false_alarms_per_hour) == (None,) * 4
    assert (scores.adopted.total, scores.leaks.total, scores.b_wer, scores.u_wer) == (0, 0, None, None)


def test_a_hint_inside_a_longer_name_that_was_said_is_no_false_alarm():
    scores = score_hotwords([HotwordUtterance("去北京饭店", None, ["北京", "北京饭店"], 3600)], NAMES)
    assert (scores.recall.percent, scores.precision.percent, scores.false_alarms_per_hour) == (100.0, 100.0, 0.0)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 27.75), (5, 10, 23.66, 76.34), (10, 10, 72.25, 100.0), (0, 1000, 0.0, 0.383)]
)
def test_wilson(count, total, low, high):
    assert wilson(count, total) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_pairs_that_sound_alike():
    refs, hyps = ["去北京", "看背景", "北京背景", "去北京", "上海"], ["去背景", "看背景", "北京", None, "北京"]
    assert pair_rates(refs, hyps, [("北京", "背景")]) == [
        {"said": "北京", "other": "背景", "utterances": 2, "right": 0, "other_written": 1},
        {"said": "背景", "other": "北京", "utterances": 1, "right": 1, "other_written": 0},
    ]
