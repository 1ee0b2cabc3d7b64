"""The streaming encoder as decoders use it: samples in, encoder frames and phonemes of whole chunks out, nothing computed twice."""

import functools
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from nim4.config import DecodeConfig
from nim4.corpus.feats import (
    LEFT_MIRROR_SAMPLES,
    NUM_MEL_BINS,
    SAMPLING_RATE_HZ,
    SHIFT_SAMPLES,
    WINDOW_SAMPLES,
    Fbank,
    StreamingFbank,
    checked_samples,
)
from nim4.decode.together import Work, alone
from nim4.model.conformer import SUBSAMPLING, Conformer, ConformerState, Context, valid_mask
from nim4.model.ctc import BLANK, PhonemeModel, collapse
from nim4.model.graphs import Graphs, size_for
from nim4.model.zipformer import ZipformerState

ENCODER_FRAME_MS = 40
CPU = torch.device("cpu")
FRAMED = 16  # ours: streams whose frames a CPU computes together: what stands between their steps then stays in its cache; a GPU, a multiple
State = ConformerState | ZipformerState


@dataclass(frozen=True)
class Chunk:
    """What the encoder and the phoneme head made of one chunk.

    Attributes:
        frames: (1, S, D) float, on the model's device; S is the chunk size, at the end of a stream less.
        log_probs: (S, V) float32, on the CPU.
        features: (T, 80) float32, on the CPU: its own, without the encoder's look-ahead; T is 4 S, or less at the end of a stream.
    """

    frames: Tensor
    log_probs: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """(N,) samples of which StreamingFbank wants the frames."""

    order: ClassVar[int] = 0

    fbank: Fbank
    samples: Tensor

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Frame, self.fbank, len(self.samples)

    @staticmethod
    def together(parts: Sequence["Frame"]) -> list[Tensor]:
        """(T, 80) float32 of each."""
        samples, fbank = [part.samples for part in parts], parts[0].fbank
        if fbank.lhotse.device == "cpu":
            return [frames for some in torch.stack(samples).split(FRAMED) for frames in fbank.frames_of_padded(some)]
        padding = [torch.zeros_like(samples[0])] * (-len(samples) % FRAMED)  # else its library would make a plan for each number of streams
        return list(fbank.frames_of_padded(torch.stack(samples + padding))[: len(samples)])


@functools.cache
def fbank_on(device: torch.device) -> Fbank:
    """One for all streams."""
    return Fbank(device)


@dataclass(frozen=True, eq=False)
class Encode:
    """A chunk that is to be encoded.

    Attributes:
        features: (T, 80) float32, on the CPU; T is 4 S and the encoder's look-ahead, or less at the end of a stream.
        num_frames: S.
        chunk_frames: of a whole chunk. On the recorded way all are padded to it, so that the last ones are encoded with the others.
        state: of its stream.
    """

    order: ClassVar[int] = 1

    model: PhonemeModel
    features: Tensor
    num_frames: int
    chunk_frames: int
    state: State

    @property
    def is_fast(self) -> bool:
        """Whether it goes the recorded way: a Conformer's on a GPU."""
        return isinstance(self.state, ConformerState) and self.state.keys.is_cuda

    @property
    def width(self) -> int:
        """Encoder frames with padding."""
        return self.chunk_frames if self.is_fast else self.num_frames

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Encode, self.model, self.width, self.state.shape

    @staticmethod
    def together(chunks: Sequence["Encode"]) -> list[tuple[Chunk, State]]:
        """What comes of each, and the state behind it."""
        if len(chunks) > BATCHES[-1]:
            return [*Encode.together(chunks[: BATCHES[-1]]), *Encode.together(chunks[BATCHES[-1] :])]
        frames, log_probs, state = (_encode_fast if chunks[0].is_fast else _encode)(chunks)
        made = zip(chunks, torch.split_copy(frames, 1), log_probs.cpu(), state.split(), strict=True)
        return [
            (Chunk(own[:, : chunk.num_frames], probs[: chunk.num_frames], chunk.features[: SUBSAMPLING * chunk.num_frames]), state)
            for chunk, own, probs, state in made
        ]


Encoded = tuple[Tensor, Tensor, State]  # (B, S, D) frames, (B, S, V) float32 log-probabilities, the state behind them


def _features(chunks: Sequence[Encode], width: int) -> Tensor:
    """(B, T, 80) float32 features of S encoder frames and the look-ahead, padded with zeros."""
    wanted = SUBSAMPLING * width + chunks[0].model.encoder.lookahead_frames
    return torch.stack([torch.nn.functional.pad(chunk.features, (0, 0, 0, wanted - len(chunk.features))) for chunk in chunks])


def _forward(model: PhonemeModel, x: Tensor, lens: Tensor | None, num_frames: Tensor | None, state: State) -> Encoded:
    """Behind the (B,) features of a stream stands what stands behind a whole utterance; None = there is nothing behind them."""
    x = model.normalise(x)
    if lens is not None:
        x = x.masked_fill(~valid_mask(lens, x.shape[1])[..., None], model.encoder.pad_value)
    frames, state = model.encoder.forward_chunk(x, state) if num_frames is None else model.encoder.forward_chunk(x, state, num_frames)
    return frames, model.head(frames), state


def _encode(chunks: Sequence[Encode]) -> Encoded:
    """Chunks of one width, none of them padded by more than the features at the end of a stream."""
    model, lens = chunks[0].model, [len(chunk.features) for chunk in chunks]
    x = _features(chunks, chunks[0].width).to(model.mean.device)
    end = torch.tensor(lens, device=x.device) if min(lens) < x.shape[1] else None
    return _forward(model, x, end, None, type(chunks[0].state).join([chunk.state for chunk in chunks]))


# ---------------------------------------------------------------------------------------------------------- on a GPU: recorded

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # chunks that are recorded together; others are padded to them
_RECORDED: WeakKeyDictionary[PhonemeModel, tuple[int, Graphs[tuple[int, int, int]]]] = WeakKeyDictionary()


def _graphs(model: PhonemeModel) -> Graphs[tuple[int, int, int]]:
    """Chunks of a model by batch size, chunk size and left frames; recorded anew when its weights have moved."""
    place, own = model.encoder.subsampling.out.weight.data_ptr(), weakref.ref(model)  # the dictionary must not keep its key alive
    if model not in _RECORDED or _RECORDED[model][0] != place:

        def make(size: tuple[int, int, int]) -> list[Tensor]:
            batch_size, chunk_frames, left_frames = size
            encoder, mean = own().encoder, own().mean
            state = encoder.initial_state(batch_size, Context(1, left_frames))
            x = mean.new_zeros(batch_size, SUBSAMPLING * chunk_frames + encoder.lookahead_frames, len(mean))
            lens = torch.tensor([[x.shape[1]], [chunk_frames]], device=mean.device).repeat(1, batch_size)
            return [x, lens, *(part.transpose(0, 1).contiguous() for part in (state.keys, state.values, state.conv)), state.filled]

        def work(x: Tensor, lens: Tensor, keys: Tensor, values: Tensor, conv: Tensor, filled: Tensor) -> Encoded:
            state = ConformerState(keys.transpose(0, 1), values.transpose(0, 1), conv.transpose(0, 1), filled)
            return _forward(own(), x, *lens, state)

        _RECORDED[model] = place, Graphs(make, work)
    return _RECORDED[model][1]


def _encode_fast(chunks: Sequence[Encode]) -> Encoded:
    """Chunks padded to one width and to a batch size that is recorded."""
    graphs, states, count = _graphs(chunks[0].model), [chunk.state for chunk in chunks], len(chunks)
    size = size_for(count, BATCHES), chunks[0].width, states[0].keys.shape[3]
    x, lens, *caches, filled = graphs.inputs(size)
    x[:count].copy_(_pinned(_features(chunks, chunks[0].width), x), non_blocking=True)
    lens[:, :count].copy_(_pinned(torch.tensor([(len(chunk.features), chunk.num_frames) for chunk in chunks]).T, x), non_blocking=True)
    for own, parts in zip(caches, zip(*((state.keys, state.values, state.conv) for state in states), strict=True), strict=True):
        torch.cat([part.transpose(0, 1) for part in parts], out=own[:count])
    torch.cat([state.filled for state in states], out=filled[:count])
    frames, log_probs, state = graphs.run(size)
    return (
        frames[:count],
        log_probs[:count],
        ConformerState(*(part[:, :count] for part in (state.keys, state.values, state.conv)), state.filled[:count]),
    )


def _pinned(x: Tensor, where: Tensor) -> Tensor:
    """The same in memory from which a GPU takes it while Python goes on."""
    return x.pin_memory() if where.is_cuda else x


@torch.inference_mode()
def record_chunks(model: PhonemeModel, context: Context) -> None:
    """Records chunks of this size for all batches, a Conformer's on a GPU: seconds, which otherwise those would wait who need one first."""
    if model.mean.is_cuda and isinstance(model.encoder, Conformer):
        for batch_size in reversed(BATCHES):
            _graphs(model).inputs((batch_size, context.chunk_frames, context.chunk_frames * context.left_chunks))


# ------------------------------------------------------------------------------------------------------------------- streams


class ChunkFeatures:
    """Features of the chunks of one stream, as its samples come.

    Args:
        chunk_frames: C, encoder frames of a chunk.
        lookahead_frames: features that the encoder sees beyond those of a chunk.
        device: that computes them; they come back to the CPU.

    A chunk needs 4 C feature frames and the encoder's look-ahead, so it is there 30 ms of audio (Zipformer: 130 ms) and half a window after its end;
    `finishing` gives what is left.
    Samples wait until their chunk is whole: then the same arithmetic is done, and the result is the same to the last digit, however they come.
    """

    def __init__(self, chunk_frames: int, lookahead_frames: int, device: torch.device = CPU):
        self._chunk_frames, self._lookahead_frames = chunk_frames, lookahead_frames
        self._fbank = StreamingFbank(fbank_on(device))
        self._framed = torch.zeros(0, NUM_MEL_BINS)
        self._samples = torch.zeros(0)
        num_features = SUBSAMPLING * chunk_frames + lookahead_frames
        self._wanted = (num_features - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES - LEFT_MIRROR_SAMPLES  # samples of the next chunk
        self._finished = False

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._wanted - len(self._samples)

    def accepting(self, samples: np.ndarray) -> Work[list[Tensor]]:
        """(T, 80) float32 features of each chunk that (N,) float32 samples in [-1, 1] complete; T is 4 C and the look-ahead.

        Raises:
            ValueError: if the samples are of another shape, type or scale; then nothing of them is kept.
            RuntimeError: after `finishing`.
        """
        if self._finished:
            raise RuntimeError("accept() came after finish(): a new stream needs a new encoder")
        self._samples = torch.cat([self._samples, checked_samples(samples, SAMPLING_RATE_HZ)])
        chunks = []
        while len(self._samples) >= self._wanted:
            samples, self._samples = self._samples[: self._wanted], self._samples[self._wanted :].clone()
            yield from self._frame(self._fbank.ready(samples))
            self._wanted = SUBSAMPLING * self._chunk_frames * SHIFT_SAMPLES
            chunks.append(self._next())
        return chunks

    def finishing(self) -> Work[list[Tensor]]:
        """The same of what is left at the end of the stream; T of the last is less, and num_frames says what it comes to."""
        self._finished = True
        yield from self._frame(self._fbank.ready(self._samples))
        yield from self._frame(self._fbank.ready_at_the_end())
        chunks = []
        while len(self._framed):
            chunks.append(self._next())
        return chunks

    def num_frames(self, features: Tensor) -> int:
        """Encoder frames of a chunk with these features."""
        return min(self._chunk_frames, -(-len(features) // SUBSAMPLING))

    def _frame(self, samples: Tensor) -> Work[None]:
        frames = yield Frame(self._fbank.fbank, samples)
        self._framed = torch.cat([self._framed, self._fbank.done(frames)])

    def _next(self) -> Tensor:
        num_frames = self.num_frames(self._framed)
        chunk, self._framed = self._framed[: SUBSAMPLING * num_frames + self._lookahead_frames], self._framed[SUBSAMPLING * num_frames :]
        return chunk


class GreedyPhones:
    """The phonemes of one stream: the best of each frame, repeats merged across chunks too."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._last = BLANK

    def hear(self, log_probs: Tensor) -> None:
        """(S, V) float32 log-probabilities of the next frames."""
        labels = log_probs.argmax(-1).tolist()
        self.ids += collapse(labels, self._last)
        self._last = labels[-1]


class StreamingEncoder:
    """Encoder frames and greedy phonemes of one stream, as its samples come; see ChunkFeatures for what waits for what.

    Args:
        model: in evaluation mode.
        context: chunk size and left context, e.g. Context(16, 4) for 640 ms and 2.56 s.

    `accepting` and `finishing` are `accept` and `finish` as work for nim4/decode/together.py.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        self._model, self._chunk_frames = model, context.chunk_frames
        self._features = ChunkFeatures(context.chunk_frames, model.encoder.lookahead_frames, model.mean.device)
        self._state = model.encoder.initial_state(1, context)
        self._phones = GreedyPhones()

    @property
    def phones(self) -> list[int]:
        """Ids, so far."""
        return self._phones.ids

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._features.missing_samples

    def accept(self, samples: np.ndarray) -> list[Chunk]:
        """The chunks that (N,) float32 samples in [-1, 1] complete. Raises as ChunkFeatures.accepting."""
        return alone(self.accepting(samples))

    def finish(self) -> list[Chunk]:
        """The chunks of what is left at the end of the stream."""
        return alone(self.finishing())

    def accepting(self, samples: np.ndarray) -> Work[list[Chunk]]:
        return (yield from self._encode((yield from self._features.accepting(samples))))

    def finishing(self) -> Work[list[Chunk]]:
        return (yield from self._encode((yield from self._features.finishing())))

    def _encode(self, parts: Sequence[Tensor]) -> Work[list[Chunk]]:
        chunks = []
        for features in parts:
            chunk, self._state = yield Encode(self._model, features, self._features.num_frames(features), self._chunk_frames, self._state)
            self._phones.hear(chunk.log_probs)
            chunks.append(chunk)
        return chunks


def context_of(config: DecodeConfig) -> Context:
    """What the encoder may see in a stream."""
    return Context(config.chunk_ms // ENCODER_FRAME_MS, config.left_context_chunks)


class Stream(Protocol):
    """What takes samples, chunk by chunk."""

    @property
    def missing_samples(self) -> int: ...


def spoken(samples: np.ndarray, stream: Stream) -> Iterator[np.ndarray]:
    """A recording in the pieces in which a speaker completes the chunks of `stream`, which must take each before the next is asked for.

    Args:
        samples: (N,) float32.
    """
    start = 0
    while start < len(samples):
        end = start + stream.missing_samples
        yield samples[start:end]
        start = end
