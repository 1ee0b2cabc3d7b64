"""`python -m nim4 serve` with wrong options, and the clients of docs/serving.md, as they stand there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from running_server import RunningServer, as_float
from spoken_clips import read_clips

from nim4 import __main__ as nim4_main
from nim4 import stage
from nim4.decode.listening import Listener
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import Recogniser
from nim4.model.asr import load_speech_llm
from nim4.serve import steady
from nim4.serve.app import Server, open_port
from nim4.serve.service import Service

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture
def serve(monkeypatch, capsys):
    """`python -m nim4 serve` in this process: exit code, errors."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["nim4", "serve", "--device", "cpu", *map(str, options)])
        code = 0
        try:
            stage.run(nim4_main.main, "nim4")
        except SystemExit as end:
            code = end.code
        return code, [line for line in capsys.readouterr().err.splitlines() if " ERROR " in line]

    return run


def test_a_second_server_on_the_same_port(serve, talkative):
    with open_port("127.0.0.1", 0) as taken:
        code, errors = serve("--model", talkative, "--port", taken.getsockname()[1])
    assert (code, len(errors)) == (2, 1)
    assert "expected a free port of this machine, found [Errno 98]" in errors[0]


def test_mistakes(serve, talkative, trained, tmp_path):
    for options, message in (
        (["--model", tmp_path / "none"], "none: expected a model folder, found no such folder"),
        (["--model", trained], "expected a model folder of stage 4 or later, found no llm/ in it"),
        (["--model", talkative, "--port", 70_000], "--port 70000: expected a port between 0 and 65535"),
        (["--model", talkative, "--host", "no.such.host.invalid"], "expected a free port of this machine"),
        (["--model", talkative, "--api-keys", tmp_path / "none"], "expected a file of API keys"),
        (["--model", talkative, "--hotword-index", tmp_path], "expected"),
        (["--model", talkative, "--hotword-index", "a/x", "--hotword-index", "b/x"], "expected folders of different names, found x, x"),
        (["--model", talkative, "--origin", "https://example.org/"], "--origin: expected scheme and host of a page"),
        (["--model", talkative, "--origin", "*"], "expected scheme and host of a page, as https://example.org, found '*'"),
        (["--model", talkative, "--set", "padding_s=9"], "vad.padding_s: expected 0 to 5, a quarter of max_segment_s, found 9.0"),
        (["--model", talkative, "--max-upload-s", 0], "--max-upload-s: expected at least 1, found 0"),
        (["--model", talkative, "--max-sessions", 0], "--max-sessions: expected at least 1, found 0"),
        (["--model", talkative, "--engine", "vllm", "--final-context", "whole"], "--final-context whole: expected --engine hf, "),
    ):
        code, errors = serve("--port", 0, *options)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]


def test_the_model_has_the_precision_of_the_option(serve, talkative, monkeypatch):
    served = []
    monkeypatch.setattr(Server, "run", lambda server, sockets: served.append(server._service._model))
    for precision in ("auto", "bf16"):
        assert serve("--model", talkative, "--port", 0, "--precision", precision) == (0, [])
    assert [model.llm.get_input_embeddings().weight.dtype for model in served] == [torch.float32, torch.bfloat16]


def test_the_second_pass_is_that_of_the_option(serve, talkative, monkeypatch):
    served = []
    monkeypatch.setattr(Server, "run", lambda server, sockets: served.append(server._service._rereading))
    for options in ([], ["--final-context", "chunks"], ["--final-context", "whole"]):
        assert serve("--model", talkative, "--port", 0, *options) == (0, [])
    assert served == [Rereading(), None, Rereading()]


STEADY = """
import ctypes, gc, os, sys
from nim4.serve import steady

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
steady.prepare()
libc.free(libc.malloc(16 << 20))  # after which glibc would keep 4 MB for itself
before = libc.mallinfo2().hblks
libc.malloc(4 << 20)
steady.settle()
print(libc.mallinfo2().hblks - before, gc.get_freeze_count() > 1000, sys.getswitchinterval(), os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_what_keeps_the_process_at_one_size():
    done = subprocess.run([sys.executable, "-c", STEADY], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1", "True", "0.001", "128"]


def test_the_server_is_steady_and_warm_before_its_port_answers(serve, talkative, monkeypatch):
    did = []
    monkeypatch.setattr(steady, "prepare", lambda: did.append("prepare"))
    monkeypatch.setattr(Service, "warm_up", lambda service: did.append("warm up"))
    monkeypatch.setattr(steady, "settle", lambda: did.append("settle"))
    monkeypatch.setattr(Server, "run", lambda server, sockets: did.append("run"))
    assert serve("--model", talkative, "--port", 0) == (0, [])
    assert did == ["prepare", "warm up", "settle", "run"]


@pytest.mark.parametrize(
    ("language", "name", "command"),
    [("python", "client.py", [sys.executable]), ("js", "client.mjs", ["node", "--experimental-websocket"])],
)
def test_the_clients_of_the_documentation(talkative, tmp_path, language, name, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / name).write_text(code, encoding="utf-8")
    samples = (read_clips(1)[0] * 32767).astype("<i2")
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    model, _ = load_speech_llm(talkative, torch.device("cpu"))
    listener = Listener(Recogniser(model), given=["总工"])
    final = [*listener.push(as_float(samples)), *listener.finish()][-1].hypothesis
    with RunningServer(model, keys=["secret"]) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/realtime"
        done = subprocess.run([*command, tmp_path / name, tmp_path / "a.wav", url, "secret"], capture_output=True, timeout=20, check=True)
    assert f"final {final.text}" in done.stdout.decode()
