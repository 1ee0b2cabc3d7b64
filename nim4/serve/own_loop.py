"""An event loop in a thread of its own, for what holds up any loop that it is started in, as vLLM does for half a minute."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Ended(Exception):
    """The loop was ended before the work was done."""


class OwnLoop:
    """Runs coroutines in its thread for those who wait in another loop, which must always be the same one.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._loop, self._is_open = asyncio.new_event_loop(), True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine that runs there. A caller who is cancelled cancels it, and waits until it has ended: what follows finds it gone.

        Raises:
            Ended: if the loop is ended before it is done, or has been.
        """
        if not self._is_open:
            work.close()
            raise Ended
        tasks: list[asyncio.Task[Result]] = []
        done: Future[None] = Future()

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(tell)

        def tell(task: asyncio.Task[Result]) -> None:
            if not task.cancelled():
                task.exception()  # has been seen, even if nobody asks for it any more
            done.set_result(None)

        self._loop.call_soon_threadsafe(begin)
        waiting = asyncio.wrap_future(done)
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            await asyncio.wait([waiting])
            raise
        if tasks[0].cancelled():
            raise Ended
        return tasks[0].result()

    async def end(self, last: Coroutine[Any, Any, None]) -> None:
        """Does one thing more there, cancels what is going on, and ends the thread. Raises what that thing raises. An ended loop does nothing."""
        if not self._is_open:
            last.close()
            return
        self._is_open = False
        try:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._end(last), self._loop))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)

    async def _end(self, last: Coroutine[Any, Any, None]) -> None:
        try:
            await last
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._loop.shutdown_asyncgens()
