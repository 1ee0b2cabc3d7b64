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
            if self._begins(future):
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
        """Does a piece of work, together with that of others. Raises RuntimeError after `shutdown`."""
        future: Future[Any] = Future()

        def begin() -> None:
            if self._begins(future):
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

    def _begins(self, future: Future[Any]) -> bool:
        """Whether it is still wanted, and may be done."""
        if not self._open:
            future.cancel()
        return future.set_running_or_notify_cancel()

    def _run(self) -> None:
        while True:
            for _ in range(max(self._waiting.qsize(), 0 if self._going else 1)):
                work = self._waiting.get()
                if work is None:
                    for _, future in self._going:
                        future.set_exception(RuntimeError("the model thread has ended"))
                    return
                work()
            self._tell()
            tasks = [task for task, _ in self._going]
            if tasks:
                self._on_step(len(tasks))
                step(tasks)
                self._tell()

    def _tell(self) -> None:
        """Gives their results to those whose work has ended."""
        ended = [(task, future) for task, future in self._going if task.request is None]
        self._going = [(task, future) for task, future in self._going if task.request is not None]
        for task, future in ended:
            if task.error is None:
                future.set_result(task.result)
            else:
                future.set_exception(task.error)
