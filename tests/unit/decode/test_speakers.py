"""Simulated speakers: when each sees what, and that company changes only that."""

import itertools

import numpy as np
import pytest
from tiny import make_talkative, tiny_llm, tiny_model, tiny_speech_llm

from nim4.decode.encoder import StreamingEncoder
from nim4.decode.speakers import follow
from nim4.decode.streaming import Recogniser
from nim4.model.conformer import Context

SECOND = 16_000


def noise(num_samples):
    return (0.1 * np.random.default_rng(num_samples).standard_normal(num_samples)).astype(np.float32)


class Counter:
    """A stream in chunks of a second, whose results say what has come."""

    missing_samples = SECOND

    def __init__(self, name):
        self.name = name


class Clock:
    """Compute takes as long as it is told: `hear` winds it on."""

    def __init__(self, seconds_of_piece):
        self.now_s, self.seconds_of_piece, self.heard = 0.0, seconds_of_piece, []

    def __call__(self):
        return self.now_s

    def hear(self, stream, piece):
        self.now_s += self.seconds_of_piece
        self.heard.append(stream.name)
        yield from ()
        return stream.name, None if piece is None else len(piece)


def told(heard):
    return [(row.heard_s, row.clock_s, row.work_s, row.result[1]) for row in heard]


def test_a_lone_speaker_waits_for_compute_that_takes_longer_than_a_chunk():
    clock = Clock(1.5)
    (heard,) = follow([np.zeros(2 * SECOND + 4000, np.float32)], [Counter("a")], clock.hear, clock)
    assert told(heard) == [(1.0, 2.5, 1.5, SECOND), (2.0, 4.0, 1.5, SECOND), (2.25, 5.5, 1.5, 4000), (2.25, 7.0, 1.5, None)]


def test_what_has_come_is_done_together_and_waited_for():
    clock = Clock(0.25)
    streams = [Counter("a"), Counter("b")]
    first, second = follow([np.zeros(2 * SECOND, np.float32), np.zeros(SECOND + 8000, np.float32)], streams, clock.hear, clock)
    # both at 1.0 for half a second; b alone at 1.5 and at its end, while a goes on speaking; then a
    assert told(first) == [(1.0, 1.5, 0.25, SECOND), (2.0, 2.25, 0.25, SECOND), (2.0, 2.5, 0.25, None)]
    assert told(second) == [(1.0, 1.5, 0.25, SECOND), (1.5, 1.75, 0.25, 8000), (1.5, 2.0, 0.25, None)]
    assert clock.heard == ["a", "b", "b", "b", "a", "a"]


def test_silence_of_no_length_ends_at_once():
    clock = Clock(0.5)
    (heard,) = follow([np.zeros(0, np.float32)], [Counter("a")], clock.hear, clock)
    assert told(heard) == [(0.0, 0.5, 0.5, None)]
    assert follow([], [], clock.hear, clock) == []


@pytest.mark.parametrize("kind", ["ctc", "llm"])
def test_each_gets_what_it_gets_alone(kind, tmp_path):
    recordings = [noise(number) for number in (40_000, 26_000, 5_000, 60_000, 33_333)]
    if kind == "ctc":
        from nim4.decode.ctc import _hear

        model = tiny_model().eval()
        make = lambda: StreamingEncoder(model, Context(4, 2))  # noqa: E731
        seen = lambda row: row.result[1]  # noqa: E731
    else:
        from nim4.decode.spoken_cuts import _hear

        recogniser = Recogniser(make_talkative(tiny_speech_llm(tiny_llm(tmp_path))))
        make = recogniser.session
        seen = lambda row: (row.result.text, row.result.settled_chars, row.result.is_final)  # noqa: E731
    alone = [follow([own], [make()], _hear)[0] for own in recordings]
    together = follow(recordings, [make() for _ in recordings], _hear)
    for one, other in zip(alone, together, strict=True):
        assert [(row.heard_s, seen(row)) for row in one] == [(row.heard_s, seen(row)) for row in other]
    assert any(seen(row) for row in itertools.chain(*together))
