"""Latency, flicker and the change of the second pass, from hand-made event logs."""

import pytest

from nim4.score.decoded import Event
from nim4.score.latency import streaming_latency


def log(name, *rows, final, settled=0):
    """Events: partials of (audio heard in s, clock in s, text), then the final text."""
    return [Event(name, *row, False, settled) for row in rows] + [Event(name, *final, True, settled)]


def test_all_figures():
    events = log("u1", (1.0, 1.1, ""), (2.0, 2.2, "打开"), (3.0, 3.1, "打开"), (4.0, 4.4, "打开天窗"), final=(4.5, 4.6, "打开天空"))
    events += log("u2", (1.0, 1.4, "hello word"), (2.0, 2.1, "hello world"), final=(2.0, 2.3, "hello world"))
    found = streaming_latency(events, {"u1": 4.5, "u2": 2.0}, {"u1": "打开天空", "u2": "hello word"})
    assert (found.first_text_p50_ms, found.first_text_utts, found.final_utts) == (1800.0, 2, 2)
    assert found.final_p50_ms == pytest.approx(200.0)
    assert 200 < found.final_p90_ms < found.final_p95_ms < found.final_p99_ms < 300
    assert found.partial_lag_p50_ms == pytest.approx(300.0)  # of 200, 400, 400 and 100: those that changed the text
    assert found.flicker == pytest.approx(100 * 1 / 7, abs=0.01)  # 4 characters, 2 words, and 1 that takes the place of another
    assert found.upwr == pytest.approx(100 * 1 / 6, abs=0.01)  # of 4 characters and 2 words of the final texts
    assert found.second_pass_change == pytest.approx(100 * 1 / 6, abs=0.01)
    assert found.second_pass_gain == pytest.approx(100 * 1 / 6, abs=0.01)  # u1 is right at last; u2 is as wrong as before
    assert (found.first_text_audio_p50_ms, found.first_text_audio_p95_ms) == (1500.0, 1950.0)


def test_what_never_changes_has_no_flicker():
    found = streaming_latency(log("u", (1.0, 1.1, "a"), final=(2.0, 2.1, "a b"), settled=None), {"u": 2.0})
    assert (found.flicker, found.upwr, found.second_pass_change, found.second_pass_gain) == (None, None, None, None)
    assert found.partial_lag_p95_ms == pytest.approx(100.0)


def test_silence_and_no_events_have_no_figures():
    found = streaming_latency(log("u", final=(2.0, 2.1, "")), {"u": 2.0})
    assert (found.first_text_p50_ms, found.partial_lag_p50_ms, found.flicker, found.second_pass_change) == (None, None, None, None)
    assert found.final_p99_ms == pytest.approx(100.0)
    assert streaming_latency([], {}).final_utts == 0


def test_a_final_text_without_partials_is_all_change():
    assert streaming_latency(log("u", final=(2.0, 2.1, "你好")), {"u": 2.0}).second_pass_change == 100.0
