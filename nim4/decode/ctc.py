"""CTC decoding of phonemes: whole recordings, and streams of samples chunk by chunk.

A stream goes through the same code as a microphone would: samples, streaming features, cached encoder, greedy collapse.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nim4.corpus.feats import SAMPLING_RATE_HZ, UNREADABLE, read_samples
from nim4.corpus.manifest import MonoCut
from nim4.decode.encoder import Chunk, StreamingEncoder, spoken
from nim4.decode.offline import Decoded, Result, features_of
from nim4.decode.processes import in_processes
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel


@torch.inference_mode()
def offline_log_probs(model: PhonemeModel, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Phoneme log-probabilities with full context, in one padded batch.

    Args:
        model: in evaluation mode.
        recordings: (N,) float32 samples in [-1, 1] at 16 kHz each.
    Returns:
        an (S, V) float32 array per recording.
    """
    x, x_lens = features_of(recordings, model.mean.device)
    if not x.numel():
        return [np.zeros((0, model.config.vocab_size), np.float32) for _ in recordings]
    log_probs, lens = model(x, x_lens)
    return [row[:length].cpu().numpy() for row, length in zip(log_probs, lens.tolist(), strict=True)]


class StreamingCtc:
    """Phoneme log-probabilities of one stream, as its samples come; see StreamingEncoder for what waits for what.

    Args:
        model: in evaluation mode.
        context: chunk size and left context, e.g. Context(16, 4) for 640 ms and 2.56 s.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        self._encoder = StreamingEncoder(model, context)
        self._vocab_size = model.config.vocab_size

    @property
    def phones(self) -> list[int]:
        """Ids, so far."""
        return self._encoder.phones

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        return self._encoder.missing_samples

    def accept(self, samples: np.ndarray) -> Tensor:
        """(N,) float32 samples -> (S, V) log-probabilities of the chunks they complete; `phones` grows."""
        return self._joined(self._encoder.accept(samples))

    def finish(self) -> Tensor:
        """The log-probabilities of what is left at the end of the stream."""
        return self._joined(self._encoder.finish())

    def _joined(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.cat([torch.zeros(0, self._vocab_size), *(chunk.log_probs for chunk in chunks)])


def stream_cuts(
    cuts: Sequence[MonoCut], model: PhonemeModel, context: Context, read_out: Callable[[np.ndarray], Result], num_processes: int = 1
) -> Iterator[Decoded[Result]]:
    """Every cut as a stream with a simulated speaker: a chunk can be decoded when it has been spoken, and compute is waited for.

    Args:
        read_out: makes the result of a stream at its end from the (S, V) float32 log-probabilities of all chunks.
    """
    return in_processes(partial(_stream, model=model, context=context, read_out=read_out), cuts, num_processes)


def _stream(cut: MonoCut, model: PhonemeModel, context: Context, read_out: Callable[[np.ndarray], Result]) -> Decoded[Result]:
    try:
        samples = read_samples(cut)
    except UNREADABLE as error:
        return Decoded(cut, None, 0.0, repr(error))
    session, outputs, shown, heard_s, clock_s, wall_s = StreamingCtc(model, context), [], [], 0.0, 0.0, 0.0
    for piece in itertools.chain(spoken(samples, session), [None]):
        heard_s += 0.0 if piece is None else len(piece) / SAMPLING_RATE_HZ
        started_s = time.perf_counter()
        outputs.append(session.finish() if piece is None else session.accept(piece))
        took_s = time.perf_counter() - started_s
        wall_s, clock_s = wall_s + took_s, max(clock_s, heard_s) + took_s
        shown.append((heard_s, clock_s, list(session.phones)))
    started_s = time.perf_counter()
    result = read_out(torch.cat(outputs).numpy())
    return Decoded(cut, result, wall_s + time.perf_counter() - started_s, None, shown)
