"""Hotwords by sound: an index of names under their phones, up to millions, that changes while it is searched.

- The base is a file that is mapped into memory, so that it loads at once and all processes share it (hotword_file.py, trie.py).
- Names that are added lie in a small trie of their own, the delta, which is built anew with each change; removed ones are marked in the
  base. Both are seen by the next search; searches that go on keep what they began with. Most of the time of a change is the pronunciation:
  names with several numbers, and Latin words that no dictionary has, take several times as long as Chinese ones, and the first names of a
  process wait until dictionaries, the grammar of numbers and the letter-to-sound model are loaded (benchmarks/hotwords.py has all of them).
- compact() writes a new base in a child process and takes it over when it is whole.

Source: arXiv 2604.18105 keeps all names in one automaton of Aho and Corasick and searches exact phones. That is `engine="ahocorasick"` here,
for comparison: it cannot branch over alternatives, and neither load nor change without a stall. Delta and lists of users are tries for the
same reason: names just added must be found in a confusion network too. An automaton for their exact search would be a second home of the same
names, made anew on top with each change, and gains nothing: benchmarks/hotwords.py has both side by side for a delta of 10,000 names.
"""

import fcntl
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.hotword_list import KeyedNames, ListReport, Name, make_keys
from nim4.corpus.units import PhonemeInventory
from nim4.decode.confusion import Slots, slots_of
from nim4.decode.hotword_file import REBUILD, read_arrays, write_arrays
from nim4.decode.hotword_lattice import DEFAULT_LIMITS, LatticeLimits, LatticeStream, rescored, search_lattice
from nim4.decode.hotword_names import NameTable, Rows
from nim4.decode.hotword_search import Hit, Phones, Source, Walker, about_phones, english_words, search
from nim4.decode.hotword_state import NO_ROWS, State, changed, changed_since, compacted, first_row, has_names, journal_rows, read_journal, state_of
from nim4.decode.hotword_stream import HotwordStream
from nim4.decode.trie import Trie
from nim4.model.ctc import collapse
from nim4.stage import ROOT, write_jsonl

ENGINES = ("trie", "ahocorasick")
FILE, JOURNAL, LOCK = "hotwords.bin", "journal.jsonl", "lock"
MAX_PER_MILLION = 100.0  # ours: a key that ordinary text has more often, per million phones, would be a hint all day
MIN_COUNT = 3  # ours: what a small text has less often tells nothing


class HotwordView:
    """An index as one user sees it: some of its tags, and lists of their own.

    Args:
        index: the shared one; its changes are seen here.
        tags: names without any of them are not found, and hide no others; None = all names.
        lists: further indexes that are searched beside it, e.g. a user's contacts; tags do not apply to them.
    """

    def __init__(self, index: "HotwordIndex", tags: Collection[str] | None = None, lists: Sequence["HotwordIndex"] = ()):
        self._index, self._tags, self._lists = index, None if tags is None else frozenset(tags), tuple(lists)
        wrong = [other for other in lists if other.inventory.tokens != index.inventory.tokens or other.tones != index.tones]
        if wrong:
            raise ValueError("lists must have the units and tones of the index")
        self._seen: tuple[tuple[State, ...], list[Source]] = ((), [])

    def search(self, phones: Sequence[int] | np.ndarray) -> list[Hit]:
        """Names whose phones stand in `phones` (P ids of an utterance), by place; see hotword_search.py for what counts."""
        return search(self.sources(), self._index.about, phones)

    def search_lattice(self, slots: Slots, limits: LatticeLimits = DEFAULT_LIMITS) -> list[Hit]:
        """Names that can be read along the slots of an utterance at little cost, see hotword_lattice.py; places are slots."""
        return search_lattice(self.sources(), self._index.about, slots, limits)

    def search_log_probs(self, log_probs: np.ndarray, limits: LatticeLimits | None = DEFAULT_LIMITS) -> list[Hit]:
        """The hits of a whole utterance.

        Args:
            log_probs: (S, V) float32, of the phoneme head.
            limits: of the search in the confusion network, whose hits are then scored in their frames; None = exact search of the best phones.
        """
        if limits is None:
            return self.search(collapse(log_probs.argmax(-1).tolist()))
        slots = slots_of(log_probs)
        return rescored(self.search_lattice(slots, limits), self._index.about, slots, log_probs, limits)

    def stream(self) -> HotwordStream:
        """An exact search that goes along with an utterance, chunk by chunk."""
        return HotwordStream(self.sources, self._index.about)

    def stream_lattice(self, limits: LatticeLimits = DEFAULT_LIMITS) -> LatticeStream:
        """The same in the confusion network of its log-probabilities."""
        return LatticeStream(self.sources, self._index.about, limits)

    def sources(self) -> list[Source]:
        """What is searched; the same object until something changes."""
        seen, sources = self._seen
        if not self._lists and seen and seen[0] is self._index.state:
            return sources
        states = tuple(index.state for index in (self._index, *self._lists))
        if len(seen) != len(states) or any(old is not new for old, new in zip(seen, states, strict=True)):
            sources = [source for number, state in enumerate(states) for source in _sources(state, None if number else self._tags)]
            self._seen = (states, sources)
        return sources


def _sources(state: State, tags: Collection[str] | None) -> Iterator[Source]:
    live = state.base.live_names(state.dead, tags)
    yield Source(state.base, live, state.live_keys if tags is None else state.base.live_keys(live), state.automaton)
    if state.delta.num_names:
        live = state.delta.live_names((), tags)
        yield Source(state.delta, live, state.delta.live_keys(live))


class HotwordIndex:
    """Names under their phones. Made by `build` or `load`; any number of threads may search and change it at the same time."""

    def __init__(self, base: NameTable, inventory: PhonemeInventory, about: Phones, *, tones: str = "toned", engine: str = "trie"):
        if engine not in ENGINES:
            raise RecipeError("--engine", expected=" or ".join(ENGINES), found=engine, fix="correct it")
        if engine == "ahocorasick" and tones == "wildcard":
            raise RecipeError("--engine ahocorasick", expected="--tones toned or toneless", found=tones, fix="use --engine trie: it can branch")
        self.inventory, self.about, self.tones, self.engine = inventory, about, tones, engine
        self.folder: Path | None = None
        self._lock, self._compacting, self._journal = threading.RLock(), threading.Lock(), None
        self.state = state_of(base, engine)
        self._all = HotwordView(self)

    @classmethod
    def build(
        cls,
        names: KeyedNames,
        inventory: PhonemeInventory,
        *,
        tones: str = "toned",
        engine: str = "trie",
        ordinary: Iterable[Sequence[int]] = (),
        max_per_million: float = MAX_PER_MILLION,
    ) -> "HotwordIndex":
        """An index in memory.

        Args:
            names: from nim4/corpus/hotword_list.py.
            inventory: of the phoneme head whose output is searched.
            tones: toned; toneless: tones do not count; wildcard: the neutral tone stands for any other.
            engine: trie, or ahocorasick for the paper's automaton as base.
            ordinary: phone ids of texts without hotwords; keys that they have too often are stopped: never found.
            max_per_million: what is too often, in matches per million phones.
        """
        about = about_phones(inventory, tones, english_words(inventory.tokens))
        base = NameTable.build(Rows.of(names, about.fold))
        stopped = _too_frequent(base, about, ordinary, max_per_million)
        return cls(replace(base, arrays={**base.arrays, "stopped": stopped.astype("<u4")}), inventory, about, tones=tones, engine=engine)

    @classmethod
    def load(cls, folder: Path, inventory: PhonemeInventory | None = None, *, engine: str = "trie") -> "HotwordIndex":
        """The index of a folder, with the changes that were saved.

        Args:
            folder: product of stage 10, or of `save`.
            inventory: of the model; None = the one that it was built with.
            engine: see `build`.
        Raises:
            RecipeError: if it is missing, damaged or cut off, or was built with other units.
        """
        folder = Path(folder)
        arrays, meta = read_arrays(folder / FILE)
        try:
            own = PhonemeInventory(meta["tokens"])
            if inventory is not None and inventory.tokens != own.tokens:
                found, fix = f"others: {len(own)} symbols beside {len(inventory)}", "build it with the tokens.txt of this model"
                raise RecipeError(folder / FILE, expected="an index of the model's units", found=found, fix=fix)
            words = Trie(*(arrays[f"words_{name}"] for name in ("first", "label", "key")))
            base, about = NameTable.of_arrays(arrays, meta["tag_sets"]), about_phones(own, meta["tones"], words)
            index = cls(base, own, about, tones=meta["tones"], engine=engine)
            index.state = replace(index.state, sequence=int(meta["sequence"]))
        except (KeyError, ValueError, TypeError) as error:
            raise RecipeError(folder / FILE, expected="a hotword index", found=error, fix=REBUILD) from error
        index.folder = folder
        index._read_journal()
        return index

    def search(self, phones: Sequence[int] | np.ndarray) -> list[Hit]:
        """See HotwordView.search."""
        return self._all.search(phones)

    def search_lattice(self, slots: Slots, limits: LatticeLimits = DEFAULT_LIMITS) -> list[Hit]:
        """See HotwordView.search_lattice."""
        return self._all.search_lattice(slots, limits)

    def search_log_probs(self, log_probs: np.ndarray, limits: LatticeLimits | None = DEFAULT_LIMITS) -> list[Hit]:
        """See HotwordView.search_log_probs."""
        return self._all.search_log_probs(log_probs, limits)

    def stream(self) -> HotwordStream:
        """See HotwordView.stream."""
        return self._all.stream()

    def stream_lattice(self, limits: LatticeLimits = DEFAULT_LIMITS) -> LatticeStream:
        """See HotwordView.stream_lattice."""
        return self._all.stream_lattice(limits)

    def filter(self, tags: Collection[str] | None = None, lists: Sequence["HotwordIndex"] = ()) -> HotwordView:
        """The index as one user sees it, see HotwordView. Keep the view: the first search of a new one looks at every name."""
        return HotwordView(self, tags, lists)

    def __len__(self) -> int:
        return self.state.base.num_names - len(self.state.dead) + len(self.state.added)

    def __contains__(self, text: object) -> bool:
        return has_names(self.state, [str(text)])[0]

    def stats(self) -> dict[str, Any]:
        """Counts, for people."""
        state, base = self.state, self.state.base
        counts = {
            "names": len(self),
            "base_names": base.num_names,
            "base_keys": base.num_keys,
            "added": len(state.added),
            "removed": len(state.removed),
        }
        more = {"stopped_keys": len(base.arrays["stopped"]), "tags": len({tag for tags in base.tag_sets for tag in tags}), "tones": self.tones}
        return counts | more | {"nodes": len(base.trie.label), "megabytes": round(base.num_bytes / 1e6, 1), "changes": state.sequence}

    def add(self, names: Iterable[Name | str]) -> ListReport:
        """Adds names, or replaces those with the same text; the next search finds them. Names that cannot be said are in the report."""
        report = ListReport()
        listed = [(number, name if isinstance(name, Name) else Name(name)) for number, name in enumerate(names, 1)]
        keyed = make_keys(listed, self.inventory, report)
        rows = Rows.of(keyed, self.about.fold)
        with self._lock:
            number = self.state.sequence + 1
            self.state = changed(self.state, {name.text: (name, number) for name in keyed.names}, rows, {}, number)
        return report

    def remove(self, texts: Iterable[str]) -> list[str]:
        """Removes names; the next search does not find them. Returns those that are not in the index."""
        with self._lock:
            gone, number = dict.fromkeys(texts, self.state.sequence + 1), self.state.sequence + 1
            missing = [text for text, known in zip(gone, has_names(self.state, list(gone)), strict=True) if not known]
            self.state = changed(self.state, {}, NO_ROWS, gone, number)
        return missing

    def save(self, folder: Path | None = None) -> None:
        """Writes the index: into a new folder as a whole, into the one it was loaded from only the changes.

        Raises:
            RecipeError: if somebody else has changed the folder since this index read it.
        """
        with self._lock:
            if folder is not None and (self.folder is None or Path(folder).resolve() != self.folder.resolve()):
                self.folder, self._journal = Path(folder), None
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder):
                    self._write_base()
                return
            if self.folder is None:
                raise ValueError("the first time, save needs a folder")
            with locked(self.folder):
                if first_row(self.folder / JOURNAL) not in (None, self._journal):
                    fix = "load the index again and repeat the change"
                    raise RecipeError(self.folder / JOURNAL, expected="no changes but our own", found="others", fix=fix)
                self._journal = {"sequence": self.state.sequence, "writer": uuid.uuid4().hex}
                write_jsonl(self.folder / JOURNAL, [self._journal, *journal_rows(self.state)])

    def compact(self) -> None:
        """Takes all changes into the base of the folder, in a child process; searches and changes go on meanwhile.

        Until the new base is whole the old one serves, also when the child is killed. One compaction runs at a time; a second call waits.

        Raises:
            RecipeError: if the child fails.
        """
        with self._compacting:
            self.save(self.folder)
            done_until = self.state.sequence
            command = [sys.executable, "-m", "nim4", "hotwords", "compact", str(self.folder.resolve())]
            child = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
            if child.returncode:
                found = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
                raise RecipeError(self.folder, expected="a compaction that ends", found=found, fix="the old index still serves; try again")
            fresh = HotwordIndex.load(self.folder, self.inventory, engine=self.engine).state
            fresh = replace(state_of(fresh.base, self.engine, fresh.automaton), sequence=done_until)
            with self._lock:
                self.state = changed_since(self.state, fresh, done_until)

    def compact_here(self) -> None:
        """What the child of `compact` does."""
        with locked(self.folder):
            self._write_base()

    def _write_base(self) -> None:
        """The base with all changes; a journal that it has become part of goes."""
        table, state = compacted(self.state), self.state
        meta = {"tokens": self.inventory.tokens, "tones": self.tones, "tag_sets": table.tag_sets, "sequence": state.sequence}
        words = {f"words_{name}": array for name, array in vars(self.about.words).items()}
        write_arrays(self.folder / FILE, {**table.arrays, **words}, meta)
        if (first_row(self.folder / JOURNAL) or {}).get("sequence", 0) <= state.sequence:
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        self._journal = first_row(path)
        if self._journal is None or self._journal["sequence"] <= self.state.sequence:
            return
        self.state = changed(self.state, *read_journal(path), self._journal["sequence"])


def index_files(search: str, folder: Path | None) -> list[Path]:
    """The files that decide what a decode config finds; none when it searches nothing.

    Args:
        search: `hotwords` of the config.
    Raises:
        RecipeError: if it needs an index and there is none.
    """
    if search == "none":
        return []
    if folder is None:
        fix = "run stage 10, ./run.sh --stage 10 --hotword-list FILE"
        raise RecipeError("--hotword-index", expected="the folder of stage 10, in which a config looks up hints", found="none", fix=fix)
    return [folder / FILE, *([folder / JOURNAL] if (folder / JOURNAL).is_file() else [])]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from changing the folder meanwhile; waits until they have."""
    with open(folder / LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _too_frequent(table: NameTable, about: Phones, texts: Iterable[Sequence[int]], max_per_million: float) -> np.ndarray:
    """Keys that the texts have too often, matches inside others counted as well."""
    source = Source(table, table.live_names((), None), np.ones(table.num_keys, np.uint8))
    counts, num_phones = np.zeros(table.num_keys, np.int64), 0
    for ids in texts:
        utterance = about.fold[np.asarray(ids, dtype=np.uint8)]
        np.add.at(counts, Walker(source, about, False).read(utterance, 0, len(utterance))[:, 2], 1)
        num_phones += len(utterance)
    return np.flatnonzero(counts >= max(MIN_COUNT, max_per_million * num_phones / 1e6))
