"""The server in front of other servers: the encoder on Triton, adaptor and language model on vLLM, hotwords looked up here in between.

    samples -> features -> encoder (Triton, or here) -> frames -------------------------> adaptor and LLM (vLLM, or here) -> text
                                        +--> best phones -> hotwords, on this CPU -> hints --^

Each of the two may be elsewhere alone: EncoderGateway has the language model here, Gateway has it on vLLM. Nothing is lost with a replica as long
as another is there, or comes back in time: what it knew of an utterance is read again elsewhere from what is kept of it here, features for the
encoder and frames for the language model.

Source: arXiv 2604.18105, section 3.6, has the parts on these engines; what happens when one fails is ours.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import PhonemeInventory
from nim4.decode.encoder import ENCODER_FRAME_MS, Chunk, GreedyPhones, StreamingEncoder
from nim4.decode.hotword import HotwordIndex
from nim4.decode.hotword_hints import MAX_HINTS, StreamHints
from nim4.decode.hotword_lattice import DEFAULT_LIMITS
from nim4.decode.recordings import Segment, speech_places, timed_segment
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import Counts, Hypothesis, Job, StreamingSession
from nim4.decode.together import Work
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel
from nim4.serve.engines import Engines
from nim4.serve.limits import Limits
from nim4.serve.metrics import Metrics
from nim4.serve.service import DEPLOYED_MS, LEFT_MS, NOISE, Reception, Service, warm_up_searches
from nim4.serve.triton_client import TritonEncoder, TritonStream

Result = TypeVar("Result")

log = logging.getLogger("nim4")


class Ears(Protocol):
    """The encoder of one utterance, wherever it is."""

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""

    async def hear(self, samples: np.ndarray, ends: bool) -> list[Chunk]:
        """The chunks that (N,) float32 samples complete, and if `ends` those of what is left."""

    async def close(self) -> None:
        """Ends the utterance, at any time."""


# ------------------------------------------------------------------------------------------------ encoder there, language model here


class HeardElsewhere:
    """What StreamingSession takes for its encoder: chunks that have been encoded before the session asks for them."""

    def __init__(self, stream: TritonStream):
        self.stream = stream
        self.waiting: list[Chunk] = []
        self._phones = GreedyPhones()

    @property
    def phones(self) -> list[int]:
        """Ids, of the chunks that the session has taken."""
        return self._phones.ids

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self.stream.missing_samples

    def accepting(self, samples: np.ndarray) -> Work[list[Chunk]]:
        """All that wait, whatever the samples."""
        chunks, self.waiting = self.waiting, []
        for chunk in chunks:
            self._phones.hear(chunk.log_probs)
        return chunks
        yield  # never reached: it makes this a generator, as all Work is

    def finishing(self) -> Work[list[Chunk]]:
        """None: they came with the last samples."""
        return []
        yield


class FedSession:
    """A session of a model here whose encoder is elsewhere."""

    def __init__(self, heard: HeardElsewhere, session: StreamingSession):
        self.heard, self.session = heard, session

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self.heard.missing_samples


class EncoderGateway(Service):
    """Streams whose encoder runs on Triton. What is heard as a whole, recordings and second passes anew, is heard by the encoder here.

    Args:
        encoder: of the same model folder as `model`.
        model, inventory, indexes, limits, vad, rereading: of the Service.
    """

    def __init__(
        self,
        encoder: TritonEncoder,
        model: SpeechLlm,
        inventory: PhonemeInventory,
        indexes: Mapping[str, HotwordIndex],
        limits: Limits,
        vad: VadConfig | None = None,
        rereading: Rereading | None = None,
    ):
        super().__init__(model, inventory, indexes, limits, vad, rereading)
        self._encoder, self.chunks_ms = encoder, encoder.chunks_ms
        encoder.metrics = self.metrics
        self._leaving: set[asyncio.Task[None]] = set()

    async def session(self, hotwords: Sequence[str], index: str | None, chunk_ms: int, tenant: str = "") -> FedSession:
        """A new stream, as of the Service."""
        heard = HeardElsewhere(self._encoder.stream(chunk_ms, self.listen))
        return FedSession(heard, await self.run(lambda: self._recogniser(index, chunk_ms).session(hotwords, encoder=heard)))

    async def hear(self, job: Job) -> Hypothesis:
        """Does a session's job; raises Busy if no server of the encoder can be reached."""
        fed: FedSession = job.session
        like = self._model.adaptor.up.weight
        for chunk in await fed.heard.stream.hear(job.samples, job.ends):
            fed.heard.waiting.append(replace(chunk, frames=chunk.frames.to(like)))
        return await super().hear(Job(fed.session, job.samples, job.ends))

    def forget(self, session: FedSession) -> None:
        """Ends a session, whatever it is doing."""
        super().forget(session.session)
        _keep(self._leaving, session.heard.stream.close())

    async def stop(self) -> None:
        """Ends the connections."""
        await self._encoder.close()


# ------------------------------------------------------------------------------------------------------- language model on vLLM


class HeardHere:
    """An encoder in this process, whose work the model thread does."""

    def __init__(self, encoder: StreamingEncoder, do: Callable[[Work[Any]], Awaitable[Any]], metrics: Metrics):
        self._encoder, self._do, self._metrics = encoder, do, metrics

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._encoder.missing_samples

    async def hear(self, samples: np.ndarray, ends: bool) -> list[Chunk]:
        """As Ears."""
        began_s = time.monotonic()
        chunks = await self._do(self._encoder.accepting(samples))
        if ends:
            chunks += await self._do(self._encoder.finishing())
        if chunks:
            self._metrics.observe("encode_seconds", (time.monotonic() - began_s) / len(chunks))
        return chunks

    async def close(self) -> None:
        """As Ears."""


class EngineSession:
    """One utterance: its encoder, the look-up of its hotwords, and its stream on an engine.

    Args:
        engines: where `stream` was opened.
        keeps_log_probs: whether what the phoneme head said stays in `log_probs`, for the times of words.
    """

    def __init__(self, ears: Ears, hotwords: StreamHints, engines: Engines, stream: Any, metrics: Metrics, keeps_log_probs: bool):
        self._ears, self._hotwords, self._engines, self._stream, self._metrics = ears, hotwords, engines, stream, metrics
        self._phones = GreedyPhones()
        self._num_samples = 0
        self._shown: Any = None  # the last text
        self._is_open = True
        self.log_probs: list[Tensor] | None = [] if keeps_log_probs else None

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._ears.missing_samples

    async def hear(self, samples: np.ndarray, ends: bool) -> Hypothesis:
        """Takes samples, and gives the final text if they are the last, else the text so far, which is an old one where there is no room for more.

        Raises:
            Busy: if there is no server, engine or room.
        """
        await self.take(samples, ends)
        if ends:
            with self._timed("write_seconds"):
                text = await self._engines.call(self._stream, lambda: self._stream.final(self._hotwords.hints))
            self._is_open = False
            await self._ears.close()
        else:
            with self._timed("partial_seconds"):
                text = await self._engines.call(self._stream, lambda: self._stream.partial(self._hotwords.hints), may_be_left_out=True)
        self._shown = text = text or self._shown
        return self._hypothesis(text)

    async def take(self, samples: np.ndarray, ends: bool) -> None:
        """Takes samples only."""
        chunks = await self._ears.hear(samples, ends)
        self._num_samples += len(samples)
        for chunk in chunks:
            with self._timed("retrieve_seconds"):
                self._phones.hear(chunk.log_probs)
                self._hotwords.hear(chunk.log_probs)
            if self.log_probs is not None:
                self.log_probs.append(chunk.log_probs)
            frames, num_phones = chunk.frames[0].cpu(), len(self._phones.ids)
            with self._timed("append_seconds"):
                await self._engines.call(self._stream, lambda frames=frames, num_phones=num_phones: self._stream.append(frames, num_phones))
        if ends:
            self._hotwords.finish()

    async def close(self) -> None:
        """Ends the utterance, at any time: what it has in the encoder and the engine is given up."""
        if self._is_open:
            self._is_open = False
            self._metrics.count("aborted_total")
            await self._stream.close()
            await self._ears.close()

    def _hypothesis(self, text: Any) -> Hypothesis:
        phones, hints, audio_s = tuple(self._phones.ids), tuple(self._hotwords.hints), self._num_samples / SAMPLING_RATE_HZ
        if text is None:
            return Hypothesis("", phones, hints, audio_s, 0, 0, False, Counts())
        own = text.counts
        counts = Counts(own.speech_tokens, refreshed=own.partials, skipped=own.skipped, drafted=own.drafted, accepted=own.accepted)
        return Hypothesis(text.text, phones, hints, audio_s, text.revision, text.settled_chars, text.is_final, counts)

    @contextmanager
    def _timed(self, name: str) -> Any:
        began_s = time.monotonic()
        yield
        self._metrics.observe(name, time.monotonic() - began_s)


class Gateway(Reception):
    """Streams and recordings whose language model runs on vLLM. Recordings are heard as streams are, segment by segment, without partial texts.

    Args:
        encoder: on Triton, or the phoneme model of the same folder, in evaluation mode, to run here.
        engines: of the same folder.
        inventory: of the phoneme head.
        indexes, limits, vad: of the Reception.
    """

    def __init__(
        self,
        encoder: TritonEncoder | PhonemeModel,
        engines: Engines,
        inventory: PhonemeInventory,
        indexes: Mapping[str, HotwordIndex],
        limits: Limits,
        vad: VadConfig | None = None,
    ):
        super().__init__(indexes, limits, vad)
        self._encoder, self._engines, self._inventory = encoder, engines, inventory
        self._leaving: set[asyncio.Task[None]] = set()
        engines.metrics, self.metrics.more = self.metrics, engines.gauges
        if isinstance(encoder, TritonEncoder):
            encoder.metrics, self.chunks_ms = self.metrics, encoder.chunks_ms
        self._lexicon: Lexicon | None = None

    def warm_up(self) -> None:
        """Does all kinds of searches once, so that no client waits while they are compiled."""
        self._thread.submit(warm_up_searches, self.indexes, self._inventory, self.vad).result()
        self._lexicon = Lexicon()

    async def start(self) -> None:
        """Starts the engines: half a minute; and says something to all parts, so that the first client does not wait for them."""
        await self._engines.start()
        for name in (None, *self.indexes):
            session = await self.session((), name, DEPLOYED_MS)
            await session.hear(NOISE, ends=False)
            await session.hear(NOISE[:0], ends=True)

    async def stop(self) -> None:
        """Ends the engines and the connections."""
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._engines.close()
        if isinstance(self._encoder, TritonEncoder):
            await self._encoder.close()

    async def session(
        self, hotwords: Sequence[str], index: str | None, chunk_ms: int, tenant: str = "", *, keeps_log_probs: bool = False
    ) -> EngineSession:
        """A new stream.

        Args:
            hotwords: hints by hand.
            index: name of the index in which hints are looked up.
            chunk_ms: one of `chunks_ms`.
            tenant: whose it is: tenants share no keys and values.
        Raises:
            Busy: if no engine has room for one more.
        """
        vocab_size = len(self._inventory)
        hints = StreamHints(self.index(index), DEFAULT_LIMITS, hotwords, MAX_HINTS, vocab_size)
        stream = await self._engines.open(tenant)
        return EngineSession(self._ears(chunk_ms), hints, self._engines, stream, self.metrics, keeps_log_probs)

    def _ears(self, chunk_ms: int) -> Ears:
        if isinstance(self._encoder, TritonEncoder):
            return self._encoder.stream(chunk_ms, self.listen)
        context = Context(chunk_ms // ENCODER_FRAME_MS, LEFT_MS // chunk_ms)
        return HeardHere(StreamingEncoder(self._encoder, context), self._do, self.metrics)

    async def _do(self, work: Work[Result]) -> Result:
        return await self._awaited(self._thread.do(work))

    async def hear(self, job: Job) -> Hypothesis:
        """Does a session's job. Raises Busy, see EngineSession.hear."""
        session: EngineSession = job.session
        return await session.hear(job.samples, job.ends)

    def forget(self, session: EngineSession) -> None:
        """Ends a session, whatever it is doing."""
        _keep(self._leaving, session.close())

    async def segments(
        self, samples: np.ndarray, hotwords: Sequence[str], index: str | None, with_words: bool, tenant: str = ""
    ) -> AsyncIterator[Segment]:
        """The segments of a whole recording, as of the Service.

        Raises:
            Refused: when the server goes away before it is done.
            Busy: as `session` and `hear`.
        """
        pieces = speech_places(samples, self.vad)
        while (places := await asyncio.wrap_future(self._ears_thread.submit(next, pieces, None))) is not None:
            for start, end in places:
                async with self._one_upload:
                    session = await self.session(hotwords, index, DEPLOYED_MS, tenant, keeps_log_probs=with_words)
                    try:
                        final = await session.hear(samples[start:end], ends=True)
                    finally:
                        self.forget(session)
                log_probs = None if session.log_probs is None else torch.cat(session.log_probs).numpy()
                lexicon = self._lexicon if with_words else None
                yield timed_segment((start, end), final.text, log_probs, final.hints, lexicon, self._inventory)
            self._check_going()
        self._heard_upload(samples)


def _keep(tasks: set[asyncio.Task[None]], work: Any) -> None:
    """Runs something that nobody waits for, and holds on to it until it ends."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
