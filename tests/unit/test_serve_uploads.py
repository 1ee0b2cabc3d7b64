"""POST /v1/audio/transcriptions and what stands before all routes: the right text, and the documented answer to everything that is wrong."""

import http.client
import io
import json
import threading
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from running_server import RunningServer, as_float, pcm, wait_for

from nim4.config import RecipeError, VadConfig
from nim4.corpus.units import PhonemeInventory
from nim4.decode.recordings import Transcriber, as_srt, as_vtt, full_text
from nim4.serve.limits import Gate, Limits, Refused, read_keys
from nim4.serve.metrics import Metrics
from nim4.serve.settings import TurnDetection

EVERYTHING = VadConfig(threshold=0.0, max_segment_s=2, cut_search_s=1)  # is speech, and cut by length


def file_of(samples, rate_hz=16_000, **options):
    data = io.BytesIO()
    soundfile.write(data, samples, rate_hz, **({"format": "WAV"} | options))
    return data.getvalue()


def code_of(answer):
    status, body = answer
    assert set(body["error"]) == {"type", "code", "message", "param"}
    return status, body["error"]["code"]


@pytest.fixture(scope="module")
def server(model):
    """One that takes everything for speech, and cuts it by length."""
    with RunningServer(model, vad=EVERYTHING) as running:
        yield running


@pytest.fixture(scope="module")
def recording(model):
    """Three seconds, and its segments as the library finds them."""
    samples = pcm(3.0)
    transcriber = Transcriber(model, PhonemeInventory.default(), vad=EVERYTHING, given=["北京", "上海"])
    return samples, transcriber.transcribe(as_float(samples))


def test_the_text_is_that_of_the_library(server, recording):
    samples, found = recording
    text = full_text(found)
    assert len(found) == 2
    assert text
    assert server.post(file_of(samples), prompt="北京, 上海") == (200, {"text": text})
    assert server.post(file_of(samples), prompt="北京，上海", response_format="text", language="zh", temperature="0") == (200, text + "\n")
    assert server.post(file_of(samples), prompt="北京，上海", response_format="srt") == (200, as_srt(found))
    assert server.post(file_of(samples), prompt="北京，上海", response_format="vtt") == (200, as_vtt(found))
    status, body = server.post(file_of(samples, format="FLAC"), prompt="北京、上海", response_format="verbose_json", language="zh")
    assert (status, body.pop("text"), body.pop("language"), body.pop("duration"), body.pop("task")) == (200, text, "zh", 3.0, "transcribe")
    places = [{"id": number, "start": at.start_s, "end": at.end_s, "text": at.text} for number, at in enumerate(found)]
    assert body == {"segments": places}


def test_words_are_timed_where_that_is_wanted(server, model, recording, monkeypatch):
    samples, _ = recording
    texts = iter(["你好", "3点"] * 2)
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, skip_special_tokens: next(texts))
    for wanted, names in ((["word"], {"words", "untimed"}), (["word", "segment"], {"words", "untimed", "segments"})):
        status, body = server.post(file_of(samples), **{"response_format": "verbose_json", "timestamp_granularities[]": wanted})
        assert (status, set(body) - {"task", "language", "duration", "text"}) == (200, names)
        assert [word["word"] for word in body["words"]] == ["你", "好"]
        assert 0 <= body["words"][0]["start"] < body["words"][0]["end"] <= body["words"][1]["start"] < body["words"][1]["end"] <= 2
        (untimed,) = body["untimed"]
        assert (untimed["text"], untimed["reason"]) == ("3点", "a word is not written as it is read")


def test_where_nobody_speaks_there_is_no_text(model):
    silence = file_of(np.zeros(32_000))
    with RunningServer(model) as server:
        assert server.post(silence) == (200, {"text": ""})
        assert server.post(silence, response_format="srt") == (200, "")
        assert server.post(silence, response_format="vtt") == (200, "WEBVTT\n")
        assert server.post(silence, response_format="verbose_json")[1]["segments"] == []


def test_a_long_recording_does_not_hold_up_another(server, monkeypatch):
    decoded, decoding = [], Transcriber.decoding

    def slowly(self, samples, place):
        decoded.append(len(samples))
        time.sleep(0.02)
        return (yield from decoding(self, samples, place))

    monkeypatch.setattr(Transcriber, "decoding", slowly)
    long = threading.Thread(target=server.post, args=(file_of(pcm(40.0)),))
    long.start()
    wait_for(lambda: decoded)
    assert server.post(file_of(pcm(0.5)))[0] == 200
    assert long.is_alive()
    long.join(30)
    assert len(decoded) > 21
    assert decoded.index(8_000) < 10


def test_nobody_works_for_a_client_that_has_gone(server, monkeypatch):
    decoded, decoding = [], Transcriber.decoding

    def counted(self, samples, place):
        decoded.append(place)
        time.sleep(0.05)
        return (yield from decoding(self, samples, place))

    monkeypatch.setattr(Transcriber, "decoding", counted)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    parts = [b'name="model"\r\n\r\nnim4-asr', b'name="file"; filename="a"\r\n\r\n' + file_of(pcm(40.0))]
    body = b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--x--\r\n"
    connection.request("POST", "/v1/audio/transcriptions", body, {"Content-Type": "multipart/form-data; boundary=x"})
    wait_for(lambda: decoded)
    connection.close()
    wait_for(lambda: server.service.metrics.gauges["uploads"] == 0)
    assert len(decoded) < 15


def test_sigterm_ends_a_recording_that_takes_too_long(model, monkeypatch):
    decoding = Transcriber.decoding

    def slowly(self, samples, place):
        time.sleep(0.1)
        return (yield from decoding(self, samples, place))

    monkeypatch.setattr(Transcriber, "decoding", slowly)
    with RunningServer(model, vad=EVERYTHING, drain_s=0.2) as server:
        answers = []
        upload = threading.Thread(target=lambda: answers.append(server.post(file_of(pcm(40.0)))))
        upload.start()
        wait_for(lambda: server.service.metrics.gauges["model_jobs"] == 1)
        server.terminate()
        upload.join(10)
    assert [code_of(answer) for answer in answers] == [(503, "draining")]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (192_000, 6)])
def test_containers_that_are_read(server, subtype, rate_hz, channels):
    samples = 0.1 * np.random.default_rng(0).standard_normal((rate_hz // 4, channels))
    assert server.post(file_of(samples, rate_hz, subtype=subtype))[0] == 200


def test_bad_files(server, monkeypatch):
    whole = file_of(pcm(), format="FLAC")
    for data in (
        b"this is no audio",
        b"",
        file_of(pcm())[:-1000],
        whole[: len(whole) // 2],
        file_of(np.zeros(0)),
        file_of(np.array([0.0, np.nan] * 500), subtype="FLOAT"),
        file_of(np.full(500, 1e9), subtype="FLOAT"),
        file_of(np.zeros(500), 400_000),
    ):
        assert code_of(server.post(data)) == (400, "invalid_audio")
    assert code_of(server.post(file_of(np.zeros(3 * 3600 * 8000, np.int16), 8000, format="FLAC"))) == (400, "audio_too_long")
    monkeypatch.setattr("nim4.serve.uploads.MAX_UNPACKED_BYTES", 8000 * 8)
    assert code_of(server.post(file_of(np.zeros(16_001)))) == (400, "audio_too_long")
    assert code_of(server.post(file_of(np.zeros((8_001, 2))))) == (400, "audio_too_long")


def test_a_wav_from_a_pipe_does_not_know_its_length(server):
    data = bytearray(file_of(pcm()))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert server.post(bytes(data)) == server.post(file_of(pcm()))


def test_bad_fields(server):
    good = file_of(pcm(0.2))
    for fields, answer in (
        ({"model": "whisper-1"}, (404, "model_not_found")),
        ({"response_format": "ass"}, (400, "unsupported_value")),
        ({"punctuation": "yes"}, (400, "invalid_value")),
        ({"timestamp_granularities[]": "word"}, (400, "invalid_value")),
        ({"response_format": "verbose_json", "timestamp_granularities[]": "phone"}, (400, "unsupported_value")),
        ({"temperature": "0.7"}, (400, "unsupported_value")),
        ({"language": "fr"}, (400, "unsupported_language")),
        ({"index": "none"}, (400, "index_not_found")),
        ({"stream": "true"}, (400, "unknown_parameter")),
        ({"prompt": ",".join(f"w{number}" for number in range(10_000))}, (400, "too_many_hotwords")),
        ({"prompt": "x" * 51}, (400, "hotword_too_long")),
    ):
        assert code_of(server.post(good, **fields)) == answer
    assert code_of(server.post(None)) == (400, "missing_required_parameter")
    assert code_of(server.post(None, file="text")) == (400, "missing_required_parameter")


def test_a_body_that_is_no_form(server):
    for kind, body, code in (
        ("application/json", b'{"model": "nim4-asr", "file": "a.wav"}', "missing_required_parameter"),
        ("audio/wav", file_of(pcm(0.2)), "missing_required_parameter"),
        ("multipart/form-data; boundary=x", b"--y\r\nno form\r\n--y--\r\n", "bad_request"),
        ("multipart/form-data", b"--x--\r\n", "bad_request"),
    ):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/audio/transcriptions", data=body, headers={"Content-Type": kind})
        status, text = server._answer(request)
        assert (kind, *code_of((status, json.loads(text)))) == (kind, 400, code)


def test_a_body_that_is_too_large(model):
    with RunningServer(model, max_body_bytes=20_000) as server:
        assert code_of(server.post(bytes(30_000))) == (413, "body_too_large")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)  # one that does not tell its length
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Transfer-Encoding": "chunked"}
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        connection.request("POST", "/v1/audio/transcriptions", iter([head, bytes(30_000)]), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.post(file_of(pcm(0.2)))[0] == 200


def test_an_upload_that_never_ends(model):
    with RunningServer(model, upload_s=0.2) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.putrequest("POST", "/v1/audio/transcriptions")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"--x\r\n")
        assert connection.getresponse().status == 408
        connection.close()


def test_a_client_that_vanishes_during_its_upload(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"--x\r\n")
    wait_for(lambda: server.service.metrics.gauges["uploads"] == 1)
    connection.close()
    wait_for(lambda: server.service.metrics.gauges["uploads"] == 0)
    assert server.post(file_of(pcm(0.2)))[0] == 200


def test_too_many_uploads(model):
    with RunningServer(model, max_uploads=1, vad=EVERYTHING) as server:
        release = threading.Event()
        server.service._thread.submit(release.wait, 10)
        upload = threading.Thread(target=server.post, args=(file_of(pcm(0.2)),))
        upload.start()
        wait_for(lambda: server.service.metrics.gauges["model_jobs"] == 1)
        assert code_of(server.post(file_of(pcm(0.2)))) == (503, "too_many_uploads")
        release.set()
        upload.join(10)
        assert server.post(file_of(pcm(0.2)))[0] == 200


def test_keys(model):
    with RunningServer(model, keys=["right", "other"]) as server:
        good = file_of(pcm(0.2))
        assert code_of(server.post(good)) == (401, "invalid_api_key")
        assert code_of(server.post(good, headers={"Authorization": "Bearer wrong"})) == (401, "invalid_api_key")
        assert server.post(good, headers={"Authorization": "Bearer right"})[0] == 200
        assert server.get("/metrics")[0] == 401
        assert server.get("/healthz")[0] == 200


def test_where_keys_come_from(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# of the team\none\n\ntwo\n", encoding="utf-8")
    assert read_keys(path, {"NIM4_API_KEYS": "three"}) == ["one", "two"]
    assert read_keys(None, {"NIM4_API_KEYS": "three, four"}) == ["three", "four"]
    assert read_keys(None, {}) == []
    path.write_text("# none\n", encoding="utf-8")
    for given, environment in ((path, {}), (tmp_path / "missing", {}), (None, {"NIM4_API_KEYS": ""})):
        with pytest.raises(RecipeError, match="API key"):
            read_keys(given, environment)


def test_a_field_that_no_text_can_have_is_told(server):
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    body = b'--x\r\nContent-Disposition: form-data; name="\\ud800"\r\n\r\nv\r\n--x--\r\n'
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/audio/transcriptions", data=body, headers=kind)
    status, text = server._answer(request)
    assert (status, json.loads(text)["error"]["param"]) == (400, "\ud800")


def test_origins(model):
    with RunningServer(model, origins=["https://example.org"]) as server:
        for origin in ("http://evil.example", "https://example.org.evil.example", "null", "http://[", ""):
            assert code_of(server.post(b"", headers={"Origin": origin})) == (403, "origin_not_allowed")
        for origin in ("https://example.org", f"http://127.0.0.1:{server.port}"):
            assert server.post(file_of(pcm(0.2)), headers={"Origin": origin})[0] == 200


def test_the_rate_of_a_key():
    now_s = [0.0]
    gate = Gate(["a", "b"], (), 60, clock=lambda: now_s[0])

    def use(key):
        gate.admit({"authorization": f"Bearer {key}"}, "")

    for _ in range(60):
        use("a")
    with pytest.raises(Refused) as info:
        use("a")
    assert (info.value.status, info.value.code, info.value.headers) == (429, "rate_limit_exceeded", {"retry-after": "2"})
    use("b")
    now_s[0] = 1.0
    use("a")
    with pytest.raises(Refused):
        use("a")


def test_the_rate_over_http(model):
    with RunningServer(model, requests_per_minute=2) as server:
        assert [server.get("/metrics")[0] for _ in range(3)] == [200, 200, 429]
        assert server.get("/healthz")[0] == 200


def test_unknown_addresses_have_the_same_errors(server):
    assert [server.get(path)[0] for path in ("/v1", "/v1/audio/transcriptions")] == [404, 405]
    assert '"code":"not_found"' in server.get("/x")[1]


def test_model_work_holds_up_no_other_answer(server):
    release = threading.Event()
    server.service._thread.submit(release.wait, 10)
    answers = []
    upload = threading.Thread(target=lambda: answers.append(server.post(file_of(pcm(0.2)))[0]))
    upload.start()
    assert server.get("/healthz") == (200, '{"status":"ok"}')
    assert not answers
    release.set()
    upload.join(10)
    assert answers == [200]


def test_a_failure_is_told_and_the_server_stays(server, monkeypatch):
    good = file_of(pcm(0.2))
    monkeypatch.setattr(Transcriber, "_encode", lambda *_: 1 / 0)
    assert code_of(server.post(good)) == (500, "server_error")
    monkeypatch.undo()
    assert server.post(good)[0] == 200
    assert server.service.metrics.gauges == {"sessions": 0, "uploads": 0, "model_jobs": 0}


def test_metrics_are_what_prometheus_reads(server):
    def unknown():
        lines = server.get("/metrics")[1].splitlines()
        assert "# TYPE nim4_sessions gauge" in lines
        counts = dict(line.rsplit(" ", 1) for line in lines)
        return int(counts.get('nim4_requests_total{path="other",status="404"}', 0))

    before = unknown()
    server.get("/x")
    assert unknown() == before + 1
    metrics = Metrics()
    for seconds in (0.005, 0.3, 99.0):
        metrics.observe("final_seconds", seconds)
    lines = metrics.text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("nim4_final_seconds_bucket")] == ["1"] * 5 + ["2"] * 6 + ["3"]
    for sessions in (1, 5, 600):
        metrics.observe("step_sessions", sessions)
    lines = metrics.text().splitlines()
    assert {'nim4_step_sessions_bucket{le="4"} 1', 'nim4_step_sessions_bucket{le="8"} 2', "nim4_step_sessions_sum 606.000000"} <= set(lines)
    assert {"nim4_final_seconds_sum 99.305000", "nim4_final_seconds_count 3"} <= set(lines)


def test_the_documentation_names_the_limits():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    limits = Limits()
    for words in (
        f"{limits.max_body_bytes >> 20} MiB",
        f"more than {limits.max_ahead_s:.0f} s of audio came faster",
        f"more than {limits.max_behind_s:.0f} s of audio wait",
        f"nothing came for {limits.idle_s:.0f} s",
        f"took nothing for {limits.stalled_s:.0f} s",
        f"more than {limits.max_waiting} messages",
        f"gives what is going on {limits.drain_s:.0f} s",
        json.dumps(asdict(TurnDetection.of(VadConfig()))),
        f"takes more than {limits.upload_s:.0f} s to arrive",
    ):
        assert words in text
