"""Recordings as streams: simulated speakers who begin at the same moment, and one decoder that follows them all.

A piece can be decoded when it has been spoken. Whenever the decoder is free it takes what has come from all of them, together; what comes
meanwhile waits. So of several speakers each waits for work on the others too, as with a server, but the work of all is less.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from nim4.corpus.feats import SAMPLING_RATE_HZ, UNREADABLE, read_samples
from nim4.corpus.manifest import MonoCut
from nim4.decode.encoder import Stream, spoken
from nim4.decode.together import Work, run

Listening = TypeVar("Listening", bound=Stream)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Heard(Generic[Result]):
    """What came of a piece of a stream, or of its end.

    Attributes:
        heard_s: audio spoken so far.
        clock_s: when the result was there, on the speakers' clock.
        work_s: of compute, shared equally with the others whose pieces went along.
    """

    heard_s: float
    clock_s: float
    work_s: float
    result: Result


def follow(
    recordings: Sequence[np.ndarray],
    streams: Sequence[Listening],
    hear: Callable[[Listening, np.ndarray | None], Work[Result]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[Heard[Result]]]:
    """What came of the pieces of each recording, in order.

    Args:
        recordings: (N,) float32 samples in [-1, 1] at 16 kHz each.
        streams: one for each.
        hear: work on a piece, or for None on the end.
        clock: seconds of compute.
    """
    pieces = [spoken(samples, stream) for samples, stream in zip(recordings, streams, strict=True)]
    found: list[list[Heard[Result]]] = [[] for _ in streams]
    num_samples, now_s = [0] * len(streams), 0.0
    coming: dict[int, tuple[float, np.ndarray | None]] = {}  # stream -> when its next piece has been spoken, and the piece

    def speak(number: int) -> None:
        piece = next(pieces[number], None)
        num_samples[number] += 0 if piece is None else len(piece)
        coming[number] = num_samples[number] / SAMPLING_RATE_HZ, piece

    for number in range(len(streams)):
        speak(number)
    while coming:
        now_s = max(now_s, min(heard_s for heard_s, _ in coming.values()))
        come = [(number, *coming.pop(number)) for number in list(coming) if coming[number][0] <= now_s]
        started_s = clock()
        tasks = run([hear(streams[number], piece) for number, _, piece in come])
        took_s = clock() - started_s
        now_s += took_s
        for (number, heard_s, piece), task in zip(come, tasks, strict=True):
            found[number].append(Heard(heard_s, now_s, took_s / len(come), task.value()))
            if piece is not None:
                speak(number)
    return found


def in_groups(cuts: Sequence[MonoCut], speakers: int) -> list[list[MonoCut]]:
    """Those who speak at once: of like length, longest first."""
    ordered = sorted(cuts, key=lambda cut: (-cut.duration, cut.id))
    return [ordered[start : start + speakers] for start in range(0, len(ordered), speakers)]


def read_all(cuts: Sequence[MonoCut]) -> tuple[list[tuple[MonoCut, np.ndarray]], list[tuple[MonoCut, str]]]:
    """The samples of those that can be read, and of the others why they cannot."""
    read, unreadable = [], []
    for cut in cuts:
        try:
            read.append((cut, read_samples(cut)))
        except UNREADABLE as error:
            unreadable.append((cut, repr(error)))
    return read, unreadable
