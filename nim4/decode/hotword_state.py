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
from nim4.decode.hotword_names import NameTable, Rows
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
    rows: Rows  # the names that were added; their table is the delta
    delta: NameTable
    added: Mapping[str, Added] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)  # text -> number of the change
    dead: frozenset[int] = frozenset()  # names of the base that are removed, or added anew
    sequence: int = 0  # number of the last change


def state_of(base: NameTable, engine: str, automaton: Automaton | None = None) -> State:
    if engine == "ahocorasick" and automaton is None:
        automaton = Automaton(base)
    none = _rows({})
    return State(base, automaton, base.live_keys(base.live_names((), None)), none, NameTable.build(none))


def has_names(state: State, texts: Sequence[str]) -> list[bool]:
    """Which of the names are in the index."""
    numbers = state.base.find(texts)
    return [text in state.added or (name is not None and name not in state.dead) for text, name in zip(texts, numbers, strict=True)]


def changed(state: State, more: Mapping[str, Added], gone: Mapping[str, int], sequence: int) -> State:
    """The state with these names added, or put in the place of their former selves, and these removed; no text may be in both."""
    texts = [*more, *gone]
    known, base = state.added.keys(), state.base
    dead = state.dead.union(name for name in base.find(texts) if name is not None)
    live_keys = state.live_keys
    if len(dead) > len(state.dead):
        live_keys = live_keys.copy()
        for name in dead - state.dead:
            for key in base.keys_under(name).tolist():
                if key < len(live_keys) and live_keys[key]:
                    live_keys[key] = any(int(other) not in dead for other in base.names_under(key))
    replaced = [text for text in texts if text in known]
    rows, delta, added = state.rows, state.delta, dict(state.added)
    if replaced:
        keep = np.ones(delta.num_names, bool)
        keep[delta.find(replaced)] = False
        rows = rows.only(keep)
        for text in replaced:
            del added[text]
    if more:
        rows = rows.with_more(_rows(more))
        added |= more
    if rows is not state.rows:
        delta = NameTable.build(rows)
    removed = {text: number for text, number in state.removed.items() if text not in more} | gone
    return State(base, state.automaton, live_keys, rows, delta, added, removed, dead, sequence)


def _rows(added: Mapping[str, Added]) -> Rows:
    keys_of_each = list(map(attrgetter("keys"), added.values()))
    keys = list(itertools.chain.from_iterable(keys_of_each))
    lens = np.fromiter(map(len, keys), np.int64, len(keys))
    owners = np.repeat(np.arange(len(added)), np.fromiter(map(len, keys_of_each), np.int64, len(added)))
    keyed = KeyedNames(list(map(attrgetter("name"), added.values())), np.frombuffer(b"".join(keys), np.uint8), lens, owners)
    return Rows.of(keyed, np.arange(256, dtype=np.uint8))


def compacted(state: State) -> NameTable:
    if not state.added and not state.removed:
        return state.base
    table = NameTable.build(state.base.rows().only(state.base.live_names(state.dead, None)).with_more(state.rows))
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
