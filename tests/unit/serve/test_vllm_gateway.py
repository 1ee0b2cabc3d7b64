"""The whole deployment, started as one starts it: the encoder on Triton, two engines on vLLM, `python -m nim4 serve` in front of them, and speech.

Needs vLLM and Triton: utils/check_vllm.sh. NIM4_VLLM_MODEL names a trained model folder; without it the model is a tiny, random one.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from running_server import ServerOnPort, as_float, wait_for
from speech_pieces import on_our_engine
from spoken_clips import join
from test_serve_uploads import file_of
from triton_server import TritonServer, free_port

from nim4.config import VadConfig
from nim4.decode.recordings import speech_places
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import WEIGHTS, load_model
from nim4.stage import ROOT, file_hash

pytest.importorskip("vllm")
KEYS = ("one", "two")
CHUNK_S = 0.64


class GatewayProcess(ServerOnPort):
    """`python -m nim4 serve` with engines on vLLM, until left."""

    def __init__(self, folder, *options):
        self.port = free_port()
        command = [sys.executable, "-m", "nim4", "serve", "--model", folder, "--port", self.port, "--engine", "vllm", "--precision", "fp32", *options]
        self._process = subprocess.Popen([*map(str, command)], cwd=ROOT)

    def __enter__(self):
        end_s = time.monotonic() + 600
        while time.monotonic() < end_s:
            assert self._process.poll() is None, "it has ended"
            with suppress(urllib.error.URLError, TimeoutError, ConnectionError):
                if self.get("/healthz")[0] == 200:
                    return self
            time.sleep(0.5)
        raise AssertionError("it does not come up")

    def __exit__(self, *error):
        engines = self.engines()
        self._process.terminate()
        assert self._process.wait(120) == 0
        assert engines
        assert not {pid for pid, _, _ in processes()} & set(engines), "an engine is left behind"

    def engines(self):
        """The ids of its engines' processes."""
        own = {self._process.pid}
        for pid, parent, _ in processes():  # children come after their parents
            own |= {pid} if parent in own else set()
        return [pid for pid, _, name in processes() if pid in own and "EngineCore" in name]

    def stream(self, key=KEYS[0]):
        return super().stream(additional_headers={"Authorization": f"Bearer {key}"})

    def metric(self, name):
        """The sum of what /metrics says under this name."""
        lines = self.get("/metrics", Authorization=f"Bearer {KEYS[0]}")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"nim4_{name}"))


def processes():
    """(id, parent's id, name) of all that run, by id."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split(None, 3) for line in listed]
    return sorted((int(pid), int(parent), name) for pid, parent, state, name in found if not state.startswith("Z"))


@pytest.fixture(scope="module")
def model(deployed):
    return load_speech_llm(deployed, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def gateway(deployed, tmp_path_factory):
    from nim4.export.triton import export_triton

    place = tmp_path_factory.mktemp("deployment")
    export_triton(load_model(deployed, torch.device("cpu"))[0], file_hash(deployed / WEIGHTS), place / "repository", "python", (640,))
    (place / "keys").write_text("\n".join(KEYS))
    with TritonServer(place / "repository", place) as triton:
        options = ["--engines", 2, "--encoder", triton.address, "--api-keys", place / "keys", "--max-sessions", 16, "--requests-per-minute", 100_000]
        with GatewayProcess(deployed, *options) as gateway:
            yield gateway


def said(client):
    """The events of what has been spoken, to its final text."""
    client.send("stop")
    return client.rest()[0]


def test_texts_of_speech_are_those_of_the_library(gateway, model, phrases):
    """Of streams at the same time, of two tenants: final texts, and the partial ones that were shown."""

    def speak(number):
        with gateway.stream(KEYS[number % 2]) as client:
            client.speak(phrases[number % 4])
            return said(client)

    with ThreadPoolExecutor(8) as pool:
        heard = list(pool.map(speak, range(8)))
    finals = []
    for number, events in enumerate(heard):
        *partials, final = on_our_engine(model, as_float(phrases[number % 4]))
        shown = {(event["revision"], event["text"]) for event in events if event["type"] == "partial"}
        assert shown
        assert shown <= {(own.revision, own.text) for own in partials}
        finals += [(event["text"], event["revision"]) for event in events if event["type"] == "final"]
        assert finals[number:] == [(final.text, final.revision)]
    assert len(set(finals)) == 4
    print(*{text for text, _ in finals}, sep="\n")
    assert gateway.metric("engine_kv_blocks_used") == 0
    assert gateway.metric("aborted_total") == 0


def test_a_recording_is_written_piece_by_piece(gateway, model, phrases):
    samples = join([as_float(phrase) for phrase in phrases[:2]], 1.5)
    expected = [on_our_engine(model, samples[start:end])[-1].text for places in speech_places(samples, VadConfig()) for start, end in places]
    assert expected
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    status, body = gateway.post(file_of((32768 * samples).astype("<i2")), headers, response_format="verbose_json")
    assert status == 200
    assert [segment["text"] for segment in body["segments"]] == expected


def test_a_client_that_vanishes_leaves_nothing_in_the_engine(gateway, phrases):
    client = gateway.stream()
    client.speak(phrases[0])
    client.until("partial")
    assert gateway.metric("engine_kv_blocks_used") > 0
    client.socket.socket.shutdown(2)
    client.socket.socket.close()
    wait_for(lambda: gateway.metric("aborted_total") == gateway.metric("engine_aborted") == 1, 20)
    assert gateway.metric("engine_streams") == gateway.metric("engine_kv_blocks_used") == 0


class Paced:
    """Speaks as fast as one speaks, and counts: chunks, those whose text came later than 1 s, that is a chunk and what a text takes, and how long
    the gateway's loop took to answer meanwhile."""

    def __init__(self, gateway):
        self._gateway, self.answered_s = gateway, []
        self._before = self._counts()

    def _counts(self):
        chunks, in_time = (self._gateway.metric(f"chunk_seconds_{name}") for name in ("count", 'bucket{le="1.0"}'))
        return chunks, chunks - in_time

    def speak(self, phrase):
        with self._gateway.stream() as client:
            for start in range(0, len(phrase), 10_240):
                began_s = time.monotonic()
                client.speak(phrase[start : start + 10_240])
                self._gateway.metric("engines")
                self.answered_s.append(time.monotonic() - began_s)
                time.sleep(max(0.0, CHUNK_S - self.answered_s[-1]))
            said(client)

    def result(self):
        chunks, late = (now - before for now, before in zip(self._counts(), self._before, strict=True))
        print(f"{chunks:g} chunks, {late:g} of them late; the slowest answer of the loop after {max(self.answered_s):.3f} s")
        return chunks, late


def test_while_a_killed_engine_is_replaced_no_other_stream_waits(gateway, model, phrases):
    before = Paced(gateway)
    for phrase in phrases[:2]:
        before.speak(phrase)
    usual_chunks, usual_late = before.result()
    expected = [on_our_engine(model, as_float(phrase))[-1].text for phrase in phrases[:2]]
    killed, other = gateway.engines()
    with gateway.stream(KEYS[0]) as first, gateway.stream(KEYS[1]) as second:  # one on each engine
        for client, phrase in zip((first, second), phrases, strict=False):
            client.speak(phrase[:32_000])
            client.until("partial")
        os.kill(killed, signal.SIGKILL)
        for client, phrase in zip((first, second), phrases, strict=False):
            client.speak(phrase[32_000:])
        assert [next(event["text"] for event in said(client) if event["type"] == "final") for client in (first, second)] == expected
    assert gateway.metric("replicas_lost_total") == 1
    assert gateway.metric("streams_moved_total") == 1
    assert gateway.metric("engines") == 1, "it was there before this could be seen"
    meanwhile, end_s = Paced(gateway), time.monotonic() + 300
    while gateway.metric("engines") == 1:
        assert time.monotonic() < end_s, "it is not replaced"
        meanwhile.speak(phrases[2])
    chunks, late = meanwhile.result()
    assert chunks > 5
    assert max(meanwhile.answered_s) < CHUNK_S, "the loop was held up"
    assert late / chunks <= usual_late / usual_chunks + 0.1, "a new process takes processors from the others, but not for long"
    assert len(gateway.engines()) == 2
    assert other in gateway.engines()
