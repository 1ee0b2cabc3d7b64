"""Work of many sessions side by side: each says what it needs next, and what is alike is done at once.

A piece of work is a generator that yields requests, receives their answers and returns its result. It reads as if it were alone: who else
is there is the business of `step`, and neither the order of arrival nor another's failure changes what it gets.
"""

from collections.abc import Generator, Hashable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Request(Protocol):
    """Something that is cheaper for many at once.

    Attributes:
        order: of its kind in a step: who gets an answer and then wants something of a higher order has that in the same step.
    """

    order: ClassVar[int]

    @property
    def kind(self) -> Hashable:
        """Requests of one kind can be done together."""
        ...

    def together(self, requests: Sequence[Any]) -> Sequence[Any]:
        """The answers to requests of this kind; when it fails, each may be asked for again."""
        ...


Work = Generator[Any, Any, Result]


class Task(Generic[Result]):
    """A piece of work and how far it is.

    Attributes:
        request: what it waits for; None when it has ended.
        result: when it has ended well.
        error: when it has not.
    """

    @torch.inference_mode()
    def __init__(self, work: Work[Result]):
        self._work = work
        self.request: Request | None = None
        self.result: Result | None = None
        self.error: Exception | None = None
        self._go_on(None)

    def value(self) -> Result:
        """The result; raises what the work raised."""
        if self.error is not None:
            raise self.error
        return self.result

    def _go_on(self, answer: Any) -> None:
        try:
            self.request = self._work.throw(answer) if isinstance(answer, Exception) else self._work.send(answer)
        except StopIteration as end:
            self.request, self.result = None, end.value
        except Exception as error:
            self.request, self.error = None, error


@torch.inference_mode()  # once for all: entering it for each task would take some milliseconds of a step of hundreds
def step(tasks: Sequence[Task[Any]]) -> None:
    """Does what these tasks wait for, in the order of its kinds, and lets each go on to a request of an order that is over, or to its end.

    So in one step a chunk is heard, encoded and read, and who waits is never behind more than one pass of each kind.

    Args:
        tasks: that have not ended.
    """
    over = -1
    while due := [task for task in tasks if task.request is not None and task.request.order > over]:
        over = min(task.request.order for task in due)
        groups: dict[Hashable, list[Task[Any]]] = {}
        for task in due:
            if task.request.order == over:
                groups.setdefault(task.request.kind, []).append(task)
        for group in groups.values():
            for task, answer in zip(group, _answers([task.request for task in group]), strict=True):
                task._go_on(answer)


def _answers(requests: Sequence[Request]) -> Sequence[Any]:
    """An answer or an error for each: when many fail together, it is found out which of them do."""
    try:
        return requests[0].together(requests)
    except Exception as error:
        if len(requests) == 1:
            return [error]
    middle = len(requests) // 2
    return [*_answers(requests[:middle]), *_answers(requests[middle:])]


def run(works: Sequence[Work[Result]]) -> list[Task[Result]]:
    """Does pieces of work together, from their beginning to the end of the last."""
    tasks = [Task(work) for work in works]
    while going := [task for task in tasks if task.request is not None]:
        step(going)
    return tasks


def alone(work: Work[Result]) -> Result:
    """The result of a piece of work on its own; raises what it raises."""
    return run([work])[0].value()
