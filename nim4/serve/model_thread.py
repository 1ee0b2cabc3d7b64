"""A thread that does all work of a model: what streams hear and what is written for uploads, together; the rest one by one, in between."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nim4.decode.streaming import Hypothesis, Job
from nim4.decode.together import Task, Work, step


class ModelThread:
    """Takes work of any thread, and does it in its own.

    Whatever waits when a step ends takes part in the next one, so nobody waits for another's text, only for a step of those that are there.

    Args:
        on_step: told, in this thread, how many pieces of work take part in a step.
    """

    def __init__(self, on_step: Callable[[int], None] = lambda num_pieces: None):
        self._on_step = on_step
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._going: list[tuple[Task[Any], Future[Any]]] = []
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls a function between two steps. Raises RuntimeError after `shutdown`."""
        future: Future[Any] = Future()

        def call() -> None:
            if not self._open:
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*args))
                except Exception as error:
                    future.set_exception(error)

        self._put(call)
        return future

    def hear(self, job: Job) -> Future[Hypothesis]:
        """Does a session's job as `do`."""
        return self.do(job.session.hearing(job.samples, job.ends))

    def do(self, work: Work[Any]) -> Future[Any]:
        """Does a piece of work, together with that of others; what is cancelled meanwhile takes part in no further step.

        Raises RuntimeError after `shutdown`.
        """
        future: Future[Any] = Future()

        def begin() -> None:
            if not self._open:
                future.cancel()
            if not future.cancelled():
                self._going.append((Task(work), future))

        self._put(begin)
        return future

    def shutdown(self) -> None:
        """Ends the thread after the step or call that is going on; what waits is cancelled."""
        with self._lock:
            self._open = False
            self._waiting.put(None)
        self._thread.join()

    def _put(self, work: Callable[[], None]) -> None:
        with self._lock:
            if not self._open:
                raise RuntimeError("the model thread has ended")
            self._waiting.put(work)

    def _run(self) -> None:
        while True:
            num_waiting = self._waiting.qsize()
            self._tell()  # now, so that what was cancelled makes room for what is counted as waiting
            for _ in range(max(num_waiting, 0 if self._going else 1)):
                if not self._begin():
                    for _, future in self._going:
                        if future.set_running_or_notify_cancel():
                            future.set_exception(RuntimeError("the model thread has ended"))
                    return
            self._tell()
            if self._going:
                self._on_step(len(self._going))
                step([task for task, _ in self._going])

    def _begin(self) -> bool:
        """Begins, or calls, what has waited longest, and keeps nothing of it here; False at the end."""
        work = self._waiting.get()
        if work is not None:
            work()
        return work is not None

    def _tell(self) -> None:
        """Gives their results to those whose work has ended, and lets go of what nobody waits for any more."""
        going, self._going = self._going, []
        for task, future in going:
            if future.cancelled():
                continue
            if task.request is not None:
                self._going.append((task, future))
            elif future.set_running_or_notify_cancel():
                if task.error is None:
                    future.set_result(task.result)
                else:
                    future.set_exception(task.error)
