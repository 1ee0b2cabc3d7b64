"""`vllm serve` with our plugin: recordings over OpenAI's interface, as written by our own offline decoding. Needs vLLM: utils/check_vllm.sh."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from running_server import as_float
from test_serve_uploads import file_of
from triton_server import free_port

from nim4.decode.offline import features_of, transcripts
from nim4.decode.streaming import CUT_CHARACTER
from nim4.model.asr import load_speech_llm, max_answer_tokens

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model(deployed):
    return load_speech_llm(deployed, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def url(deployed):
    """Where the server is, as docs/vllm.md starts it, with less memory."""
    port = free_port()
    command = [Path(sys.executable).parent / "vllm", "serve", deployed, "--config-format", "nim4", "--tokenizer", deployed / "llm"]
    options = ["--served-model-name", "nim4-asr", "--max-model-len", 512, "--max-num-seqs", 4, "--limit-mm-per-prompt", '{"audio": 1}']
    options += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "100M", "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen([*map(str, command), *map(str, options)])
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1/audio/transcriptions"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_until_ready(url, server):
    end_s = time.monotonic() + 900
    while time.monotonic() < end_s:
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError("the server does not come up")


def post(url, samples, **fields):
    """Status and answer to 16-bit samples."""
    fields = {"model": "nim4-asr", "temperature": "0", **fields}
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    parts.append(b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + file_of(samples))
    request = urllib.request.Request(url, b"".join([*parts, b"\r\n--b--\r\n"]), {"content-type": "multipart/form-data; boundary=b"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("hints", [(), ("北京", "上海")])
def test_texts_of_speech_are_those_of_offline_decoding(url, model, phrases, hints):
    texts = []
    for samples in phrases:
        own = as_float(samples)
        num_tokens = -(-model.encode(*features_of([own], torch.device("cpu")))[1].item() // model.config.adaptor.stack)
        fields = {"hotwords": ", ".join(hints)} if hints else {}
        status, body = post(url, samples, max_completion_tokens=max_answer_tokens(num_tokens), **fields)
        assert status == 200
        expected = transcripts(model, [own], hints=[hints])[0]
        assert body["text"] == expected.rstrip(CUT_CHARACTER), "vLLM leaves a character out of which some bytes are missing"
        texts.append(body["text"])
    print(*texts, sep="\n")
    assert len(set(texts)) == 4


@pytest.mark.parametrize(
    ("samples", "fields", "reason"),
    [
        (np.zeros(100, np.int16), {}, "a recording must have 0.01 to 60 s, not 0.00625 s"),
        (np.zeros(16_000, np.int16), {"hotwords": ",".join("一二三四五六七八九十百")}, "hotwords"),
        (np.zeros(16_000, np.int16), {"model": "other"}, "other"),
    ],
)
def test_what_cannot_be_transcribed_is_told(url, samples, fields, reason):
    status, body = post(url, samples, **fields)
    assert 400 <= status < 500
    assert reason in body["error"]["message"]
