"""What searches of a hotword index see at one moment, and what changes make of it; and the journal in which changes are kept."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.hotword_list import KeyedNames, Name
from nim4.decode.hotword_names import NameTable, joined
from nim4.decode.hotword_search import Automaton
from nim4.stage import read_jsonl


@dataclass(frozen=True)
class Added:
    name: Name
    keys: tuple[bytes, ...]  # phone ids, folded
    sequence: int  # number of the change


@dataclass(frozen=True)
class State:
    """What searches see; replaced as a whole by every change."""

    base: NameTable
    automaton: Automaton | None
    live_keys: np.ndarray  # of the base, whatever their tags
    delta: NameTable
    added: Mapping[str, Added] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)  # text -> number of the change
    dead: frozenset[int] = frozenset()  # names of the base that are removed, or added anew
    sequence: int = 0  # number of the last change


def state_of(base: NameTable, engine: str, automaton: Automaton | None = None) -> State:
    if engine == "ahocorasick" and automaton is None:
        automaton = Automaton(base)
    return State(base, automaton, base.live_keys(base.live_names((), None)), _delta({}))


def has_names(state: State, texts: Sequence[str]) -> list[bool]:
    """Which of the names are in the index."""
    numbers = state.base.find(texts)
    return [text in state.added or (name is not None and name not in state.dead) for text, name in zip(texts, numbers, strict=True)]


def changed(state: State, added: Mapping[str, Added], removed: Mapping[str, int], sequence: int) -> State:
    """The state with these additions and removals beside its base."""
    hidden = added.keys() | removed.keys()
    differing = list(hidden ^ (state.added.keys() | state.removed.keys()))
    names = [(text, name) for text, name in zip(differing, state.base.find(differing), strict=True) if name is not None]
    dead = state.dead.difference(name for text, name in names if text not in hidden).union(name for text, name in names if text in hidden)
    live_keys = state.live_keys
    if dead != state.dead:
        live_keys = live_keys.copy()
        for name in dead ^ state.dead:
            for key in state.base.keys_under(name).tolist():
                if key < len(live_keys):
                    live_keys[key] = any(int(other) not in dead for other in state.base.names_under(key))
        stopped = state.base.arrays["stopped"]
        live_keys[stopped[stopped < len(live_keys)]] = 0
    same = len(added) == len(state.added) and all(state.added.get(text) is entry for text, entry in added.items())
    delta = state.delta if same else _delta(added)
    return replace(state, added=added, removed=removed, dead=dead, delta=delta, live_keys=live_keys, sequence=sequence)


def _delta(added: Mapping[str, Added]) -> NameTable:
    return NameTable.build(_keyed(added), np.arange(256, dtype=np.uint8))


def _keyed(added: Mapping[str, Added]) -> KeyedNames:
    keys_of_each = list(map(attrgetter("keys"), added.values()))
    keys = list(itertools.chain.from_iterable(keys_of_each))
    lens = np.fromiter(map(len, keys), np.int64, len(keys))
    owners = np.repeat(np.arange(len(added)), np.fromiter(map(len, keys_of_each), np.int64, len(added)))
    return KeyedNames(list(map(attrgetter("name"), added.values())), np.frombuffer(b"".join(keys), np.uint8), lens, owners)


def compacted(state: State) -> NameTable:
    if not state.added and not state.removed:
        return state.base
    live = np.flatnonzero(state.base.live_names(state.dead, None))
    table = NameTable.build(joined([state.base.keyed_names(live), _keyed(state.added)]), np.arange(256, dtype=np.uint8))
    stopped = [table.trie.find(state.base.key(int(key))) for key in state.base.arrays["stopped"]]
    return replace(table, arrays={**table.arrays, "stopped": np.array([key for key in stopped if key is not None], "<u4")})


def journal_rows(state: State) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"removed": text, "sequence": number} for text, number in state.removed.items()]
    for text, entry in state.added.items():
        facts = {"weight": entry.name.weight, "tags": entry.name.tags, "keys": [list(key) for key in entry.keys], "sequence": entry.sequence}
        rows.append({"added": text, **facts})
    return rows


def first_row(path: Path) -> dict[str, Any] | None:
    """What a journal says about itself; None when there is none."""
    if not path.is_file():
        return None
    rows = read_jsonl(path)
    if not rows or not isinstance(rows[0], dict) or not isinstance(rows[0].get("sequence"), int):
        raise RecipeError(path, expected="changes of a hotword index", found="another file", fix="remove it: the base is still whole")
    return rows[0]


def read_journal(path: Path) -> tuple[dict[str, Added], dict[str, int]]:
    """The names added and removed that journal_rows wrote, below a first row. Raises RecipeError when it is broken."""
    added, removed = {}, {}
    try:
        for row in read_jsonl(path)[1:]:
            if "removed" in row:
                removed[row["removed"]] = row["sequence"]
            else:
                name = Name(row["added"], float(row["weight"]), tuple(row["tags"]))
                added[name.text] = Added(name, tuple(bytes(key) for key in row["keys"]), row["sequence"])
    except (KeyError, ValueError, TypeError) as error:
        raise RecipeError(path, expected="changes of a hotword index", found=repr(error), fix="remove it: the base is still whole") from error
    return added, removed
