"""CTC decoding of phonemes: whole recordings, and streams of samples chunk by chunk.

A stream goes through the same code as a microphone would: samples, streaming features, cached encoder, greedy collapse.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nim4.corpus.manifest import MonoCut
from nim4.decode.encoder import Chunk, StreamingEncoder
from nim4.decode.offline import Decoded, Result, features_of
from nim4.decode.processes import in_processes
from nim4.decode.speakers import follow, in_groups, read_all
from nim4.decode.together import Work
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
    cuts: Sequence[MonoCut],
    model: PhonemeModel,
    context: Context,
    read_out: Callable[[np.ndarray], Result],
    num_processes: int = 1,
    speakers: int = 1,
) -> Iterator[Decoded[Result]]:
    """Every cut as a stream with a simulated speaker, see nim4/decode/speakers.py.

    Args:
        read_out: makes the result of a stream at its end from the (S, V) float32 log-probabilities of all chunks.
        speakers: followed at once by each process.
    """
    stream = partial(_stream, model=model, context=context, read_out=read_out)
    for decoded in in_processes(stream, in_groups(cuts, speakers), num_processes):
        yield from decoded


def _stream(cuts: Sequence[MonoCut], model: PhonemeModel, context: Context, read_out: Callable[[np.ndarray], Result]) -> list[Decoded[Result]]:
    read, unreadable = read_all(cuts)
    encoders = [StreamingEncoder(model, context) for _ in read]
    decoded = [Decoded(cut, None, 0.0, reason) for cut, reason in unreadable]
    for (cut, _), heard in zip(read, follow([samples for _, samples in read], encoders, _hear), strict=True):
        started_s = time.perf_counter()
        log_probs = [chunk.log_probs for row in heard for chunk in row.result[0]]
        result = read_out(torch.cat([torch.zeros(0, model.config.vocab_size), *log_probs]).numpy())
        wall_s = sum(row.work_s for row in heard) + time.perf_counter() - started_s
        decoded.append(Decoded(cut, result, wall_s, None, [(row.heard_s, row.clock_s, row.result[1]) for row in heard]))
    return decoded


def _hear(encoder: StreamingEncoder, piece: np.ndarray | None) -> Work[tuple[list[Chunk], list[int]]]:
    """The chunks that a piece completes, or the end of the stream, and all phonemes so far."""
    chunks = yield from encoder.finishing() if piece is None else encoder.accepting(piece)
    return chunks, list(encoder.phones)
