"""/v1/realtime: the texts of the library in OpenAI's events and ours, and the documented answer to every client that does not behave."""

import base64
import itertools
import json
import logging
import socket as sockets
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from running_server import RunningServer, as_float, pcm, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus

from nim4.config import VadConfig
from nim4.corpus.hotword_list import ListReport, Name, make_keys
from nim4.decode.hotword import HotwordIndex
from nim4.decode.offline import transcripts
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import Recogniser, StreamingSession
from nim4.decode.together import step
from nim4.model.asr import load_speech_llm
from nim4.serve.realtime import Connection
from nim4.serve.service import Service, some_names

HOTWORDS = ["北京", "上海"]


def final_of(model, samples, hotwords=()):
    session = Recogniser(model).session(hotwords)
    session.append(as_float(samples))
    return session.finalize().text


def test_a_stream_from_its_first_sample_to_its_final_text(server, model):
    samples = pcm(2.5)
    with server.stream() as client:
        client.send("session.update", session={"hotwords": HOTWORDS, "language": "zh"})
        session = client.event()["session"]
        assert (session["hotwords"], session["language"], session["index"], session["chunk_ms"]) == (HOTWORDS, "zh", None, 640)
        client.speak(samples)
        client.send("stop")
        events, code = client.rest()
    assert code == 1000
    final = next(event for event in events if event["type"] == "final")
    assert (final["text"], final["audio_s"], final["hints"]) == (final_of(model, samples, HOTWORDS), 2.5, HOTWORDS)
    assert [event["type"] for event in events if "delta" not in event][-3:] == [
        "input_audio_buffer.committed",
        "final",
        "conversation.item.input_audio_transcription.completed",
    ]
    assert events[-1]["transcript"] == final["text"]
    assert len({event["item_id"] for event in events}) == 1
    assert len({event["event_id"] for event in events}) == len(events)
    partials = [event for event in events if event["type"] == "partial"]
    assert partials
    assert [event["revision"] for event in [*partials, final]] == list(range(1, len(partials) + 2))
    for earlier, later in itertools.pairwise(partials):
        assert later["text"].startswith(earlier["text"][: earlier["settled"]])


def test_a_second_pass_that_hears_the_whole(model, heard_anew):
    recordings = [pcm(1.0 + seed, seed=seed) for seed in range(3)]
    with RunningServer(model, make=partial(Service, rereading=Rereading())) as server, ThreadPoolExecutor(3) as pool:
        server.service.warm_up()
        heard_anew.clear()

        def said(samples):
            with server.stream() as client:
                client.speak(samples)
                client.send("stop")
                return next(event["text"] for event in client.rest()[0] if event["type"] == "final")

        finals = list(pool.map(said, recordings))
    assert finals == [transcripts(model, [as_float(samples)])[0] for samples in recordings]
    assert sorted(heard_anew) == [100, 200, 300]


def test_openai_messages_and_two_utterances(server, model):
    spoken = [pcm(1.5, seed=1), pcm(0.7, seed=2)]
    with server.stream(subprotocols=["realtime"]) as client:
        assert client.socket.subprotocol == "realtime"
        transcription = {"model": "nim4-asr", "language": "zh", "prompt": "北京, 上海"}
        audio = {"input": {"format": {"type": "audio/pcm", "rate": 16000}, "transcription": transcription, "turn_detection": None}}
        client.send("session.update", session={"type": "transcription", "audio": audio})
        assert client.event()["session"]["hotwords"] == HOTWORDS
        items = [None]
        for samples in spoken:
            client.send("input_audio_buffer.append", audio=base64.b64encode(samples.tobytes()).decode())
            client.send("input_audio_buffer.commit")
            events = client.until("conversation.item.input_audio_transcription.completed")
            assert events[-1]["transcript"] == final_of(model, samples, HOTWORDS)
            committed = next(event for event in events if event["type"] == "input_audio_buffer.committed")
            assert committed["previous_item_id"] == items[-1]
            items.append(committed["item_id"])
        assert len(set(items)) == 3


def test_deltas_are_what_was_settled(server):
    with server.stream() as client:
        client.send("session.update", session={"chunk_ms": 160})
        client.event()
        client.speak(pcm(6.0))
        client.send("stop")
        events, _ = client.rest()
    told, settled = "", ""
    for event in events:
        if event["type"] == "partial":
            assert told == settled
            settled = event["text"][: event["settled"]]
        told += event.get("delta", "")
        if event["type"] == "final":
            assert told == settled
            assert settled, "nothing was settled: the test shows nothing"


def test_texts_have_no_punctuation_on_request(server, model, monkeypatch):
    tokens = model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, **options: "，".join(tokens(ids, **options)))
    for punctuation in (True, False):
        with server.stream() as client:
            client.send("session.update", session={"punctuation": punctuation, "chunk_ms": 160})
            assert client.event()["session"]["punctuation"] is punctuation
            client.speak(pcm(3.0))
            client.send("stop")
            texts = [event[key] for event in client.rest()[0] for key in ("text", "delta", "transcript") if key in event]
        assert any("，" in text for text in texts) is punctuation
        assert any(texts), "nothing was written: the test shows nothing"


def test_streams_at_the_same_time_do_not_hear_each_other(server, model):
    def speak(seed):
        with server.stream() as client:
            client.speak(pcm(1.5 + seed / 10, seed=seed))
            client.send("stop")
            return next(event["text"] for event in client.rest()[0] if event["type"] == "final")

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(speak, range(6)))
    assert texts == [final_of(model, pcm(1.5 + seed / 10, seed=seed)) for seed in range(6)]
    assert len(set(texts)) > 1
    assert server.service.metrics._sums["step_sessions"] > sum(server.service.metrics._observed["step_sessions"]), "none had a step together"


def test_a_stream_that_has_much_to_say_does_not_hold_up_another(server, monkeypatch):
    monkeypatch.setattr("nim4.serve.model_thread.step", lambda tasks: time.sleep(0.005) or step(tasks))
    ended = []
    with server.stream() as long, server.stream() as short, ThreadPoolExecutor(2) as pool:
        long.speak(pcm(9.5))
        short.speak(pcm(0.7))
        for name, client in (("long", long), ("short", short)):
            client.send("stop")
            pool.submit(lambda name=name, client=client: ended.append((name, client.rest()[1])))
    assert ended == [("short", 1000), ("long", 1000)]


def test_hints_from_an_index(talkative):
    model, inventory = load_speech_llm(talkative, torch.device("cpu"))
    names = [Name(text) for text in ("北京", "上海", "你好")]
    index = HotwordIndex.build(make_keys(enumerate(names), inventory, ListReport()), inventory)
    samples = pcm(2.0)
    session = Recogniser(model, hotwords=index).session()
    session.append(as_float(samples))
    with RunningServer(model, {"names": index}) as server, server.stream() as client:
        assert index.search_log_probs(some_names(index))
        assert index.about.english & set(some_names(index).argmax(1)), "or the search of words is compiled while a client waits"
        server.service.warm_up()
        client.send("session.update", session={"index": "names"})
        assert client.event()["session"]["index"] == "names"
        client.speak(samples)
        client.send("stop")
        final = next(event for event in client.rest()[0] if event["type"] == "final")
    hypothesis = session.finalize()
    assert (final["text"], tuple(final["hints"])) == (hypothesis.text, hypothesis.hints)


def test_what_is_cleared_is_forgotten(server, model):
    with server.stream() as client:
        client.speak(pcm(1.0, seed=5))
        client.send("input_audio_buffer.clear")
        client.until("input_audio_buffer.cleared")
        client.speak(pcm(0.8))
        client.send("input_audio_buffer.commit")
        assert client.until("final")[-1]["text"] == final_of(model, pcm(0.8))


def test_bad_messages_are_told_and_the_stream_goes_on(server, model):
    with server.stream() as client:
        for message, code in (
            ("not json", "invalid_json"),
            ("[" * 100_000, "invalid_json"),
            ("[1]", "unknown_event"),
            ('{"type": "response.create"}', "unknown_event"),
            ('{"type": "input_audio_buffer.append", "audio": "***"}', "invalid_audio"),
            ('{"type": "input_audio_buffer.append", "audio": 7}', "invalid_audio"),
            ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "invalid_audio"),
            (b"\0\0\0", "invalid_audio"),
            ('{"type": "input_audio_buffer.commit"}', "input_audio_buffer_commit_empty"),
        ):
            client.socket.send(message)
            assert client.error() == code
        for session, code in (
            (None, "invalid_value"),
            ({"hotwords": [f"名字{number}" for number in range(10_000)]}, "too_many_hotwords"),
            ({"hotwords": "北京"}, "invalid_value"),
            ({"hotwords": ["\ud800"]}, "invalid_value"),
            ({"hotwords": ["x" * 51]}, "hotword_too_long"),
            ({"\ud800": 1}, "unknown_parameter"),
            ({"index": "none"}, "index_not_found"),
            ({"language": ["zh"]}, "unsupported_language"),
            ({"chunk_ms": 100}, "invalid_value"),
            ({"punctuation": "no"}, "invalid_value"),
            ({"turn_detection": {"type": "semantic_vad"}}, "unsupported_value"),
            ({"turn_detection": {"create_response": True}}, "unsupported_value"),
            ({"turn_detection": {"threshold": float("nan")}}, "invalid_value"),
            ({"turn_detection": {"threshold": True}}, "invalid_value"),
            ({"turn_detection": {"silence_duration_ms": 31}}, "invalid_value"),
            ({"turn_detection": {"padding_ms": 300}}, "unknown_parameter"),
            ({"turn_detection": "server_vad"}, "invalid_value"),
            ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}}}}, "unsupported_value"),
            ({"input_audio_transcription": {"model": "whisper-1"}}, "model_not_found"),
        ):
            client.send("session.update", session=session)
            assert client.error() == code
        client.socket.send(b"")
        client.speak(pcm())
        client.send("input_audio_buffer.commit")
        final = client.until("final")[-1]
        assert (final["text"], final["hints"]) == (final_of(model, pcm()), [])


def test_a_message_that_is_too_large(server):
    with server.stream() as client:
        with suppress(ConnectionClosed):
            client.socket.send(bytes(2 << 20))
        assert client.rest()[1] == 1009


def refused(server, **options):
    with pytest.raises(InvalidStatus) as info:
        server.stream(**options)
    response = info.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


def test_keys_and_origins(model, caplog):
    with RunningServer(model, keys=["right"]) as server:
        assert refused(server) == (401, "invalid_api_key")
        assert refused(server, additional_headers={"Authorization": "Bearer wrong"}) == (401, "invalid_api_key")
        assert refused(server, subprotocols=["realtime", "openai-insecure-api-key.wrong"]) == (401, "invalid_api_key")
        assert refused(server, origin="http://evil.example") == (403, "origin_not_allowed")
        for options in (
            {"additional_headers": {"Authorization": "Bearer right"}},
            {"subprotocols": ["realtime", "openai-insecure-api-key.right"]},
        ):
            server.stream(**options).socket.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "a refusal is no error of the server"


def test_too_many_streams(model):
    with RunningServer(model, max_sessions=1) as server:
        with server.stream():
            assert refused(server) == (503, "too_many_sessions")
        wait_for(lambda: not server.service.streams)
        server.stream().socket.close()


def test_a_client_that_sends_faster_than_it_speaks(model):
    with RunningServer(model, max_ahead_s=2.0) as server, server.stream() as client:
        client.speak(pcm(3.0))
        assert client.rest()[1] == 4429


def test_a_server_that_is_behind(model):
    with RunningServer(model, max_behind_s=1.0) as server, server.stream() as client:
        server.service._thread.submit(time.sleep, 0.3)
        client.speak(pcm(2.0))
        assert client.rest()[1] == 1013


def test_a_flood_of_messages(model):
    with RunningServer(model, max_waiting=10) as server, server.stream() as client:
        server.service._thread.submit(time.sleep, 0.5)
        client.speak(pcm(0.7))
        with suppress(ConnectionClosed):
            for _ in range(30):
                client.send("input_audio_buffer.clear")
        assert client.rest()[1] == 4429


def test_a_flood_does_not_hold_up_another(model, monkeypatch):
    taken, take = [], Connection._take_text

    def noted(self, text):
        taken.append(text)
        take(self, text)

    monkeypatch.setattr(Connection, "_take_text", noted)
    monkeypatch.setattr("nim4.serve.realtime.MAX_SHARE", 0.001)  # far less than the machine can do
    with RunningServer(model, max_waiting=10**6) as server, server.stream() as other, raw_stream(server, 2) as raw:
        clear = frame(b'{"type": "input_audio_buffer.clear"}', 1)
        raw.sendall(clear * 4000)  # so few bytes that the server has a thousand of them at once
        wait_for(lambda: taken)
        other.send("input_audio_buffer.commit")
        assert other.error() == "input_audio_buffer_commit_empty"
        assert len(taken) < 300


def test_silence_and_length_end_a_stream_with_its_final_text(model):
    for limits, code in (({"idle_s": 0.2}, 4408), ({"session_s": 0.3}, 4413)):
        with RunningServer(model, **limits) as server, server.stream() as client:
            client.speak(pcm(0.5))
            events, closed = client.rest()
            assert closed == code
            assert [event["text"] for event in events if event["type"] == "final"] == [final_of(model, pcm(0.5))]


def test_an_utterance_that_is_too_long_is_committed(model, monkeypatch):
    monkeypatch.setattr("nim4.serve.realtime.MAX_UTTERANCE_SAMPLES", 16_000)
    samples = pcm(2.5)
    with RunningServer(model) as server, server.stream() as client:
        client.speak(samples)
        client.send("stop")
        finals = [event["text"] for event in client.rest()[0] if event["type"] == "final"]
    assert finals == [final_of(model, part) for part in np.split(samples, [16_000, 32_000])]


@pytest.fixture
def sessions(monkeypatch):
    """Every session that begins."""
    begun, begin = [], Recogniser.session

    def session(self, *args):
        begun.append(begin(self, *args))
        return begun[-1]

    monkeypatch.setattr(Recogniser, "session", session)
    return begun


def test_a_client_that_vanishes_in_mid_utterance(server, sessions):
    client = server.stream()
    client.speak(pcm(1.5))
    client.until("partial")
    client.socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.socket.shutdown(sockets.SHUT_RDWR)
    client.socket.socket.close()
    wait_for(lambda: not server.service.streams and not any(session._open for session in sessions))
    assert len(sessions) == 1
    assert server.service.metrics.gauges["model_jobs"] == 0
    assert 'nim4_closed_total{code="1006"}' in server.get("/metrics")[1]


def raw_stream(server, number=1):
    """The stream of this number, whose client reads nothing and answers no pings."""
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    head = "GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    raw.sendall(f"{head}Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    wait_for(lambda: len(server.service.streams) == number)
    return raw


def frame(data, opcode):
    """A WebSocket frame of up to 65535 bytes, masked with zeros."""
    return bytes([0x80 | opcode, 0xFE]) + struct.pack(">H", len(data)) + bytes(4) + data


def test_a_client_that_stops_reading_is_found_by_pings(model, sessions):
    with RunningServer(model, ping_s=0.2, vad=VadConfig(threshold=0.0)) as server, raw_stream(server) as raw:
        raw.sendall(frame(pcm(0.7).tobytes(), 2))
        wait_for(lambda: sessions)
        wait_for(lambda: not server.service.streams and not sessions[0]._open)


def test_a_client_that_stops_reading_is_found_by_what_it_does_not_take(model, monkeypatch):
    monkeypatch.setattr("nim4.serve.app.UNREAD_MS", 500)
    monkeypatch.setattr("nim4.serve.realtime.MAX_SHARE", 1e6)  # so that the buffers are full before the kernel gives up
    update = {"type": "session.update", "session": {"hotwords": [chr(0x4E00 + number) * 50 for number in range(10)]}}
    with RunningServer(model, max_waiting=10**6, stalled_s=0.2) as server, raw_stream(server) as raw:
        with suppress(OSError):
            for _ in range(5000):  # the answers fill the buffers between the two
                raw.sendall(frame(json.dumps(update).encode(), 1))
        wait_for(lambda: not server.service.streams)
        assert 'nim4_closed_total{code="4409"} 1' in server.service.metrics.text()
        assert server.get("/healthz")[0] == 200
        wait_for(lambda: len(server._server.server_state.connections) <= 1)


def test_a_failure_ends_one_stream_only(server, model, monkeypatch):
    with server.stream() as good, server.stream() as bad:
        good.speak(pcm(0.5))
        monkeypatch.setattr(StreamingSession, "_finalize", lambda _: 1 / 0)
        bad.speak(pcm(0.5))
        bad.send("stop")
        assert bad.rest()[1] == 1011
        monkeypatch.undo()
        good.send("stop")
        events, code = good.rest()
        assert (code, [event["text"] for event in events if event["type"] == "final"]) == (1000, [final_of(model, pcm(0.5))])


def test_sigterm_lets_streams_finish(model):
    with RunningServer(model, drain_s=0.6) as server, server.stream() as quick, server.stream() as slow:
        for client in (quick, slow):
            client.speak(pcm(0.5))
        server.terminate()
        assert server.get("/healthz") == (503, '{"status":"draining"}')
        assert refused(server) == (503, "draining")
        quick.send("stop")
        for client, code in ((quick, 1000), (slow, 1001)):
            events, closed = client.rest()
            assert (closed, [event["text"] for event in events if event["type"] == "final"]) == (code, [final_of(model, pcm(0.5))])
