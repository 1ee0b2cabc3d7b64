"""The streaming encoder as decoders use it: samples in, encoder frames and phonemes of whole chunks out, nothing computed twice."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nim4.config import DecodeConfig
from nim4.corpus.feats import LEFT_MIRROR_SAMPLES, SAMPLING_RATE_HZ, SHIFT_SAMPLES, WINDOW_SAMPLES, Fbank, StreamingFbank, checked_samples
from nim4.decode.together import Work, alone
from nim4.model.conformer import SUBSAMPLING, ConformerState, Context, valid_mask
from nim4.model.ctc import BLANK, PhonemeModel, collapse
from nim4.model.zipformer import ZipformerState

ENCODER_FRAME_MS = 40
State = ConformerState | ZipformerState


@dataclass(frozen=True)
class Chunk:
    """What the encoder and the phoneme head made of one chunk.

    Attributes:
        frames: (1, S, D) float, on the model's device; S is the chunk size, at the end of a stream less.
        log_probs: (S, V) float32, on the CPU.
    """

    frames: Tensor
    log_probs: Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """(N,) samples of which StreamingFbank wants the frames."""

    fbank: Fbank
    samples: Tensor

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Frame, len(self.samples)

    @staticmethod
    def together(parts: Sequence["Frame"]) -> list[Tensor]:
        """(T, 80) float32 of each."""
        return list(parts[0].fbank.frames_of_padded(torch.stack([part.samples for part in parts])))


@dataclass(frozen=True, eq=False)
class Encode:
    """A chunk that is to be encoded.

    Attributes:
        features: (T, 80) float32, on the CPU; T is 4 S and the encoder's look-ahead, or less at the end of a stream.
        num_frames: S.
        state: of its stream.
    """

    model: PhonemeModel
    features: Tensor
    num_frames: int
    state: State

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Encode, self.model, self.num_frames, self.state.shape

    @staticmethod
    def together(chunks: Sequence["Encode"]) -> list[tuple[Chunk, State]]:
        """What comes of each, and the state behind it."""
        model, wanted = chunks[0].model, SUBSAMPLING * chunks[0].num_frames + chunks[0].model.encoder.lookahead_frames
        x = torch.stack([torch.nn.functional.pad(chunk.features, (0, 0, 0, wanted - len(chunk.features))) for chunk in chunks])
        x = model.normalise(x.to(model.mean.device))
        lens = [len(chunk.features) for chunk in chunks]
        if min(lens) < wanted:  # as behind a whole utterance
            x = x.masked_fill(~valid_mask(torch.tensor(lens, device=x.device), wanted)[..., None], model.encoder.pad_value)
        frames, state = model.encoder.forward_chunk(x, type(chunks[0].state).join([chunk.state for chunk in chunks]))
        made = zip(frames.split(1), model.head(frames).cpu(), state.split(), strict=True)
        return [(Chunk(own, log_probs), state) for own, log_probs, state in made]


class StreamingEncoder:
    """Encoder frames and greedy phonemes of one stream, as its samples come.

    Args:
        model: in evaluation mode.
        context: chunk size and left context, e.g. Context(16, 4) for 640 ms and 2.56 s.

    An encoder chunk of C frames needs 4 C feature frames and the encoder's look-ahead, so it can be encoded 30 ms of audio (Zipformer: 130 ms)
    and half a window after its end; `finish` pads what is left. Samples wait until their chunk can be encoded: then the same arithmetic is
    done, and the result is the same to the last digit, however they come. `accepting` and `finishing` are `accept` and `finish` as work for
    nim4/decode/together.py.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        self._model = model
        self._chunk_frames = context.chunk_frames
        self._fbank = StreamingFbank()
        self._features = torch.zeros(0, model.config.encoder.num_mel_bins)
        self._state = model.encoder.initial_state(1, context)
        self._samples = torch.zeros(0)
        num_features = SUBSAMPLING * context.chunk_frames + model.encoder.lookahead_frames
        self._wanted = (num_features - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES - LEFT_MIRROR_SAMPLES  # samples of the next chunk
        self._finished = False
        self._last = BLANK
        self.phones: list[int] = []  # ids, so far

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._wanted - len(self._samples)

    def accept(self, samples: np.ndarray) -> list[Chunk]:
        """The chunks that (N,) float32 samples in [-1, 1] complete.

        Raises:
            ValueError: if the samples are of another shape, type or scale; then nothing of them is kept.
            RuntimeError: after `finish`.
        """
        return alone(self.accepting(samples))

    def finish(self) -> list[Chunk]:
        """The chunks of what is left at the end of the stream."""
        return alone(self.finishing())

    def accepting(self, samples: np.ndarray) -> Work[list[Chunk]]:
        if self._finished:
            raise RuntimeError("accept() came after finish(): a new stream needs a new encoder")
        self._samples = torch.cat([self._samples, checked_samples(samples, SAMPLING_RATE_HZ)])
        chunks = []
        while len(self._samples) >= self._wanted:
            samples, self._samples = self._samples[: self._wanted], self._samples[self._wanted :].clone()
            yield from self._frame(self._fbank.ready(samples))
            self._wanted = SUBSAMPLING * self._chunk_frames * SHIFT_SAMPLES
            chunks.append((yield from self._encode(self._chunk_frames)))
        return chunks

    def finishing(self) -> Work[list[Chunk]]:
        self._finished = True
        yield from self._frame(self._fbank.ready(self._samples))
        yield from self._frame(self._fbank.ready_at_the_end())
        chunks = []
        while len(self._features):
            chunks.append((yield from self._encode(min(self._chunk_frames, -(-len(self._features) // SUBSAMPLING)))))
        return chunks

    def _frame(self, samples: Tensor) -> Work[None]:
        frames = yield Frame(self._fbank.fbank, samples)
        self._features = torch.cat([self._features, self._fbank.done(frames)])

    def _encode(self, num_frames: int) -> Work[Chunk]:
        features = self._features[: SUBSAMPLING * num_frames + self._model.encoder.lookahead_frames]
        chunk, self._state = yield Encode(self._model, features, num_frames, self._state)
        self._features = self._features[SUBSAMPLING * num_frames :]
        labels = chunk.log_probs.argmax(-1).tolist()
        self.phones += collapse(labels, self._last)
        self._last = labels[-1]
        return chunk


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
