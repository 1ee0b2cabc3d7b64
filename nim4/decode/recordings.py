"""Recordings of any length: cut where nobody speaks, decoded in batches, and joined again; with the time of each word.

Words are timed by the phoneme head: the most probable path that spells the phones of the text (nim4/model/ctc.py, forced_align). What the
language model writes is taken as said; a text that does not fit the audio gets times all the same, if it has few enough phones.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nim4.config import RecipeError, VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ, WINDOW_SAMPLES
from nim4.corpus.g2p import UNKNOWN, Lexicon
from nim4.corpus.punctuation import without_punctuation
from nim4.corpus.text import joined
from nim4.corpus.units import PhonemeInventory
from nim4.corpus.word_places import place_words
from nim4.decode.encoder import ENCODER_FRAME_MS
from nim4.decode.hotword import HotwordIndex, HotwordView
from nim4.decode.hotword_hints import MAX_HINTS, Hints
from nim4.decode.hotword_lattice import DEFAULT_LIMITS, LatticeLimits
from nim4.decode.offline import features_of
from nim4.decode.streaming import Adapt
from nim4.decode.together import Work
from nim4.decode.vad import segments_by_piece
from nim4.model.asr import SpeechLlm, max_answer_tokens
from nim4.model.ctc import forced_align
from nim4.model.rows import Rows, write

BATCH_S = 60.0  # padded audio decoded at once; the texts do not depend on it
MAX_CUE_S = 7.0  # ours: of a subtitle; longer ones do not fit the screen


@dataclass(frozen=True)
class Word:
    """A word as it is written, or a Chinese character, and when it is said, in seconds of the recording."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Segment:
    """One stretch of speech, in seconds of the recording.

    Attributes:
        words: None when they could not be timed, or need not be.
        untimed: why they could not.
        hints: in the prompt.
    """

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...] | None
    untimed: str | None
    hints: tuple[str, ...]

    def unpunctuated(self) -> "Segment":
        """The same without punctuation, in its words too."""
        words = None if self.words is None else tuple(replace(word, text=without_punctuation(word.text)) for word in self.words)
        return replace(self, text=without_punctuation(self.text), words=words)


class Transcriber:
    """Texts of recordings.

    Args:
        model: in evaluation mode.
        inventory: of the model's phoneme head.
        hotwords: where hints are looked up, segment by segment; None = nowhere.
        limits: of the lattice search; None = exact search.
        given: hints of every segment.
        max_hints: per segment, the given ones included.
        vad: how recordings are cut.
        with_words: whether words are timed.
        rows: of the model, for `decoding`.
    """

    def __init__(
        self,
        model: SpeechLlm,
        inventory: PhonemeInventory,
        *,
        hotwords: HotwordIndex | HotwordView | None = None,
        limits: LatticeLimits | None = DEFAULT_LIMITS,
        given: Sequence[str] = (),
        max_hints: int = MAX_HINTS,
        vad: VadConfig | None = None,
        with_words: bool = True,
        rows: Rows | None = None,
    ):
        self._model, self._inventory, self._hotwords, self._limits = model, inventory, hotwords, limits
        self._given, self._max_hints, self._vad = given, max_hints, vad or VadConfig()
        self._lexicon, self._rows = Lexicon() if with_words else None, rows

    def transcribe(self, samples: np.ndarray) -> list[Segment]:
        """The segments of a recording, in order; none where nobody speaks.

        Args:
            samples: (N,) float32 in [-1, 1] at 16 kHz; N may be 0.
        Raises:
            ValueError: if they are of another shape, type or scale.
            RecipeError: if silero-vad is not installed, or a setting of it is out of range.
        """
        places = [place for found in self.places(samples) for place in found]
        found = {place: segment for batch in _batches(places) for place, segment in zip(batch, self.decode(samples, batch), strict=True)}
        return [found[place] for place in places]

    def places(self, samples: np.ndarray) -> Iterator[list[tuple[int, int]]]:
        """Where the segments of a recording are, start and end in samples, piece by piece as they are found. Raises as `transcribe`."""
        return speech_places(samples, self._vad)

    @torch.inference_mode()
    def decode(self, samples: np.ndarray, places: Sequence[tuple[int, int]]) -> list[Segment]:
        """The segments at these places of a recording, as one batch; none depends on the others."""
        model = self._model
        frames, lens = self._encode(samples, places)
        log_probs = [row[:length] for row, length in zip(model.acoustic.head(frames).cpu().numpy(), lens.tolist(), strict=True)]
        hints = [self._hints(row) for row in log_probs]
        texts = model.write(*model.adaptor(frames, lens), hints=hints)
        return [self._segment(*parts) for parts in zip(places, log_probs, texts, hints, strict=True)]

    def decoding(self, samples: np.ndarray, place: tuple[int, int]) -> Work[Segment]:
        """The same for one segment as work for nim4/decode/together.py, so that streams need not wait until all of it is written."""
        model, rows = self._model, self._rows
        frames, _ = self._encode(samples, [place])
        log_probs = model.acoustic.head(frames)[0].cpu().numpy()
        hints, row = self._hints(log_probs), rows.new()
        speech = yield Adapt(model, frames)
        written = yield from write(rows, row, model.prompt.suffix(hints), (), max_answer_tokens(len(speech)), model.prompt.end, speech)
        return self._segment(place, log_probs, model.tokenizer.decode(written.ids, skip_special_tokens=True).strip(), hints)

    def _encode(self, samples: np.ndarray, places: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model.encode(*features_of([samples[start:end] for start, end in places], self._model.acoustic.mean.device))

    def _segment(self, place: tuple[int, int], log_probs: np.ndarray, text: str, hints: Sequence[str]) -> Segment:
        return timed_segment(place, text, log_probs, hints, self._lexicon, self._inventory)

    def _hints(self, log_probs: np.ndarray) -> list[str]:
        if self._hotwords is None:
            return list(self._given)
        return Hints(self._given, self._max_hints).update(self._hotwords.search_log_probs(log_probs, self._limits))


def speech_places(samples: np.ndarray, vad: VadConfig) -> Iterator[list[tuple[int, int]]]:
    """Where the segments of a recording are that have at least a frame, start and end in samples, piece by piece as they are found."""
    for found in segments_by_piece(samples, vad):
        yield [(start, end) for start, end in found if end - start >= WINDOW_SAMPLES]


def timed_segment(
    place: tuple[int, int], text: str, log_probs: np.ndarray | None, hints: Sequence[str], lexicon: Lexicon | None, inventory: PhonemeInventory
) -> Segment:
    """A segment with the times of its words.

    Args:
        place: start and end in samples.
        log_probs: (S, V) float32, of the phoneme head.
        lexicon: None = words are not timed, and `log_probs` are not needed.
    """
    start_s, end_s = (sample / SAMPLING_RATE_HZ for sample in place)
    words, untimed = None, None
    if lexicon is not None:
        try:
            words = tuple(word_times(text, log_probs, lexicon, inventory, start_s, end_s))
        except ValueError as error:
            untimed = str(error)
    return Segment(start_s, end_s, text, words, untimed, tuple(hints))


def _batches(places: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The segments, longest first, in batches of at most BATCH_S padded seconds."""
    batch: list[tuple[int, int]] = []
    for start, end in sorted(places, key=lambda place: place[0] - place[1]):
        if batch and (batch[0][1] - batch[0][0]) * (len(batch) + 1) > BATCH_S * SAMPLING_RATE_HZ:
            yield batch
            batch = []
        batch.append((start, end))
    if batch:
        yield batch


def word_times(
    text: str, log_probs: np.ndarray, lexicon: Lexicon, inventory: PhonemeInventory, start_s: float = 0.0, end_s: float = float("inf")
) -> list[Word]:
    """When each word of `text` is said.

    Args:
        log_probs: (S, V) float32, of the phoneme head, with full context.
        start_s, end_s: of the segment that they are of.
    Raises:
        ValueError: when that cannot be told: a number is not written as it is read, a word cannot be read, there are more phones than frames.
    """
    read = lexicon.words(text)
    places = place_words(text, read)
    if places is None:
        raise ValueError("a word is not written as it is read")
    phones = [phone for _, own in read for phone in own]
    if UNKNOWN in phones:
        raise ValueError("a word that nobody can read")
    try:
        ids = inventory.encode(phones)
    except RecipeError as error:
        raise ValueError("a phone that the model does not have") from error
    frames = forced_align(log_probs, ids)
    times = []
    for (start, first), (end, behind) in itertools.pairwise([(0, 0), *places]):
        frame_s = ENCODER_FRAME_MS / 1000
        said = (start_s + frame_s * int(frames[first, 0]), min(start_s + frame_s * (int(frames[behind - 1, 1]) + 1), end_s))
        times.append(Word(re.sub(r"^[\W_]+", "", text[start:end]), *said))
    return times


def as_json(found: Sequence[Segment]) -> list[dict[str, object]]:
    """The segments as JSON has them: `words` is left out where none were wanted, and is null, beside `untimed`, where there are none."""
    rows: list[dict[str, object]] = []
    for segment in found:
        row: dict[str, object] = {"start_s": round(segment.start_s, 3), "end_s": round(segment.end_s, 3), "text": segment.text}
        if segment.words is not None:
            row["words"] = [{"text": word.text, "start_s": round(word.start_s, 3), "end_s": round(word.end_s, 3)} for word in segment.words]
        elif segment.untimed is not None:
            row |= {"words": None, "untimed": segment.untimed}
        rows.append(row)
    return rows


def full_text(found: Sequence[Segment]) -> str:
    """All texts, joined as their scripts want it."""
    return joined([segment.text for segment in found])


def as_srt(found: Sequence[Segment]) -> str:
    """SubRip subtitles; see cues."""
    numbered = enumerate(cues(found), 1)
    return "\n".join(f"{number}\n{_clock(start_s, ',')} --> {_clock(end_s, ',')}\n{_one_line(text)}\n" for number, (start_s, end_s, text) in numbered)


def as_vtt(found: Sequence[Segment]) -> str:
    """WebVTT subtitles; see cues."""
    told = [f"{_clock(start_s, '.')} --> {_clock(end_s, '.')}\n{_escaped(_one_line(text))}\n" for start_s, end_s, text in cues(found)]
    return "\n".join(["WEBVTT\n", *told])


def cues(found: Sequence[Segment]) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and text, of subtitles: a segment each; one that is longer than MAX_CUE_S, and whose words are timed, gives several.

    Segments without text give none.
    """
    made: list[tuple[float, float, str]] = []
    for segment in found:
        start_s, last_s, begin, place = segment.start_s, segment.start_s, 0, 0
        for word in segment.words or ():
            place = segment.text.index(word.text, place)
            if word.end_s - start_s > MAX_CUE_S and re.search(r"\w", segment.text[begin:place]):
                made.append((start_s, last_s, segment.text[begin:place].strip()))
                start_s, begin = word.start_s, place
            place, last_s = place + len(word.text), word.end_s
        if segment.text[begin:].strip():
            made.append((start_s, segment.end_s, segment.text[begin:].strip()))
    return made


def _one_line(text: str) -> str:
    """An empty line would end a cue."""
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{milliseconds:03}"
