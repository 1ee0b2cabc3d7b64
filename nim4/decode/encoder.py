"""The streaming encoder as decoders use it: samples in, encoder frames and phonemes of whole chunks out, nothing computed twice."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nim4.config import DecodeConfig
from nim4.corpus.feats import LEFT_MIRROR_SAMPLES, SAMPLING_RATE_HZ, SHIFT_SAMPLES, WINDOW_SAMPLES, StreamingFbank, checked_samples
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Context
from nim4.model.ctc import BLANK, PhonemeModel, collapse

ENCODER_FRAME_MS = 40


@dataclass(frozen=True)
class Chunk:
    """What the encoder and the phoneme head made of one chunk.

    Attributes:
        frames: (1, S, D) float, on the model's device; S is the chunk size, at the end of a stream less.
        log_probs: (S, V) float32, on the CPU.
    """

    frames: Tensor
    log_probs: Tensor


class StreamingEncoder:
    """Encoder frames and greedy phonemes of one stream, as its samples come.

    Args:
        model: in evaluation mode.
        context: chunk size and left context, e.g. Context(16, 4) for 640 ms and 2.56 s.

    An encoder chunk of C frames needs 4 C + 3 feature frames, so it can be encoded 30 ms of audio (and half a window) after its end;
    `finish` pads what is left. Samples wait until their chunk can be encoded: then the same arithmetic is done, and the result is the
    same to the last digit, however they come.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        self._model = model
        self._chunk_frames = context.chunk_frames
        self._fbank = StreamingFbank()
        self._features = torch.zeros(0, model.config.encoder.num_mel_bins)
        self._state = model.encoder.initial_state(1, context)
        self._samples = torch.zeros(0)
        num_features = SUBSAMPLING * context.chunk_frames + LOOKAHEAD_FRAMES
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
        if self._finished:
            raise RuntimeError("accept() came after finish(): a new stream needs a new encoder")
        self._samples = torch.cat([self._samples, checked_samples(samples, SAMPLING_RATE_HZ)])
        chunks, start = [], 0
        while len(self._samples) - start >= self._wanted:
            self._features = torch.cat([self._features, self._fbank.accept(self._samples[start : start + self._wanted])])
            chunks.append(self._encode(self._chunk_frames))
            start += self._wanted
            self._wanted = SUBSAMPLING * self._chunk_frames * SHIFT_SAMPLES
        self._samples = self._samples[start:].clone()
        return chunks

    def finish(self) -> list[Chunk]:
        """The chunks of what is left at the end of the stream."""
        self._finished = True
        self._features = torch.cat([self._features, self._fbank.accept(self._samples), self._fbank.finish()])
        chunks = []
        while len(self._features):
            chunks.append(self._encode(min(self._chunk_frames, -(-len(self._features) // SUBSAMPLING))))
        return chunks

    @torch.inference_mode()
    def _encode(self, num_frames: int) -> Chunk:
        wanted = SUBSAMPLING * num_frames + LOOKAHEAD_FRAMES
        x = self._model.normalise(self._features[:wanted].to(self._model.mean.device))
        x = torch.nn.functional.pad(x, (0, 0, 0, wanted - len(x)))  # zeros stand for the mean, as behind a whole utterance
        frames, self._state = self._model.encoder.forward_chunk(x[None], self._state)
        self._features = self._features[SUBSAMPLING * num_frames :]
        log_probs = self._model.head(frames)[0].cpu()
        labels = log_probs.argmax(-1).tolist()
        self.phones += collapse(labels, self._last)
        self._last = labels[-1]
        return Chunk(frames, log_probs)


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
