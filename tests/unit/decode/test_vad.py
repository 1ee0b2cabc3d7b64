"""Segments of speech: silero's own numbers, the same for any split of the samples, bounded, and cut where it is quiet."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken_clips import join, read_clips

from nim4.config import RecipeError, VadConfig
from nim4.decode import vad
from nim4.decode.together import alone, run
from nim4.decode.vad import WINDOW_SAMPLES, SpeechProbability, VoiceActivity, segments

SECOND = 16_000


@pytest.fixture(scope="module")
def speech():
    return join(read_clips(5), 1.0)


class Scripted:
    """Stands for the network: these probabilities, one per window, and the last one for ever."""

    def __init__(self, values):
        self._values = list(values)

    def hear(self, windows):
        yield from ()
        return [self._values.pop(0) if len(self._values) > 1 else self._values[0] for _ in windows]


@pytest.fixture
def told(monkeypatch):
    """`told(probabilities)` replaces the network by these, one per window, the last one for ever."""
    return lambda *values: monkeypatch.setattr(vad, "SpeechProbability", lambda: Scripted(values))


def windows(count):
    return np.zeros(count * WINDOW_SAMPLES, np.float32)


def pushed(samples, ends, config=None):
    """Events of a stream that is split at `ends`, and what was settled after each push."""
    activity, events, settled = VoiceActivity(config), [], 0
    for piece in np.split(samples, sorted(ends)):
        new = activity.push(piece)
        assert all(event.sample >= settled for event in new)
        assert activity.settled >= settled
        settled = activity.settled
        assert settled <= len(samples)
        events += new
    last = activity.finish()
    assert all(event.sample >= settled for event in last)
    return events + last


def test_probabilities_are_those_of_silero(speech):
    from silero_vad import load_silero_vad

    reference, own = load_silero_vad(), SpeechProbability()
    heard = torch.from_numpy(speech[: 100 * WINDOW_SAMPLES]).split(WINDOW_SAMPLES)
    ours = [alone(own.hear(window[None]))[0] for window in heard]
    theirs = [reference(window, SECOND).item() for window in heard]
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-4
    assert max(ours) > 0.9
    assert min(ours) < 0.1


def test_every_clip_is_a_segment_and_the_silence_between_them_is_none(speech):
    found = segments(speech)
    clips, start = read_clips(5), 0
    assert len(found) == len(clips)
    for (first, last), clip in zip(found, clips, strict=True):
        assert start - 0.3 * SECOND <= first < last <= start + len(clip) + 0.4 * SECOND
        assert last - first > 0.4 * len(clip)
        start += len(clip) + SECOND
    assert segments(np.zeros(3 * SECOND, np.float32)) == []
    assert segments(speech[:0]) == []
    noise = np.random.default_rng(0).normal(0, 0.01, 3 * SECOND).astype(np.float32)
    assert segments(noise) == []


CONFIGS = [
    VadConfig(),
    VadConfig(threshold=0, max_segment_s=2, cut_search_s=1),
    VadConfig(min_silence_s=0.1, padding_s=0, max_segment_s=2, cut_search_s=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "all is speech", "short"])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_split_of_the_samples_gives_the_same_events(speech, config, data):
    samples = speech[: 6 * SECOND + 123]
    ends = data.draw(st.lists(st.integers(0, len(samples)), max_size=30))
    events = pushed(samples, ends, config)
    assert events == pushed(samples, [], config)
    assert [event.kind for event in events] == ["speech_started", "speech_stopped"] * (len(events) // 2)
    assert segments(samples, config) == [(a.sample, b.sample) for a, b in zip(events[::2], events[1::2], strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    levels=st.lists(st.tuples(st.sampled_from([0.0, 0.4, 1.0]), st.integers(1, 60)), min_size=1, max_size=12),
    loudness=st.integers(0, 9),
    tail=st.integers(0, 511),
    config=st.sampled_from(
        [
            *CONFIGS,
            VadConfig(max_segment_s=2, cut_search_s=0.5, padding_s=0.5),
            VadConfig(min_speech_s=0, min_silence_s=0.032, padding_s=0),
            VadConfig(min_silence_s=0.1, padding_s=0.4),
        ]
    ),
)
def test_whatever_is_heard_events_alternate_and_segments_are_bounded(levels, loudness, tail, config):
    values = [level for level, count in levels for _ in range(count)]
    samples = np.random.default_rng(loudness).uniform(-1, 1, len(values) * WINDOW_SAMPLES + tail).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "SpeechProbability", lambda: Scripted(values))
        events = pushed(samples, range(0, len(samples), 700), config)
    assert [event.kind for event in events] == ["speech_started", "speech_stopped"] * (len(events) // 2)
    places = [event.sample for event in events]
    assert places == sorted(places)
    assert all(0 <= place <= len(samples) for place in places)
    lengths = [end - start for start, end in zip(places[::2], places[1::2], strict=True)]
    assert all(0 < length <= config.max_segment_s * SECOND for length in lengths)


def test_speech_starts_and_stops_with_padding_around_it(told):
    told(*[0.0] * 20, *[1.0] * 20, *[0.2] * 30)
    config = VadConfig(padding_s=0.128, min_silence_s=0.32)
    activity = VoiceActivity(config)
    assert activity.push(windows(23)) == []  # 96 ms of speech are not yet enough
    (started,) = activity.push(windows(1))
    assert (started.kind, started.sample, activity.speaking) == ("speech_started", 16 * WINDOW_SAMPLES, True)
    assert activity.push(windows(16 + 9)) == []
    assert activity.settled == 44 * WINDOW_SAMPLES
    (stopped,) = activity.push(windows(1))
    assert (stopped.kind, stopped.sample, activity.speaking) == ("speech_stopped", 44 * WINDOW_SAMPLES, False)


def test_a_click_is_no_speech_and_a_dip_is_no_end(told):
    config = VadConfig(min_silence_s=0.6, padding_s=0)
    told(*[0.0] * 5, *[1.0] * 3, *[0.0] * 9)
    assert segments(windows(17)) == []
    told(*[1.0] * 10, *[0.0] * 10, *[0.4] * 10, *[1.0] * 5, *[0.0] * 40)
    assert segments(windows(75), config) == [(0, 10 * WINDOW_SAMPLES), (30 * WINDOW_SAMPLES, 35 * WINDOW_SAMPLES)]
    told(*[1.0] * 10, *[0.4] * 40, *[0.0] * 10, 1.0, *[0.0] * 40)
    assert segments(windows(101), config) == [(0, 61 * WINDOW_SAMPLES)]


def test_speech_ends_under_a_low_threshold(told):
    told(*[0.0] * 5, *[0.2] * 10, *[0.002] * 40)
    found = segments(windows(55), VadConfig(threshold=0.1, min_silence_s=0.6, padding_s=0))
    assert found == [(5 * WINDOW_SAMPLES, 15 * WINDOW_SAMPLES)]


def test_a_long_segment_is_cut_at_its_quietest_late_point(told):
    told(1.0)
    samples = np.full(6 * SECOND, 0.5, np.float32)
    samples[round(0.5 * SECOND) : round(0.7 * SECOND)] = 0  # too early
    samples[round(3.2 * SECOND) : round(3.4 * SECOND)] = 0.1
    config = VadConfig(max_segment_s=4, cut_search_s=2)
    (first, second) = segments(samples, config)
    assert 3.2 * SECOND < first[1] < 3.4 * SECOND
    assert (first[0], second[0], second[1]) == (0, first[1], 6 * SECOND)


@pytest.mark.parametrize(
    "change", [{"threshold": 1.5}, {"padding_s": 5.1}, {"max_segment_s": 100}, {"cut_search_s": 0.1}, {"min_silence_s": float("nan")}]
)
def test_settings_out_of_range_are_told(change):
    (name,) = change
    with pytest.raises(RecipeError, match=rf"vad\.{name}: expected"):
        VoiceActivity(VadConfig(**change))


def test_mistakes(monkeypatch):
    activity = VoiceActivity()
    for bad in (np.zeros((2, 2), np.float32), np.array([np.nan], np.float32), np.array([1], np.int16)):
        with pytest.raises(ValueError, match="samples must"):
            activity.push(bad)
    activity.finish()
    for call in (activity.finish, lambda: activity.push(windows(1))):
        with pytest.raises(RuntimeError, match="needs a new VoiceActivity"):
            call()
    vad._silero.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"silero-vad: expected it to be installed, found no such package. Fix: pip install silero-vad==6\.2\.3"):
        VoiceActivity()


def test_streams_are_heard_together_as_alone(speech):
    streams = [speech, speech[9_000:], np.zeros_like(speech), speech[::-1].copy()]
    together = [VoiceActivity() for _ in streams]
    events = [[] for _ in streams]
    for start in range(0, len(speech), 1_600):
        tasks = run([activity.pushing(stream[start : start + 1_600]) for activity, stream in zip(together, streams, strict=True)])
        for own, task in zip(events, tasks, strict=True):
            own += task.value()
    for own, task in zip(events, run([activity.finishing() for activity in together]), strict=True):
        own += task.value()
    alone_too = [VoiceActivity() for _ in streams]
    assert events == [[*activity.push(stream), *activity.finish()] for activity, stream in zip(alone_too, streams, strict=True)]
    assert events[0]
    assert not events[2]
