"""Intervals on data whose truth is known; all seeds are fixed."""

import numpy as np
import pytest

from nim4.score import bootstrap


def test_the_block_is_the_speaker_from_ten_speakers_on():
    assert bootstrap.choose_block([f"s{i % 9}" for i in range(100)]) == "utterance"
    assert bootstrap.choose_block([f"s{i % 10}" for i in range(100)]) == "speaker"
    assert bootstrap.choose_block([f"s{i % 10}" for i in range(99)] + [None]) == "utterance"


def test_equal_utterances_leave_no_doubt():
    assert bootstrap.interval([1] * 30, [4] * 30, ["s"] * 30) == (25.0, 25.0)


def test_the_interval_is_the_same_every_time_and_holds_the_rate():
    rng = np.random.default_rng(7)
    errors = rng.binomial(10, 0.2, size=500)
    low, high = bootstrap.interval(errors, [10] * 500, [None] * 500)
    assert (low, high) == bootstrap.interval(errors, [10] * 500, [None] * 500)
    assert low < 100 * errors.sum() / 5000 < high
    spread = 100 * np.sqrt(0.2 * 0.8 / 5000)  # binomial, for comparison
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_intervals_cover_the_true_rate_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        rates = rng.beta(2, 8, size=80)  # utterances differ; the mean is 0.2
        low, high = bootstrap.interval(rng.binomial(10, rates), [10] * 80, [None] * 80)
        hits += low <= 20.0 <= high
    assert 180 <= hits <= 198


def test_speakers_that_differ_widen_the_interval():
    rng = np.random.default_rng(2)
    speakers = np.repeat([f"s{i}" for i in range(20)], 25)
    errors = rng.binomial(10, np.repeat(rng.beta(2, 8, size=20), 25))
    low, high = bootstrap.interval(errors, [10] * 500, list(speakers))
    utt_low, utt_high = bootstrap.interval(errors, [10] * 500, [None] * 500)
    assert high - low > 1.5 * (utt_high - utt_low)


def test_a_system_does_not_differ_from_itself():
    errors = np.random.default_rng(3).integers(0, 5, size=50)
    change = bootstrap.paired_difference(errors, errors, [8] * 50, ["s"] * 50)
    assert change == bootstrap.Difference(0.0, 0.0, 0.0, 0.5)


def test_a_small_gain_everywhere_is_sure_although_the_intervals_overlap():
    rng = np.random.default_rng(4)
    errors = rng.integers(1, 8, size=60)
    better = errors - (np.arange(60) % 3 == 0)
    change = bootstrap.paired_difference(errors, better, [10] * 60, [None] * 60)
    assert change.points == pytest.approx(-20 / 600 * 100)
    assert change.low < change.points < change.high < 0
    assert change.p_better == 1.0
    back = bootstrap.paired_difference(better, errors, [10] * 60, [None] * 60)
    assert (back.points, back.low, back.high, back.p_better) == pytest.approx((-change.points, -change.high, -change.low, 0.0))
    first, second = (bootstrap.interval(values, [10] * 60, [None] * 60) for values in (errors, better))
    assert second[1] > first[0]


def test_draws_of_empty_references_are_left_out():
    low, high = bootstrap.interval([0, 1], [0, 2], [None, None])
    assert (low, high) == (50.0, 50.0)


def test_slices_of_draws_do_not_change_the_result(monkeypatch):
    errors, refs = [0, 1, 2, 3], [5, 5, 5, 5]
    whole = bootstrap.interval(errors, refs, [None] * 4)
    monkeypatch.setattr(bootstrap, "_PICKS_AT_ONCE", 40)
    assert bootstrap.interval(errors, refs, [None] * 4) == whole
