"""What searches of a hotword index see at one moment, and what changes make of it; and the journal in which changes are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.hotword_list import KeyedNames, Name
from nim4.decode.hotword_names import NameTable, Rows
from nim4.decode.hotword_search import Automaton
from nim4.stage import read_jsonl

AS_IS = np.arange(256, dtype=np.uint8)  # phones that are folded already
NO_ROWS = Rows.of(KeyedNames([], np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)), AS_IS)
Added = tuple[Name, int]  # and the number of the change


@dataclass(frozen=True)
class State:
    """What searches see; replaced as a whole by every change."""

    base: NameTable
    automaton: Automaton | None
    live_keys: np.ndarray  # of the base, whatever their tags
    rows: Rows  # the names of `added`, in its order; their table is the delta
    delta: NameTable
    added: Mapping[str, Added] = field(default_factory=dict)  # by text
    removed: Mapping[str, int] = field(default_factory=dict)  # text -> number of the change
    dead: frozenset[int] = frozenset()  # names of the base that are removed, or added anew
    sequence: int = 0  # number of the last change


def state_of(base: NameTable, engine: str, automaton: Automaton | None = None) -> State:
    if engine == "ahocorasick" and automaton is None:
        automaton = Automaton(base)
    return State(base, automaton, base.live_keys(base.live_names((), None)), NO_ROWS, NameTable.build(NO_ROWS))


def has_names(state: State, texts: Sequence[str]) -> list[bool]:
    """Which of the names are in the index."""
    numbers = state.base.find(texts)
    return [text in state.added or (name is not None and name not in state.dead) for text, name in zip(texts, numbers, strict=True)]


def changed(state: State, more: Mapping[str, Added], rows_of_more: Rows, gone: Mapping[str, int], sequence: int) -> State:
    """The state with names added, or put in the place of their former selves, and others removed.

    Args:
        more: by text; rows_of_more: the same in the same order, with the phones as the index counts them.
        gone: text -> number of the change; no text of `more`.
    """
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
        rows = rows.with_more(rows_of_more)
        added |= more
    if rows is not state.rows:
        delta = NameTable.build(rows)
    removed = dict(state.removed)  # which may be many: copied at once, not one by one
    for text in more:
        removed.pop(text, None)
    removed |= gone
    return State(base, state.automaton, live_keys, rows, delta, added, removed, dead, sequence)


def compacted(state: State) -> NameTable:
    if not state.added and not state.removed:
        return state.base
    table = NameTable.build(state.base.rows().only(state.base.live_names(state.dead, None)).with_more(state.rows))
    stopped = [table.trie.find(state.base.key(int(key))) for key in state.base.arrays["stopped"]]
    return replace(table, arrays={**table.arrays, "stopped": np.array([key for key in stopped if key is not None], "<u4")})


def changed_since(state: State, fresh: State, sequence: int) -> State:
    """A state with the changes of another one that are later than `sequence`."""
    keep = np.fromiter((number > sequence for _, number in state.added.values()), bool, len(state.added))
    more = {text: entry for text, entry in state.added.items() if entry[1] > sequence}
    gone = {text: number for text, number in state.removed.items() if number > sequence}
    return changed(fresh, more, state.rows.only(keep), gone, state.sequence)


def journal_rows(state: State) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"removed": text, "sequence": number} for text, number in state.removed.items()]
    phones, ends = state.rows.phones.tolist(), np.cumsum(state.rows.key_lens).tolist()
    keys: list[list[list[int]]] = [[] for _ in state.added]
    for owner, end, length in zip(state.rows.owners.tolist(), ends, state.rows.key_lens.tolist(), strict=True):
        keys[owner].append(phones[end - length : end])
    for (text, (name, number)), own in zip(state.added.items(), keys, strict=True):
        rows.append({"added": text, "weight": name.weight, "tags": name.tags, "keys": own, "sequence": number})
    return rows


def first_row(path: Path) -> dict[str, Any] | None:
    """What a journal says about itself; None when there is none."""
    if not path.is_file():
        return None
    rows = read_jsonl(path)
    if not rows or not isinstance(rows[0], dict) or not isinstance(rows[0].get("sequence"), int):
        raise RecipeError(path, expected="changes of a hotword index", found="another file", fix="remove it: the base is still whole")
    return rows[0]


def read_journal(path: Path) -> tuple[dict[str, Added], Rows, dict[str, int]]:
    """The names added, their rows, and those removed, that journal_rows wrote below a first row. Raises RecipeError when it is broken."""
    added, removed, keys, counts = {}, {}, [], []
    try:
        for row in read_jsonl(path)[1:]:
            if "removed" in row:
                removed[row["removed"]] = row["sequence"]
            elif row["added"] not in added:
                name = Name(row["added"], float(row["weight"]), tuple(row["tags"]))
                added[name.text] = name, row["sequence"]
                keys += map(bytes, row["keys"])
                counts.append(len(row["keys"]))
        if not all(keys):
            raise ValueError("a key without phones")
        owners, lens = np.repeat(np.arange(len(counts)), counts), np.fromiter(map(len, keys), np.int64, len(keys))
        rows = Rows.of(KeyedNames([name for name, _ in added.values()], np.frombuffer(b"".join(keys), np.uint8), lens, owners), AS_IS)
    except (KeyError, ValueError, TypeError) as error:
        raise RecipeError(path, expected="changes of a hotword index", found=repr(error), fix="remove it: the base is still whole") from error
    return added, rows, removed
