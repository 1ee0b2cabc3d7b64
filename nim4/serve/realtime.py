"""One stream of a client: messages in, partial and final texts out.

Two tasks: one reads what the client sends, checks it and puts it in line; the other works the line off, so that all answers come in order and
model work is asked for one job at a time. An utterance is what a Cutter finds, or, where the client wants none, what it sends between two
commits, up to the longest that the model can hear.

Source: event names are those of OpenAI's Realtime interface for transcription; `partial`, `final`, `speech_started`, `speech_stopped` and
`stop` are ours.
"""

import asyncio
import base64
import binascii
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect

from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.corpus.manifest import MAX_DURATION_S
from nim4.decode.listening import Cutter, Step
from nim4.decode.streaming import Hypothesis, Job
from nim4.serve.limits import Busy, Refused, tenant_of
from nim4.serve.service import Reception, Session
from nim4.serve.settings import StreamSettings, TurnDetection, changed

STOPPED, TRY_LATER, FAILED, VANISHED = 1000, 1013, 1011, 1006
IDLE, STALLED, TOO_LONG, TOO_FAST = 4408, 4409, 4413, 4429
PIECE_SAMPLES = SAMPLING_RATE_HZ  # ours: so much is looked through for speech at once, while other streams wait
MAX_SHARE = 0.1  # ours: of a processor, that reading one client's messages takes: what others say must not wait for one who sends too many
MAX_UTTERANCE_SAMPLES = round(MAX_DURATION_S * SAMPLING_RATE_HZ)

log = logging.getLogger("nim4")


class Closing(Exception):
    """The stream ends here, with this close code."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass
class Utterance:
    """What is said from the start of speech, or a commit, to the next end.

    Attributes:
        item_id: its name in events.
        max_samples: that it may have; None when the Cutter sees to that.
        punctuation: whether its texts have it.
        waiting: samples, (N,) float32, that do not complete a chunk yet.
        num_samples: all that came, those in `waiting` included.
        revision: of the text that the client has.
        told: settled text that went out as deltas.
    """

    item_id: str
    session: Session
    max_samples: int | None
    punctuation: bool = True
    waiting: list[np.ndarray] = field(default_factory=list)
    num_samples: int = 0
    revision: int = 0
    told: str = ""

    @property
    def missing_samples(self) -> int:
        """Samples until there is something to do."""
        chunk = self.session.missing_samples - sum(map(len, self.waiting))
        return chunk if self.max_samples is None else min(chunk, self.max_samples - self.num_samples)

    def pop_waiting(self) -> np.ndarray:
        """The samples that wait, which do so no longer."""
        samples = np.concatenate([np.zeros(0, np.float32), *self.waiting])
        self.waiting = []
        return samples


class Connection:
    """A client's stream, from `run` to its close.

    Args:
        socket: accepted.
    """

    def __init__(self, socket: WebSocket, service: Reception):
        self._socket, self._service, self._limits = socket, service, service.limits
        self._id = _new_id("sess")
        self._settings = StreamSettings(TurnDetection.of(service.vad))
        self._line: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._stopping = False
        self._turns: TurnDetection | None = None  # by which `_cutter` cuts; both are None while the client ends utterances
        self._cutter: Cutter | None = None
        self._heard = 0  # samples of the stream that have been worked off
        self._utterance: Utterance | None = None
        self._last_item: str | None = None
        self._ahead_s, self._ahead_at_s = 0.0, time.monotonic()  # audio that came faster than it was spoken, at this time
        self._behind_s = 0.0  # audio that came and is not recognised

    async def run(self) -> None:
        """Serves the client until one of the two sides ends it; nothing of it is left then."""
        code, reason = VANISHED, ""
        timer = asyncio.get_running_loop().call_later(self._limits.session_s, self.stop, TOO_LONG, "the session has lasted as long as it may")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read())
                tasks.create_task(self._work())
        except* Closing as ends:
            code, reason = ends.exceptions[0].code, ends.exceptions[0].reason
        except* Busy as busy:
            log.warning("%s: %s", self._id, busy.exceptions[0])
            code, reason = TRY_LATER, "the server has too much to do"
        except* (WebSocketDisconnect, OSError):
            log.info("%s: the client is gone", self._id)
        except* Exception:
            log.exception("%s: a stream failed", self._id)
            code, reason = FAILED, "something went wrong in the server"
        finally:
            timer.cancel()
            if self._utterance is not None:
                self._service.forget(self._utterance.session)
            self._service.metrics.count("closed_total", code=code)
        if code != VANISHED:
            with suppress(TimeoutError, RuntimeError, WebSocketDisconnect, OSError):  # it cannot be told if it is not there
                async with asyncio.timeout(self._limits.stalled_s):
                    await self._socket.close(code, reason)

    def stop(self, code: int, reason: str) -> None:
        """Ends the stream with the final text of what has been said; what the client sends from now on is not heard."""
        if not self._stopping:
            self._stopping = True
            self._line.put_nowait(partial(self._finish, code, reason, time.monotonic()))

    # ------------------------------------------------------------------------------------------------- what the client sends

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._limits.idle_s):
                    message = await self._socket.receive()
            except TimeoutError:
                self.stop(IDLE, f"nothing came for {self._limits.idle_s:g} s")
                continue
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", VANISHED))
            if self._stopping:
                continue
            began_s = time.thread_time()
            try:
                data = message.get("bytes")
                if data is not None:
                    self._take_audio(data, "binary frame")
                else:
                    self._take_text(message["text"])
            except Refused as refused:
                self._line.put_nowait(partial(self._send_error, refused))
            if self._line.qsize() > self._limits.max_waiting:
                raise Closing(TOO_FAST, f"more than {self._limits.max_waiting} messages wait")
            await asyncio.sleep((time.thread_time() - began_s) / MAX_SHARE)  # what it sends meanwhile waits in the network

    def _take_text(self, text: str) -> None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Refused(400, "invalid_json", "a text message must be JSON") from error
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "input_audio_buffer.append":
            try:
                data = base64.b64decode(message.get("audio"), validate=True)
            except (TypeError, ValueError, binascii.Error) as error:
                raise Refused(400, "invalid_audio", "audio must be base64", "audio") from error
            self._take_audio(data, "audio")
        elif kind in ("session.update", "transcription_session.update"):
            self._settings = changed(self._settings, message.get("session"), self._service)
            self._line.put_nowait(partial(self._send, "session.updated", session=self._session()))
        elif kind == "input_audio_buffer.commit":
            self._line.put_nowait(partial(self._commit, time.monotonic()))
        elif kind == "input_audio_buffer.clear":
            self._line.put_nowait(self._clear)
        elif kind == "stop":
            self.stop(STOPPED, "stopped")
        else:
            raise Refused(400, "unknown_event", "type must be one of the events in docs/serving.md", "type")

    def _take_audio(self, data: bytes, what: str) -> None:
        if len(data) % 2:
            raise Refused(
                400, "invalid_audio", f"{what} has {len(data)} bytes: 16-bit samples have an even number of them; it was not heard", "audio"
            )
        if not data:
            return
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        now_s, audio_s = time.monotonic(), len(samples) / SAMPLING_RATE_HZ
        self._ahead_s = max(self._ahead_s - (now_s - self._ahead_at_s), 0.0) + audio_s
        self._ahead_at_s = now_s
        self._behind_s += audio_s
        if self._ahead_s > self._limits.max_ahead_s:
            raise Closing(TOO_FAST, f"audio came more than {self._limits.max_ahead_s:g} s faster than it is spoken: upload recordings instead")
        if self._behind_s > self._limits.max_behind_s:
            raise Closing(TRY_LATER, "the server has too much to do")
        self._line.put_nowait(partial(self._hear, samples, self._settings, now_s))

    # ---------------------------------------------------------------------------------------------------- what is done with it

    async def _work(self) -> NoReturn:
        await self._send("session.created", session=self._session())
        while True:
            await (await self._line.get())()

    async def _hear(self, samples: np.ndarray, settings: StreamSettings, came_s: float) -> None:
        audio_s = len(samples) / SAMPLING_RATE_HZ
        for piece in np.split(samples, range(PIECE_SAMPLES, len(samples), PIECE_SAMPLES)):
            piece = self._turn_to(settings.turn_detection, piece)
            self._heard += len(piece)
            steps = [Step("speech", self._heard, piece)] if self._cutter is None else await self._service.listen(self._cutter.pushing(piece))
            await self._follow(steps, settings, came_s)
        self._behind_s -= audio_s
        self._service.metrics.count("audio_seconds_total", audio_s, kind="stream")

    def _turn_to(self, turns: TurnDetection | None, samples: np.ndarray) -> np.ndarray:
        """Lets a change hold between two utterances: of what the cutter before has kept nothing is lost, it comes back before `samples`."""
        if self._utterance is not None or turns == self._turns:
            return samples
        kept = np.zeros(0, np.float32) if self._cutter is None else self._cutter.kept
        self._turns, self._heard = turns, self._heard - len(kept)
        self._cutter = self._new_cutter()
        return np.concatenate([kept, samples])

    def _new_cutter(self) -> Cutter | None:
        return None if self._turns is None else Cutter(self._turns.vad(self._service.vad), self._heard)

    async def _follow(self, steps: Sequence[Step], settings: StreamSettings, came_s: float) -> None:
        for step in steps:
            if step.kind == "speech_started":
                await self._begin(settings, step.sample)
            elif step.kind == "speech_stopped":
                await self._commit_utterance(came_s, step.sample)
            else:
                await self._hear_speech(step.samples, settings, came_s)

    async def _begin(self, settings: StreamSettings, start: int | None) -> Utterance:
        """A new utterance, whose start the client is told when it did not make it."""
        item_id = _new_id("item")
        if start is not None:
            await self._send("input_audio_buffer.speech_started", item_id=item_id, audio_start_ms=_ms(start))
            await self._send("speech_started", item_id=item_id, audio_s=_ms(start) / 1000)
        session = await self._service.session(settings.hotwords, settings.index, settings.chunk_ms, tenant_of(self._socket.scope))
        self._utterance = Utterance(item_id, session, MAX_UTTERANCE_SAMPLES if start is None else None, settings.punctuation)
        return self._utterance

    async def _hear_speech(self, samples: np.ndarray, settings: StreamSettings, came_s: float) -> None:
        while len(samples):
            utterance = self._utterance or await self._begin(settings, None)
            piece, samples = np.split(samples, [utterance.missing_samples])
            utterance.waiting.append(piece)
            utterance.num_samples += len(piece)
            if utterance.num_samples == utterance.max_samples:
                await self._commit_utterance(came_s)
            elif utterance.missing_samples == 0:
                hypothesis = await self._service.hear(Job(utterance.session, utterance.pop_waiting()))
                await self._tell(utterance, hypothesis)
                self._service.metrics.observe("chunk_seconds", time.monotonic() - came_s)

    async def _end_speech(self, came_s: float) -> None:
        """Ends what is being said, if anything is; what is said next begins another utterance."""
        if self._cutter is not None:
            await self._follow(await self._service.listen(self._cutter.finishing()), self._settings, came_s)
            self._cutter = self._new_cutter()
        elif self._utterance is not None:
            await self._commit_utterance(came_s)

    async def _commit(self, came_s: float) -> None:
        if self._utterance is None:
            why = "no audio came since the last commit" if self._cutter is None else "nobody is speaking, and turn_detection is not null"
            await self._send_error(Refused(400, "input_audio_buffer_commit_empty", why))
            return
        await self._end_speech(came_s)

    async def _commit_utterance(self, came_s: float, stop: int | None = None) -> None:
        """The final text of the utterance; the client is told where it stops when it did not stop it."""
        utterance, self._utterance = self._utterance, None
        item_id = utterance.item_id
        try:
            if stop is not None:
                await self._send("input_audio_buffer.speech_stopped", item_id=item_id, audio_end_ms=_ms(stop))
                await self._send("speech_stopped", item_id=item_id, audio_s=_ms(stop) / 1000)
            await self._send("input_audio_buffer.committed", item_id=item_id, previous_item_id=self._last_item)
            self._last_item = item_id
            await self._tell(utterance, await self._service.hear(Job(utterance.session, utterance.pop_waiting(), ends=True)))
        finally:
            self._service.forget(utterance.session)
        self._service.metrics.observe("final_seconds", time.monotonic() - came_s)

    async def _clear(self) -> None:
        utterance, self._utterance = self._utterance, None
        if utterance is not None:
            self._service.forget(utterance.session)
        self._cutter = self._new_cutter()
        await self._send("input_audio_buffer.cleared")

    async def _finish(self, code: int, reason: str, came_s: float) -> NoReturn:
        await self._end_speech(came_s)
        raise Closing(code, reason)

    # ------------------------------------------------------------------------------------------------ what the client is told

    async def _tell(self, utterance: Utterance, seen: Hypothesis) -> None:
        seen = seen if utterance.punctuation else seen.unpunctuated()
        if seen.revision > utterance.revision:
            utterance.revision = seen.revision
            more: dict[str, Any] = {} if seen.is_final else {"settled": seen.settled_chars}
            more |= {"hints": seen.hints, "audio_s": round(seen.audio_s, 3)}
            kind = "final" if seen.is_final else "partial"
            await self._send(kind, item_id=utterance.item_id, revision=seen.revision, text=seen.text, **more)
            self._service.metrics.count(f"{kind}s_total")
        settled = seen.text[: seen.settled_chars]
        about = {"item_id": utterance.item_id, "content_index": 0}
        if settled.startswith(utterance.told) and settled != utterance.told:  # a final text may differ from what was settled
            await self._send("conversation.item.input_audio_transcription.delta", **about, delta=settled.removeprefix(utterance.told))
            utterance.told = settled
        if seen.is_final:
            usage = {"type": "duration", "seconds": round(seen.audio_s, 3)}
            await self._send("conversation.item.input_audio_transcription.completed", **about, transcript=seen.text, usage=usage)

    def _session(self) -> dict[str, Any]:
        return {"id": self._id, "object": "realtime.transcription_session", "type": "transcription", **asdict(self._settings)}

    async def _send_error(self, refused: Refused) -> None:
        self._service.metrics.count("errors_total", code=refused.code)
        await self._send("error", error=refused.body)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": _new_id("event"), **fields}
        try:
            async with asyncio.timeout(self._limits.stalled_s):
                await self._socket.send_text(json.dumps(event))
        except TimeoutError as error:
            raise Closing(STALLED, f"the client took nothing for {self._limits.stalled_s:g} s") from error


def _ms(samples: int) -> int:
    return round(1000 * samples / SAMPLING_RATE_HZ)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"
