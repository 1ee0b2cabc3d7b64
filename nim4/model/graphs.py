"""Passes of the language model as CUDA graphs, for rows that read little each: otherwise the GPU waits for Python between kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

MIN_ROWS = 8  # fewer are padded to so many
WIDTHS = (1, 4)  # tokens of a row: an answer's next one; a chunk's speech
MIN_COLUMNS = 128

Pass = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def up_to(number: int, least: int) -> int:
    """The smallest power of two that is enough; few sizes are few graphs."""
    return max(1 << (number - 1).bit_length(), least)


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

    def __call__(self, embeds: Tensor, places: Tensor, positions: Tensor, num_columns: int, max_columns: int) -> Tensor:
        """A pass, with at least `num_columns` and at most `max_columns`; its result is good until the next one."""
        size = (up_to(len(embeds), MIN_ROWS), embeds.shape[1], min(up_to(num_columns, MIN_COLUMNS), max_columns))
        if size not in self._recorded:
            self._recorded[size] = self._record(*size, embeds)
        graph, (own_embeds, own_places, own_positions, hidden) = self._recorded[size]
        own_places.fill_(self._spare)
        for own, given in ((own_embeds, embeds), (own_places, places), (own_positions, positions)):
            own[: len(given)] = given
        graph.replay()
        return hidden[: len(embeds)]

    def _record(self, num_rows: int, width: int, num_columns: int, like: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        embeds = like.new_zeros(num_rows, width, like.shape[2])
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
