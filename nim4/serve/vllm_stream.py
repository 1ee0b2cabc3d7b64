"""One stream on vLLM, from its first encoder frames to its final text; see nim4/serve/vllm_engine.py, which makes them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nim4.corpus.prompts import Prompt
from nim4.decode.streaming import CUT_CHARACTER, FREE_CHUNKS, MAX_NEW_TOKENS, num_kept_tokens
from nim4.model.asr import max_answer_tokens
from nim4.model.llm import cut_at
from nim4.serve.kv_room import Room
from nim4.serve.vllm_client import EngineLost, EngineSettings, SpeechPrompt, VllmClient, VllmSession


@dataclass
class Counts:
    """Work, of a stream or of all streams of an engine, as vLLM reports it.

    Attributes:
        speech_tokens: embeddings of speech that came.
        appended_tokens: that open requests have read: speech, the prompt's beginning, and what a stream that came back did not find any more.
        prompt_tokens, cached_tokens: of requests for texts; those that were cached were not read again.
        written_tokens: of texts, their ends included.
        partials, skipped, finals: texts, and partials for which nothing new was heard.
        drafted, accepted: tokens of the last partials, and how many of them the final texts begin with.
        evicted, resumed: open requests that were let go to make room, and streams that came back.
        aborted: streams that ended without a final text.
    """

    speech_tokens: int = 0
    appended_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    partials: int = 0
    skipped: int = 0
    finals: int = 0
    drafted: int = 0
    accepted: int = 0
    evicted: int = 0
    resumed: int = 0
    aborted: int = 0


@dataclass(frozen=True)
class Text:
    """What a stream has understood so far, as nim4/decode/streaming.py's Hypothesis has it.

    Attributes:
        ids: tokens, without the end of the turn.
        revision: counts the times that the text was written.
        settled_chars: so many characters stay as they are in all later partials.
        counts: of the stream so far.
    """

    text: str
    ids: tuple[int, ...]
    revision: int
    settled_chars: int
    is_final: bool
    counts: Counts


class Engine(Protocol):
    """What streams share; VllmEngine."""

    client: VllmClient
    settings: EngineSettings
    folder: Path
    model: str
    frame_dim: int
    stack: int
    tokenizer: Any
    prompt: Prompt
    room: Room
    counts: Counts
    streams: dict["VllmStream", None]


class VllmStream:
    """One utterance; made by VllmEngine.open. Calls of one stream wait for each other.

    After `final` or `close` nothing is left of it, here and in vLLM, and every further call but `close` raises RuntimeError. After any other
    error, or when a call is cancelled, the stream is as it was before, and the call may be made again, also after VllmEngine.adopt.

    Attributes:
        engine: where it is.
        counts: of this stream.
    """

    def __init__(self, engine: Engine, tenant: str):
        self.engine, self.counts = engine, Counts()
        self._tenant, self._id, self._num_requests = tenant, uuid.uuid4().hex, 0
        self._open, self._calls = True, asyncio.Lock()
        self._going: str | None = None  # name of the request for a text
        self._items: list[Tensor] = []  # (S, D) frames of whole speech tokens, as they came
        self._rest = torch.zeros(0, engine.frame_dim)  # frames that fill none yet
        self._session: VllmSession | None = None  # has read all items, if there is one
        self._num_blocks = 0  # taken for it
        self._num_phones = self._written_phones = self._spoken_chunks = self._revision = 0
        self._ids: list[int] = []  # of the last partial
        self._num_kept = 0  # of them stay

    @property
    def may_make_room(self) -> bool:
        """Whether `evict` would free blocks at once."""
        return self._session is not None and not self._calls.locked()

    async def append(self, frames: Tensor, num_phones: int) -> None:
        """Takes the encoder frames of one chunk. The language model reads those that fill speech tokens: now if there are blocks for them,
        else with the next text.

        Args:
            frames: (S, D) float, on the CPU.
            num_phones: that the phoneme head has heard since the start, these frames included.
        Raises:
            ValueError: if frames are of another shape, or the utterance would be longer than EngineSettings.max_tokens allows.
            EngineLost: if the engine's process is gone.
        """
        async with self._call():
            if frames.ndim != 2 or frames.shape[1] != self.engine.frame_dim:
                raise ValueError(f"frames must be (S, {self.engine.frame_dim}), as the engine's model makes them, not {tuple(frames.shape)}")
            frames = torch.cat([self._rest.to(frames.dtype), frames])
            whole = len(frames) - len(frames) % self.engine.stack
            if whole:
                await self._take(frames[:whole])
            self._rest, self._num_phones = frames[whole:], num_phones
            self._spoken_chunks += bool(self._spoken_chunks or num_phones)

    async def partial(self, hints: Sequence[str] = ()) -> Text:
        """The text so far. It is written anew if phonemes were heard since the last time. Raises NoRoom, EngineLost."""
        async with self._call():
            if self._num_phones > self._written_phones and self._items:
                await self._refresh(hints)
            else:
                self._count(skipped=1)
            text = self._text(self._ids).rstrip(CUT_CHARACTER).strip()
            settled = len(self._text(self._ids[: self._num_kept]).lstrip())
            return Text(text, tuple(self._ids), self._revision, min(settled, len(text)), False, replace(self.counts))

    async def final(self, hints: Sequence[str] = ()) -> Text:
        """The second pass, at the end of speech; ends the stream. The last partial is verified as a draft. Raises NoRoom, EngineLost."""
        async with self._call():
            if len(self._rest):
                await self._take(self._rest)
                self._rest = self._rest[:0]
            ids: list[int] = []
            if self._items:
                suffix, limit = self.engine.prompt.suffix(hints), max_answer_tokens(self.counts.speech_tokens)
                ids, accepted = await self._write(suffix, self._ids, limit)
                self._count(drafted=len(self._ids), accepted=accepted)
            self._count(finals=1)
            text = self._text(ids).strip()
            final = Text(text, tuple(ids), self._revision + 1, len(text), True, replace(self.counts))
            await self._end()
            return final

    async def close(self) -> None:
        """Ends the stream and frees its blocks, at any time and as often as one likes; what a call is doing is given up."""
        if not self._open:
            return
        self._open = False
        self._count(aborted=1)
        if self._going is not None:
            with suppress(EngineLost):
                await self.engine.client.abort(self._going)
        async with self._calls:
            await self._end()

    async def move(self, engine: Engine) -> None:
        """Goes on in another engine; see VllmEngine.adopt."""
        async with self._call():
            await self._let_go()
            self.engine.streams.pop(self, None)
            self.engine = engine
            engine.streams[self] = None

    async def evict(self) -> None:
        """Lets its open request go, to make room; the next chunk begins another."""
        async with self._calls:
            self._count(evicted=1)
            await self._let_go()

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        async with self._calls:
            self._check_open()
            self.engine.streams.pop(self, None)
            self.engine.streams[self] = None  # the last of them to be evicted
            try:
                yield
            finally:
                self.engine.room.wake()

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the stream has ended: a new utterance needs a new one")

    async def _take(self, frames: Tensor) -> None:
        """Keeps frames of the next speech tokens; the open request reads them if there are blocks for them, else there is none."""
        engine, num_tokens = self.engine, -(-len(frames) // self.engine.stack)
        num_speech = self.counts.speech_tokens + num_tokens
        bare = len(engine.prompt.prefix) + num_speech + len(engine.prompt.suffix()) + max_answer_tokens(num_speech)
        if bare > engine.settings.max_tokens:
            raise ValueError(f"an utterance with its text has at most {engine.settings.max_tokens} tokens, and would have {bare}")
        more = engine.room.blocks(len(engine.prompt.prefix) + num_speech + 1) - self._num_blocks  # and the token that is forgotten
        if await engine.room.take_now(more):
            self._num_blocks += more
            try:
                await self._read(frames, num_speech)
            except BaseException:
                await self._let_go()
                raise
        else:
            await self._let_go()
        self._items.append(frames)
        self._count(speech_tokens=num_tokens)

    async def _read(self, frames: Tensor, num_speech: int) -> None:
        if self._session is None:
            self._session = self.engine.client.session(self._name())
            num_cached = await self._session.send(self._prompt([*self._items, frames], [], begins=True))
            self._count(appended_tokens=len(self.engine.prompt.prefix) + num_speech - num_cached, resumed=bool(self._items))
        else:
            await self._session.send(self._prompt([frames], [], begins=False))
            self._count(appended_tokens=num_speech - self.counts.speech_tokens)

    def _prompt(self, items: Sequence[Tensor], ids: Sequence[int], begins: bool) -> SpeechPrompt:
        """The last of all items, and ids; `begins`: behind the prompt's beginning."""
        first = 0 if begins else len(self._items)
        names = [f"{self._id}-{place}" for place in range(first, first + len(items))]
        prefix = self.engine.prompt.prefix if begins else []
        return SpeechPrompt([*prefix, *[self.engine.client.speech_id] * len(items), *ids], items, names, self._tenant)

    async def _refresh(self, hints: Sequence[str]) -> None:
        kept = self._ids[: self._num_kept]
        suffix = self.engine.prompt.suffix(hints, partial=True)
        limit = min(MAX_NEW_TOKENS, max_answer_tokens(self.counts.speech_tokens) - len(kept))
        num_phones = self._num_phones
        self._ids = kept + (await self._write(suffix + kept, [], limit))[0]
        if self._spoken_chunks >= FREE_CHUNKS:
            self._num_kept = num_kept_tokens(self.engine.tokenizer, self._ids, self._num_kept)
        self._written_phones = num_phones
        self._revision += 1
        self._count(partials=1)

    async def _write(self, after: list[int], draft: list[int], limit: int) -> tuple[list[int], int]:
        """What stands behind all speech and `after`, without its end, and how many tokens of the draft it begins with."""
        end, draft = self.engine.prompt.end, draft[: limit - 1]
        if limit < 1:
            return [], 0
        accepted, ids = await self._ask([*after, *draft], limit - len(draft), draft)
        ids = [*draft[:accepted], *ids]
        if accepted < len(draft) and end not in ids[-1:] and len(ids) < limit:
            ids += (await self._ask([*after, *ids], limit - len(ids), []))[1]
        return cut_at(ids, end), accepted

    async def _ask(self, ids: list[int], limit: int, draft: list[int]) -> tuple[int, list[int]]:
        """One request for a text: how many tokens of the draft hold, at the end of `ids`, and what stands behind them."""
        engine, room = self.engine, self.engine.room
        num_spoken = len(engine.prompt.prefix) + self.counts.speech_tokens
        if (num_tokens := num_spoken + len(ids) + limit) > engine.settings.max_tokens:
            raise ValueError(f"an utterance with hints and text has at most {engine.settings.max_tokens} tokens, and would have {num_tokens}")
        shared = num_spoken // room.block_size if self._session is not None else 0
        own = room.blocks(num_tokens) - shared
        if not await room.take_now(own):
            await self._let_go()  # who waits holds nothing that others wait for
            own = room.blocks(num_tokens)
            await room.take(own)
        try:
            self._check_open()
            self._going = self._name()
            answer = await engine.client.answer(self._going, self._prompt(self._items, ids, begins=True), limit, engine.prompt.end, draft)
        finally:
            self._going = None
            room.give(own)
        self._count(prompt_tokens=answer.prompt_tokens, cached_tokens=answer.cached_tokens, written_tokens=len(answer.ids))
        return answer.accepted, answer.ids

    def _name(self) -> str:
        self._num_requests += 1
        return f"{self._id}/{self._num_requests}"

    def _text(self, ids: Sequence[int]) -> str:
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True)

    async def _let_go(self) -> None:
        """Ends the open request; when the engine is gone, so is that."""
        session, self._session = self._session, None
        try:
            if session is not None:
                with suppress(EngineLost):
                    await session.close()
        finally:
            self.engine.room.give(self._num_blocks)
            self._num_blocks = 0

    async def _end(self) -> None:
        self._open = False
        await self._let_go()
        self._items = []
        self.engine.streams.pop(self, None)

    def _count(self, **amounts: int) -> None:
        for counts in (self.counts, self.engine.counts):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)
