"""Hotwords in a confusion network: names that a phoneme head nearly wrote.

Ours; the paper searches the best phones only. A match costs what its phones cost beyond the best ones. It is kept while that is little for
its length, and while no match around it is worth more; a longer match outweighs a shorter one inside it unless it costs more than `worth`
nats for each phone that it has more. So without alternatives the result is that of the exact search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.decode import trie as walks
from nim4.decode.confusion import SlotMaker, Slots, ctc_cost
from nim4.decode.hotword_search import Hit, Phones, Source, WordCosts, scratch
from nim4.decode.trie import ENGLISH, MAX_GAPS


@dataclass(frozen=True)
class LatticeLimits:
    """How far the search goes. All ours, chosen on simulated errors (benchmarks/hotwords.py).

    Attributes:
        budget: nats that a match may cost.
        per_phone: nats that it may cost for each of its phones.
        min_phones: of a match that costs anything.
        tone: nats for reading a slot as its best final in another tone, which costs no more even where that is not among the alternatives.
        worth: nats, see above.
        max_ctc_cost: nats per phone by which the frames of a match may be less probable as the name than as their best path.
    """

    budget: float = 4.0
    per_phone: float = 0.5
    min_phones: int = 6
    tone: float = 2.5
    worth: float = 1.0
    max_ctc_cost: float = 1.0


DEFAULT_LIMITS = LatticeLimits()
_SLOT_FIELDS = ("phones", "costs", "counts", "frames")


def search_lattice(sources: Sequence[Source], about: Phones, slots: Slots, limits: LatticeLimits, begin: int = 0) -> list[Hit]:
    """The hits of a confusion network that begin in slot `begin` or later, by place; `start` and `end` of a hit are slots."""
    rows, costs, owners = _walk(sources, about, slots, limits, begin)
    return _choose(sources, about, slots, limits, rows, costs, owners)


def _walk(sources: Sequence[Source], about: Phones, slots: Slots, limits: LatticeLimits, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    phones = about.fold[slots.phones]
    found = []
    for source in sources:
        trie = source.table.trie
        while True:
            total = walks.walk_slots(
                trie.first,
                trie.label,
                trie.key,
                source.live_keys,
                about.alike,
                about.num_alike,
                about.tones,
                about.kinds,
                phones,
                slots.costs,
                slots.counts,
                begin,
                np.array([limits.budget, limits.per_phone, limits.min_phones, limits.tone]),
                scratch.stack,
                scratch.stack_costs,
                scratch.lattice_rows,
                scratch.row_costs,
            )
            if 0 <= total <= len(scratch.row_costs):
                break
            scratch.grow_lattice(total)
        found.append((scratch.lattice_rows[:total].copy(), scratch.row_costs[:total].copy()))
    rows = np.concatenate([rows for rows, _ in found]) if found else np.zeros((0, 4), np.int64)
    costs = np.concatenate([costs for _, costs in found]) if found else np.zeros(0)
    return rows, costs, np.repeat(np.arange(len(found)), [len(rows) for rows, _ in found])


def _choose(
    sources: Sequence[Source], about: Phones, slots: Slots, limits: LatticeLimits, rows: np.ndarray, costs: np.ndarray, owners: np.ndarray
) -> list[Hit]:
    if not len(rows):
        return []
    if len(sources) > 1:  # the same number of two sources is not the same key
        rows = rows.copy()
        rows[:, 2] = rows[:, 2] * len(sources) + owners
    order = np.lexsort((costs, rows[:, 2], rows[:, 1], rows[:, 0]))
    rows, costs = rows[order], costs[order]
    is_new = np.ones(len(rows), bool)
    np.any(rows[1:, :3] != rows[:-1, :3], axis=1, out=is_new[1:])
    rows, costs = rows[is_new], costs[is_new]
    kept = np.zeros(len(rows), np.int64)
    kept = kept[: walks.choose_cheapest(rows, costs, _whole_words(rows, slots, about), limits.worth, kept)]
    hits: dict[tuple[int, int, float], list[tuple[Source, int]]] = {}
    for (start, end, key, _), cost in zip(rows[kept].tolist(), costs[kept].tolist(), strict=True):
        hits.setdefault((start, end, cost), []).append((sources[key % len(sources)], key // len(sources)))
    return [Hit(start, end, cost, tuple(keys)) for (start, end, cost), keys in hits.items()]


def _whole_words(rows: np.ndarray, slots: Slots, about: Phones) -> np.ndarray:
    """(R,) bool: matches that cut no English word of the best path."""
    best = about.fold[slots.phones[:, 0]]
    if not (about.kinds[best] == ENGLISH).any():
        return np.ones(len(rows), np.bool_)
    places = np.concatenate([[0], np.cumsum(best > 0)])  # of each slot's edge among the best phones
    utterance = best[best > 0]
    words = WordCosts(about)
    words.read(utterance, 0, len(utterance))
    edges = places[rows[:, :2]]
    edges = np.stack([np.minimum(edges[:, 0], edges[:, 1] - 1), edges[:, 1]], axis=1)  # of slots whose best is a gap
    outside = (edges[:, 0] < 0) | (edges[:, 1] < 1)
    allowed = words.check(np.maximum(edges, [[0, 1]]), utterance, len(utterance))[0] if len(utterance) else np.ones(len(rows), np.bool_)
    return allowed | outside


def rescored(hits: Sequence[Hit], about: Phones, slots: Slots, log_probs: np.ndarray, limits: LatticeLimits, first_frame: int = 0) -> list[Hit]:
    """Hits with the CTC cost of their frames instead of their slots', without those for which it is too high.

    Args:
        log_probs: (S, V) float32, from frame `first_frame` of the utterance on.
    """
    if not hits:
        return []
    num_symbols = log_probs.shape[1]
    folded = np.full_like(log_probs, -np.inf, np.float32, order="C")
    for own in range(num_symbols):  # a phone is as probable as the best that counts as it
        np.maximum(folded[:, about.fold[own]], log_probs[:, own], out=folded[:, about.fold[own]])
    log_probs = folded
    for own in np.flatnonzero(about.num_alike[:num_symbols] > 1):
        log_probs = log_probs.copy() if log_probs is folded else log_probs
        log_probs[:, own] = folded[:, about.alike[own, : about.num_alike[own]]].max(1)
    kept: dict[tuple[int, int, float], list[tuple[Source, int]]] = {}
    for hit in hits:
        begin, end = int(slots.frames[hit.start, 0]) - first_frame, int(slots.frames[hit.end - 1, 1]) - first_frame
        for source, key in hit.keys:
            phones = source.table.key(key).astype(np.int64)
            cost = max(float(ctc_cost(log_probs, begin, end, phones)), 0.0)
            if cost <= limits.max_ctc_cost * len(phones):
                kept.setdefault((hit.start, hit.end, round(cost, 4)), []).append((source, key))
    return [Hit(start, end, cost, tuple(keys)) for (start, end, cost), keys in sorted(kept.items(), key=lambda item: item[0])]


class LatticeStream:
    """The lattice search of one stream, as its log-probabilities come; at the end the same as a search of the whole.

    With each chunk only keys are searched that can still end in it.

    Args:
        sources: gives the sources that are searched now; the same object as long as nothing has changed.
        about: of the phones.
    """

    def __init__(self, sources: Callable[[], Sequence[Source]], about: Phones, limits: LatticeLimits = DEFAULT_LIMITS):
        self._get_sources, self._about, self._limits = sources, about, limits
        self._maker, self._slots = SlotMaker(), Slots.of_phones(np.zeros(0, np.uint8))
        self._frames: list[np.ndarray] = []
        self._rows: tuple[np.ndarray, ...] = ()
        self._sources: Sequence[Source] | None = None
        self.hits: list[Hit] = []

    def push(self, log_probs: np.ndarray, final: bool = False) -> list[Hit]:
        """The hits that stand after a chunk, (S, V) float32; `final` with the last. A slot that the next chunk may go on with comes with that."""
        self._frames.append(log_probs)
        new = self._maker.push(log_probs, final)
        if not len(new):
            return self.hits
        num_old, sources = len(self._slots), self._get_sources()
        self._slots = Slots(*(np.concatenate([getattr(part, name) for part in (self._slots, new)]) for name in _SLOT_FIELDS))
        begin = self._first_open(num_old, sources) if sources is self._sources else 0
        rows, costs, owners = _walk(sources, self._about, self._slots, self._limits, begin)
        if begin > 0:
            kept = self._rows[0][:, 0] < begin
            rows, costs, owners = (np.concatenate([old[kept], more]) for old, more in zip(self._rows, (rows, costs, owners), strict=True))
        self._sources, self._rows = sources, (rows, costs, owners)
        hits = _choose(sources, self._about, self._slots, self._limits, rows, costs, owners)
        self.hits = rescored(hits, self._about, self._slots, np.concatenate(self._frames), self._limits)
        return self.hits

    def _first_open(self, num_old: int, sources: Sequence[Source]) -> int:
        """The first slot from which a key may reach beyond slot `num_old`."""
        longest = max((source.table.trie.depth for source in sources), default=0) + MAX_GAPS
        spoken = np.flatnonzero(self._slots.phones[:num_old, 0])
        return int(spoken[-longest]) if len(spoken) >= longest else 0
