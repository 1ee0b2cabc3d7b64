"""Streams on vLLM: a gateway hands over encoder frames as they come, and gets partial and final texts.

    append(frames)   -> one more item of a request that stays open: its keys and values are only ever appended to
    partial, final   -> an ordinary request that begins with the same items: it finds their keys and values by prefix, and is forgotten

What a text is, is decided as in nim4/decode/streaming.py, and in fp32 on a CPU the texts are the same: what stays of a partial, how long one
may be, that nothing is written before a new phoneme was heard. Encoder, phoneme head and look-up of hints are the caller's business.

Blocks of keys and values are counted here: vLLM never takes those of an open request back, so that all would wait for ever if open requests
had them all. Where there are too few, the stream lets its request go that has been still for longest, and one that has to wait lets go its
own. What they have read stays where it is until it is overwritten, and is read again where it was, from the frames that a stream keeps.

    engine = await VllmEngine.start(folder)
    stream = await engine.open(tenant="acme")
    await stream.append(frames, num_phones)
    text = await stream.partial(hints)
    text = await stream.final(hints)

Source: arXiv 2604.18105, section 3.6, has adaptor and language model on vLLM; how, is ours.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.prompts import Prompt
from nim4.model.asr import model_files, read_speech_llm_config
from nim4.serve.kv_room import NoRoom, Room
from nim4.serve.vllm_client import EngineLost, EngineSettings, VllmClient
from nim4.serve.vllm_stream import Counts, Text, VllmStream

__all__ = ["Counts", "EngineLost", "EngineSettings", "NoRoom", "Text", "VllmEngine", "VllmStream"]

NEW_STREAM_TOKENS = 64  # ours: a few chunks and a first partial; a stream that cannot have them had better not begin
SAMPLED_BYTES = 1 << 20  # of weights, at both ends, by which two models are told apart: reading all of them takes longer than loading them


class VllmEngine:
    """One replica of adaptor and language model; made by `start`. All of it belongs to one event loop.

    Attributes:
        model: what tells it from other models.
        frame_dim: D, width of the encoder frames that it takes.
        stack: encoder frames of one speech token.
        prompt, tokenizer: of the model.
        counts: of all streams.
        streams: that are open, the one that has been still for longest first.
    """

    def __init__(self, folder: Path, settings: EngineSettings, client: VllmClient):
        self.folder, self.settings, self.client = folder, settings, client
        config, _ = read_speech_llm_config(folder)
        self.frame_dim, self.stack = config.encoder.dim, config.adaptor.stack
        self.tokenizer, self.prompt = client.tokenizer, Prompt(client.tokenizer)
        self.counts = Counts()
        self.streams: dict[VllmStream, None] = {}
        self.room = Room(client.num_blocks, client.block_size, settings.wait_s, self._make_room)
        self.model = model_identity(folder)

    @classmethod
    async def start(cls, folder: Path, settings: EngineSettings | None = None) -> "VllmEngine":
        """Loads a model folder of stages 4 to 9 into a process of its own: half a minute.

        Raises:
            RecipeError: if vLLM or our plugin is not installed, the folder is not such a folder, or vLLM cannot load it.
        """
        settings = settings or EngineSettings()
        return cls(folder, settings, await VllmClient.start(folder, settings))

    def check_model(self, folder: Path) -> None:
        """Raises RecipeError unless a folder's model is the one that the engine was started with: frames of another mean nothing to it."""
        config, _ = read_speech_llm_config(folder)
        self._check_model(model_identity(folder), config.encoder.dim, folder)

    def _check_model(self, model: str, frame_dim: int, folder: Path) -> None:
        if model != self.model:
            found = f"another, of width {frame_dim}" if frame_dim != self.frame_dim else "another of the same width"
            expected = f"the model of the engine, {self.folder}, of width {self.frame_dim}"
            raise RecipeError(folder, expected=expected, found=found, fix="name one model")

    async def open(self, tenant: str = "") -> "VllmStream":
        """A new stream.

        Args:
            tenant: streams of different tenants share no keys and values, not even those of the prompt's beginning.
        Raises:
            NoRoom: if all streams are in use, or there are no blocks for one more that do not belong to others.
            EngineLost: if the engine's process is gone.
        """
        await self._check_room()
        stream = VllmStream(self, tenant)
        self.streams[stream] = None
        return stream

    async def adopt(self, stream: "VllmStream") -> None:
        """Takes over a stream of another engine with the same model, e.g. of one that is lost; it goes on with what it has heard and written.

        Raises:
            NoRoom, EngineLost: as `open`; the stream stays where it was.
            RecipeError: if the engines have different models.
            RuntimeError: if the stream has ended.
        """
        self._check_model(stream.engine.model, stream.engine.frame_dim, stream.engine.folder)
        await self._check_room()
        await stream.move(self)

    async def _check_room(self) -> None:
        await self.client.check()
        if len(self.streams) >= self.settings.max_streams:
            raise NoRoom(f"all {self.settings.max_streams} streams are in use")
        if not self.room.has(self.room.blocks(len(self.prompt.prefix) + NEW_STREAM_TOKENS)):
            raise NoRoom(f"{self.room.used} of {self.room.num_blocks} blocks of keys and values are in use")

    async def _make_room(self) -> bool:
        """Lets the open request go of the stream that has been still for longest."""
        for stream in self.streams:
            if stream.may_make_room:
                await stream.evict()
                return True
        return False

    async def check(self) -> None:
        """Raises EngineLost unless the engine's process is there."""
        await self.client.check()

    def metrics(self) -> dict[str, float]:
        """Gauges and counters by name: streams, kv_blocks, kv_blocks_used, and all of `counts`."""
        return {"streams": len(self.streams), "kv_blocks": self.room.num_blocks, "kv_blocks_used": self.room.used, **asdict(self.counts)}

    async def close(self) -> None:
        """Ends all streams and the process."""
        for stream in list(self.streams):
            await stream.close()
        await self.client.close()


def model_identity(folder: Path) -> str:
    """What tells one model folder from another: its configuration whole, of its weights the sizes and samples."""
    digest = hashlib.sha256()
    for path in model_files(folder, "llm"):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode())
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(size - SAMPLED_BYTES, 0))
            digest.update(file.read())
    return digest.hexdigest()
