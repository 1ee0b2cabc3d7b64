"""Work in an event loop of another thread: it holds nobody up, and whoever gives it up finds it gone."""

import asyncio
import threading
import time

import pytest

from nim4.serve.own_loop import Ended, OwnLoop


def run(work):
    """Runs `work(loop)`, and ends the loop."""

    async def main():
        loop = OwnLoop("test")
        try:
            return await asyncio.wait_for(work(loop), 20)
        finally:
            await loop.end(asyncio.sleep(0))
            assert "test" not in {thread.name for thread in threading.enumerate()}

    return asyncio.run(main())


async def blocked(seconds):
    time.sleep(seconds)
    return threading.current_thread().name


def test_what_blocks_there_holds_up_nobody_here():
    async def work(loop):
        waiting, ticks = asyncio.create_task(loop.do(blocked(0.5))), 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await waiting, ticks

    name, ticks = run(work)
    assert name == "test"
    assert ticks > 10


def test_errors_come_back():
    async def fail():
        raise ValueError("no")

    async def work(loop):
        with pytest.raises(ValueError, match="no"):
            await loop.do(fail())
        return await loop.do(blocked(0))

    assert run(work) == "test"


def test_who_is_cancelled_waits_until_the_work_has_ended():
    events = []

    async def slow():
        try:
            await asyncio.sleep(60)
        finally:
            time.sleep(0.2)
            events.append("ended")

    async def work(loop):
        waiting = asyncio.create_task(loop.do(slow()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        events.append("cancelled")

    run(work)
    assert events == ["ended", "cancelled"]


def test_who_waits_when_the_loop_is_ended_is_told_and_so_is_who_comes_later():
    did = []

    async def last():
        await asyncio.sleep(0.5)
        did.append("last")

    async def work(loop):
        waiting = asyncio.create_task(loop.do(asyncio.sleep(60)))
        await asyncio.sleep(0.05)
        ending = asyncio.create_task(loop.end(last()))
        await asyncio.sleep(0.05)
        with pytest.raises(Ended):  # at once, although the last thing is still done
            await loop.do(asyncio.sleep(0))
        assert not ending.done()
        await ending
        assert did == ["last"]
        with pytest.raises(Ended):
            await waiting
        await loop.end(last())
        assert did == ["last"]

    run(work)


def test_a_loop_ends_also_when_the_last_thing_fails():
    async def fail():
        raise OSError("no")

    async def work(loop):
        with pytest.raises(OSError, match="no"):
            await loop.end(fail())

    run(work)
