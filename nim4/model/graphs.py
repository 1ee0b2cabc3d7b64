"""Passes of the language model as CUDA graphs, for rows that read little each: otherwise the GPU waits for Python between kernels."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

WIDTHS = (1,)  # tokens of a row: an answer's next one; a chunk's speech is read with the prompt behind it, which is longer

Pass = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def rows_for(number: int) -> int:
    """So many rows a pass is recorded for that serves this number: 8, 16, 32, 64, 128, 192 and so on; few sizes are few recordings."""
    return -(-number // 64) * 64 if number > 32 else max(8, 1 << (number - 1).bit_length())


def columns_for(number: int) -> int:
    """The same of columns: 128, 192, 256, 384, 512 and so on."""
    step = 64 if number <= 256 else 128
    return max(-(-number // step) * step, 128)


class Graphs:
    """Recorded passes, each for one size; made when it is first wanted, which takes a fraction of a second.

    Args:
        work: (B, N, D) embeddings, (B,) places, (B, N) positions, columns -> (B, N, D) hidden states.
        spare: place of a row that nobody reads, for padding.
    """

    def __init__(self, work: Pass, spare: int):
        self._work, self._spare = work, spare
        self._recorded: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        """To be called when what they work on has moved."""
        self._recorded.clear()

    def record_all(self, max_rows: int, max_columns: int, like: Tensor) -> None:
        """Records a pass for each size up to these; `like`: of the type and width of embeddings."""
        rows = sorted({rows_for(number) for number in range(1, max_rows + 1)}, reverse=True)  # the largest first: the others fit in its memory
        columns = sorted({min(columns_for(number), max_columns) for number in range(1, max_columns + 1)}, reverse=True)
        for size in itertools.product(rows, WIDTHS, columns):
            if size not in self._recorded:
                self._recorded[size] = self._record(*size, like)

    def __call__(self, embeds: Tensor, places: Tensor, positions: Tensor, num_columns: int, max_columns: int) -> Tensor:
        """A pass, with at least `num_columns` and at most `max_columns`; its result is good until the next one."""
        size = (rows_for(len(embeds)), embeds.shape[1], min(columns_for(num_columns), max_columns))
        if size not in self._recorded:
            self._recorded[size] = self._record(*size, embeds)
        graph, (own_embeds, own_places, own_positions, hidden) = self._recorded[size]
        own_places.fill_(self._spare)
        for own, given in ((own_embeds, embeds), (own_places, places), (own_positions, positions)):
            own[: len(given)] = given
        graph.replay()
        return hidden[: len(embeds)]

    def _record(self, num_rows: int, width: int, num_columns: int, like: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        embeds = like.new_zeros(num_rows, width, like.shape[-1])
        places = torch.full((num_rows,), self._spare, device=like.device)
        positions = torch.arange(width, device=like.device).repeat(num_rows, 1)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries choose their kernels before anything is recorded
            for _ in range(2):
                self._work(embeds, places, positions, num_columns)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._work(embeds, places, positions, num_columns)
        return graph, [embeds, places, positions, hidden]
