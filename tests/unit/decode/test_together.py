"""Many sessions at once: each gets what it gets alone, in any order of arrival, whatever becomes of the others; and passes are shared."""

import gc
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny import make_talkative, tiny_llm, tiny_speech_llm

from nim4.decode.streaming import Job, Recogniser, new_rows
from nim4.decode.together import Task, alone, run, step
from nim4.model.conformer import Context
from nim4.model.rows import Read

LENGTHS = (40_000, 26_000, 5_000, 60_000, 0, 33_333)  # samples
CONTEXTS = (Context(16, 4), Context(4, 16), Context(10, 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False)))


class Found:
    """A hotword index that finds a name in the second chunk."""

    def __init__(self):
        self.hits, self.chunks = [], 0

    def stream(self):
        return Found()

    def push_labels(self, labels):
        self.chunks += 1
        if self.chunks == 2:
            self.hits = [HIT]


@dataclass
class Named:
    text: str


@dataclass
class Hit:
    start: int = 0
    end: int = 4
    cost: float = 0.0
    names: list = field(default_factory=lambda: [Named("ab")])
    span: tuple = (0, 4)


HIT = Hit()


def recognisers(model):
    """Of different chunks, one with hotwords, that share their passes."""
    rows = new_rows(model)
    return [*(Recogniser(model, context, rows=rows) for context in CONTEXTS), Recogniser(model, hotwords=Found(), limits=None, rows=rows)]


def noise(num_samples, seed):
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    return (0.05 * (1 + np.sin(9 * time)) * rng.standard_normal(num_samples)).clip(-1, 1).astype(np.float32)


def pieces_of(number, rng):
    """A recording in pieces of any size, at the latest the last of which is empty."""
    samples = noise(LENGTHS[number % len(LENGTHS)], number)
    return [*np.split(samples, np.sort(rng.integers(0, len(samples) + 1, 6))), np.zeros(0, np.float32)]


def by_itself(session, pieces):
    seen = []
    for piece in pieces[:-1]:
        session.append(piece)
        seen.append(session.partial())
    session.append(pieces[-1])
    return [*seen, session.finalize()]


@pytest.fixture(scope="module")
def expected(model):
    """By recogniser, recording and seed of its split: what a session alone gives."""
    known = {}

    def of(kind, number, seed):
        key = (kind, number, seed)
        if key not in known:
            known[key] = by_itself(recognisers(model)[kind].session(["x"] * (number % 2)), pieces_of(number, np.random.default_rng(seed)))
        return known[key]

    return of


@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink a failure takes minutes
@given(data=st.data())
def test_sessions_get_what_they_get_alone_in_any_order(model, expected, data):
    kinds = recognisers(model)
    who = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=7))
    sessions = [kinds[kind].session(["x"] * (number % 2)) for kind, number, _ in who]
    waiting = [pieces_of(number, np.random.default_rng(seed)) for _, number, seed in who]
    seen = [[] for _ in who]
    while any(waiting):
        ready = [number for number, pieces in enumerate(waiting) if pieces]
        chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=len(ready), unique=True))
        jobs = [Job(sessions[number], waiting[number].pop(0), not waiting[number]) for number in chosen]
        for number, hypothesis in zip(chosen, kinds[0].hear(jobs), strict=True):
            seen[number].append(hypothesis)
    assert seen == [expected(*own) for own in who]
    assert len({own[-1].text for own in seen}) > 1 or len({own[1] for own in who}) < 3


def test_tasks_that_begin_at_any_time_share_what_they_can(model, expected):
    kinds, rng = recognisers(model), np.random.default_rng(0)
    who = [(kind, number, 0) for kind, number in ((0, 0), (1, 1), (3, 3), (0, 3), (2, 5), (0, 2))]

    def work(kind, number, seed):
        session = kinds[kind].session(["x"] * (number % 2))
        pieces, seen = pieces_of(number, np.random.default_rng(seed)), []
        for place, piece in enumerate(pieces):
            seen.append((yield from session.hearing(piece, place == len(pieces) - 1)))
        return seen

    tasks, works = [], [work(*own) for own in who]
    while works or any(task.request is not None for task in tasks):
        if works and rng.random() < 0.3:
            tasks.append(Task(works.pop(0)))
        step([task for task in tasks if task.request is not None])
    assert [task.value() for task in tasks] == [expected(*own) for own in who]


def passes(model, work):
    """How often the encoder and the language model are called."""
    counts = [0, 0]

    def counted(number):
        def count(*_):
            counts[number] += 1

        return count

    hooks = [model.acoustic.head.register_forward_pre_hook(counted(0)), model.llm.model.register_forward_pre_hook(counted(1))]
    work()
    for hook in hooks:
        hook.remove()
    return counts


def test_passes_are_shared(model):
    recogniser, samples = Recogniser(model), [noise(21_080, seed) for seed in range(8)]

    def one(number):
        session = recogniser.session()
        return lambda: recogniser.hear([Job(session, samples[number])])

    sessions = [recogniser.session() for _ in samples]
    together = passes(model, lambda: recogniser.hear([Job(*pair) for pair in zip(sessions, samples, strict=True)]))
    single = [passes(model, one(number)) for number in range(8)]
    assert together[0] == max(count for count, _ in single) == 2
    assert together[1] <= 3 + max(count for _, count in single) < sum(count for _, count in single) / 3


def test_a_chunk_is_heard_encoded_and_read_in_one_step(model):
    recogniser = Recogniser(model)
    late, early = (recogniser.session() for _ in range(2))
    task = Task(early.hearing(noise(10_840, 0), False))
    step([task])
    assert isinstance(task.request, Read)
    other = Task(late.hearing(noise(10_840, 1), False))
    seen = passes(model, lambda: step([task, other]))
    assert seen in ([1, 1], [1, 2])  # of the language model, one for a token and one for a chunk, where padding would cost more than a pass
    assert isinstance(other.request, Read)


def test_one_that_fails_does_not_harm_the_others(model, expected, monkeypatch):
    kinds = recognisers(model)
    good, bad, ended, broken = (kinds[0].session() for _ in range(4))
    ended.abort()
    monkeypatch.setattr(broken._hotwords, "hear", lambda *_: 1 / 0)
    pieces = pieces_of(0, np.random.default_rng(0))
    for place, piece in enumerate(pieces):
        wrong = [Job(bad, np.full(9, np.nan, np.float32)), Job(ended, piece), Job(broken, noise(30_000, 1))]
        found = kinds[0].hear([*wrong, Job(good, piece, place == len(pieces) - 1)])
        assert [type(own) for own in found[:3]] == [ValueError, RuntimeError, ZeroDivisionError]
    assert found[3] == expected(0, 0, 0)[-1]
    for place, piece in enumerate(pieces):  # whose samples were none goes on
        (last,) = kinds[0].hear([Job(bad, piece, place == len(pieces) - 1)])
    assert last.text == expected(0, 0, 0)[-1].text


def test_a_shared_step_that_fails_is_done_again_without_who_spoils_it(model, monkeypatch):
    kinds = recognisers(model)
    sessions = [kinds[0].session() for _ in range(5)]
    spoiler, read = sessions[2]._row, Read.together

    def spoiled(reads):
        if any(one.row is spoiler for one in reads):
            raise RuntimeError("out of memory")
        return read(reads)

    monkeypatch.setattr(Read, "together", staticmethod(spoiled))
    samples = noise(10_840, 3)
    found = kinds[0].hear([Job(session, samples) for session in sessions])
    assert isinstance(found[2], RuntimeError)
    monkeypatch.undo()
    session = kinds[0].session()
    session.append(samples)
    assert [*(found[number] for number in (0, 1, 3, 4)), sessions[2].partial()] == [session.partial()] * 5  # nothing of its speech is lost


def test_a_session_that_is_aborted_in_the_middle_leaves_nothing(model):
    recogniser = Recogniser(model)
    kept, gone = recogniser.session(), recogniser.session()
    tasks = [Task(session.hearing(noise(40_000, 1), False)) for session in (kept, gone)]
    for _ in range(3):
        step(tasks)
    place = gone._row.place
    gone.abort()
    while going := [task for task in tasks if task.request is not None]:
        step(going)
    other = recogniser.session()
    other.append(noise(40_000, 1))
    assert tasks[0].value() == other.partial()
    assert tasks[1].error is not None
    del tasks
    gc.collect()
    assert place in (other._row.place, recogniser.session()._row.place)


def test_a_session_has_one_job_at_a_time(model):
    recogniser = Recogniser(model)
    session = recogniser.session()
    with pytest.raises(ValueError, match="one job at a time"):
        recogniser.hear([Job(session, noise(10, 0)), Job(session, noise(10, 0))])
    assert recogniser.hear([]) == []


def test_work_without_requests_and_work_that_raises():
    def nothing():
        return 7
        yield

    def wrong():
        raise KeyError("x")
        yield

    assert alone(nothing()) == 7
    tasks = run([nothing(), wrong()])
    assert (tasks[0].value(), type(tasks[1].error)) == (7, KeyError)
    with pytest.raises(KeyError):
        tasks[1].value()
