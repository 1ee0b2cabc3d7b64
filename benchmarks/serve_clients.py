"""A server in a process of its own, and clients of it that speak in real time: many of them in one event loop, so that they cost little."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, read_samples
from nim4.corpus.manifest import load_cuts
from nim4.stage import ROOT

FRAME_SAMPLES = SAMPLING_RATE_HZ // 10
FRAME_S = FRAME_SAMPLES / SAMPLING_RATE_HZ
FRAME_BYTES = 2 * FRAME_SAMPLES
SILENCE = bytes(FRAME_BYTES)
KEY = "load"
START_S = 180.0  # for the server to read its model and warm up
PROC = Path("/proc")


class ServerProcess:
    """`python -m nim4 serve` on a free port of 127.0.0.1, until left.

    Args:
        model: folder.
        threads: of its arithmetic.
        options: more of its command line.
    """

    def __init__(self, model: Path, threads: int, options: Sequence[str] = ()):
        if not PROC.is_dir():
            raise RecipeError(PROC, expected="Linux, which tells the memory of a process", found="another system", fix="run this benchmark on Linux")
        self._log = tempfile.NamedTemporaryFile("w+", prefix="nim4-serve-", suffix=".log")  # noqa: SIM115 (closed in __exit__)
        command = [sys.executable, "-m", "nim4", "serve", "--model", str(model), "--port", "0", *options]
        environment = os.environ | {"NIM4_API_KEYS": KEY, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log)

    def __enter__(self) -> "ServerProcess":
        end_s = time.monotonic() + START_S
        while not (match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log())):
            if self._process.poll() is not None or time.monotonic() > end_s:
                self._process.kill()
                raise RecipeError("nim4 serve", expected="a server that listens", found=self.log()[-300:] or "no word", fix="see its message")
            time.sleep(0.1)
        self.port = int(match[1])
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
        self.errors = [line for line in self.log().splitlines() if " ERROR " in line or line.startswith("Traceback")]
        self._log.close()

    def log(self) -> str:
        """What it has written so far."""
        return Path(self._log.name).read_text(encoding="utf-8")

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that it has used."""
        fields = (PROC / str(self._process.pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def waited_s(self) -> float:
        """Seconds that its threads stood in line for a processor: what it has to do with others on this machine, not with its clients."""
        return sum(int(path.read_text().split()[1]) for path in (PROC / str(self._process.pid) / "task").glob("*/schedstat")) / 1e9

    @property
    def memory_mb(self) -> float:
        """Memory of it that is in RAM."""
        return int((PROC / str(self._process.pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def metrics(self) -> dict[str, float]:
        """Its counters and gauges, by name with labels and without the prefix."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {name.removeprefix("nim4_"): float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    def upload(self, data: bytes) -> float:
        """Seconds until the text of a WAV is there."""
        boundary, started_s = uuid.uuid4().hex, time.monotonic()
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\nnim4-asr\r\n--{boundary}\r\n'
        head += 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Authorization": f"Bearer {KEY}"}
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/audio/transcriptions", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            json.load(answer)["text"]
        return time.monotonic() - started_s


def read_clips(manifest: Path) -> list[list[bytes]]:
    """The recordings of a manifest as 16-bit frames of 100 ms; the last is filled up with silence."""
    clips = []
    for cut in load_cuts(manifest):
        samples = (32767 * read_samples(cut).clip(-1, 1)).astype("<i2")
        data = np.pad(samples, (0, -len(samples) % FRAME_SAMPLES)).tobytes()
        clips.append([data[start : start + FRAME_BYTES] for start in range(0, len(data), FRAME_BYTES)])
    return clips


@dataclass
class Utterance:
    """What was said between two ends of speech, and what came back.

    Attributes:
        start: frames of the stream before it.
        ended_s: on the clock, when the end of speech had been sent; None while it goes on.
        partials: on the clock, and seconds since the last sample that the text has heard was sent.
        finals: on the clock.
    """

    start: float
    ended_s: float | None = None
    partials: list[tuple[float, float]] = field(default_factory=list)
    finals: list[float] = field(default_factory=list)
    forgotten: bool = False


class Stream:
    """One client's stream, to be entered.

    Args:
        vad: whether the server finds the end of speech; else the client says it.
        options: of websockets' connect.
    """

    def __init__(self, port: int, vad: bool = False, key: str = KEY, **options: Any):
        headers = {"Authorization": f"Bearer {key}"}
        self._connecting = connect(f"ws://127.0.0.1:{port}/v1/realtime", additional_headers=headers, compression=None, open_timeout=30, **options)
        self.vad = vad
        self.utterances: list[Utterance] = []
        self.errors: list[str] = []
        self.close_code: int | None = None
        self.socket: ClientConnection
        self._sent_s: list[float] = []  # frame by frame, on the clock
        self._due_s = 0.0  # of the next frame
        self._unnamed: deque[Utterance] = deque()
        self._by_item: dict[str, Utterance] = {}

    async def __aenter__(self) -> "Stream":
        self.socket = await self._connecting
        self._reading = asyncio.create_task(self._read())
        await self.send("session.update", session={"turn_detection": {"type": "server_vad"} if self.vad else None})
        self._due_s = time.monotonic()
        return self

    async def __aexit__(self, *error: object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.socket.close()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def deafen(self) -> None:
        """From now on nothing is taken that the server sends."""
        self._reading.cancel()

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def speak(self, frames: Sequence[bytes]) -> None:
        """Sends audio as fast as it is spoken, a frame when its last sample has been."""
        if not self.vad and (not self.utterances or self.utterances[-1].ended_s is not None):
            self.utterances.append(Utterance(len(self._sent_s)))
            self._unnamed.append(self.utterances[-1])
        for frame in frames:
            self._due_s = max(self._due_s + FRAME_S, time.monotonic() - 1.0)  # a client that was held up does not catch up more than a second
            await asyncio.sleep(self._due_s - time.monotonic())
            await self.socket.send(frame)
            self._sent_s.append(time.monotonic())

    async def pause(self, seconds: float) -> None:
        """Says nothing: with `vad` silence is sent, else nothing."""
        if self.vad:
            await self.speak([SILENCE] * round(seconds / FRAME_S))
        else:
            self._due_s += seconds
            await asyncio.sleep(max(self._due_s - time.monotonic(), 0.0))

    async def commit(self) -> None:
        """Ends the utterance."""
        self.utterances[-1].ended_s = time.monotonic()
        await self.send("input_audio_buffer.commit")

    async def clear(self) -> None:
        """Takes back what was said since the last commit."""
        self.utterances[-1].ended_s, self.utterances[-1].forgotten = time.monotonic(), True
        await self.send("input_audio_buffer.clear")

    async def stop(self) -> None:
        """Ends the stream; returns when the server has closed it, with all that it had to say."""
        await self.send("stop")
        if self.utterances and self.utterances[-1].ended_s is None:
            self.utterances[-1].ended_s = time.monotonic()
        async with asyncio.timeout(60):
            await asyncio.shield(self._reading)

    def first_s(self, utterance: Utterance) -> float:
        """Seconds from the first sample of an utterance to its first partial text."""
        return utterance.partials[0][0] - self._when_sent(utterance.start + 1) + FRAME_S

    def spoken_s(self, start_s: float, end_s: float) -> float:
        """Seconds of audio that were sent between two times."""
        return FRAME_S * sum(start_s <= at_s < end_s for at_s in self._sent_s)

    @property
    def num_lost(self) -> int:
        """Utterances that do not have exactly one final text, or, when taken back, have one."""
        return sum(len(utterance.finals) != (not utterance.forgotten) for utterance in self.utterances)

    async def _read(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                self._take(json.loads(await self.socket.recv()))
        self.close_code = self.socket.close_code

    def _take(self, event: dict[str, Any]) -> None:
        now_s, kind = time.monotonic(), event["type"]
        if kind == "input_audio_buffer.speech_started":
            self.utterances.append(Utterance(event["audio_start_ms"] / 1000 / FRAME_S))
            self._by_item[event["item_id"]] = self.utterances[-1]
        elif kind == "input_audio_buffer.speech_stopped":
            self._utterance(event).ended_s = self._when_sent(event["audio_end_ms"] / 1000 / FRAME_S)
        elif kind == "input_audio_buffer.committed":
            self._utterance(event)
        elif kind == "input_audio_buffer.cleared" and self._unnamed and self._unnamed[0].forgotten:
            self._unnamed.popleft()  # nothing was said about it yet, and nothing will be
        elif kind == "partial":
            utterance = self._utterance(event)
            utterance.partials.append((now_s, now_s - self._when_sent(utterance.start + event["audio_s"] / FRAME_S)))
        elif kind == "final":
            self._utterance(event).finals.append(now_s)
        elif kind == "error":
            self.errors.append(event["error"]["code"])

    def _utterance(self, event: dict[str, Any]) -> Utterance:
        if event["item_id"] not in self._by_item:  # the client began it, so it is the oldest without a name
            self._by_item[event["item_id"]] = self._unnamed.popleft()
        return self._by_item[event["item_id"]]

    def _when_sent(self, frames: float) -> float:
        """When so many frames of the stream had been sent."""
        return self._sent_s[min(max(int(np.ceil(frames - 1e-6)), 1), len(self._sent_s)) - 1]
