"""Decoding on all cores of a machine: each process works on utterances of its own, with one thread.

What is done at a time, a chunk of a stream or the next token of a batch, is too little work to share: threads would mostly wait for each other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from nim4.config import RecipeError

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # of a worker process


def processes_of_one_thread(device: torch.device) -> int:
    """How many processes to decode in: the threads that torch has on a CPU, of which this process keeps one from now on; 1 on a GPU."""
    if device.type != "cpu":
        return 1
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return num_threads


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], num_processes: int) -> Iterator[Result]:
    """`work` of each item, in order.

    Args:
        work: may hold a model: processes are forked, and share its memory. Its results travel between processes.
        num_processes: 1 = this process does it.
    Raises:
        RecipeError: if a process was killed. What `work` raises is raised here.
    """
    num_processes = min(num_processes, len(items))
    if num_processes <= 1:
        yield from map(work, items)
        return
    try:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("fork"), initializer=_begin, initargs=(work,)) as pool:
            yield from pool.map(_do, items)
    except BrokenProcessPool as error:
        raise RecipeError(
            "parallel work", expected="all processes to live", found="one was killed, perhaps for memory", fix="set OMP_NUM_THREADS to use fewer"
        ) from error


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)


def _do(item: Any) -> Any:
    return _work(item)
