"""/v1/realtime when the server finds where somebody speaks: what a Listener of the library finds, and what a client may do meanwhile."""

import numpy as np
import pytest
from running_server import RunningServer, as_float
from spoken_clips import join, read_clips

from nim4.config import VadConfig
from nim4.decode.listening import Cutter, Listener
from nim4.decode.streaming import Recogniser
from nim4.serve.settings import StreamSettings, TurnDetection, changed

TURNS = {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 200, "silence_duration_ms": 300}


@pytest.fixture(scope="module")
def server(model):
    """One for clients that do not wait until they have spoken."""
    with RunningServer(model, max_ahead_s=60, max_behind_s=60) as running:
        yield running


@pytest.fixture(scope="module")
def speech():
    """Three clips, a second of silence after each, as 16-bit samples."""
    return (join(read_clips(3), 1.0) * 32767).astype("<i2")


def ids(events):
    return {event["item_id"] for event in events if "item_id" in event}


@pytest.mark.parametrize("num_bytes", [320, 3200, 40_000])
def test_utterances_are_those_of_the_library(server, model, speech, num_bytes):
    vad = VadConfig(threshold=0.4, padding_s=0.2, min_silence_s=0.3)
    listener = Listener(Recogniser(model), vad, ["北京"])
    expected = [*listener.push(as_float(speech)), *listener.finish()]
    with server.stream(by_hand=False) as client:
        client.send("session.update", session={"hotwords": ["北京"], "audio": {"input": {"turn_detection": TURNS}}})
        assert client.event()["session"]["turn_detection"] == TURNS
        client.speak(speech, num_bytes)
        client.send("stop")
        events, code = client.rest()
    assert code == 1000
    told = [event for event in events if event["type"] in ("speech_started", "partial", "speech_stopped", "final")]
    assert [event["type"] for event in told] == [update.kind for update in expected]
    assert sum(update.kind == "final" for update in expected) >= 3
    for event, update in zip(told, expected, strict=True):
        if update.hypothesis is None:
            assert event["audio_s"] == pytest.approx(update.audio_s, abs=1e-3)
        else:
            seen = update.hypothesis
            assert (event["text"], event["revision"], tuple(event["hints"])) == (seen.text, seen.revision, seen.hints)
    starts = [event for event in events if event["type"] == "input_audio_buffer.speech_started"]
    stops = [event for event in events if event["type"] == "input_audio_buffer.speech_stopped"]
    assert [event["audio_start_ms"] for event in starts] == [round(event["audio_s"] * 1000) for event in told if event["type"] == "speech_started"]
    assert [event["audio_end_ms"] for event in stops] == [round(event["audio_s"] * 1000) for event in told if event["type"] == "speech_stopped"]
    for start in starts:
        own = [event["type"] for event in events if event.get("item_id") == start["item_id"] and "delta" not in event and event["type"] != "partial"]
        assert own == [
            "input_audio_buffer.speech_started",
            "speech_started",
            "input_audio_buffer.speech_stopped",
            "speech_stopped",
            "input_audio_buffer.committed",
            "final",
            "conversation.item.input_audio_transcription.completed",
        ]
    assert len(ids(events)) == len(starts)


def test_a_pause_ends_an_utterance_without_a_word_of_the_client(server, speech):
    with server.stream(by_hand=False) as client:
        client.speak(speech[:48_000])
        client.until("speech_started")
        client.speak(np.zeros(24_000, np.int16))
        assert ids(client.until("final"))


def test_silence_says_nothing(server):
    with server.stream(by_hand=False) as client:
        client.speak(np.zeros(48_000, np.int16))
        client.send("stop")
        assert client.rest() == ([], 1000)


def test_a_client_may_end_what_is_being_said_and_nothing_else(server, model, speech):
    with server.stream(by_hand=False) as client:
        client.speak(np.zeros(16_000, np.int16))
        client.send("input_audio_buffer.commit")
        assert client.error() == "input_audio_buffer_commit_empty"
        client.speak(speech[:12_000])
        client.send("input_audio_buffer.commit")
        first = client.until("final")
        client.speak(speech[12_000:])
        client.send("stop")
        rest, _ = client.rest()
    (start,) = [event["audio_start_ms"] for event in first if "audio_start_ms" in event]
    (end,) = [event["audio_end_ms"] for event in first if "audio_end_ms" in event]
    assert 1000 <= start < end == 1750  # nobody paused
    cut = speech[16 * start - 16_000 : 16 * end - 16_000]
    session = Recogniser(model).session()
    session.append(as_float(cut))
    assert first[-1]["text"] == session.finalize().text
    assert min(event["audio_start_ms"] for event in rest if "audio_start_ms" in event) >= 1750


def test_what_is_cleared_is_not_heard_again(server, speech):
    with server.stream(by_hand=False) as client:
        client.speak(speech[:32_000])
        item_ids = ids(client.until("speech_started"))
        client.send("input_audio_buffer.clear")
        client.until("input_audio_buffer.cleared")
        client.speak(np.zeros(32_000, np.int16))
        client.speak(speech)
        client.send("stop")
        events, _ = client.rest()
    assert item_ids.isdisjoint(ids(events))
    assert min(event["audio_start_ms"] for event in events if "audio_start_ms" in event) >= 3900
    assert any(event["type"] == "final" for event in events)


def test_a_change_of_turns_loses_nothing(server, model, speech):
    tail = 5_000  # of silence before speech, of which the detector has kept some
    with server.stream(by_hand=False) as client:
        client.speak(np.zeros(16_000 + tail, np.int16))
        client.send("session.update", session={"turn_detection": None})
        client.until("session.updated")
        client.speak(speech[:20_000])
        client.send("session.update", session={"turn_detection": TURNS})  # holds after the commit
        client.send("input_audio_buffer.commit")
        first = client.until("final")[-1]
        client.speak(speech[20_000:])
        client.send("stop")
        events, _ = client.rest()
    cutter = Cutter(VadConfig())
    cutter.push(np.zeros(16_000 + tail, np.float32))
    assert len(cutter.kept) > 4_000
    session = Recogniser(model).session()
    session.append(np.concatenate([cutter.kept, as_float(speech[:20_000])]))
    assert (first["text"], first["audio_s"]) == (session.finalize().text, pytest.approx((len(cutter.kept) + 20_000) / 16_000, abs=1e-3))
    assert min(event["audio_start_ms"] for event in events if "audio_start_ms" in event) >= (16_000 + tail + 20_000) / 16


def test_the_server_says_what_it_does_when_a_client_does_not(model, speech):
    vad = VadConfig(threshold=0.0, max_segment_s=2, cut_search_s=1)  # everything is speech, and cut by length
    with RunningServer(model, vad=vad) as server, server.stream(by_hand=False) as client:
        client.send("session.update", session={"turn_detection": {"silence_duration_ms": 500}})
        expected = {"type": "server_vad", "threshold": 0.0, "prefix_padding_ms": 300, "silence_duration_ms": 500}
        assert client.event()["session"]["turn_detection"] == expected
        client.speak(speech[:80_000])
        client.send("stop")
        events, _ = client.rest()
    stops = [event["audio_end_ms"] for event in events if "audio_end_ms" in event]
    starts = [event["audio_start_ms"] for event in events if "audio_start_ms" in event]
    assert starts == [0, *stops[:-1]]
    assert (stops[-1], len(stops)) == (5000, sum(event["type"] == "final" for event in events))


def test_all_that_a_client_may_say_can_be_done(server):
    settings = StreamSettings(TurnDetection.of(server.service.vad))
    for threshold, padding, silence in ((0, 0, 32), (1, 5000, 10_000), (0.5, 5000, 32)):
        object_ = {"threshold": threshold, "prefix_padding_ms": padding, "silence_duration_ms": silence}
        turns = changed(settings, {"turn_detection": object_}, server.service).turn_detection
        assert Cutter(turns.vad(server.service.vad)).push(np.zeros(1600, np.float32)) == []
    assert TurnDetection.of(settings.turn_detection.vad(VadConfig())) == settings.turn_detection
