"""CUDA graphs: a recorded function starts all its kernels at once, where Python would start them one by one and the GPU would wait."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

Size = TypeVar("Size")


def size_for(number: int, sizes: Sequence[int]) -> int:
    """The smallest of the rising `sizes` that is large enough; beyond the last, multiples of it."""
    return next((size for size in sizes if size >= number), -(-number // sizes[-1]) * sizes[-1])


class Graphs(Generic[Size]):
    """A function, recorded once for each size of its input, when that is first wanted: a fraction of a second. Without a GPU it is called.

    Args:
        make: a size -> what the function takes: a tensor first, and all of them filled so that it may run.
        work: takes them, and returns tensors; what else it reads must stay where it is.
    """

    def __init__(self, make: Callable[[Size], Sequence[Any]], work: Callable[..., Any]):
        self._make, self._work = make, work
        self._made: dict[Size, tuple[Sequence[Any], torch.cuda.CUDAGraph | None, Any]] = {}

    def forget(self) -> None:
        """To be called when something that the function reads has moved."""
        self._made.clear()

    def inputs(self, size: Size) -> Sequence[Any]:
        """What `run` of this size reads; the caller fills the tensors of it."""
        if size not in self._made:
            inputs = self._make(size)
            self._made[size] = (inputs, *self._record(inputs)) if inputs[0].is_cuda else (inputs, None, None)
        return self._made[size][0]

    def run(self, size: Size) -> Any:
        """What the function returns for the inputs of this size; good until the next run, of whatever size."""
        inputs, graph, outputs = self._made[size]
        if graph is None:
            return self._work(*inputs)
        graph.replay()
        return outputs

    def _record(self, inputs: Sequence[Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries choose their kernels before anything is recorded
            for _ in range(2):
                self._work(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # All share memory, since results are used up before the next run: that of a graph which is still there; what forgotten ones had is gone.
        pool = next((other.pool() for _, other, _ in self._made.values() if other is not None), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = self._work(*inputs)
        return graph, outputs
