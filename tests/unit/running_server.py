"""A server in this process, on a free port of 127.0.0.1, and clients of it."""

import json
import signal
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from nim4.corpus.units import PhonemeInventory
from nim4.serve.app import Server, make_app, open_port
from nim4.serve.limits import Gate, Limits
from nim4.serve.service import Service


def pcm(seconds=1.5, seed=0):
    """16-bit samples at 16 kHz: noise whose loudness changes."""
    rng = np.random.default_rng(seed)
    count = round(16_000 * seconds)
    loud = 3000 * (1 + np.sin(np.arange(count) / 1500))
    return (loud * rng.standard_normal(count)).clip(-32768, 32767).astype("<i2")


def as_float(samples):
    """What the server makes of them."""
    return samples.astype(np.float32) / 32768


class ServerOnPort:
    """A server on `port` of 127.0.0.1, as its clients see it."""

    def get(self, path, **headers):
        """(status, body as text) of a GET."""
        return self._answer(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers))

    def post(self, audio=None, headers=None, **fields):
        """(status, JSON or text) of a transcription; model and file are filled in. A list is a field several times."""
        fields = {"model": "nim4-asr"} | fields
        pairs = [(key, one) for key, value in fields.items() for one in (value if isinstance(value, list) else [value])]
        boundary = uuid.uuid4().hex
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in pairs]
        if audio is not None:
            parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode() + audio + b"\r\n")
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", **(headers or {})}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/audio/transcriptions", data=body, headers=headers)
        status, text = self._answer(request)
        return status, json.loads(text) if text.startswith("{") else text

    def _answer(self, request):
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stream(self, by_hand=True, **options):
        """A client's end of a stream that ends utterances by hand, or as the server does; the answers so far have been read."""
        client = StreamClient(connect(f"ws://127.0.0.1:{self.port}/v1/realtime", open_timeout=10, close_timeout=1, **options))
        assert client.event()["type"] == "session.created"
        if by_hand:
            client.send("session.update", session={"turn_detection": None})
            assert client.event()["session"]["turn_detection"] is None
        return client


class RunningServer(ServerOnPort):
    """Serves until left. `service` may be looked into; `make` makes another kind of it."""

    def __init__(self, model, indexes=None, keys=(), origins=(), vad=None, port=0, make=Service, **limits):
        self.service = make(model, PhonemeInventory.default(), indexes or {}, Limits(**limits), vad)
        gate = Gate(keys, origins, self.service.limits.requests_per_minute)
        self._listening = open_port("127.0.0.1", port)
        self.port = self._listening.getsockname()[1]
        self._server = Server(make_app(self.service, gate, origins), self.service)
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)

    def __enter__(self):
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, *error):
        self.terminate()
        self._thread.join(10)
        self.service.close()
        assert not self._thread.is_alive()
        assert not self.service.streams, "a session is left behind"

    def terminate(self):
        """What SIGTERM does."""
        if not self.service.draining:
            self._server.handle_exit(signal.SIGTERM, None)


class StreamClient:
    """A client of one stream."""

    def __init__(self, socket):
        self.socket = socket

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def speak(self, samples, num_bytes=3200):
        data = samples.tobytes()
        with suppress(ConnectionClosed):  # seen when the rest is read
            for start in range(0, len(data), num_bytes):
                self.socket.send(data[start : start + num_bytes])

    def event(self):
        return json.loads(self.socket.recv(timeout=20))

    def until(self, kind):
        """The events up to the first of this kind."""
        events = [self.event()]
        while events[-1]["type"] != kind:
            events.append(self.event())
        return events

    def error(self):
        """The next event, which must be an error: its code."""
        event = self.event()
        assert event["type"] == "error"
        return event["error"]["code"]

    def rest(self):
        """The events until the server closes, and its close code."""
        events = []
        with suppress(ConnectionClosed):
            while True:
                events.append(self.event())
        return events, self.socket.close_code


def wait_for(condition, seconds=10.0):
    """Waits until something becomes true."""
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)
