"""Hotwords of a stream: what is added and what is withdrawn with each chunk; after the last the same as a search of the whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.decode.hotword_search import Hit, Phones, Source, Walker, WordCosts, merged
from nim4.model.ctc import BLANK, collapse

Match = tuple[int, int, tuple[tuple[int, int], ...]]  # start, end, (source, key) of each key


@dataclass(frozen=True)
class Change:
    """What a chunk did. A hit is withdrawn when a longer one takes its place, or it turns out to cut an English word."""

    added: tuple[Hit, ...]
    withdrawn: tuple[Hit, ...]


class HotwordStream:
    """Exact search of one stream; each phone is read once. A change of the index is seen at the next chunk.

    Args:
        sources: gives the sources that are searched now; the same object as long as nothing has changed.
        about: of the phones.
    """

    def __init__(self, sources: Callable[[], Sequence[Source]], about: Phones):
        self._get_sources, self._about = sources, about
        self._utterance, self._size, self._last_label = np.zeros(64, np.uint8), 0, BLANK
        self._visible: list[Match] = []
        self._restart(sources())

    @property
    def hits(self) -> list[Hit]:
        """Those that stand now, by place."""
        return [self._hit(match) for match in self._visible]

    def push_labels(self, labels: Sequence[int]) -> Change:
        """The best label of each frame of a chunk, blanks included: repeats are merged across chunks too."""
        phones = collapse(labels, self._last_label)
        self._last_label = labels[-1] if len(labels) else self._last_label
        return self.push(phones)

    def push(self, ids: Sequence[int]) -> Change:
        """The next phones, as ids."""
        begin, self._size = self._size, self._size + len(ids)
        if self._size > len(self._utterance):
            self._utterance = np.concatenate([self._utterance, np.zeros(2 * self._size - len(self._utterance), np.uint8)])
        fold = self._about.fold_list
        new = [fold[phone] for phone in ids]
        self._utterance[begin : self._size] = new
        before, old_sources, sources = self._visible, self._sources, self._get_sources()
        if sources is not self._sources:
            self._restart(sources)
            begin, new = 0, self._utterance[: self._size].tolist()
        self._has_english = self._has_english or not self._about.english.isdisjoint(new)
        self._read(begin)
        if self._visible is before:
            return Change((), ())
        if sources is not old_sources:
            return Change(tuple(self.hits), tuple(self._hit(match, old_sources) for match in before))  # keys are numbered anew
        was, now = before[self._num_same :], self._visible[self._num_same :]
        added, withdrawn = [match for match in now if match not in was], [match for match in was if match not in now]
        return Change(tuple(map(self._hit, added)), tuple(map(self._hit, withdrawn)))

    def _restart(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._walkers = [Walker(source, self._about, True) for source in sources]
        self._words, self._has_english = WordCosts(self._about), False
        self._settled: list[Match] = []  # hits that only a longer one can take away
        self._pending, self._owners = np.zeros((0, 3), np.int64), np.zeros(0, np.int64)  # matches that later phones can rule out
        self._visible, self._num_same = [], 0  # all that stand, and how many of them the last chunk did not touch

    def _read(self, begin: int) -> None:
        utterance, size = self._utterance, self._size
        rows, owners = merged([walker.read(utterance, begin, size) for walker in self._walkers])
        if not self._has_english:
            if len(rows):
                self._settled, self._num_same = _resolved(self._settled, rows.tolist(), None if owners is None else owners.tolist())
                self._visible = self._settled
            return
        self._words.read(utterance, begin, size)
        owners = np.zeros(len(rows), np.int64) if owners is None else owners
        rows, owners = np.concatenate([self._pending, rows]), np.concatenate([self._owners, owners])
        allowed, first_open = self._words.check(rows, utterance, size)
        sure = np.flatnonzero(allowed[:first_open])
        num_settled = len(self._settled)
        self._settled, same = _resolved(self._settled, rows[sure].tolist(), owners[sure].tolist())
        self._pending, self._owners = rows[first_open:], owners[first_open:]
        likely = np.flatnonzero(allowed[first_open:])
        self._visible, still = _resolved(self._settled, self._pending[likely].tolist(), self._owners[likely].tolist())
        self._num_same = min(same, still, num_settled)

    def _hit(self, match: Match, sources: Sequence[Source] | None = None) -> Hit:
        start, end, keys = match
        sources = self._sources if sources is None else sources
        return Hit(start, end, 0.0, tuple((sources[owner], key) for owner, key in keys))


def _resolved(matches: list[Match], rows: list[list[int]], owners: list[int] | None) -> tuple[list[Match], int]:
    """`matches` and the rows that end behind them, without those that lie inside another; and how many of `matches` are left as they were."""
    tail, low = list(matches), len(matches)
    for number, (start, end, key) in enumerate(rows):
        own = (owners[number] if owners else 0, key)
        if tail and tail[-1][1] == end and tail[-1][0] < start:
            continue
        if tail and tail[-1][:2] == (start, end):
            tail[-1] = (start, end, (*tail[-1][2], own))
            low = min(low, len(tail) - 1)
            continue
        while tail and tail[-1][0] >= start:
            tail.pop()
        low = min(low, len(tail))
        tail.append((start, end, (own,)))
    return tail, low
