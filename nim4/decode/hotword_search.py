"""Searches of hotwords in phones: whole utterances, streams, confusion networks; over several tables of names at once.

A match is a key that stands in the phones, that begins inside no syllable and cuts no English word, and that lies inside no other match:
of 北京 and 北京饭店 over the same phones only the longer one counts, as in arXiv 2604.18105. The words are looked up in a trie of CMUdict's,
since CTC writes no gaps between words: "art" is not found in "start", but in "the art", because there DH AH is a word as well.
"""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.g2p_en import dictionary
from nim4.corpus.units import FINALS, PhonemeInventory
from nim4.decode import trie as walks
from nim4.decode.hotword_names import NameTable
from nim4.decode.trie import ENGLISH, Trie
from nim4.decode.trie_build import build_trie, keys_of

WIDEST = 5  # ways to take one phone with --tones wildcard
TONES = ("toned", "toneless", "wildcard")


@dataclass(frozen=True)
class Phones:
    """What is known about phone ids.

    Attributes:
        fold: (256,) uint8, the phone that each id counts as.
        kinds: (256,) int8, see trie.phone_kinds.
        alike: (256, M) uint8; num_alike: (256,) int64: phones that one may be taken for at no cost, itself first.
        tones: (256, 4) uint8: the same final in other tones; 0 where there is none.
        words: trie of English words.
    """

    fold: np.ndarray
    kinds: np.ndarray
    alike: np.ndarray
    num_alike: np.ndarray
    tones: np.ndarray
    words: Trie

    @cached_property
    def is_plain(self) -> bool:
        """Whether each phone is only itself."""
        return int(self.num_alike.max()) == 1

    @cached_property
    def fold_list(self) -> list[int]:
        """`fold` for a few phones."""
        return self.fold.tolist()

    @cached_property
    def english(self) -> frozenset[int]:
        """Ids of English phones."""
        return frozenset(np.flatnonzero(self.kinds == ENGLISH).tolist())


def about_phones(inventory: PhonemeInventory, tones: str, words: Trie) -> Phones:
    """What is known about the phones of an inventory.

    Args:
        tones: toned; toneless: tones do not count; wildcard: the neutral tone may be any other, in a key and in what is searched.
        words: see english_words.
    Raises:
        RecipeError: for another word.
    """
    if tones not in TONES:
        raise RecipeError("--tones", expected=" or ".join(TONES), found=tones, fix="correct it")
    ids = {token: number for number, token in enumerate(inventory.tokens)}
    fold, alike, num_alike = np.arange(256, dtype=np.uint8), np.zeros((256, 6), np.uint8), np.ones(256, np.int64)
    siblings = np.zeros((256, 4), np.uint8)
    alike[:, 0] = fold
    for final in FINALS:
        toned = [ids[final + tone] for tone in "12345" if final + tone in ids]
        for own in toned if tones != "toneless" else ():
            siblings[own, : len(toned) - 1] = [other for other in toned if other != own]
        if tones == "toneless" and toned:
            fold[toned] = toned[0]
        elif tones == "wildcard" and final + "5" in ids:
            neutral = ids[final + "5"]
            for own in toned:
                others = [other for other in toned if other != neutral] if own == neutral else [neutral]
                alike[own, 1 : 1 + len(others)], num_alike[own] = others, 1 + len(others)
    return Phones(fold, walks.phone_kinds(inventory), alike, num_alike, siblings, words)


@functools.cache
def english_words(tokens: tuple[str, ...]) -> Trie:
    """The readings of CMUdict, as far as an inventory with these symbols has their phones."""
    ids = {token: number for number, token in enumerate(tokens)}
    readings = (reading.split() for reading in dictionary().values())
    known = [bytes(ids[phone] for phone in reading) for reading in readings if all(phone in ids for phone in reading)]
    return build_trie(np.frombuffer(b"".join(known), np.uint8), np.fromiter(map(len, known), np.int64, len(known)))[0]


@dataclass(frozen=True)
class Source:
    """A table of names, and which of its names and keys count."""

    table: NameTable
    live_names: np.ndarray  # (N,) bool
    live_keys: np.ndarray  # (K,) uint8
    automaton: "Automaton | None" = None  # searches instead of the trie


@dataclass(frozen=True)
class Found:
    """One name of a match."""

    text: str
    weight: float
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """Names that sound like a stretch of the utterance.

    Attributes:
        start, end: phones from start to end - 1; in a confusion network its slots.
        cost: nats that it costs beyond the best path; 0 for exact matches.
        keys: (source, key number) of each key with this span and cost.
    """

    start: int
    end: int
    cost: float
    keys: tuple[tuple[Source, int], ...]

    @cached_property
    def names(self) -> tuple[Found, ...]:
        """All names, the highest weight first, then in the order of their texts; each text once."""
        found: dict[str, Found] = {}
        for source, key in self.keys:
            for name in source.table.names_under(key).tolist():
                if source.live_names[name]:
                    own = Found(source.table.text(name), source.table.weight(name), source.table.tags(name))
                    if own.text not in found or found[own.text].weight < own.weight:
                        found[own.text] = own
        return tuple(sorted(found.values(), key=lambda own: (-own.weight, own.text)))

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.end


class Automaton:
    """The keys of a table in pyahocorasick, the paper's way; phones as characters. Seconds and hundreds of MB per million names."""

    def __init__(self, table: NameTable):
        import ahocorasick

        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        self.key_lens = table.key_lens
        phones, ends = keys_of(table.trie)[0].tobytes().decode("latin-1"), np.cumsum(self.key_lens).tolist()
        for number, (end, length) in enumerate(zip(ends, self.key_lens.tolist(), strict=True)):
            self._automaton.add_word(phones[end - length : end], number)
        self._automaton.make_automaton()
        self.longest = int(self.key_lens.max()) if table.num_keys else 0

    def rows(self, phones: np.ndarray, begin: int, source: Source, kinds: np.ndarray) -> np.ndarray:
        """(R, 3) live (start, end, key) with an end behind `begin`, by end, then start."""
        offset = max(begin - self.longest + 1, 0)
        if not len(self._automaton):
            return np.zeros((0, 3), np.int64)
        text = phones[offset:].tobytes().decode("latin-1")
        rows = []
        for last, key in self._automaton.iter(text):
            end = offset + last + 1
            start = end - int(self.key_lens[key])
            inside = start > 0 and kinds[phones[start]] == walks.FINAL and kinds[phones[start - 1]] == walks.INITIAL
            if end > begin and source.live_keys[key] and not inside:
                rows.append((start, end, key))
        return np.array(sorted(rows, key=lambda row: (row[1], row[0])), np.int64).reshape(-1, 3)


class _Scratch(threading.local):
    """Arrays that the walks of one thread write to."""

    def __init__(self) -> None:
        self.starts, self.nodes = np.zeros(1024, np.int64), np.zeros(1024, np.int64)
        self.rows = np.zeros((4096, 3), np.int64)
        self.kept = np.zeros(4096, np.int64)
        self.all = np.ones(4096, np.bool_)
        self.stack, self.stack_costs = np.zeros((4096, 4), np.int64), np.zeros(4096)
        self.lattice_rows, self.row_costs = np.zeros((4096, 4), np.int64), np.zeros(4096)

    def grow_lattice(self, rows: int) -> None:
        """Room for so many rows; for a higher stack when `rows` is negative."""
        if rows < 0:
            self.stack, self.stack_costs = np.zeros((2 * len(self.stack), 4), np.int64), np.zeros(2 * len(self.stack))
        else:
            self.lattice_rows, self.row_costs = np.zeros((2 * rows, 4), np.int64), np.zeros(2 * rows)


scratch = _Scratch()


class Walker:
    """The open keys of one source along an utterance."""

    def __init__(self, source: Source, phones: Phones, own_arrays: bool):
        self._source, self._phones, self._num_active = source, phones, 0
        self._widest = 1 if phones.is_plain else WIDEST
        self._starts, self._nodes = (np.zeros(64, np.int64), np.zeros(64, np.int64)) if own_arrays else (scratch.starts, scratch.nodes)

    def read(self, utterance: np.ndarray, begin: int, end: int) -> np.ndarray:
        """The (R, 3) rows (start, end, key) of keys that end in utterance[begin:end], by end, then start."""
        source, about = self._source, self._phones
        if source.automaton is not None:
            return source.automaton.rows(utterance[:end], begin, source, about.kinds)
        trie, room = source.table.trie, (self._num_active + end - begin) * self._widest
        if room > len(self._starts):
            self._starts, self._nodes = (np.concatenate([own, np.zeros(2 * room - len(own), np.int64)]) for own in (self._starts, self._nodes))
        fits = room * (end - begin) <= len(scratch.rows)  # then nothing can be too small, and nothing needs to be kept
        before = None if fits or not self._num_active else (self._starts[: self._num_active].copy(), self._nodes[: self._num_active].copy())
        while True:
            active, num_rows = walks.advance(
                trie.first,
                trie.label,
                trie.key,
                source.live_keys,
                about.alike,
                about.num_alike,
                about.kinds,
                utterance,
                begin,
                end,
                self._starts,
                self._nodes,
                self._num_active,
                scratch.rows,
            )
            if active >= 0 and num_rows <= len(scratch.rows):
                self._num_active = active
                return scratch.rows[:num_rows].copy()
            if active >= 0:
                scratch.rows = np.zeros((2 * num_rows, 3), np.int64)
            else:
                self._starts, self._nodes = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
            if before is not None:
                self._starts[: self._num_active], self._nodes[: self._num_active] = before


def search(sources: Sequence[Source], about: Phones, ids: Sequence[int] | np.ndarray) -> list[Hit]:
    """The hits of a whole utterance, by place. `ids`: P phone ids."""
    utterance = about.fold[np.asarray(ids, dtype=np.uint8)]
    rows, owners = merged([Walker(source, about, False).read(utterance, 0, len(utterance)) for source in sources])
    if not len(rows):
        return []
    allowed = whole_words(rows, utterance, about)
    if len(rows) > len(scratch.kept):
        scratch.kept = np.zeros(2 * len(rows), np.int64)
    kept = scratch.kept[: walks.choose_maximal(rows, len(rows), allowed, scratch.kept)]
    hits: list[Hit] = []
    chosen = None if owners is None else owners[kept].tolist()
    for number, (start, end, key) in enumerate(rows[kept].tolist()):
        own = (sources[chosen[number] if chosen else 0], key)
        if hits and hits[-1].span == (start, end):
            hits[-1] = Hit(start, end, 0.0, (*hits[-1].keys, own))
        else:
            hits.append(Hit(start, end, 0.0, (own,)))
    return hits


def merged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of several sources by end, then start, and the number of each row's source; None with a single source."""
    if len(rows) == 1:
        return rows[0], None
    owners = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    together = np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)
    order = np.lexsort((owners, together[:, 0], together[:, 1]))
    return together[order], owners[order]


def whole_words(rows: np.ndarray, utterance: np.ndarray, about: Phones) -> np.ndarray:
    """(R,) bool: which of the rows (start, end, ...) cut no English word."""
    if len(rows) > len(scratch.all):
        scratch.all = np.ones(2 * len(rows), np.bool_)
    if not (about.kinds[utterance] == ENGLISH).any():
        return scratch.all
    words = WordCosts(about)
    words.read(utterance, 0, len(utterance))
    return words.check(rows, utterance, len(utterance))[0]


class WordCosts:
    """The English words along an utterance, for telling which matches cut none."""

    def __init__(self, about: Phones):
        self._about = about
        self._costs, self._runs = np.zeros(64, np.float32), np.zeros(64, np.int64)

    def read(self, utterance: np.ndarray, begin: int, end: int) -> None:
        """Goes on from phone `begin` to `end`."""
        if end + 1 > len(self._costs):
            more = 2 * (end + 1) - len(self._costs)
            self._costs, self._runs = (np.concatenate([array, np.zeros(more, array.dtype)]) for array in (self._costs, self._runs))
        words = self._about.words
        walks.word_costs(words.first, words.label, words.key, self._about.kinds, utterance, begin, end, self._costs, self._runs)

    def check(self, rows: np.ndarray, utterance: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """(R,) bool, which rows may stand among the first `size` phones; and the first row whose fate later phones can change, or R."""
        allowed, words = np.zeros(len(rows), np.bool_), self._about.words
        first_open = walks.check_words(
            words.first, words.label, words.key, self._about.kinds, utterance, size, self._costs, self._runs, rows, len(rows), allowed
        )
        return allowed, int(first_open)
