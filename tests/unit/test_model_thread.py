"""The thread of a model: steps are shared by all that have come, calls come in between, what is cancelled or too late does not run."""

import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass

import pytest

from nim4.serve.model_thread import ModelThread


@dataclass(eq=False)
class Ask:
    """A request whose answer is how many asked together."""

    order = 0
    kind = "ask"

    @staticmethod
    def together(asked):
        return [len(asked)] * len(asked)


def work(times, told):
    for _ in range(times):
        told.append((yield Ask()))
    return times


@pytest.fixture
def thread():
    sizes = []
    thread = ModelThread(sizes.append)
    thread.sizes = sizes
    yield thread
    thread.shutdown()


@pytest.fixture
def held(thread):
    """A thread that does nothing until `release` is set, and holds what comes meanwhile."""
    thread.release = threading.Event()
    started = threading.Event()
    thread.submit(lambda: (started.set(), thread.release.wait(10)))
    assert started.wait(10)
    return thread


def test_what_has_come_is_done_together_and_ends_when_it_is_done(held):
    told = [[], [], []]
    futures = [held.do(work(times, own)) for times, own in zip((1, 3, 2), told, strict=True)]
    held.release.set()
    assert [future.result(10) for future in futures] == [1, 3, 2]
    assert told == [[3], [3, 2, 1], [3, 2]]
    assert held.sizes == [3, 2, 1]


def test_who_comes_later_joins_the_next_step(thread):
    told, late = [], []

    def meets():
        yield Ask()
        late.append(thread.do(work(2, told)))
        yield Ask()
        return "met"

    assert thread.do(meets()).result(10) == "met"
    assert late[0].result(10) == 2
    assert told == [2, 1]


def test_calls_come_between_steps_and_in_order(held):
    order = []
    calls = [held.submit(order.append, number) for number in range(3)]
    held.do(work(1, []))
    held.release.set()
    for call in calls:
        call.result(10)
    assert order == [0, 1, 2]


def test_failures_are_those_of_one(held):
    def wrong():
        yield Ask()
        raise KeyError("x")

    futures = [held.do(wrong()), held.do(work(2, [])), held.submit(lambda: 1 / 0)]
    held.release.set()
    assert isinstance(futures[0].exception(10), KeyError)
    assert futures[1].result(10) == 2
    assert isinstance(futures[2].exception(10), ZeroDivisionError)


def test_what_is_cancelled_does_not_run(held):
    told = []
    futures = [held.do(work(1, told)), held.submit(told.append, "called")]
    for future in futures:
        assert future.cancel()
    held.release.set()
    held.submit(int).result(10)
    assert told == []


def test_what_is_cancelled_while_it_goes_takes_part_in_no_further_step(held):
    told, steps, closed = [], [], threading.Event()
    begun, go_on = threading.Event(), threading.Event()

    def endless():
        try:
            while True:
                steps.append((yield Ask()))
        finally:
            closed.set()

    def holds():
        yield Ask()
        begun.set()
        go_on.wait(10)
        yield Ask()
        return "done"

    holding, gone = held.do(holds()), held.do(endless())
    held.release.set()
    assert begun.wait(10)
    assert gone.cancel()
    go_on.set()
    assert holding.result(10) == "done"
    assert closed.wait(10)
    num_steps = len(steps)
    assert held.do(work(3, told)).result(10) == 3
    assert (told, len(steps)) == ([1, 1, 1], num_steps)


def test_the_end_cancels_what_waits_and_ends_what_goes_on():
    thread, told, going = ModelThread(), [], threading.Event()

    def endless():
        while True:
            going.set()
            yield Ask()

    running = thread.do(endless())
    assert going.wait(10)
    thread.shutdown()
    assert isinstance(running.exception(10), RuntimeError)
    for call in (lambda: thread.submit(int), lambda: thread.do(work(1, told))):
        with pytest.raises(RuntimeError, match="has ended"):
            call()

    thread, started, release = ModelThread(), threading.Event(), threading.Event()
    thread.submit(lambda: (started.set(), release.wait(10)))
    assert started.wait(10)
    waiting = thread.do(work(1, told))
    ending = threading.Thread(target=thread.shutdown)
    ending.start()
    while thread._open:
        pass
    release.set()
    ending.join(10)
    with pytest.raises(CancelledError):
        waiting.result(10)
    assert told == []
