"""Keys and values of many streams in one place, so that one pass of the language model serves all that have something to read.

    row 0   [ prefix | speech of A | text ]                 a column is a position: nothing moves when a row grows, shrinks or ends;
    row 1   [ prefix | speech of B ......... | text . ]     no row sees another, or what lies behind its own end
    row 2   [ prefix | speech of C .. ]

Ours: padding on the left, as for whole batches, would move every row in every pass; pages would save room, which is not what is short. Qwen3 on a
GPU goes the fast way (nim4/model/qwen3.py). The other way is for any model and device, and what the fast one is measured by: rows that have
about as much to read are padded to one width, and what a pass copies is their keys and values, up to the longest of them.
"""

import itertools
import logging
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from nim4.model.llm import Written, grouped_attention, writing
from nim4.model.qwen3 import LENGTHS, FlatQwen3, why_not

log = logging.getLogger("nim4")

COLUMNS = 64  # a table grows by so many at least
MORE_COLUMNS = 512  # the same where passes are recorded anew when it has grown
ALIGNED = 16  # columns: what a pass sees is a multiple, as fast kernels want it
MAX_PADDING = {"cuda": 256, "cpu": 16}  # ours: tokens that cost less than another pass


class Row:
    """What one stream has read; made by Rows.new. Its place is free again when nobody holds it any more.

    Attributes:
        length: tokens, those of the prefix included.
    """

    def __init__(self, place: int, length: int):
        self.place, self.length = place, length

    def drop(self, num_tokens: int) -> None:
        """Forgets the last tokens."""
        self.length -= num_tokens


@dataclass(eq=False, slots=True)  # not frozen: that takes three times as long, and there may be hundreds for each token
class Read:
    """Something that a row is to read next, at least one token.

    Attributes:
        rows: to which `row` belongs.
        ids: the last of it.
        num_wanted: behind each of the last so many tokens, the model's first choice is wanted.
        speech: (A, D) embeddings that stand before `ids`; None = none.
    """

    order: ClassVar[int] = 3

    rows: "Rows"
    row: Row
    ids: Sequence[int]
    num_wanted: int = 0
    speech: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids) + (0 if self.speech is None else len(self.speech))

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Read, self.rows

    @staticmethod
    def together(reads: Sequence["Read"]) -> list[list[int]]:
        """The ids that are wanted by each."""
        return reads[0].rows.read(reads)


class Rows:
    """The rows of one language model.

    Args:
        model: transformers' causal model, in evaluation mode. A Qwen3 on a GPU goes the fast way (nim4/model/qwen3.py).
        prefix: ids that all rows begin with, at least one.
    """

    def __init__(self, model: nn.Module, prefix: Sequence[int]):
        self._model = model
        config, weight, reason = model.config.get_text_config(), model.get_input_embeddings().weight, why_not(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows, self._more_columns = (1, COLUMNS) if reason else (4, MORE_COLUMNS)
        self._table = weight.new_zeros(config.num_hidden_layers, 2, rows, self._more_columns, config.num_key_value_heads, head_dim)
        self._max_padding = MAX_PADDING.get(weight.device.type, 0)
        self._reserved = self._table.shape[2:4]  # rows and columns that stay
        self._held: WeakValueDictionary[int, Row] = WeakValueDictionary()  # by place
        self._flat: FlatQwen3 | None = None
        self._prefix = self._table[:, :, 0, :0]
        if reason is None:
            self._spare = self.new()  # for padding
            self._flat = FlatQwen3(model, self._spare.place)
            self._flat.stand_on(self._table)
        elif weight.is_cuda:
            log.warning("the language model goes the slow way through the GPU: %s", reason)
        row = self.new()
        self.read([Read(self, row, prefix)])
        self._prefix = self._table[:, :, row.place, : row.length].clone()

    @torch.inference_mode()
    def new(self) -> Row:
        """A row that has read the prefix."""
        if self._flat is None:  # whose passes know where the table is: recording them again would take longer than it is worth
            self._shrink()
        place, length = next(place for place in itertools.count() if place not in self._held), self._prefix.shape[2]
        if place == self._table.shape[2]:
            self._resize(2 * place, self._table.shape[3])
        self._table[:, :, place, length:] = 0  # another's broken numbers would break sums, even where they count nothing
        self._table[:, :, place, :length] = self._prefix
        self._held[place] = row = Row(place, length)
        return row

    @torch.inference_mode()
    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Makes room for so many rows of so many tokens for good, so that it need not be made later; what there is stays."""
        self._reserved = tuple(map(max, self._reserved, (num_rows, -(-num_columns // COLUMNS) * COLUMNS)))
        rows, columns = map(max, self._reserved, self._table.shape[2:4])
        if (rows, columns) != self._table.shape[2:4]:
            self._resize(rows, columns)

    def _shrink(self) -> None:
        """Gives room back when a quarter of it would do: rows that were many once, or long, are not paid for ever after."""
        held = list(self._held.values())
        rows = 1 + max((row.place for row in held), default=0)
        columns = max((row.length for row in held), default=self._prefix.shape[2])
        if 4 * rows * columns < self._table.shape[2] * self._table.shape[3]:
            wanted = map(max, self._reserved, (2 * rows, -(-2 * columns // COLUMNS) * COLUMNS))
            smaller = tuple(map(min, wanted, self._table.shape[2:4]))
            if smaller != self._table.shape[2:4]:
                self._resize(*smaller)

    def _resize(self, num_rows: int, num_columns: int) -> None:
        layers, both, old_rows, old_columns, *heads = self._table.shape
        rows, columns = min(num_rows, old_rows), min(num_columns, old_columns)
        table = self._table.new_zeros(layers, both, num_rows, num_columns, *heads)
        table[:, :, :rows, :columns] = self._table[:, :, :rows, :columns]
        self._table = table
        if self._flat is not None:
            self._flat.stand_on(table)

    @torch.inference_mode()
    def record(self) -> None:
        """Records the passes of the fast way: seconds, which otherwise those would wait who need one first."""
        if self._flat is not None:
            self._flat.record()

    @torch.inference_mode()
    def read(self, reads: Sequence[Read]) -> list[list[int]]:
        """Lets rows read, as many of them in one pass as is good.

        Args:
            reads: of different rows. If it fails, none has read anything, or may read the same again.
        Returns:
            the ids that are wanted by each.
        """
        lens = [len(read.ids) if read.speech is None else len(read) for read in reads]
        num_columns = max(read.row.length + length for read, length in zip(reads, lens, strict=True))
        if self._flat is None:  # padding takes columns, too
            num_columns = max(read.row.length for read in reads) + max(lens)
        if num_columns > self._table.shape[3]:
            wanted = max(num_columns, self._table.shape[3] * 5 // 4)
            self._resize(self._table.shape[2], -(-wanted // self._more_columns) * self._more_columns)
        found: dict[int, list[int]] = {}
        for group in self._alike(reads) if self._flat is None else _lists(lens):
            own = [reads[number] for number in group]
            found |= zip(group, self._pass(own) if self._flat is None else _shared(self._flat.read(own), own), strict=True)
        for read, length in zip(reads, lens, strict=True):
            read.row.length += length
        return [found[number] for number in range(len(reads))]

    def _alike(self, reads: Sequence[Read]) -> Iterator[list[int]]:
        """Numbers of reads that have about as much to read, so that little is padding."""
        group: list[int] = []
        padding = 0
        for number in sorted(range(len(reads)), key=lambda number: len(reads[number])):
            padding += len(group) * (len(reads[number]) - len(reads[group[-1]])) if group else 0
            if padding > self._max_padding:
                yield group
                group, padding = [], 0
            group.append(number)
        yield group

    def _pass(self, reads: Sequence[Read]) -> list[list[int]]:
        embed, device = self._model.get_input_embeddings(), self._table.device
        num_new = len(reads[-1])
        num_columns = max(read.row.length for read in reads) + num_new
        places, lens = torch.tensor([(read.row.place, read.row.length) for read in reads], device=device).T
        ids = torch.zeros(len(reads), num_new, dtype=torch.int64)
        for row, read in zip(ids, reads, strict=True):
            row[len(read) - len(read.ids) : len(read)] = torch.tensor(read.ids)
        embeds = embed(ids.to(device))
        for row, read in zip(embeds, reads, strict=True):
            if read.speech is not None:
                row[: len(read.speech)] = read.speech
        positions = lens[:, None] + torch.arange(num_new, device=device)
        alone = reads[0].row if len(reads) == 1 else None
        hidden = self._forward(embeds, places, positions, min(-(-num_columns // ALIGNED) * ALIGNED, self._table.shape[3]), alone)
        wanted = [(row, place) for row, read in enumerate(reads) for place in range(len(read) - read.num_wanted, len(read))]
        chosen = self._model.lm_head(hidden[torch.tensor(wanted, device=device).T.unbind()]).argmax(-1).tolist() if wanted else []
        return _shared(chosen, reads)

    def _forward(self, embeds: Tensor, places: Tensor, positions: Tensor, num_columns: int, alone: Row | None = None) -> Tensor:
        """(B, N, D) hidden states of what rows read; their keys and values are taken into the table."""
        seen = torch.arange(num_columns, device=embeds.device) <= positions[:, None, :, None]
        view = _View(self._table, places, positions, num_columns, alone)
        given = {"attention_mask": seen, "position_ids": positions, "past_key_values": view, "use_cache": True}
        with grouped_attention(self._model):
            return self._model.model(inputs_embeds=embeds, **given).last_hidden_state


def _lists(lens: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of reads that are together no longer than the longest list that is recorded, unless one is."""
    group: list[int] = []
    total = 0
    for number, length in enumerate(lens):
        if group and total + length > LENGTHS[-1]:
            yield group
            group, total = [], 0
        group.append(number)
        total += length
    yield group


def _shared(ids: list[int], reads: Sequence[Read]) -> list[list[int]]:
    """To each as many as it wants."""
    ends = itertools.accumulate((read.num_wanted for read in reads), initial=0)
    return [ids[start:end] for start, end in itertools.pairwise(ends)]


def write(
    rows: Rows, row: Row, ids: Sequence[int], draft: Sequence[int], limit: int, end: int, speech: Tensor | None = None
) -> Generator[Read, list[int], Written]:
    """`writing` behind what a row has read, as work for nim4/decode/together.py.

    Args:
        speech: (A, D) embeddings that stand before `ids`; they are read in the same pass, which costs little more than one without them.
    """
    work, best = writing(row.drop, ids, draft, limit, end), None
    while True:
        try:
            new, num_wanted = work.send(best)
        except StopIteration as done:
            return done.value
        best = yield Read(rows, row, new, num_wanted, speech)
        speech = None


class _View:
    """The rows of one pass, as transformers asks for its cache.

    Args:
        table: (layers, 2, rows, columns, heads, width of a head).
        places: (B,) int64, rows that read.
        positions: (B, N) int64, columns of what they read.
        num_columns: that they see.
        alone: when it is one only: what it sees need not be copied.
    """

    def __init__(self, table: Tensor, places: Tensor, positions: Tensor, num_columns: int, alone: Row | None):
        self._table, self._places, self._positions, self._num_columns, self._alone = table, places, positions, num_columns, alone

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes (B, H, N, D/H) keys and values of a layer; returns those of all columns."""
        seen = []
        for table, new in zip(self._table[layer], (keys, values), strict=True):
            if self._alone is not None:
                row = table[self._alone.place]
                row[self._alone.length : self._alone.length + new.shape[2]] = new[0].transpose(0, 1)
                seen.append(row[None, : self._num_columns].transpose(1, 2))
            else:
                table[self._places[:, None], self._positions] = new.transpose(1, 2)
                seen.append(table[:, : self._num_columns].index_select(0, self._places).transpose(1, 2))
        return seen[0], seen[1]
