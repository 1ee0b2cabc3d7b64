"""What all connections of a server share: one model, one thread that does its work, the indexes, the limits and the counters.

The model thread does what all of them need together, step by step: whatever has come when a step ends takes part in the next one. That is
fair, since a stream has at most one job there, a chunk or a final text, and all uploads together have one, a segment. A second thread looks
for speech, so that the model does not wait for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import numpy as np

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import PhonemeInventory
from nim4.decode.encoder import ENCODER_FRAME_MS, record_chunks
from nim4.decode.hotword import HotwordIndex
from nim4.decode.listening import Cutter
from nim4.decode.recordings import Segment, Transcriber
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import DEPLOYED, Hypothesis, Job, Recogniser, StreamingSession, new_rows
from nim4.decode.together import Work, alone
from nim4.decode.trie import NONE
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context
from nim4.model.ctc import BLANK, forced_align
from nim4.serve.limits import Limits, Refused
from nim4.serve.metrics import Metrics
from nim4.serve.model_thread import ModelThread

MODEL_NAME = "nim4-asr"
CHUNKS_MS = (160, 320, 640, 1280)  # whole embeddings of speech; paper, section 3.6: 640
DEPLOYED_MS = DEPLOYED.chunk_frames * ENCODER_FRAME_MS
LEFT_MS = DEPLOYED_MS * DEPLOYED.left_chunks  # what the encoder sees before a chunk, whatever its size

RESERVED_TOKENS = 512  # of a stream on a GPU: 20 s of speech, ten hints, and their text

NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLING_RATE_HZ).clip(-1, 1).astype(np.float32)  # what servers warm up with

Result = TypeVar("Result")


class Stream(Protocol):
    """A connection, as the service sees it."""

    def stop(self, code: int, reason: str) -> None:
        """Writes the final text of what has been said, and closes."""


class Session(Protocol):
    """What an utterance is heard by."""

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""


class Reception:
    """What connections find, whatever hears them: who is there, the indexes, the limits, the counters, and the thread that looks for speech.

    `Service` has the model in this process, nim4/serve/gateway.py asks servers for parts of the work. They have in common:

        session(hotwords, index, chunk_ms)   a new Session: hints by hand, the name of an index, one of `chunks_ms`
        hear(job)                            does a session's job; if the caller is cancelled, or it fails, only `forget` may follow
        forget(session)                      ends a session, whatever it is doing
        segments(samples, ...)               the segments of a whole recording

    Args:
        indexes: hotwords by the name that clients know them under.
        vad: how speech is found, where a client does not say it.
    """

    chunks_ms: Sequence[int] = CHUNKS_MS

    def __init__(self, indexes: Mapping[str, HotwordIndex], limits: Limits, vad: VadConfig | None):
        self.indexes, self.limits, self.metrics, self.vad = dict(indexes), limits, Metrics(), vad or VadConfig()
        self.streams: set[Stream] = set()
        self.draining = self.ending = False  # nothing new is taken; what is going on ends now
        self._thread = ModelThread(lambda num_sessions: self.metrics.observe("step_sessions", num_sessions))
        self._ears_thread = ModelThread()
        self._one_upload = asyncio.Semaphore(1)
        self.one_reader = asyncio.Semaphore(1)  # of uploads, which take memory while they are unpacked

    def close(self) -> None:
        """Ends the threads; what waits there is forgotten."""
        self._thread.shutdown()
        self._ears_thread.shutdown()

    async def start(self) -> None:
        """To be called in the event loop that serves, before the first client."""

    async def stop(self) -> None:
        """To be called there, after the last one."""

    async def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Runs a function in the model thread. If the caller is cancelled while it waits there, it does not run."""
        return await self._awaited(self._thread.submit(work, *args))

    async def _awaited(self, future: Future[Result]) -> Result:
        self.metrics.gauges["model_jobs"] += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self.metrics.gauges["model_jobs"] -= 1

    async def listen(self, work: Work[Result]) -> Result:
        """Looks for speech in the thread for that, together with others."""
        return await asyncio.wrap_future(self._ears_thread.do(work))

    def index(self, name: Any) -> HotwordIndex | None:
        """The index of this name; None for None. Raises Refused when there is none."""
        if name in (None, ""):
            return None
        if not isinstance(name, str) or name not in self.indexes:
            known = ", ".join(self.indexes) or "none"
            raise Refused(400, "index_not_found", f"no such index of hotwords; this server has: {known}", "index")
        return self.indexes[name]

    def check_model(self, name: Any) -> None:
        """Raises Refused for another model than the one that is served."""
        if name != MODEL_NAME:
            raise Refused(404, "model_not_found", f"this server has the model {MODEL_NAME!r} only", "model")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Counts an open stream. Raises Refused when there are too many."""
        if len(self.streams) >= self.limits.max_sessions:
            raise Refused(503, "too_many_sessions", f"all {self.limits.max_sessions} streams are in use", retry_after_s=5)
        self.streams.add(stream)
        self.metrics.count("sessions_total")
        self.metrics.gauges["sessions"] = len(self.streams)
        try:
            yield
        finally:
            self.streams.discard(stream)
            self.metrics.gauges["sessions"] = len(self.streams)

    async def drain(self) -> None:
        """Takes nothing new, gives what is going on Limits.drain_s to finish, then ends streams with their final texts, and uploads without."""
        self.draining = True
        await self._until_empty(self.limits.drain_s)
        self.ending = True
        for stream in list(self.streams):
            stream.stop(1001, "the server is going away")
        await self._until_empty(self.limits.stalled_s)

    async def _until_empty(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.streams or self.metrics.gauges["uploads"]:
                    await asyncio.sleep(0.02)

    def _heard_upload(self, samples: np.ndarray) -> None:
        self.metrics.count("audio_seconds_total", len(samples) / SAMPLING_RATE_HZ, kind="upload")

    def _check_going(self) -> None:
        """Raises Refused when the server goes away before a recording is done."""
        if self.ending:
            raise Refused(503, "draining", "this server is going away", retry_after_s=5)


class Service(Reception):
    """One server with its model, without its network.

    Args:
        model: in evaluation mode.
        inventory: of the model's phoneme head.
        indexes, limits, vad: of the Reception.
        rereading: of the streams' second passes, as of the Recogniser.
    """

    def __init__(
        self,
        model: SpeechLlm,
        inventory: PhonemeInventory,
        indexes: Mapping[str, HotwordIndex],
        limits: Limits,
        vad: VadConfig | None = None,
        rereading: Rereading | None = None,
    ):
        super().__init__(indexes, limits, vad)
        self._model, self._inventory, self._rereading = model, inventory, rereading
        self._recognisers: dict[tuple[int, str | None], Recogniser] = {}  # touched by the model thread only
        self._rows = new_rows(model)
        if model.acoustic.mean.is_cuda:  # where room that is made later costs time, see nim4/model/graphs.py
            self._rows.reserve(limits.max_sessions + 2, RESERVED_TOKENS)

    def warm_up(self) -> None:
        """Does all kinds of work once, so that no client waits while searches are compiled: seconds, the first time on a machine longer."""
        self._thread.submit(self._warm_up).result()

    def _warm_up(self) -> None:
        for name in (None, *self.indexes):
            alone(Transcriber(self._model, self._inventory, hotwords=self.index(name), rows=self._rows).decoding(NOISE, (0, len(NOISE))))
            session = self._recogniser(name, DEPLOYED_MS).session()
            session.append(NOISE)
            session.partial()
            session.finalize()
        warm_up_searches(self.indexes, self._inventory, self.vad)
        self._rows.record()
        record_chunks(self._model.acoustic, DEPLOYED)

    async def hear(self, job: Job) -> Hypothesis:
        """Does a session's job in the model thread, together with those of others. If the caller is cancelled, it ends with the present step."""
        return await self._awaited(self._thread.hear(job))

    def forget(self, session: StreamingSession) -> None:
        """Ends a session, whatever it has in the model thread."""
        with suppress(RuntimeError):  # the thread has ended, and the server with it
            self._thread.submit(session.abort)

    async def session(self, hotwords: Sequence[str], index: str | None, chunk_ms: int, tenant: str = "") -> StreamingSession:
        """A new stream of the model.

        Args:
            hotwords: hints by hand.
            index: name of the index in which hints are looked up.
            chunk_ms: one of CHUNKS_MS.
            tenant: makes no difference here: no stream sees what another has read.
        """
        return await self.run(lambda: self._recogniser(index, chunk_ms).session(hotwords))

    def _recogniser(self, index: str | None, chunk_ms: int) -> Recogniser:
        key = (chunk_ms, index)
        if key not in self._recognisers:
            context = Context(chunk_ms // ENCODER_FRAME_MS, LEFT_MS // chunk_ms)
            own = {"hotwords": self.index(index), "rows": self._rows, "rereading": self._rereading}
            self._recognisers[key] = Recogniser(self._model, context, **own)
        return self._recognisers[key]

    async def segments(
        self, samples: np.ndarray, hotwords: Sequence[str], index: str | None, with_words: bool, tenant: str = ""
    ) -> AsyncIterator[Segment]:
        """The segments of a whole recording, (N,) float32 in [-1, 1] at 16 kHz, as they are recognised; others have a turn between them.

        Raises:
            Refused: when the server goes away before it is done.
        """
        given = {"hotwords": self.index(index), "given": hotwords, "vad": self.vad, "with_words": with_words, "rows": self._rows}
        transcriber = Transcriber(self._model, self._inventory, **given)
        pieces = transcriber.places(samples)
        while (places := await asyncio.wrap_future(self._ears_thread.submit(next, pieces, None))) is not None:
            for place in places:
                async with self._one_upload:
                    segment: Segment = await self._awaited(self._thread.do(transcriber.decoding(samples, place)))
                yield segment
            self._check_going()
        self._heard_upload(samples)


def warm_up_searches(indexes: Mapping[str, HotwordIndex], inventory: PhonemeInventory, vad: VadConfig) -> None:
    """Does all kinds of searches once, so that no client waits while they are compiled."""
    for index in indexes.values():
        log_probs = some_names(index)  # noise finds none, and much is done only when there is one
        index.search_log_probs(log_probs)
        index.stream_lattice().push(log_probs, final=True)
    Lexicon().words("你好 hello 3 nimasr")  # words of uploads are timed: dictionaries, and what reads names that they lack
    forced_align(np.zeros((9, len(inventory)), np.float32), [1, 2])
    Cutter(vad).push(NOISE)


def some_names(index: HotwordIndex) -> np.ndarray:
    """(S, V) float32 log-probabilities, as if two names of the index were said clearly, a Mandarin and an English one if it has both.

    Something English is always said, since words are searched then, too.
    """
    trie, phones = index.state.base.trie, np.zeros(0, np.uint8)
    for node in {1, int(trie.first[1]) - 1} if trie.num_keys else ():  # below the root, by rising id; those of English are the highest
        while trie.key[node] == NONE:
            node = int(trie.first[node])
        phones = np.concatenate([phones, trie.phones_to(node)])
    english = index.about.english
    if english and not english & set(phones.tolist()):
        phones = np.append(phones, np.uint8(min(english)))
    log_probs = np.full((2 * len(phones) + 1, len(index.inventory)), -20.0, np.float32)
    log_probs[::2, BLANK] = 0.0
    log_probs[np.arange(len(phones)) * 2 + 1, phones] = 0.0
    return log_probs
