"""Streaming with the speech LLM: text that follows a speaker chunk by chunk, and a second pass over the whole when they have ended.

    samples -> features -> encoder, cached -> adaptor -> [ prefix | speech ]       keys and values that are only ever appended to
                                 |                                |
                             phonemes -> hints            [ suffix | answer ]      forgotten when the next chunk comes

A partial text is written with the instruction for unfinished speech, behind the text before it less its last tokens; nothing is written, nor
read by the language model, while no new phoneme has been heard. The final text is written with the full instruction and all hints, and is
the text of plain greedy decoding: the last partial only shortens the way there (nim4/model/llm.py, writing).

Many sessions go together (`Recogniser.hear`): chunks of the encoder and passes of the language model are shared by all that need one, and none
waits for another that writes more (nim4/decode/together.py, nim4/model/rows.py). Each session gets what it would get alone: in fp32 on a CPU
exactly; sums in bf16 depend on how many are added at once, and near ties may fall the other way.

Source: arXiv 2604.18105, section 3.6. Ours, since it says no more: what has been kept is not rolled back later, so that users can rely on it
until the final text; the two free chunks are counted from the first with a phoneme; new tokens are limited; those rolled back are a draft; the
second pass may hear the whole anew (nim4/decode/second_pass.py).
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.corpus.punctuation import without_punctuation
from nim4.decode.encoder import Chunk, StreamingEncoder
from nim4.decode.hotword import HotwordIndex, HotwordView
from nim4.decode.hotword_hints import MAX_HINTS, StreamHints
from nim4.decode.hotword_lattice import DEFAULT_LIMITS, LatticeLimits
from nim4.decode.second_pass import EncodeWhole, Rereading, WriteBest
from nim4.decode.together import Work, alone, run
from nim4.model.asr import SpeechLlm, max_answer_tokens
from nim4.model.conformer import Context
from nim4.model.llm import Written
from nim4.model.rows import Rows, write

ROLLBACK_TOKENS = 5  # paper, section 3.6
FREE_CHUNKS = 2  # paper, section 3.6: nothing of their texts is kept
MAX_NEW_TOKENS = 16  # ours: of a partial, so that one that loops holds nobody up; nobody says more in 640 ms
DEPLOYED = Context(16, 4)  # paper, section 3.6: 640 ms, and 2.56 s before them
Clock = Callable[[], float]
CUT_CHARACTER = "\ufffd"  # what a tokenizer gives for bytes that are no whole character


@dataclass
class Counts:
    """Work of one session.

    Attributes:
        speech_tokens: embeddings of the speech that was heard chunk by chunk. Each is read once; a second pass that hears the whole anew reads as
            many others, and those of the last chunks not at all.
        read_tokens: all that the language model has read, prompts, drafts and answers included; without the shared prefix, and without what a
            beam search reads.
        passes: of the language model, without those of a beam search.
        refreshed, skipped: partials that were written, and those that nothing new was heard for.
        drafted, accepted: tokens of the last partial, and how many of them the final text begins with.
    """

    speech_tokens: int = 0
    read_tokens: int = 0
    passes: int = 0
    refreshed: int = 0
    skipped: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Hypothesis:
    """What a session has understood so far.

    Attributes:
        phones: ids, greedy, of all chunks so far.
        hints: names in the prompt of `text`.
        audio_s: seconds of audio that had come.
        revision: counts the times that `text` was written.
        settled_chars: so many characters of `text` stay as they are in all later partials; the final text may still differ.
        is_final: whether it is of the second pass.
        counts: of the session so far.
    """

    text: str
    phones: tuple[int, ...]
    hints: tuple[str, ...]
    audio_s: float
    revision: int
    settled_chars: int
    is_final: bool
    counts: Counts

    def unpunctuated(self) -> "Hypothesis":
        """The same without punctuation."""
        text, settled = (without_punctuation(text) for text in (self.text, self.text[: self.settled_chars]))
        return replace(self, text=text, settled_chars=len(settled))


@dataclass(frozen=True, eq=False)
class Job:
    """What comes next in a session.

    Attributes:
        samples: (N,) float32 in [-1, 1] at 16 kHz.
        ends: whether they are its last: a final text is wanted, else a partial one.
    """

    session: "StreamingSession"
    samples: np.ndarray
    ends: bool = False


@dataclass(frozen=True)
class Event:
    """One partial or the final text in a session's log; `compute_s`: seconds of compute since the event before."""

    compute_s: float
    hypothesis: Hypothesis


class Recogniser:
    """What the streams of one model share: its weights, their keys and values, the hotwords.

    Args:
        model: in evaluation mode.
        context: chunk size and left context of the encoder.
        hotwords: where hints are looked up, chunk by chunk; None = nowhere.
        limits: of the lattice search; None = exact search.
        max_hints: of a session, the given ones included.
        rows: of `model`, from new_rows, where another recogniser is to share the passes of the language model; None = rows of its own.
        rereading: how the second pass hears the whole anew; None = it reads the frames of the stream (paper).
    """

    def __init__(
        self,
        model: SpeechLlm,
        context: Context = DEPLOYED,
        *,
        hotwords: HotwordIndex | HotwordView | None = None,
        limits: LatticeLimits | None = DEFAULT_LIMITS,
        max_hints: int = MAX_HINTS,
        rows: Rows | None = None,
        rereading: Rereading | None = None,
    ):
        self.model, self.context, self.hotwords, self.limits, self.max_hints = model, context, hotwords, limits, max_hints
        self.rows, self.rereading = rows or new_rows(model), rereading

    def session(self, given: Sequence[str] = (), clock: Clock = time.perf_counter, encoder: StreamingEncoder | None = None) -> "StreamingSession":
        """A new stream.

        Args:
            given: hints by hand.
            clock: seconds, for the log.
            encoder: that it hears through; None = one of the model's own.
        """
        return StreamingSession(self, given, clock, encoder or StreamingEncoder(self.model.acoustic, self.context))

    def hear(self, jobs: Sequence[Job]) -> list[Hypothesis | Exception]:
        """Does a job for each of many sessions: what `append` and `partial`, or `finalize`, would do, and with the same results.

        Args:
            jobs: of different sessions, of this recogniser or of others that share its rows.
        Returns:
            a hypothesis, or what went wrong; that of one job is none of the others' business.
        """
        if len({id(job.session) for job in jobs}) < len(jobs):
            raise ValueError("a session has one job at a time")
        return [task.error or task.result for task in run([job.session.hearing(job.samples, job.ends) for job in jobs])]


def new_rows(model: SpeechLlm) -> Rows:
    """Keys and values that recognisers of one model may share."""
    return Rows(model.llm, model.prompt.prefix)


@dataclass(frozen=True, eq=False)
class Adapt:
    """(1, S, D) encoder frames that are to become embeddings; a tail that fills none is padded."""

    order: ClassVar[int] = 2
    model: SpeechLlm
    frames: Tensor

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Adapt, self.model, self.frames.shape

    @staticmethod
    def together(parts: Sequence["Adapt"]) -> list[Tensor]:
        """(A, D) embeddings of each."""
        frames = torch.cat([part.frames for part in parts])
        speech, _ = parts[0].model.adaptor(frames, torch.full((len(parts),), frames.shape[1], device=frames.device))
        return list(speech)


class StreamingSession:
    """One stream, from its first sample to its final text; made by Recogniser.session.

    After `finalize` or `abort` nothing but `events` is left, and every further call raises RuntimeError.
    """

    def __init__(self, recogniser: Recogniser, given: Sequence[str], clock: Clock, encoder: StreamingEncoder):
        self._recogniser, self._model, self._clock, self._encoder = recogniser, recogniser.model, clock, encoder
        self._features: list[Tensor] = []  # (T, 80) of all chunks, where they are to be heard anew
        self._frames = self._model.adaptor.up.weight.new_zeros(1, 0, self._model.config.encoder.dim)  # that fill no embedding yet
        self._row = recogniser.rows.new()  # of the prefix and the speech before the last text
        self._unread = self._model.llm.get_input_embeddings().weight.detach()[:0]  # (A, D) embeddings of the speech since then
        vocab_size = self._model.acoustic.config.vocab_size
        self._hotwords = StreamHints(recogniser.hotwords, recogniser.limits, given, recogniser.max_hints, vocab_size)
        self._ids: list[int] = []  # of the last partial
        self._num_kept = 0  # of them stay
        self._num_samples = self._revision = self._spoken_chunks = self._written_phones = 0
        self._compute_s = 0.0
        self._counts = Counts()
        self._open = True
        self.events: list[Event] = []

    @property
    def missing_samples(self) -> int:
        """How many more samples complete the next chunk."""
        self._check_open()
        return self._encoder.missing_samples

    def append(self, samples: np.ndarray) -> None:
        """Takes (N,) float32 samples in [-1, 1] at 16 kHz; chunks that they complete are encoded and read.

        Raises:
            ValueError: if they are of another shape, type or scale; the session goes on without them.
        """
        alone(self._append(samples))

    def partial(self) -> Hypothesis:
        """The text so far. It is written anew if phonemes were heard since the last time."""
        return alone(self._partial())

    def finalize(self) -> Hypothesis:
        """The second pass, at the end of speech; ends the session."""
        return alone(self._finalize())

    def hearing(self, samples: np.ndarray, ends: bool) -> Work[Hypothesis]:
        """`append`, and then `finalize` if `ends`, else `partial`, as work for nim4/decode/together.py."""
        yield from self._append(samples)
        return (yield from self._finalize() if ends else self._partial())

    def abort(self) -> None:
        """Ends the session and lets go of its memory; may be called at any time."""
        self._open = False
        self._row = self._encoder = self._hotwords = self._features = self._frames = self._unread = None

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the session has ended: a new stream needs a new one")

    def _begin(self) -> float:
        self._check_open()
        return self._clock()

    def _append(self, samples: np.ndarray) -> Work[None]:
        started_s = self._begin()
        chunks = yield from self._encoder.accepting(samples)
        yield from self._hear(chunks)
        self._num_samples += len(samples)
        self._compute_s += self._clock() - started_s

    def _partial(self) -> Work[Hypothesis]:
        started_s = self._begin()
        if len(self._encoder.phones) > self._written_phones:
            yield from self._refresh()
        else:
            self._counts.skipped += 1
        text = self._text(self._ids).rstrip(CUT_CHARACTER).strip()
        return self._log(started_s, text, min(len(self._text(self._ids[: self._num_kept]).lstrip()), len(text)), False)

    def _finalize(self) -> Work[Hypothesis]:
        started_s = self._begin()
        chunks = yield from self._encoder.finishing()
        yield from self._hear(chunks)
        if self._frames.shape[1]:
            yield from self._adapt(self._frames)
        self._hotwords.finish()
        text = (yield from self._second_pass()) if self._counts.speech_tokens else ""
        self._revision += 1
        hypothesis = self._log(started_s, text, len(text), True)
        self.abort()
        return hypothesis

    def _second_pass(self) -> Work[str]:
        """The final text of speech that fills at least one embedding."""
        again, hints = self._recogniser.rereading, self._hotwords.hints
        if again is not None:
            features = torch.cat(self._features)
            if again.num_beams > 1:
                return (yield WriteBest(self._model, features, hints, again))
            frames = yield EncodeWhole(self._model, features)
            self._unread = yield Adapt(self._model, frames)
            self._row.drop(self._row.length - len(self._model.prompt.prefix))  # the speech of the stream is forgotten
        suffix, limit = self._model.prompt.suffix(hints), max_answer_tokens(self._counts.speech_tokens)
        written = yield from self._write(suffix, self._ids, limit)
        self._counts.drafted, self._counts.accepted = len(self._ids), written.accepted
        return self._text(written.ids).strip()

    def _hear(self, chunks: Sequence[Chunk]) -> Work[None]:
        stack = self._model.adaptor.stack
        for chunk in chunks:
            self._hotwords.hear(chunk.log_probs)
            if self._recogniser.rereading is not None:
                self._features.append(chunk.features)
            frames = torch.cat([self._frames, chunk.frames], 1)
            whole = frames.shape[1] - frames.shape[1] % stack
            self._frames = frames[:, whole:]
            if whole:
                yield from self._adapt(frames[:, :whole])
            self._spoken_chunks += bool(self._spoken_chunks or chunk.log_probs.argmax(-1).any())

    def _adapt(self, frames: Tensor) -> Work[None]:
        """Keeps the embeddings of (1, S, D) encoder frames for the next text, which is written in the pass that reads them."""
        speech = yield Adapt(self._model, frames)
        self._unread = torch.cat([self._unread, speech])
        self._counts.speech_tokens += len(speech)

    def _refresh(self) -> Work[None]:
        kept, draft = self._ids[: self._num_kept], self._ids[self._num_kept :]
        suffix = self._model.prompt.suffix(self._hotwords.hints, partial=True)
        limit = min(MAX_NEW_TOKENS, max_answer_tokens(self._counts.speech_tokens) - len(kept))
        self._ids = kept + (yield from self._write(suffix + kept, draft, limit)).ids
        if self._spoken_chunks >= FREE_CHUNKS:
            self._num_kept = num_kept_tokens(self._model.tokenizer, self._ids, self._num_kept)
        self._written_phones = len(self._encoder.phones)
        self._revision += 1
        self._counts.refreshed += 1

    def _write(self, ids: Sequence[int], draft: Sequence[int], limit: int) -> Work[Written]:
        """Writes behind all speech, of which a row keeps what it has read; the rest is forgotten again."""
        rows, row, speech, num_heard = self._recogniser.rows, self._row, self._unread, self._row.length + len(self._unread)
        try:
            written = yield from write(rows, row, ids, draft, limit, self._model.prompt.end, speech)
        finally:
            if row.length >= num_heard:  # else the first pass has failed, and may be tried again
                row.drop(row.length - num_heard)
                self._unread = speech[:0]
        self._counts.read_tokens += len(speech) + written.tokens_read
        self._counts.passes += written.passes
        return written

    def _text(self, ids: Sequence[int]) -> str:
        return self._model.tokenizer.decode(ids, skip_special_tokens=True)

    def _log(self, started_s: float, text: str, settled_chars: int, is_final: bool) -> Hypothesis:
        phones, hints, audio_s = tuple(self._encoder.phones), tuple(self._hotwords.hints), self._num_samples / SAMPLING_RATE_HZ
        hypothesis = Hypothesis(text, phones, hints, audio_s, self._revision, settled_chars, is_final, replace(self._counts))
        self.events.append(Event(self._compute_s + self._clock() - started_s, hypothesis))
        self._compute_s = 0.0
        return hypothesis


def num_kept_tokens(tokenizer: Any, ids: Sequence[int], at_least: int = 0) -> int:
    """How many of `ids` stay when the last ROLLBACK_TOKENS are taken back, and with them the rest of a character that would be cut.

    Args:
        tokenizer: of the language model; a token may be a part of a character.
        at_least: so many stay in any case.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for kept in range(len(ids) - ROLLBACK_TOKENS, at_least, -1):
        start = tokenizer.decode(ids[:kept], skip_special_tokens=True)
        if not start.endswith(CUT_CHARACTER) and text.startswith(start):
            return kept
    return at_least
