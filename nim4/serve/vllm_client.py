"""The door to vLLM: an engine of its own process that reads our model folders, and the two kinds of requests that streams make.

vLLM's end of that process has an event loop and a thread of its own: it holds up its loop for half a minute while the process starts, and others
must go on meanwhile, as when a gateway replaces one of its engines.

Written for vLLM 0.32, whose names change from release to release; docs/vllm.md has the versions.
"""

import asyncio
import importlib.metadata
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nim4.config import RecipeError
from nim4.corpus.manifest import MAX_DURATION_S
from nim4.model.asr import LLM_FOLDER, read_speech_llm_config
from nim4.serve.own_loop import Ended, OwnLoop

INSTALL = "see docs/vllm.md"
ENTRY_POINT = "vllm.general_plugins"
FORMAT = "nim4"  # vLLM's --config-format, under which nim4/serve/vllm_plugin.py reads our folders
MAX_ITEMS = round(MAX_DURATION_S / 0.16) + 1  # of a request: one embedding each, for as long as an utterance may be
MAX_APPENDED_TOKENS = 8  # ours: of a chunk of 1.28 s; what open requests have sent last stays in vLLM's cache of embeddings
MIN_BATCHED_TOKENS = 4096  # ours: of a pass; room for the embeddings of a stream that comes back, or of a whole recording

Result = TypeVar("Result")

CPU_BLOCK_SIZE = 32  # tokens: the least it can have there; by default it is 128, and a text reads half a block again. On GPUs it is 16


class EngineLost(Exception):
    """The engine's process is gone. Its streams are not: see VllmEngine.adopt."""


@dataclass(frozen=True)
class EngineSettings:
    """What one engine may take; all values are ours.

    Attributes:
        max_streams: that are open at the same time.
        max_tokens: of one stream: prompt, speech (6.25 a second), hints and text.
        precision: fp32, bf16, or auto: bf16 on a GPU, fp32 elsewhere.
        memory_share: of a GPU's memory that vLLM may take, weights included.
        kv_gb: memory for keys and values; None = what is left of that on a GPU, 1 GB elsewhere.
        num_blocks: of keys and values, instead of as many as that memory holds.
        cache_gb: of memory for frames, at both ends, so that none travels to the model twice.
        wait_s: a text that finds no room waits so long; then it is refused.
    """

    max_streams: int = 64
    max_tokens: int = 2048
    precision: str = "auto"
    memory_share: float = 0.9
    kv_gb: float | None = None
    num_blocks: int | None = None
    cache_gb: float = 1.0
    wait_s: float = 2.0


@dataclass(frozen=True)
class SpeechPrompt:
    """What a request begins with.

    Attributes:
        ids: with one placeholder for each item.
        items: (S, D) float encoder frames.
        names: of the items, unique in the engine: what has a name that is known is neither sent nor adapted again.
        tenant: with whom alone keys and values are shared.
    """

    ids: Sequence[int]
    items: Sequence[Tensor]
    names: Sequence[str]
    tenant: str


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    Attributes:
        accepted: tokens of the draft that the answer begins with.
        ids: of the answer behind them, its end included; none where the draft could not be verified.
        prompt_tokens: of the request; `cached_tokens` of them had not to be read again.
    """

    accepted: int
    ids: list[int]
    prompt_tokens: int
    cached_tokens: int


class Gone:
    """Stands where vLLM was when that has been ended."""

    def __getattr__(self, name: str) -> Any:
        raise EngineLost("the engine has been ended")


class VllmClient:
    """vLLM with our model in it; made by `start`. It is called in one event loop, and works in another, its own.

    Attributes:
        tokenizer: the language model's.
        speech_id: that stands for an item in a prompt.
        num_blocks, block_size: of keys and values.
    """

    def __init__(self) -> None:
        self._own = OwnLoop("vllm")
        self._llm: Any = None

    @classmethod
    async def start(cls, folder: Path, settings: EngineSettings) -> "VllmClient":
        """Loads a model folder into a process of its own. Who is cancelled meanwhile waits until it has been ended again.

        Raises:
            RecipeError: if vLLM or our plugin is not installed, the folder is no speech LLM's, or vLLM cannot load it.
        """
        read_speech_llm_config(folder)
        client = cls()
        try:
            await client._own.do(client._load(folder, settings))
        except BaseException:
            await client.close()
            raise
        return client

    async def _load(self, folder: Path, settings: EngineSettings) -> None:
        self._llm = new_llm(folder, settings)  # and no name of its own here: vLLM keeps this frame in an old error, see `_shut_down`
        cache = self._llm.vllm_config.cache_config
        self.num_blocks, self.block_size = cache.num_gpu_blocks - 1, cache.block_size  # vLLM keeps one for itself
        self.tokenizer, self.speech_id = self._llm.get_tokenizer(), self._llm.model_config.hf_config.speech_id

    async def _do(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine gives that runs in the engine's loop. Raises EngineLost if the process is gone, or `close` has been called."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await self._own.do(work)
        except (EngineDeadError, Ended) as error:
            raise EngineLost("the engine's process is gone") from error

    async def answer(self, name: str, prompt: SpeechPrompt, limit: int, end: int, draft: Sequence[int] = ()) -> Answer:
        """The greedy answer behind a prompt that ends with a draft, up to `limit` tokens behind it, or to the draft's first mistake.

        Source: verification as in speculative decoding (arXiv 2211.17192); the first choices behind the draft come with the prompt.

        Args:
            name: of the request, see `abort`.
            limit: at least 1.
            end: id that ends an answer.
            draft: what the prompt ends with.
        Raises:
            RuntimeError: if the request is aborted.
            EngineLost: if the engine's process is gone.
        """
        return await self._do(self._answer(name, prompt, limit, end, draft))

    async def _answer(self, name: str, prompt: SpeechPrompt, limit: int, end: int, draft: Sequence[int]) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=limit,
            stop_token_ids=[end],
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=1 if draft else None,
            skip_reading_prefix_cache=False,
            output_kind=RequestOutputKind.CUMULATIVE if draft else RequestOutputKind.FINAL_ONLY,
        )
        outputs = self._llm.generate(await self._rendered(prompt), params, name)
        try:
            output, checked = None, not draft
            async for output in outputs:
                if not checked and output.prompt_logprobs is not None:
                    checked = True
                    num_read = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
                    if num_read <= len(draft):  # vLLM has no choices for what it found read, as when a text is asked for once more
                        return Answer(0, [], len(output.prompt_token_ids), output.num_cached_tokens)
                    best = [_first_choice(row) for row in output.prompt_logprobs[-len(draft) :]]
                    accepted = next((place for place, token in enumerate(draft) if token != best[place]), len(draft))
                    if accepted < len(draft):
                        return Answer(accepted, [best[accepted]], len(output.prompt_token_ids), output.num_cached_tokens or 0)
        finally:
            await outputs.aclose()
        if output is None or output.outputs[0].finish_reason == "abort":
            raise RuntimeError("the stream has ended")
        if not checked:
            raise RuntimeError("vLLM gave no choices for the prompt, so that the draft is not verified")
        return Answer(len(draft), list(output.outputs[0].token_ids), len(output.prompt_token_ids), output.num_cached_tokens or 0)

    def session(self, name: str) -> "VllmSession":
        """A request that stays open; nothing is sent yet."""
        return VllmSession(self, name)

    async def abort(self, name: str) -> None:
        """Gives a request up; who waits for it gets RuntimeError."""
        await self._do(self._llm.abort(name))

    async def check(self) -> None:
        """Raises EngineLost unless the process is there."""
        await self._do(self._llm.check_health())

    async def counts(self) -> Mapping[str, int]:
        """What the model has counted since it was loaded, see nim4/serve/vllm_model.py."""
        return (await self._do(self._llm.collective_rpc("nim4_counts")))[0]

    async def forget(self) -> bool:
        """Forgets the keys and values that nobody holds; returns False, and forgets none, if somebody holds any."""
        return await self._do(self._llm.reset_prefix_cache())

    async def close(self) -> None:
        """Ends the process and its loop; who waits for something there gets EngineLost."""
        await self._own.end(self._shut_down())

    async def _shut_down(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = Gone()  # so that it is deleted now, and not when Python ends, where its deletion fails with a traceback

    async def _rendered(self, prompt: SpeechPrompt) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        request: dict[str, Any] = {"prompt_token_ids": list(prompt.ids)}
        if prompt.items:
            request |= {"multi_modal_data": {"audio": list(prompt.items)}, "multi_modal_uuids": {"audio": list(prompt.names)}}
        if prompt.tenant:
            request["cache_salt"] = prompt.tenant
        (rendered,) = await self._llm.renderer.render_cmpl_async([parse_model_prompt(self._llm.model_config, request)])
        return rendered


def new_llm(folder: Path, settings: EngineSettings) -> Any:
    """vLLM's AsyncLLM, in the running loop, which it holds up until its process is ready. Raises RecipeError, see VllmClient.start."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise RecipeError("vllm", expected="the package vllm 0.32", found=error, fix=INSTALL) from error
    if not any(plugin.value.startswith("nim4.") for plugin in importlib.metadata.entry_points(group=ENTRY_POINT)):
        raise RecipeError(ENTRY_POINT, expected="nim4 installed as a plugin", found="none", fix="python -m pip install --no-deps -e .")
    cpu = current_platform.is_cpu()
    precision = settings.precision if settings.precision != "auto" else "fp32" if cpu else "bf16"
    kv_gb = 1.0 if cpu and settings.kv_gb is None else settings.kv_gb
    args = AsyncEngineArgs(
        model=str(folder),
        tokenizer=str(folder / LLM_FOLDER),
        config_format=FORMAT,
        served_model_name="nim4-asr",
        dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        max_model_len=settings.max_tokens,
        max_num_seqs=2 * settings.max_streams,  # an open request and a text of each
        max_num_batched_tokens=max(MIN_BATCHED_TOKENS, settings.max_tokens, MAX_APPENDED_TOKENS * settings.max_streams),
        enable_prefix_caching=True,
        block_size=CPU_BLOCK_SIZE if cpu else None,
        limit_mm_per_prompt={"audio": MAX_ITEMS},
        mm_processor_cache_gb=settings.cache_gb,
        gpu_memory_utilization=settings.memory_share,
        kv_cache_memory_bytes=None if kv_gb is None else round(kv_gb * 2**30),
        num_gpu_blocks_override=settings.num_blocks,
        enforce_eager=cpu,  # compiling takes longer to start than it saves there
        worker_extension_cls="nim4.serve.vllm_model.WorkerCounts",
        disable_log_stats=True,
    )
    try:
        return AsyncLLM.from_engine_args(args)
    except RecipeError:
        raise
    except Exception as error:  # of many kinds; what happened in the other process stands in the log
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(folder, expected="a model that vLLM can load", found=reason, fix="see the log above") from error


def _first_choice(row: Mapping[int, Any]) -> int:
    """The likeliest id of a row of logprobs, which holds the prompt's own and the best."""
    return max(row, key=lambda token: row[token].logprob)


class VllmSession:
    """A request that stays open, and whose keys and values are only ever appended to; made by VllmClient.session.

    vLLM writes a token after each part and forgets it when the next one comes, so that the parts stand one behind the other.
    """

    def __init__(self, client: VllmClient, name: str):
        self._client, self._name = client, name
        self._parts: asyncio.Queue[Any] = asyncio.Queue()
        self._outputs: AsyncGenerator[Any, None] | None = None

    async def send(self, prompt: SpeechPrompt) -> int:
        """Appends a part, and waits until it has been read; returns how many of the first part's tokens were there already.

        After an error the session is to be closed.
        """
        return await self._client._do(self._send(prompt))

    async def _send(self, prompt: SpeechPrompt) -> int:
        from vllm import SamplingParams
        from vllm.engine.protocol import StreamingInput
        from vllm.sampling_params import RequestOutputKind

        first = self._outputs is None
        part = StreamingInput(await self._client._rendered(prompt))
        if self._outputs is None:
            params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
            self._outputs = self._client._llm.generate(self._feed(), params, self._name)
        self._parts.put_nowait(part)
        output = await anext(self._outputs, None)
        if output is None or output.outputs[0].finish_reason == "abort":
            raise RuntimeError("the stream has ended")
        return (output.num_cached_tokens or 0) if first else 0

    async def close(self) -> None:
        """Ends the request, and frees its blocks."""
        if self._outputs is not None:
            outputs, self._outputs = self._outputs, None
            await self._client._do(self._close(outputs))

    async def _close(self, outputs: AsyncGenerator[Any, None]) -> None:
        await outputs.aclose()

    async def _feed(self) -> AsyncGenerator[Any, None]:
        while True:
            yield await self._parts.get()
