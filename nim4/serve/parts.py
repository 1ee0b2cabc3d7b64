"""Where the parts of a server run, what its second pass reads, and the service that is made of them."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nim4.config import RecipeError, VadConfig
from nim4.decode.hotword import HotwordIndex
from nim4.decode.second_pass import rereading_of
from nim4.model.asr import load_speech_llm, read_speech_llm_config
from nim4.model.checkpoint import load_model
from nim4.serve.limits import Limits
from nim4.serve.service import Reception, Service

LOCAL = "local"


@dataclass(frozen=True)
class Parts:
    """Where encoder and language model run.

    Attributes:
        encoder: local, or addresses of Triton servers.
        engine: of the language model: hf is the one here, vllm has processes of its own.
        engines: how many of those; where there are GPUs, each has one of its own.
        final_context: of the second pass, as of DecodeConfig; engines of vLLM read chunks in any case.
    """

    encoder: str = LOCAL
    engine: str = "hf"
    engines: int = 1
    final_context: str = "whole"


HERE = Parts()


def new_service(parts: Parts, model: tuple[Path, torch.device, str], indexes: Mapping[str, Path], limits: Limits, vad: VadConfig) -> Reception:
    """What serves, before it is warm.

    Args:
        model: folder, device and precision, as load_speech_llm takes them.
        indexes: folders by name; their files are mapped into memory, so that all gateways of a machine share them.
    Raises:
        RecipeError: if a folder, an address or a server is wrong, or a package is missing.
    """
    folder, device, precision = model
    encoder: Any = None
    if parts.encoder != LOCAL:
        from nim4.serve.triton_client import TritonEncoder

        encoder = TritonEncoder(parts.encoder, folder)
        asyncio.run(encoder.check())
    if parts.engine == "vllm":
        from nim4.serve.engines import Engines
        from nim4.serve.gateway import Gateway
        from nim4.serve.vllm_engine import model_identity

        _, inventory = read_speech_llm_config(folder)
        loaded = {name: HotwordIndex.load(path, inventory) for name, path in indexes.items()}
        encoder = encoder or load_model(folder, torch.device("cpu"))[0]
        settings = (folder, model_identity(folder), precision, limits)
        turn = asyncio.Lock()
        starts = [_start_of(number, parts.engines, turn, *settings) for number in range(parts.engines)]
        return Gateway(encoder, Engines(starts), inventory, loaded, limits, vad)
    speech_llm, inventory = load_speech_llm(folder, device, precision)
    loaded = {name: HotwordIndex.load(path, inventory) for name, path in indexes.items()}
    rereading = rereading_of(parts.final_context)
    if encoder is None:
        return Service(speech_llm, inventory, loaded, limits, vad, rereading)
    from nim4.serve.gateway import EncoderGateway

    return EncoderGateway(encoder, speech_llm, inventory, loaded, limits, vad, rereading)


def _start_of(
    number: int, engines: int, turn: asyncio.Lock, folder: Path, model: str, precision: str, limits: Limits
) -> Callable[[], Awaitable[Any]]:
    """Starts one of several engines, on the GPU of its number if there is more than one engine; one after the other, see `turn`."""

    async def start() -> Any:
        async with turn:  # since which GPU it is stands in this process's environment until it has started
            return await started()

    async def started() -> Any:
        from nim4.serve.vllm_engine import EngineSettings, VllmEngine, model_identity

        if model_identity(folder) != model:  # as when the folder was trained anew: the encoder is still that of the old one
            fix = "put it back, or start the gateway again"
            raise RecipeError(folder, expected="the model that this gateway was started with", found="another", fix=fix)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        if engines > 1:  # which the engine's process inherits
            visible = before.split(",") if before else [str(gpu) for gpu in range(engines)]
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
        try:
            # one that takes over from another has room for all streams
            share = 0.9 if torch.version.cuda else 0.4 / engines
            return await VllmEngine.start(folder, EngineSettings(max_streams=limits.max_sessions, precision=precision, memory_share=share))
        finally:
            if engines > 1:
                os.environ.pop("CUDA_VISIBLE_DEVICES") if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)

    return start
