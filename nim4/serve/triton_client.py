"""The door to Triton: streams of an encoder that runs on one or more servers (nim4/export/triton.py), as long as one of them is there.

A server holds the state of its streams, and loses it when it dies, is restarted, or hears nothing of a stream for a minute. The features of an
utterance are kept here until it ends: they are sent again from the first one on, to another server or the same, and the stream goes on with the
frames that it would have had anyway. Whenever it is not known whether a chunk was encoded, that is done, too: no chunk may count twice.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nim4.config import ModelConfig, RecipeError
from nim4.decode.encoder import ENCODER_FRAME_MS, Chunk, ChunkFeatures
from nim4.decode.together import Work
from nim4.model.checkpoint import WEIGHTS, read_model_config
from nim4.model.conformer import SUBSAMPLING
from nim4.model.ctc import PhonemeModel
from nim4.serve.limits import Busy
from nim4.serve.metrics import Metrics
from nim4.serve.service import CHUNKS_MS, DEPLOYED_MS
from nim4.stage import file_hash

SCHEME = "grpc://"
INSTALL = "python -m pip install --no-deps tritonclient==2.73.0 python-rapidjson==1.25"  # its own pins would take back protobuf
ANSWER_S = 5.0  # ours: a chunk takes milliseconds; who says nothing for so long is not waited for
AWAY_S = 2.0  # ours: a server that failed is asked again after so long
MAX_TRIES = 4  # ours: of a chunk
FORGOTTEN = "StatusCode.INVALID_ARGUMENT"  # what a server answers to a stream that it does not know
PATIENCE_S = 8.0  # ours: so long a stream looks for a server; more audio than that must not wait, see Limits.max_behind_s

log = logging.getLogger("nim4")


def model_name(chunk_ms: int) -> str:
    """What the servers call the encoder with chunks of this size."""
    return f"nim4_encoder_{chunk_ms}ms"


class Replica:
    """One server.

    Attributes:
        streams: of ours that it holds.
        away_until_s: on time.monotonic's clock; it failed, and is left alone until then.
        is_checked: whether it is known to have our model since it failed last.
    """

    def __init__(self, address: str):
        self.address, self.streams, self.away_until_s, self.is_checked = address, 0, 0.0, False
        self._client: Any = None  # belongs to the event loop that made it

    @property
    def client(self) -> Any:
        """tritonclient's, made when it is first wanted."""
        if self._client is None:
            self._client = _triton().InferenceServerClient(self.address.removeprefix(SCHEME))
        return self._client

    async def close(self) -> None:
        """Ends the connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class TritonEncoder:
    """The encoder of a model folder on Triton servers.

    Args:
        addresses: of the servers, as grpc://HOST:PORT, separated by commas.
        folder: model folder; the servers must have been given the same.
    Attributes:
        lookahead_frames: features that the encoder sees beyond those of a chunk.
        metrics: of the gateway.
        chunks_ms: sizes of chunks for which the servers have a model; known after `check`.
    Raises:
        RecipeError: if an address is none, tritonclient is not installed, or the folder is no model folder.
    """

    def __init__(self, addresses: str, folder: Path):
        self.replicas = [Replica(_checked_address(address.strip())) for address in addresses.split(",")]
        _triton()
        self.config: ModelConfig = read_model_config(folder)[0]
        with torch.device("meta"):  # without its weights
            self.lookahead_frames = PhonemeModel(self.config).encoder.lookahead_frames
        self.metrics, self.chunks_ms = Metrics(), [DEPLOYED_MS]
        self._missing: set[int] = set()  # sizes that some server does not have
        self._folder, self._fingerprint = folder, file_hash(folder / WEIGHTS)

    async def check(self) -> None:
        """Looks whether at least one server is ready, and all that are have our model; to be called in an event loop of its own.

        Raises:
            RecipeError: if none is, or one has another.
        """
        problems = []
        for replica in self.replicas:
            try:
                await self._check(replica, DEPLOYED_MS)
                for chunk_ms in set(CHUNKS_MS) - {DEPLOYED_MS}:
                    await self._look_for(replica, chunk_ms)
            except _triton().InferenceServerException as error:
                log.warning("%s is not ready: %s", replica.address, error.message())
                problems.append(f"{replica.address}: {error.message()}")
            finally:
                await replica.close()
        if len(problems) == len(self.replicas):
            fix = "start tritonserver on what `python -m nim4 export --format triton` wrote, see docs/deployment.md"
            raise RecipeError("--encoder", expected="a Triton server that is ready", found="; ".join(problems), fix=fix)
        self.chunks_ms = sorted(set(CHUNKS_MS) - self._missing)

    async def _look_for(self, replica: Replica, chunk_ms: int) -> None:
        try:
            await self._check(replica, chunk_ms)
        except _triton().InferenceServerException:
            self._missing.add(chunk_ms)

    async def _check(self, replica: Replica, chunk_ms: int) -> None:
        name = model_name(chunk_ms)
        answer = await replica.client.get_model_config(name, as_json=True, client_timeout=ANSWER_S)
        found = {key: value["string_value"] for key, value in answer["config"].get("parameters", {}).items()}
        if found.get("fingerprint") != self._fingerprint:
            own = {"dim": str(self.config.encoder.dim), "vocab_size": str(self.config.vocab_size)}
            other = ", ".join(f"{key} {found.get(key, 'unknown')} and not {value}" for key, value in own.items() if found.get(key) != value)
            expected, fix = f"the weights of {self._folder / WEIGHTS}", "export this folder again, or name the folder that was exported as --model"
            raise RecipeError(f"{replica.address}, {name}", expected=expected, found=f"others: {other or 'of the same sizes'}", fix=fix)
        if not await replica.client.is_model_ready(name, client_timeout=ANSWER_S):
            raise _triton().InferenceServerException(f"{name} is not ready")
        replica.is_checked = True

    def stream(self, chunk_ms: int, frame: Callable[[Work[Any]], Awaitable[Any]]) -> "TritonStream":
        """A new stream.

        Args:
            frame: does work in which samples become features.
        """
        return TritonStream(self, chunk_ms, frame)

    async def pick(self, chunk_ms: int, before: Replica | None) -> Replica:
        """The server with the fewest streams of ours, one more from now on; another than `before`, if there is one.

        Raises:
            Busy: if none comes back in time.
        """
        end_s = time.monotonic() + PATIENCE_S
        while True:
            there = [replica for replica in self.replicas if replica.away_until_s <= time.monotonic()]
            if there:
                replica = min(there, key=lambda replica: (replica is before, replica.streams))
                if replica.is_checked:
                    replica.streams += 1
                    return replica
                try:
                    await self._check(replica, chunk_ms)
                except (RecipeError, _triton().InferenceServerException) as error:
                    self.lost(replica, error)
                continue
            if time.monotonic() > end_s:
                raise Busy(f"no server of the encoder is ready: {', '.join(replica.address for replica in self.replicas)}")
            await asyncio.sleep(0.1)

    def lost(self, replica: Replica, error: Exception) -> None:
        """Leaves a server alone for a while."""
        if replica.away_until_s <= time.monotonic():
            log.warning("%s is left alone for %g s: %s", replica.address, AWAY_S, error)
            self.metrics.count("replicas_lost_total", part="encoder")
        replica.away_until_s, replica.is_checked = time.monotonic() + AWAY_S, False

    async def close(self) -> None:
        """Ends all connections."""
        for replica in self.replicas:
            await replica.close()


class TritonStream:
    """One utterance; made by TritonEncoder.stream. What `hear` gives is what StreamingEncoder would, but that of the phones only the best are known.

    When a call of `hear` is cancelled, or has failed, nothing but `close` may follow.
    """

    def __init__(self, encoder: TritonEncoder, chunk_ms: int, frame: Callable[[Work[Any]], Awaitable[Any]]):
        self._encoder, self._chunk_ms, self._frame = encoder, chunk_ms, frame
        self._features = ChunkFeatures(chunk_ms // ENCODER_FRAME_MS, encoder.lookahead_frames)
        self._sent: list[Tensor] = []  # features of all chunks
        self._replica: Replica | None = None  # that has the state behind what was sent
        self._number = 0  # by which the server knows the stream

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._features.missing_samples

    async def hear(self, samples: np.ndarray, ends: bool) -> list[Chunk]:
        """The chunks that (N,) float32 samples in [-1, 1] complete, and if `ends` those of what is left.

        Raises:
            Busy: if no server can be reached.
        """
        parts = await self._frame(self._features.accepting(samples))
        if ends:
            parts += await self._frame(self._features.finishing())
        chunks = []
        for number, features in enumerate(parts):
            began_s = time.monotonic()
            chunks.append(await self._encode(features, ends and number == len(parts) - 1))
            self._encoder.metrics.observe("encode_seconds", time.monotonic() - began_s)
        if ends:
            await self.close()
        return chunks

    async def close(self) -> None:
        """Ends the stream, at any time: the server lets go of its state, unless the last chunk has told it already."""
        if self._replica is not None:
            replica = self._leave()
            try:
                silence = torch.zeros(1, self._encoder.config.encoder.num_mel_bins)
                await self._ask(replica, silence, False, True)
            except _triton().InferenceServerException as error:
                log.info("%s did not hear that a stream has ended: %s", replica.address, error)  # it forgets idle ones by itself

    async def _encode(self, features: Tensor, ends: bool) -> Chunk:
        self._sent.append(features)
        before, error = None, None
        for _ in range(MAX_TRIES):
            todo = [features]
            if self._replica is None:
                self._replica, self._number, todo = await self._encoder.pick(self._chunk_ms, before), secrets.randbits(63) or 1, self._sent
                if len(todo) > 1:
                    self._encoder.metrics.count("chunks_again_total", len(todo) - 1, part="encoder")
            begin = len(self._sent) - len(todo)
            try:
                for number, part in enumerate(todo, begin):
                    last = number == len(self._sent) - 1
                    answer = await self._ask(self._replica, part, number == 0, ends and last)
            except _triton().InferenceServerException as failure:
                before, error = self._leave(), failure
                if failure.status() != FORGOTTEN:
                    self._encoder.lost(before, failure)
                continue
            if ends:
                self._leave()
            return self._chunk(answer, features)
        raise Busy(f"no server of the encoder has encoded a chunk, the last one says: {error}")

    def _leave(self) -> Replica:
        replica, self._replica = self._replica, None
        replica.streams -= 1
        return replica

    async def _ask(self, replica: Replica, features: Tensor, starts: bool, ends: bool) -> Any:
        triton, num_features = _triton(), SUBSAMPLING * self._chunk_ms // ENCODER_FRAME_MS + self._encoder.lookahead_frames
        x = np.zeros((1, num_features, features.shape[1]), np.float32)
        x[0, : len(features)] = features.numpy()
        inputs = [triton.InferInput("x", list(x.shape), "FP32"), triton.InferInput("x_lens", [1, 1], "INT64")]
        inputs[0].set_data_from_numpy(x)
        inputs[1].set_data_from_numpy(np.array([[len(features)]], np.int64))
        about = {"sequence_id": self._number, "sequence_start": starts, "sequence_end": ends, "client_timeout": ANSWER_S}
        return await replica.client.infer(model_name(self._chunk_ms), inputs, **about)

    def _chunk(self, answer: Any, features: Tensor) -> Chunk:
        num_frames = self._features.num_frames(features)
        frames, values, ids = (answer.as_numpy(name)[:, :num_frames] for name in ("frames", "top_log_probs", "top_ids"))
        log_probs = spread(ids[0], values[0], self._encoder.config.vocab_size)
        return Chunk(torch.from_numpy(frames.copy()), log_probs, features[: SUBSAMPLING * num_frames])


def spread(ids: np.ndarray, values: np.ndarray, vocab_size: int) -> Tensor:
    """(S, V) float32 log-probabilities of which only the best are known: the rest of the probability is shared by all other phones alike.

    Slots of a lattice (nim4/decode/confusion.py) are the same as of all, since none has more than four alternatives; the score of a name whose
    phones are no alternatives differs.

    Args:
        ids: (S, K) int32.
        values: (S, K) float32, natural logarithms, the best first.
    """
    rest = np.log(np.maximum(1 - np.exp(values.astype(np.float64)).sum(1, keepdims=True), 1e-12)) - math.log(max(vocab_size - values.shape[1], 1))
    log_probs = np.broadcast_to(np.minimum(rest, values[:, -1:]), (len(ids), vocab_size)).astype(np.float32)
    np.put_along_axis(log_probs, ids.astype(np.int64), values, 1)
    return torch.from_numpy(log_probs)


def _checked_address(address: str) -> str:
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    if not address.startswith(SCHEME) or not host or not port.isdecimal():
        raise RecipeError("--encoder", expected=f"addresses as {SCHEME}HOST:PORT, separated by commas", found=repr(address), fix="correct it")
    return address


def _triton() -> Any:
    try:
        import tritonclient.grpc.aio
    except ImportError as error:
        raise RecipeError("--encoder", expected="the package tritonclient", found=error, fix=INSTALL) from error
    return tritonclient.grpc.aio
