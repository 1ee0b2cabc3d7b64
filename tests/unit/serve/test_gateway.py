"""The gateway: the server's own tests with the parts elsewhere; and what happens when a part fails, has no room, or a client is gone."""

import asyncio
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import test_serve_streams as streams
import test_serve_turns as turns
import torch
from made_engine import MadeEngine
from running_server import RunningServer, as_float, pcm, wait_for
from test_serve_uploads import EVERYTHING, file_of
from triton_server import free_port

from nim4.config import RecipeError, VadConfig
from nim4.corpus.hotword_list import ListReport, Name, make_keys
from nim4.decode.encoder import StreamingEncoder
from nim4.decode.hotword import HotwordIndex
from nim4.decode.offline import transcripts
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import DEPLOYED, Recogniser
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import WEIGHTS
from nim4.serve.engines import Engines
from nim4.serve.gateway import EncoderGateway, Gateway, HeardHere
from nim4.serve.limits import Limits
from nim4.serve.parts import Parts, new_service
from nim4.serve.vllm_engine import VllmEngine

# Run here again, on `server` below:
test_a_stream_from_its_first_sample_to_its_final_text = streams.test_a_stream_from_its_first_sample_to_its_final_text
test_openai_messages_and_two_utterances = streams.test_openai_messages_and_two_utterances
test_deltas_are_what_was_settled = streams.test_deltas_are_what_was_settled
test_texts_have_no_punctuation_on_request = streams.test_texts_have_no_punctuation_on_request
test_what_is_cleared_is_forgotten = streams.test_what_is_cleared_is_forgotten
test_bad_messages_are_told_and_the_stream_goes_on = streams.test_bad_messages_are_told_and_the_stream_goes_on
test_utterances_are_those_of_the_library = turns.test_utterances_are_those_of_the_library
test_a_client_may_end_what_is_being_said_and_nothing_else = turns.test_a_client_may_end_what_is_being_said_and_nothing_else
speech = turns.speech


def with_engines(*engines, encoder=None):
    """Makes the Service's stand-in, whose engines are these; a lost one is started again when it is no longer lost."""

    def make(model, inventory, indexes, limits, vad):
        async def started(engine):
            while engine.is_lost:
                await asyncio.sleep(0.01)
            return engine

        starts = [lambda engine=engine: started(engine) for engine in engines]
        return Gateway(encoder or model.acoustic, Engines(starts), inventory, indexes, limits, vad)

    return make


def with_encoder(encoder):
    return lambda *args: EncoderGateway(encoder, *args)


def on_triton(request, talkative):
    """An encoder on the real server; skips where there is none."""
    from nim4.serve.triton_client import TritonEncoder

    encoder = TritonEncoder(request.getfixturevalue("triton").address, talkative)
    encoder.chunks_ms = [160, 640]
    return encoder


@pytest.fixture(scope="module", params=["engine", "encoder", "both"])
def server(request, model, talkative):
    """The language model in an engine, the encoder on Triton, or both."""
    encoder = None if request.param == "engine" else on_triton(request, talkative)
    make = with_encoder(encoder) if request.param == "encoder" else with_engines(MadeEngine(model), MadeEngine(model), encoder=encoder)
    with RunningServer(model, make=make, max_ahead_s=60, max_behind_s=60) as running:
        yield running


def final_of(model, samples, hotwords=()):
    return streams.final_of(model, samples, hotwords)


def said(client):
    """The final text of what has been spoken to a client."""
    client.send("stop")
    return next((event["text"] for event in client.rest()[0] if event["type"] == "final"), None)


def metric(server, name):
    lines = [line for line in server.get("/metrics")[1].splitlines() if line.startswith(f"nim4_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_streams_at_the_same_time_do_not_hear_each_other(server, model):
    def speak(seed):
        with server.stream() as client:
            client.speak(pcm(1.5 + seed / 10, seed=seed))
            return said(client)

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(speak, range(6)))
    assert texts == [final_of(model, pcm(1.5 + seed / 10, seed=seed)) for seed in range(6)]
    assert len(set(texts)) > 1


class MadeEncoder:
    """With the interface of nim4/serve/triton_client.py, in this process."""

    chunks_ms = (640,)

    def __init__(self, acoustic):
        self._acoustic, self.metrics = acoustic, None

    def stream(self, chunk_ms, do):
        return HeardHere(StreamingEncoder(self._acoustic, DEPLOYED), do, self.metrics)

    async def close(self):
        pass


def test_a_second_pass_that_hears_the_whole_has_the_encoder_here(model, heard_anew):
    samples, make = pcm(2.5), partial(EncoderGateway, MadeEncoder(model.acoustic), rereading=Rereading())
    with RunningServer(model, make=make) as server, server.stream() as client:
        client.speak(samples)
        final = said(client)
    assert (final, heard_anew) == (transcripts(model, [as_float(samples)])[0], [250])


def test_stages_are_counted(server, model):
    before = {name: metric(server, f"{name}_seconds_count") for name in ("encode", "retrieve", "append", "partial", "write")}
    with server.stream() as client:
        client.speak(pcm(2.0))
        said(client)
    after = {name: metric(server, f"{name}_seconds_count") - count for name, count in before.items()}
    if isinstance(server.service, Gateway):
        assert after == {"encode": 4, "retrieve": 4, "append": 4, "partial": 3, "write": 1} or after["encode"] in (3, 4)
        assert after["append"] == after["retrieve"] == after["encode"]
        assert metric(server, "engine_kv_blocks_used") == 0
        assert metric(server, "engines") == 2
    else:
        assert after["encode"] >= 3


def test_hints_from_an_index(talkative):
    model, inventory = load_speech_llm(talkative, torch.device("cpu"))
    names = [Name(text) for text in ("北京", "上海", "你好")]
    index = HotwordIndex.build(make_keys(enumerate(names), inventory, ListReport()), inventory)
    samples = pcm(2.0)
    session = Recogniser(model, hotwords=index).session()
    session.append(as_float(samples))
    expected = session.finalize()
    with RunningServer(model, {"names": index}, make=with_engines(MadeEngine(model))) as server, server.stream() as client:
        client.send("session.update", session={"index": "names"})
        assert client.event()["session"]["index"] == "names"
        client.speak(samples)
        client.send("stop")
        final = next(event for event in client.rest()[0] if event["type"] == "final")
    assert (final["text"], tuple(final["hints"])) == (expected.text, expected.hints)


def test_recordings_are_heard_as_streams_are(model):
    samples = pcm(3.0)
    with RunningServer(model, vad=EVERYTHING, make=with_engines(MadeEngine(model))) as server:
        server.service.warm_up()
        status, body = server.post(file_of(samples), response_format="verbose_json", **{"timestamp_granularities[]": ["segment", "word"]})
        assert status == 200
        places = [(round(16_000 * segment["start"]), round(16_000 * segment["end"])) for segment in body["segments"]]
        assert len(places) == 2
        assert [segment["text"] for segment in body["segments"]] == [final_of(model, samples[start:end]) for start, end in places]
        assert len(body["words"]) > 0 or len(body["untimed"]) == 2
        assert not server.service._engines._there[0].streams


# ---------------------------------------------------------------------------------------------------------- what can go wrong


def test_a_lost_engine_loses_no_text(model):
    engines = MadeEngine(model), MadeEngine(model)
    samples = [pcm(4.0 + seed / 5, seed=seed) for seed in range(4)]
    with RunningServer(model, make=with_engines(*engines)) as server, ThreadPoolExecutor(4) as pool:
        clients = [server.stream() for _ in samples]
        for client, spoken in zip(clients, samples, strict=True):
            client.speak(spoken[:32_000])
            client.until("partial")
        assert [len(engine.streams) for engine in engines] == [2, 2]
        engines[0].is_lost = True
        for client, spoken in zip(clients, samples, strict=True):
            client.speak(spoken[32_000:])
        texts = list(pool.map(said, clients))
        assert texts == [final_of(model, spoken) for spoken in samples]
        assert engines[1].adopted == 2
        assert metric(server, "replicas_lost_total") == 1
        assert metric(server, "streams_moved_total") == 2
        assert metric(server, "engines") == 1
        engines[0].is_lost = False
        wait_for(lambda: metric(server, "engines") == 2)


def test_while_a_lost_engine_is_replaced_streams_on_another_wait_for_nothing(model, talkative, monkeypatch):
    engines, ended = [MadeEngine(model), MadeEngine(model)], []
    cache, config = SimpleNamespace(num_gpu_blocks=100, block_size=16), SimpleNamespace(speech_id=3)
    llm = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache), model_config=SimpleNamespace(hf_config=config))
    llm.get_tokenizer, llm.shutdown = lambda: model.tokenizer, lambda: ended.append(threading.current_thread().name)
    may_start = threading.Event()

    def slowly(*_):
        """As vLLM does: it holds up the loop in which it starts."""
        assert may_start.wait(20)
        return llm

    async def first():
        return engines[0] if not engines[0].is_lost else await VllmEngine.start(talkative)

    async def second():
        return engines[1]

    monkeypatch.setattr("nim4.serve.vllm_client.new_llm", slowly)
    samples = pcm(4.0)
    with RunningServer(model, make=lambda _, *args: Gateway(model.acoustic, Engines([first, second]), *args)) as server, ExitStack() as stack:
        moved, client = (stack.enter_context(server.stream()) for _ in engines)
        for stream in (moved, client):
            stream.speak(samples[:32_000])
            stream.until("partial")
        engines[0].is_lost = True
        moved.speak(samples[32_000:])
        assert said(moved) == final_of(model, samples)
        assert metric(server, "engines") == 1
        delays_s = []
        for start in range(32_000, 64_000, 10_240):
            began_s = time.monotonic()
            client.speak(samples[start : start + 10_240])
            client.until("partial")
            delays_s.append(time.monotonic() - began_s)
        assert max(delays_s) < 0.64
        assert metric(server, "engines") == 1, "it was there before this could be seen"
        may_start.set()
        wait_for(lambda: metric(server, "engines") == 2)
        assert said(client) == final_of(model, samples)
    assert ended == ["vllm"]


def test_an_engine_is_not_replaced_by_one_of_another_model(talkative, aligned, tmp_path, monkeypatch):
    folder = shutil.copytree(talkative, tmp_path / "model")
    service = new_service(Parts(engine="vllm", engines=2), (folder, torch.device("cpu"), "fp32"), {}, Limits(), VadConfig())
    service.close()
    started = []

    async def start(folder, settings):
        started.append(folder)

    monkeypatch.setattr(VllmEngine, "start", start)
    asyncio.run(service._engines._starts[1]())
    shutil.copy(aligned / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(RecipeError, match=r"model: expected the model that this gateway was started with, found another. Fix: put it back, or start"):
        asyncio.run(service._engines._starts[1]())
    assert started == [folder]


def test_engines_start_one_after_the_other(talkative, monkeypatch):
    """Each is told its GPU by an environment that all of this process share."""
    service = new_service(Parts(engine="vllm", engines=2), (talkative, torch.device("cpu"), "fp32"), {}, Limits(), VadConfig())
    service.close()
    seen = []

    async def start(folder, settings):
        before = os.environ["CUDA_VISIBLE_DEVICES"]
        await asyncio.sleep(0.02)
        seen.append((before, os.environ["CUDA_VISIBLE_DEVICES"]))

    monkeypatch.setattr(VllmEngine, "start", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    async def together():
        await asyncio.gather(*(start() for start in service._engines._starts))

    asyncio.run(together())
    assert seen == [("4", "4"), ("7", "7")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


def test_a_stream_waits_for_its_only_engine(model):
    engine, samples = MadeEngine(model), pcm(3.0)
    with RunningServer(model, make=with_engines(engine)) as server, server.stream() as client:
        client.speak(samples[:32_000])
        client.until("partial")
        engine.is_lost = True
        client.speak(samples[32_000:])
        wait_for(lambda: metric(server, "replicas_lost_total") == 1)
        engine.is_lost = False
        assert said(client) == final_of(model, samples)


def test_without_an_engine_clients_are_told_to_come_back(model, monkeypatch):
    monkeypatch.setattr("nim4.serve.engines.PATIENCE_S", 0.1)
    engine = MadeEngine(model)
    with RunningServer(model, vad=EVERYTHING, make=with_engines(engine)) as server:
        with server.stream() as client:
            client.speak(pcm(1.5))
            client.until("partial")
            engine.is_lost = True
            client.speak(pcm(1.5))
            assert client.rest()[1] == 1013
        with server.stream() as client:
            client.speak(pcm(1.0))
            assert client.rest()[1] == 1013
        status, body = server.post(file_of(pcm(1.0)))
        assert (status, body["error"]["code"]) == (503, "too_busy")
        engine.is_lost = False
        wait_for(lambda: metric(server, "engines") == 1)
        with server.stream() as client:
            client.speak(pcm(1.5))
            assert said(client) == final_of(model, pcm(1.5))


def test_where_there_is_no_room_partials_wait_and_nothing_crashes(model):
    engine, samples = MadeEngine(model), pcm(4.0)
    with RunningServer(model, make=with_engines(engine)) as server:
        with server.stream() as client:
            client.speak(samples[:24_000])
            client.until("partial")
            engine.is_full = True
            client.speak(samples[24_000:])
            wait_for(lambda: metric(server, "no_room_total") >= 2)
            with server.stream() as other:  # nor is there any for another one
                other.speak(pcm(1.0))
                assert other.rest()[1] == 1013
            engine.is_full = False
            assert said(client) == final_of(model, samples)
        assert not engine.streams


def test_a_client_that_vanishes_frees_what_it_had(model, request, talkative):
    engine = MadeEngine(model)
    with RunningServer(model, make=with_engines(engine)) as server:
        client = server.stream()
        client.speak(pcm(2.0))
        client.until("partial")
        client.socket.socket.shutdown(2)
        client.socket.socket.close()
        wait_for(lambda: engine.aborted == 1)
        assert not engine.streams
        assert metric(server, "aborted_total") == 1
        with server.stream() as other:
            other.speak(pcm(1.5))
            assert said(other) == final_of(model, pcm(1.5))
        assert metric(server, "aborted_total") == 1, "what ended well was not given up"


def test_tenants_are_told_apart(model):
    engine = MadeEngine(model)
    with RunningServer(model, keys=["one", "two"], make=with_engines(engine)) as server:
        for key in ("one", "two", "one"):
            with server.stream(additional_headers={"Authorization": f"Bearer {key}"}) as client:
                client.speak(pcm(1.0))
                said(client)
        own = [tenant for tenant in engine.opened if tenant]
        assert own[0] == own[2] != own[1]
        assert "one" not in "".join(own), "a key must not be told to others"


def test_lost_triton_servers_lose_no_text(model, talkative, repository, triton, tmp_path):
    from triton_server import TritonServer

    from nim4.serve.triton_client import TritonEncoder

    samples = [pcm(4.0 + seed / 5, seed=seed) for seed in range(4)]
    with TritonServer(repository, tmp_path) as other:
        encoder = TritonEncoder(f"{triton.address},{other.address}", talkative)
        with RunningServer(model, make=with_encoder(encoder), max_behind_s=60) as server, ThreadPoolExecutor(4) as pool:
            clients = [server.stream() for _ in samples]
            for client, spoken in zip(clients, samples, strict=True):
                client.speak(spoken[:32_000])
                client.until("partial")
            assert [replica.streams for replica in encoder.replicas] == [2, 2]
            other.kill()
            for client, spoken in zip(clients, samples, strict=True):
                client.speak(spoken[32_000:])
            assert list(pool.map(said, clients)) == [final_of(model, spoken) for spoken in samples]
            assert metric(server, "replicas_lost_total") >= 1
            assert metric(server, "chunks_again_total") >= 4


# ----------------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--encoder", "127.0.0.1:8001"], "--encoder: expected addresses as grpc://HOST:PORT"),
        (["--engines", "0"], "--engines: expected at least 1"),
        (["--engines", "2"], "no more than 1 with --engine hf"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(nim4, talkative, options, expected):
    code, _, told = nim4("serve", "--model", talkative, "--port", 0, *options)
    assert code == 2
    assert len(told) == 1
    assert expected in told[0]


def test_a_server_of_the_encoder_that_is_not_there_is_told_before_the_model_is_read(nim4, talkative, monkeypatch):
    pytest.importorskip("tritonclient.grpc")
    monkeypatch.setattr("nim4.serve.parts.load_speech_llm", lambda *_: pytest.fail("it was read"))
    code, _, told = nim4("serve", "--model", talkative, "--port", 0, "--encoder", f"grpc://127.0.0.1:{free_port()}")
    assert code == 2
    assert "expected a Triton server that is ready" in told[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "onnx", "--backend", "python"], "--backend: expected --format triton"),
        (["--format", "onnx", "--chunk-ms", "640", "320"], "--chunk-ms: expected one size, found 2"),
        (["--format", "triton", "--int8"], "--int8: expected it to be left out"),
        (["--format", "triton", "--chunk-ms", "600"], "multiples of 40 that divide 2560, found 600"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(nim4, talkative, tmp_path, options, expected):
    code, _, told = nim4("export", "--model", talkative, "--out", tmp_path / "out", *options)
    assert code == 2
    assert len(told) == 1
    assert expected in told[0]
    assert not list(tmp_path.iterdir())


def test_export_writes_a_repository(nim4, talkative, tmp_path):
    assert nim4("export", "--format", "triton", "--model", talkative, "--out", tmp_path / "out") == (0, [], [])
    folder = tmp_path / "out" / "nim4_encoder_640ms"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == ["1/model.onnx", "config.pbtxt"]
    assert 'backend: "onnxruntime"' in (folder / "config.pbtxt").read_text()
