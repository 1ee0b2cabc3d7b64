"""Ways to follow a speaker with the same weights and the same policy: ours, and those that read everything again for every text.

`again` ways hear chunk by chunk, skip a partial when no phoneme was heard, keep the text but its last tokens, write at most so many new
ones, as StreamingSession does (nim4/decode/streaming.py), so that their texts are the same; but all speech so far, the prompt around it and
the kept text are read from nothing for each of them, and nothing is verified.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nim4.decode import streaming
from nim4.decode.encoder import StreamingEncoder, spoken
from nim4.decode.offline import features_of
from nim4.decode.second_pass import Rereading
from nim4.decode.streaming import DEPLOYED, FREE_CHUNKS, MAX_NEW_TOKENS, Counts, Recogniser, num_kept_tokens
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING
from nim4.model.ctc import greedy_search
from nim4.model.llm import Llm, cut_at, generate, read
from nim4.model.rows import Rows

# (model, embeddings (1, N, D), limit of new ids) -> new ids without the end
Write = Callable[[SpeechLlm, Tensor, int], list[int]]


class Meter:
    """Counts what a language model reads, whoever calls it: tokens, padding included, and passes; what a CUDA graph replays it does not see."""

    def __init__(self, llm: nn.Module):
        self.tokens = self.passes = 0
        llm.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeds = kwargs.get("inputs_embeds")
        self.tokens += (kwargs["input_ids"] if embeds is None else embeds[..., 0]).numel()
        self.passes += 1


@dataclass
class Followed:
    """One utterance as one way followed it.

    Attributes:
        stream: as it was left.
        texts: after each chunk, and the final one.
        num_written: partials, the others were skipped.
        chunk_ms: from the chunk's samples to its text.
        final_ms: from the end of speech to the final text.
        tokens, passes: of the language model, all partials and the final text.
    """

    stream: "Ours | ReadAgain"
    texts: list[str] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    final_ms: float = 0.0
    num_written: int = 0
    tokens: int = 0
    passes: int = 0

    @property
    def total_ms(self) -> float:
        return sum(self.chunk_ms) + self.final_ms


class CachedEncoder:
    """Hears a stream as ours does: every frame is computed once."""

    def __init__(self, model: SpeechLlm):
        self._model, self._encoder = model, StreamingEncoder(model.acoustic, DEPLOYED)
        self._speech: list[Tensor] = []

    def hear(self, samples: np.ndarray, final: bool) -> tuple[Tensor, int]:
        """The next (N,) samples -> (1, A, D) embeddings of all speech so far, and how many phonemes it has."""
        chunks = self._encoder.accept(samples) + (self._encoder.finish() if final else [])
        for chunk in chunks:  # whole embeddings each, but the last
            self._speech.append(self._model.adaptor(chunk.frames, torch.tensor([chunk.frames.shape[1]], device=chunk.frames.device))[0])
        return torch.cat(self._speech, 1), len(self._encoder.phones)


class EncoderFromNothing:
    """Hears all samples so far again, chunk by chunk, under the mask that gives the frames of a stream."""

    def __init__(self, model: SpeechLlm):
        self._model, self._samples, self._num_chunks = model, np.zeros(0, np.float32), 0

    def hear(self, samples: np.ndarray, final: bool) -> tuple[Tensor, int]:
        """As CachedEncoder's, where `samples` complete a chunk unless `final`."""
        model, self._samples, self._num_chunks = self._model, np.concatenate([self._samples, samples]), self._num_chunks + 1
        x, x_lens = features_of([self._samples], model.acoustic.mean.device)
        if not final:
            x = x[:, : SUBSAMPLING * DEPLOYED.chunk_frames * self._num_chunks + LOOKAHEAD_FRAMES]
            x_lens = torch.full_like(x_lens, x.shape[1])
        frames, lens = model.acoustic.encoder(model.acoustic.normalise(x), x_lens, DEPLOYED)
        if not final:
            lens = torch.full_like(lens, DEPLOYED.chunk_frames * self._num_chunks)
            frames = frames[:, : lens[0]]
        return model.adaptor(frames, lens)[0], len(greedy_search(model.acoustic.head(frames), lens)[0])


def write_from_nothing(model: SpeechLlm, embeds: Tensor, limit: int) -> list[int]:
    """Reads the row and writes greedily behind it, with keys and values within this one text."""
    written: list[int] = []
    hidden, cache = read(model.llm, embeds)
    while True:
        written.append(int(model.llm.lm_head(hidden[0, -1]).float().argmax(-1)))
        if written[-1] == model.prompt.end or len(written) == limit:
            return cut_at(written, model.prompt.end)
        hidden, cache = read(model.llm, model.llm.get_input_embeddings()(torch.tensor([written[-1:]], device=embeds.device)), cache)


def write_with_generate(model: SpeechLlm, embeds: Tensor, limit: int) -> list[int]:
    """The same by transformers' `generate`."""
    no_padding = torch.zeros(1, dtype=torch.int64, device=embeds.device)
    return generate(Llm(model.llm, model.tokenizer, ""), embeds, no_padding, [limit], end=model.prompt.end)[0]


class ReadAgain:
    """A stream whose language model starts from nothing for every text.

    Attributes:
        ids: of the last partial.
        speech: (1, A, D) embeddings so far.
        num_written: partials.
    """

    def __init__(self, model: SpeechLlm, ear: CachedEncoder | EncoderFromNothing, write: Write):
        self._model, self._ear, self._write = model, ear, write
        self._num_kept = self._spoken_chunks = self._written_phones = self.num_written = 0
        self.ids: list[int] = []
        self.speech: Tensor

    @torch.inference_mode()
    def partial(self, samples: np.ndarray) -> str:
        """The text after the samples of the next chunk."""
        self.speech, num_phones = self._ear.hear(samples, False)
        self._spoken_chunks += num_phones > 0
        if num_phones > self._written_phones:
            kept = self.ids[: self._num_kept]
            limit = min(MAX_NEW_TOKENS, streaming.max_answer_tokens(self.speech.shape[1]) - len(kept))
            self.ids = kept + self._written(self._model.prompt.suffix(partial=True) + kept, limit)
            if self._spoken_chunks >= FREE_CHUNKS:
                self._num_kept = num_kept_tokens(self._model.tokenizer, self.ids, self._num_kept)
            self._written_phones = num_phones
            self.num_written += 1
        return self._text(self.ids).rstrip(streaming.CUT_CHARACTER).strip()

    @torch.inference_mode()
    def final(self, samples: np.ndarray) -> str:
        """The final text, after the last samples, which complete no chunk."""
        self.speech, _ = self._ear.hear(samples, True)
        return self._text(self._written(self._model.prompt.suffix(), streaming.max_answer_tokens(self.speech.shape[1]))).strip()

    def _written(self, suffix: list[int], limit: int) -> list[int]:
        lens = torch.tensor([self.speech.shape[1]], device=self.speech.device)
        return self._write(self._model, self._model.rows(self.speech, lens, [suffix])[0], limit)

    def _text(self, ids: Sequence[int]) -> str:
        return self._model.tokenizer.decode(ids, skip_special_tokens=True)


class Ours:
    """StreamingSession, called as ReadAgain is.

    Attributes:
        counts: the session's own, after the last text.
    """

    def __init__(self, model: SpeechLlm, rows: Rows, rereading: Rereading | None = None):
        self._session = Recogniser(model, rows=rows, rereading=rereading).session()
        self.num_written = 0
        self.counts: Counts

    def partial(self, samples: np.ndarray) -> str:
        self._session.append(samples)
        hypothesis = self._session.partial()
        self.num_written = hypothesis.revision
        return hypothesis.text

    def final(self, samples: np.ndarray) -> str:
        self._session.append(samples)
        hypothesis = self._session.finalize()
        self.counts = hypothesis.counts
        return hypothesis.text


OURS, WHOLE, AGAIN, ENCODE_AGAIN, GENERATE = "ours", "ours, final whole", "re-feed", "re-feed, re-encode", "re-feed, generate"
WAYS: dict[str, Callable[[SpeechLlm, Rows], Ours | ReadAgain]] = {
    OURS: Ours,
    WHOLE: lambda model, rows: Ours(model, rows, Rereading()),
    AGAIN: lambda model, _: ReadAgain(model, CachedEncoder(model), write_from_nothing),
    ENCODE_AGAIN: lambda model, _: ReadAgain(model, EncoderFromNothing(model), write_from_nothing),
    GENERATE: lambda model, _: ReadAgain(model, CachedEncoder(model), write_with_generate),
}


def in_chunks(model: SpeechLlm, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The pieces of a recording that complete a chunk each, and what is left at its end."""
    encoder, pieces, rest = StreamingEncoder(model.acoustic, DEPLOYED), [], np.zeros(0, np.float32)
    for piece in spoken(samples, encoder):
        if encoder.accept(piece):
            pieces.append(piece)
        else:
            rest = piece
    return pieces, rest


def follow(way: str, model: SpeechLlm, rows: Rows, pieces: Sequence[np.ndarray], rest: np.ndarray, meter: Meter) -> Followed:
    """Gives a new stream its chunks one by one, and its end. Ours keeps its own books; the prompt's beginning, read once for all, counts."""
    tokens, passes = meter.tokens, meter.passes
    stream = WAYS[way](model, rows)
    followed = Followed(stream)
    for piece in pieces:
        started_s = time.perf_counter()
        followed.texts.append(stream.partial(piece))
        followed.chunk_ms.append(1000 * (time.perf_counter() - started_s))
    started_s = time.perf_counter()
    followed.texts.append(stream.final(rest))
    followed.final_ms = 1000 * (time.perf_counter() - started_s)
    followed.num_written = stream.num_written
    if isinstance(stream, Ours):
        followed.tokens, followed.passes = stream.counts.read_tokens + len(model.prompt.prefix), stream.counts.passes + 1
    else:
        followed.tokens, followed.passes = meter.tokens - tokens, meter.passes - passes
    return followed
