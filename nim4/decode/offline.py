"""Decoding of whole recordings in padded batches; the result of an utterance does not depend on what it is batched with."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nim4.config import DecodeConfig
from nim4.corpus.feats import UNREADABLE, Fbank, read_samples
from nim4.corpus.manifest import MonoCut
from nim4.decode.hotword import HotwordIndex, HotwordView
from nim4.decode.hotword_hints import MAX_HINTS, Hints
from nim4.decode.hotword_lattice import DEFAULT_LIMITS, LatticeLimits
from nim4.decode.processes import in_processes
from nim4.decode.rescoring import CtcRescorer
from nim4.model.asr import SpeechLlm

Result = TypeVar("Result")
# recordings, (N,) float32 samples in [-1, 1] at 16 kHz each -> a result for each
DecodeBatch = Callable[[Sequence[np.ndarray]], list[Result]]


@dataclass(frozen=True)
class Decoded(Generic[Result]):
    """One utterance: its result, or why there is none.

    Attributes:
        wall_s: seconds of compute; in a batch its share of them.
        shown: of a stream, after each chunk: (seconds of audio heard, seconds on the speaker's clock, what was seen: phoneme ids
            so far, or of the speech LLM text and how many characters of it stay).
    """

    cut: MonoCut
    result: Result | None
    wall_s: float
    error: str | None
    shown: Sequence[tuple[Any, ...]] = ()


def decode_cuts(cuts: Sequence[MonoCut], batch_s: float, decode: DecodeBatch[Result], num_processes: int = 1) -> Iterator[Decoded[Result]]:
    """All of `cuts`, longest first, in batches of at most `batch_s` padded seconds; audio that cannot be read is a result with an error."""
    batches: list[list[MonoCut]] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if not batches or batches[-1][0].duration * (len(batches[-1]) + 1) > batch_s:
            batches.append([])
        batches[-1].append(cut)
    for decoded in in_processes(partial(_decode_batch, decode=decode), batches, num_processes):
        yield from decoded


def _decode_batch(cuts: Sequence[MonoCut], decode: DecodeBatch[Result]) -> list[Decoded[Result]]:
    unreadable, read = [], []
    for cut in cuts:
        try:
            read.append((cut, read_samples(cut)))
        except UNREADABLE as error:
            unreadable.append(Decoded(cut, None, 0.0, repr(error)))
    started_s = time.perf_counter()
    results = decode([samples for _, samples in read]) if read else []
    wall_s = time.perf_counter() - started_s
    audio_s = sum(cut.duration for cut, _ in read)
    return unreadable + [Decoded(cut, result, wall_s * cut.duration / audio_s, None) for (cut, _), result in zip(read, results, strict=True)]


def features_of(recordings: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-Mel features of recordings: (B, T, 80) float32, zero beyond the (B,) int64 lengths; T may be 0."""
    fbank = Fbank()
    features = [torch.from_numpy(fbank.extract(samples)) for samples in recordings]
    lens = torch.tensor([len(x) for x in features], device=device)
    return pad_sequence(features, batch_first=True).to(device), lens


@torch.inference_mode()
def transcripts(
    model: SpeechLlm,
    recordings: Sequence[np.ndarray],
    *,
    hints: Sequence[Sequence[str]] | None = None,
    num_beams: int = 1,
    rescorer: CtcRescorer | None = None,
) -> list[str]:
    """Texts of whole recordings by the speech LLM, with full context, in one padded batch.

    Args:
        model: in evaluation mode.
        hints: per recording, words that may occur in it.
        num_beams: 1 = greedy.
        rescorer: chooses among the beams, of which there are then at least 2, and where there are hints among as many written without them.
    """
    x, x_lens = features_of(recordings, model.acoustic.mean.device)
    if not x.numel():
        return ["" for _ in recordings]
    return write_texts(model, *model.encode(x, x_lens), hints, num_beams, rescorer)


def write_texts(
    model: SpeechLlm, frames: Tensor, lens: Tensor, hints: Sequence[Sequence[str]] | None, num_beams: int, rescorer: CtcRescorer | None
) -> list[str]:
    """`transcripts` for what the encoder gave: (B, S, D) frames and (B,) lengths."""
    speech = model.adaptor(frames, lens)
    if rescorer is None:
        return model.write(*speech, hints=hints, num_beams=num_beams)
    candidates = _candidates(model, *speech, hints, num_beams)
    log_probs = model.acoustic.head(frames)
    return [rescorer.best(texts, row[:length]) for texts, row, length in zip(candidates, log_probs, lens.tolist(), strict=True)]


def _candidates(
    model: SpeechLlm, speech: Tensor, lens: Tensor, hints: Sequence[Sequence[str]] | None, num_beams: int
) -> list[list[tuple[str, float]]]:
    """Texts with their log-probabilities for a rescorer. Ours: those written without hints are in the choice, too, so that hints are an offer:
    a language model that they lead astray writes worse with them all over the sentence, not only in their place."""
    found = model.candidates(speech, lens, num_beams, hints=hints)
    hinted = [row for row, own in enumerate(hints or ()) if own]
    if hinted:
        for row, plain in zip(hinted, model.candidates(speech[hinted], lens[hinted], num_beams), strict=True):
            texts = dict(found[row])
            for text, log_prob in plain:
                texts[text] = max(log_prob, texts.get(text, log_prob))
            found[row] = list(texts.items())
    return found


@torch.inference_mode()
def transcripts_with_hotwords(
    model: SpeechLlm,
    recordings: Sequence[np.ndarray],
    hotwords: HotwordIndex | HotwordView,
    *,
    limits: LatticeLimits | None = DEFAULT_LIMITS,
    given: Sequence[str] = (),
    max_hints: int = MAX_HINTS,
    num_beams: int = 1,
    rescorer: CtcRescorer | None = None,
) -> list[tuple[str, list[str]]]:
    """Like `transcripts`, with hints that sound like what the phoneme head heard; each recording is encoded once.

    Args:
        hotwords: where hints are looked up.
        limits: of the lattice search; None = exact search.
        given: hints of every recording.
        max_hints: per recording, the given ones included.
    Returns:
        text and hints per recording.
    """
    x, x_lens = features_of(recordings, model.acoustic.mean.device)
    if not x.numel():
        return [("", list(given)) for _ in recordings]
    frames, lens = model.encode(x, x_lens)
    log_probs = model.acoustic.head(frames).cpu().numpy()
    found = [hotwords.search_log_probs(row[:length], limits) for row, length in zip(log_probs, lens.tolist(), strict=True)]
    hints = [Hints(given, max_hints).update(hits) for hits in found]
    return list(zip(write_texts(model, frames, lens, hints, num_beams, rescorer), hints, strict=True))


def llm_cuts(
    model: SpeechLlm,
    cuts: Sequence[MonoCut],
    config: DecodeConfig,
    given: Sequence[str],
    index: HotwordIndex | None,
    num_processes: int = 1,
    rescorer: CtcRescorer | None = None,
) -> Iterator[Decoded[tuple[str, list[str] | None]]]:
    """Text of every cut, and the hints that were looked up for it; None when there is no index.

    Args:
        given: hints for every cut.
        index: hotwords; the config says how they are searched.
        rescorer: chooses among the beams; None = the language model alone does.
    """
    search = {"num_beams": config.num_beams, "rescorer": rescorer}

    def decode(recordings: Sequence[np.ndarray]) -> list[tuple[str, list[str] | None]]:
        if index is None:
            texts = transcripts(model, recordings, hints=[given] * len(recordings), **search)
            return [(text, None) for text in texts]
        limits = DEFAULT_LIMITS if config.hotwords == "lattice" else None
        return transcripts_with_hotwords(model, recordings, index, limits=limits, given=given, max_hints=config.max_hints, **search)

    return decode_cuts(cuts, config.batch_s, decode, num_processes)
