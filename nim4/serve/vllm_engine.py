"""Streams on vLLM: a gateway hands over encoder frames as they come, and gets partial and final texts.

    append(frames)   -> one more item of a request that stays open: its keys and values are only ever appended to
    partial, final   -> an ordinary request that begins with the same items: it finds their keys and values by prefix, and is forgotten

What a text is, is decided as in nim4/decode/streaming.py, and in fp32 on a CPU the texts are the same: what stays of a partial, how long one
may be, that nothing is written before a new phoneme was heard. Encoder, phoneme head and look-up of hints are the caller's business.

Blocks of keys and values are accounted for here: vLLM never takes those of an open request back, so that it would wait for ever if open
requests had them all. Who needs blocks when there are none lets the stream go that has been still for longest; its keys and values stay
where they are until they are overwritten, and are computed again, from the frames that the stream keeps, where they were.

    engine = await VllmEngine.start(folder)
    stream = await engine.open(tenant="acme")
    await stream.append(frames, num_phones)        # (S, D) encoder frames; phonemes heard since the start
    text = await stream.partial(hints)
    text = await stream.final(hints)

Source: arXiv 2604.18105, section 3.6, for the deployment: adaptor and language model on vLLM; how, is ours. Written for vLLM 0.32.
"""

import asyncio
import importlib.metadata
import itertools
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nim4.config import RecipeError
from nim4.corpus.manifest import MAX_DURATION_S
from nim4.corpus.prompts import Prompt
from nim4.decode.streaming import CUT_CHARACTER, FREE_CHUNKS, MAX_NEW_TOKENS, num_kept_tokens
from nim4.model.asr import LLM_FOLDER, max_answer_tokens, read_speech_llm_config
from nim4.model.llm import cut_at
from nim4.serve.kv_room import NoRoom, Room

ENTRY_POINT = "vllm.general_plugins"
FORMAT = "nim4"  # vLLM's --config-format, under which nim4/serve/vllm_plugin.py reads our folders
MAX_ITEMS = round(MAX_DURATION_S / 0.16) + 1  # of a stream: appends of one embedding each, for as long as an utterance may be


@dataclass(frozen=True)
class EngineSettings:
    """What one engine may take.

    Attributes:
        max_streams: that are open at the same time.
        max_tokens: of one stream: prompt, speech (6.25 a second) and text.
        precision: fp32, bf16, or auto: bf16 on a GPU, fp32 elsewhere.
        num_blocks: of keys and values; None = what the memory holds that vLLM finds.
        gpu_memory_share: of a GPU's memory that vLLM may take.
        cache_gb: of memory for what streams have sent, so that no frame travels to the model twice.
        wait_s: a request that finds no room waits so long; then it is refused.
    """

    max_streams: int = 64
    max_tokens: int = 1024
    precision: str = "auto"
    num_blocks: int | None = None
    gpu_memory_share: float = 0.9
    cache_gb: float = 1.0
    wait_s: float = 2.0


class EngineLost(Exception):
    """The engine's process is gone. Its streams are not: see VllmEngine.adopt."""


@dataclass
class Counts:
    """Work, of a stream or of all streams of an engine, as vLLM reports it.

    Attributes:
        speech_tokens: embeddings of speech that were appended.
        appended_tokens: that the language model read for that: the prompt's beginning, and after `resumed` what was overwritten, included.
        prompt_tokens, cached_tokens: of requests for texts; so many of them were not read again.
        written_tokens: of texts, the end and what was thrown away included.
        partials, skipped, finals: texts, and partials for which nothing new was heard.
        drafted, accepted: tokens of the last partials, and how many of them the final texts begin with.
        evicted, resumed: streams that were let go of to make room, and that came back.
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
    """What a stream has understood so far; the same as in nim4/decode/streaming.py's Hypothesis.

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


class VllmEngine:
    """One replica of adaptor and language model; made by `start`. All of it belongs to one event loop.

    Attributes:
        frame_dim: D, width of the encoder frames that it takes.
        stack: encoder frames of one speech token.
        prompt, tokenizer: of the model.
        counts: of all streams.
        streams: that are open here.
    """

    def __init__(self, folder: Path, settings: EngineSettings, llm: Any):
        self.folder, self.settings, self._llm = folder, settings, llm
        config, _ = read_speech_llm_config(folder)
        self.frame_dim, self.stack = config.encoder.dim, config.adaptor.stack
        self.tokenizer = llm.get_tokenizer()
        self.prompt = Prompt(self.tokenizer)
        self.counts, self.streams = Counts(), set[VllmStream]()
        cache = llm.vllm_config.cache_config
        self.room = Room(cache.num_gpu_blocks - 1, cache.block_size, settings.wait_s)  # vLLM keeps one block for itself

    @classmethod
    async def start(cls, folder: Path, settings: EngineSettings | None = None) -> "VllmEngine":
        """Loads a model folder of stages 4 to 9 into a process of its own: half a minute.

        Raises:
            RecipeError: if vLLM or our plugin is not installed, the folder is not such a folder, or vLLM cannot load it.
        """
        raise NotImplementedError

    def check_model(self, folder: Path) -> None:
        """Raises RecipeError unless a folder's model is the one that the engine was started with: what made the frames must fit it."""
        raise NotImplementedError

    async def open(self, tenant: str = "") -> "VllmStream":
        """A new stream.

        Args:
            tenant: streams of different tenants share no keys and values, not even those of the prompt's beginning.
        Raises:
            NoRoom: if all streams are in use.
            EngineLost: if the engine's process is gone.
        """
        raise NotImplementedError

    async def adopt(self, stream: "VllmStream") -> None:
        """Takes over a stream of another engine with the same model, e.g. of one that is lost; it goes on with what it has heard and written.

        Raises:
            NoRoom, EngineLost: as `open`; the stream stays where it was.
        """
        raise NotImplementedError

    async def check(self) -> None:
        """Raises EngineLost unless the engine's process is there."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Gauges and counters by name: streams, kv_blocks, kv_blocks_used, and all of `counts`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends all streams and the process."""
        raise NotImplementedError


class VllmStream:
    """One utterance, from its first frames to its final text; made by VllmEngine.open. Calls of one stream wait for each other.

    After `final` or `close` nothing is left of it, here and in vLLM, and every further call but `close` raises RuntimeError.
    If a call fails with NoRoom, or is cancelled, the stream is as it was before, and the call may be made again; `final` too.
    """

    async def append(self, frames: Tensor, num_phones: int) -> None:
        """Takes the encoder frames of the next chunk; the language model reads those that fill speech tokens.

        Args:
            frames: (S, D) float, on the CPU.
            num_phones: that the phoneme head has heard since the start, these frames included.
        Raises:
            ValueError: if frames are of another shape, or the stream would be longer than it may be: nothing of them is kept.
            NoRoom: if there were no blocks for EngineSettings.wait_s.
            EngineLost: if the engine's process is gone.
        """
        raise NotImplementedError

    async def partial(self, hints: Sequence[str] = ()) -> Text:
        """The text so far. It is written anew if phonemes were heard since the last time. Raises NoRoom, EngineLost."""
        raise NotImplementedError

    async def final(self, hints: Sequence[str] = ()) -> Text:
        """The second pass, at the end of speech; ends the stream. The last partial is verified as a draft. Raises NoRoom, EngineLost."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends the stream and frees its blocks, at any time and as often as one likes: what a call is doing is given up."""
        raise NotImplementedError
