"""CTC decoding of phonemes: whole recordings, and streams of samples chunk by chunk.

A stream goes through the same code as a microphone would: samples, streaming features, cached encoder, greedy collapse.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nim4.corpus.feats import SAMPLING_RATE_HZ, UNREADABLE, StreamingFbank, read_samples
from nim4.corpus.manifest import MonoCut
from nim4.decode.offline import Decoded, Result, features_of
from nim4.decode.processes import in_processes
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Context
from nim4.model.ctc import BLANK, PhonemeModel, collapse

ENCODER_FRAME_MS = 40


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
    """Phonemes of one stream, as its samples come.

    Args:
        model: in evaluation mode.
        context: chunk size and left context, e.g. Context(16, 4) for 640 ms and 2.56 s.

    An encoder chunk of C frames needs 4 C + 3 feature frames, so its phonemes come 30 ms of audio (and half a window) after its
    end; `finish` pads what is left. Features are kept only until their chunk is encoded.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        self._model = model
        self._chunk_frames = context.chunk_frames
        self._fbank = StreamingFbank()
        self._features = torch.zeros(0, model.config.encoder.num_mel_bins)
        self._state = model.encoder.initial_state(1, context)
        self._last = BLANK
        self.phones: list[int] = []

    def accept(self, samples: np.ndarray) -> Tensor:
        """(N,) float32 samples -> (S, V) log-probabilities of the chunks they complete; `phones` grows."""
        self._features = torch.cat([self._features, self._fbank.accept(torch.from_numpy(samples))])
        return self._encode(final=False)

    def finish(self) -> Tensor:
        """The log-probabilities of what is left at the end of the stream."""
        self._features = torch.cat([self._features, self._fbank.finish()])
        return self._encode(final=True)

    @torch.inference_mode()
    def _encode(self, final: bool) -> Tensor:
        outputs = [torch.zeros(0, self._model.config.vocab_size)]
        needed = SUBSAMPLING * self._chunk_frames + LOOKAHEAD_FRAMES
        while len(self._features) >= needed or (final and len(self._features) > 0):
            num_frames = min(self._chunk_frames, -(-len(self._features) // SUBSAMPLING))
            wanted = SUBSAMPLING * num_frames + LOOKAHEAD_FRAMES
            x = self._model.normalise(self._features[:wanted].to(self._model.mean.device))
            x = torch.nn.functional.pad(x, (0, 0, 0, wanted - len(x)))  # zeros stand for the mean, as behind a whole utterance
            encoded, self._state = self._model.encoder.forward_chunk(x[None], self._state)
            outputs.append(self._model.head(encoded)[0].cpu())
            self._features = self._features[SUBSAMPLING * num_frames :]
        log_probs = torch.cat(outputs)
        labels = log_probs.argmax(-1).tolist()
        self.phones += collapse(labels, self._last)
        self._last = labels[-1] if labels else self._last
        return log_probs


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
    piece = context.chunk_frames * ENCODER_FRAME_MS * SAMPLING_RATE_HZ // 1000
    session, outputs, shown, clock_s, wall_s = StreamingCtc(model, context), [], [], 0.0, 0.0
    for start in [*range(0, len(samples), piece), None]:
        heard_s = (len(samples) if start is None else min(start + piece, len(samples))) / SAMPLING_RATE_HZ
        started_s = time.perf_counter()
        outputs.append(session.finish() if start is None else session.accept(samples[start : start + piece]))
        took_s = time.perf_counter() - started_s
        wall_s, clock_s = wall_s + took_s, max(clock_s, heard_s) + took_s
        shown.append((heard_s, clock_s, list(session.phones)))
    started_s = time.perf_counter()
    result = read_out(torch.cat(outputs).numpy())
    return Decoded(cut, result, wall_s + time.perf_counter() - started_s, None, shown)
