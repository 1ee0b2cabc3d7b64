#!/usr/bin/env python3
"""How many people one model follows in real time, with their work done together and one by one: simulated speakers, no network.

N speakers say utterances of --utterance-s with pauses of 30 % of the time, each at another place of it, as fast as people speak. Each chunk goes
to the model thread of the server (nim4/serve/model_thread.py) when its last sample has been said: `together`, where all that waits when a step
ends takes part in the next one, or `one by one`. Lag: from then to the partial text; a stream has one chunk there at a time, what comes meanwhile
waits and counts. Final: from the end of an utterance to its final text. The first seconds of each N are not counted. A way holds N when the 95th
percentile of the lag is below a chunk of 640 ms. The largest such N is looked for from --streams on, in --tries for each way: twice or half as many
until one is held and one is not, then the number between them. Model and texts: see streaming_model.py; with random weights a text is written for
every chunk, with others only when something new was heard.
"""

import argparse
import gc
import heapq
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
import torch
from common import keep, make_record, parser_for
from streaming_model import Measured, Recordings, add_model_options, load_measured
from streaming_ways import in_chunks

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.decode.streaming import Hypothesis, Job, Recogniser, StreamingSession
from nim4.report.benchmarks import as_markdown
from nim4.serve.model_thread import ModelThread

CHUNK_S = 0.64
PAUSE_SHARE = 0.3
HOPELESS_S = 5.0  # who is so late will not catch up
NUM_RECORDINGS = 8  # said in turn
COLUMNS = ("lag_p50_ms", "lag_p95_ms", "latest_ms", "final_p50_ms", "final_p95_ms", "partials_per_s", "steps_per_s", "sessions_per_step")
TOGETHER, ALONE = "together", "one by one"


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=None)
    parser.add_argument("--streams", type=int, nargs=2, default=[128, 4], help="speakers of the first try, together and one by one")
    parser.add_argument("--most", type=int, default=768, help="speakers there is room for")
    parser.add_argument("--tries", type=int, nargs=2, default=[6, 4], help="for each way")
    parser.add_argument("--utterance-s", type=float, default=10.0, help="length of an utterance")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured for each number of speakers")
    parser.add_argument("--warm-up-s", type=float, default=3.0, help="before that")
    add_model_options(parser)
    return parser


@dataclass(frozen=True)
class Said:
    """An utterance: pieces that complete a chunk each, and the rest at its end."""

    pieces: list[np.ndarray]
    rest: np.ndarray

    @property
    def length_s(self) -> float:
        return (sum(map(len, self.pieces)) + len(self.rest)) / SAMPLING_RATE_HZ

    def after(self, length_s: float) -> "Said":
        """What is left of it, at least a chunk, when so much has been said."""
        skipped = min(int(length_s / self.length_s * len(self.pieces)), len(self.pieces) - 1)
        return Said([self.pieces[0], *self.pieces[skipped + 1 :]], self.rest)


@dataclass
class Measure:
    """Seconds that texts took, of what was due within a stretch of time.

    Attributes:
        latest_s: the longest of all, whenever they were due.
        steps: sessions that took part in each step of the model.
        error: the first.
        is_over: nothing more is wanted.
    """

    start_s: float
    end_s: float
    lag: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    latest_s: float = 0.0
    steps: list[int] = field(default_factory=list)
    error: BaseException | None = None
    is_over: bool = False

    def add(self, due_s: float, ends: bool) -> None:
        late_s = time.perf_counter() - due_s
        self.latest_s = max(self.latest_s, late_s)
        if self.start_s <= due_s < self.end_s:
            (self.final if ends else self.lag).append(late_s)


class Speaker:
    """One stream at the model thread: its pieces go there one at a time, in order."""

    def __init__(self, thread: ModelThread, recogniser: Recogniser, way: str, measure: Measure):
        self._thread, self._recogniser, self._together, self._measure = thread, recogniser, way == TOGETHER, measure
        self._waiting: deque[tuple[float, np.ndarray, bool]] = deque()
        self._busy = False
        self._session: StreamingSession | None = None
        self._lock = threading.Lock()

    def say(self, due_s: float, samples: np.ndarray, ends: bool) -> None:
        """Gives the samples that have been said by now to the model."""
        self._waiting.append((due_s, samples, ends))
        self._go_on()

    def _go_on(self) -> None:
        with self._lock:
            if self._busy or not self._waiting or self._measure.is_over:
                return
            self._busy = True
        if self._session is None:
            self._submitted(self._thread.submit(self._recogniser.session), self._begun)
            return
        due_s, samples, ends = self._waiting.popleft()
        job = Job(self._session, samples, ends)
        if ends:
            self._session = None
        future = self._thread.hear(job) if self._together else self._thread.submit(self._hear_alone, job)
        self._submitted(future, lambda _: self._measure.add(due_s, ends))

    def _hear_alone(self, job: Job) -> Hypothesis:
        (heard,) = self._recogniser.hear([job])
        if isinstance(heard, Exception):
            raise heard
        return heard

    def _begun(self, session: StreamingSession) -> None:
        self._session = session

    def _submitted(self, future: Future[Any], done: Callable[[Any], None]) -> None:
        def free(future: Future[Any]) -> None:
            if self._measure.is_over:
                return
            if future.exception() is not None:
                self._measure.error = self._measure.error or future.exception()
                return
            done(future.result())
            self._busy = False
            self._go_on()

        future.add_done_callback(free)


def schedule(said: Sequence[Said], number: int, began_s: float, phase_s: float, pause_s: float) -> Iterator[tuple[float, np.ndarray, bool]]:
    """What a speaker says for ever: when the last sample of it is said, the samples, and whether an utterance ends there.

    Args:
        number: of the speaker.
        phase_s: how far into an utterance and the pause behind it they are when it begins.
    """
    own = said[number % len(said)]
    at_s = began_s + (0.0 if phase_s < own.length_s else own.length_s + pause_s - phase_s)
    own = own.after(phase_s) if phase_s < own.length_s else own
    while True:
        for piece in own.pieces:
            at_s += len(piece) / SAMPLING_RATE_HZ
            yield at_s, piece, False
        at_s += len(own.rest) / SAMPLING_RATE_HZ
        yield at_s, own.rest, True
        at_s, number = at_s + pause_s, number + 1
        own = said[number % len(said)]


def speak(speakers: Sequence[Speaker], plans: Sequence[Iterator[tuple[float, np.ndarray, bool]]], measure: Measure) -> None:
    """Lets all speak until the measure has been taken, or is hopeless."""
    following = [next(plan) for plan in plans]
    coming = [(following[number][0], number) for number in range(len(plans))]
    heapq.heapify(coming)
    expected = 0
    while coming[0][0] < measure.end_s and measure.latest_s < HOPELESS_S and measure.error is None:
        due_s, number = coming[0]
        time.sleep(max(due_s - time.perf_counter(), 0.0))
        speakers[number].say(*following[number])
        expected += due_s >= measure.start_s
        following[number] = next(plans[number])
        heapq.heapreplace(coming, (following[number][0], number))
    last_s = time.perf_counter() + HOPELESS_S
    while len(measure.lag) + len(measure.final) < expected and measure.error is None and measure.latest_s < HOPELESS_S:
        if time.perf_counter() > last_s:
            measure.latest_s = HOPELESS_S
        time.sleep(0.01)


def warm_up(recogniser: Recogniser, said: Said, size: int) -> None:
    """So many sessions at once: memory, kernels and graphs are set up before the clock starts."""
    sessions = [recogniser.session() for _ in range(size)]
    for samples in (*said.pieces, said.rest):
        for heard in recogniser.hear([Job(session, samples, samples is said.rest) for session in sessions]):
            if isinstance(heard, Exception):
                raise heard


@dataclass
class Search:
    """Looks for the largest number that is held.

    Attributes:
        following: to be tried next; None = no more.
    """

    following: int | None
    most: int
    tries: int
    held: int = 0
    not_held: int = 0

    def tell(self, holds: bool) -> None:
        """Whether `following` is held."""
        self.tries -= 1
        if holds:
            self.held = self.following
        else:
            self.not_held = self.following
        if self.not_held and self.held:
            between = (self.held + self.not_held) // 2
            between = between - between % 8 if between > 32 else between
            self.following = between if self.held < between < self.not_held else None
        else:
            self.following = min(2 * self.held, self.most) if holds else self.not_held // 2
        if self.tries == 0 or self.following in (self.held, 0):
            self.following = None


def held(measured: Measured, recogniser: Recogniser, said: Sequence[Said], count: int, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """A line of the table: `count` speakers at once."""
    began_s = time.perf_counter() + 0.5
    measure = Measure(began_s + args.warm_up_s, began_s + args.warm_up_s + args.seconds)
    thread, pause_s = ModelThread(measure.steps.append), said[0].length_s * PAUSE_SHARE / (1 - PAUSE_SHARE)
    speakers = [Speaker(thread, recogniser, way, measure) for _ in range(count)]
    cycle_s = said[0].length_s + pause_s
    plans = [schedule(said, number, began_s, cycle_s * number / count, pause_s) for number in range(count)]
    try:
        with measured.scripted():
            speak(speakers, plans, measure)
    finally:
        measure.is_over = True
        thread.shutdown()
    if measure.error is not None:
        raise measure.error
    lag, final = (1000 * np.array(seconds or [np.nan]) for seconds in (measure.lag, measure.final))
    holds = bool(measure.lag) and measure.latest_s < HOPELESS_S and np.percentile(lag, 95) < 1000 * CHUNK_S
    numbers = (
        *np.percentile(lag, (50, 95)).tolist(),
        1000 * measure.latest_s,
        *np.percentile(final, (50, 95)).tolist(),
        len(measure.lag) / args.seconds,
        len(measure.steps) / (time.perf_counter() - began_s) if measure.steps else "-",
        float(np.mean(measure.steps)) if measure.steps else 1.0,
    )
    return {"streams": count, "way": way, "holds": "yes" if holds else "no"} | dict(zip(COLUMNS, numbers, strict=True))


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if min(*args.streams, *args.tries, args.seconds, args.utterance_s - CHUNK_S) <= 0 or args.warm_up_s < 0 or max(args.streams) > args.most:
        found = (args.streams, args.most, args.tries, args.seconds, args.utterance_s, args.warm_up_s)
        names, expected = (
            "--streams, --most, --tries, --seconds, --utterance-s, --warm-up-s",
            "numbers above 0, no try above the most, and utterances of more than a chunk",
        )
        raise RecipeError(names, expected=expected, found=found, fix="correct them")
    measured = load_measured(args)
    recordings = Recordings(measured)
    recogniser = Recogniser(measured.model, rows=measured.rows(args.most, args.utterance_s))
    said = [Said(*in_chunks(measured.model, recordings.samples(number, args.utterance_s))) for number in range(NUM_RECORDINGS)]
    rows: list[dict[str, Any]] = []
    kept = None
    for way, first, tries in zip((TOGETHER, ALONE), args.streams, args.tries, strict=True):
        search = Search(first, args.most, tries)
        while search.following is not None:
            try:
                with measured.scripted():
                    warm_up(recogniser, said[0], min(search.following, 16) if way == TOGETHER else 1)
                row = held(measured, recogniser, said, search.following, way, args)
            except torch.OutOfMemoryError:
                row = {"streams": search.following, "way": f"{way}: out of memory", "holds": "no"} | dict.fromkeys(COLUMNS, "-")
            search.tell(row["holds"] == "yes")
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            gc.collect()
            size = f"utterances of {args.utterance_s:g} s, {args.seconds:g} s for each number; {measured.about}"
            record = make_record(args, __doc__.split("\n")[0], size, rows, measured.device)
            keep(args, record, instead_of=kept)  # killed, it leaves what was measured
            kept = record
    print(as_markdown(kept))


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
