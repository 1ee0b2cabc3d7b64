"""Names of a hotword index, the keys they are filed under, and what is said about them; arrays that lie in memory or in a file."""

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np

from nim4.corpus.hotword_list import KeyedNames, Name
from nim4.decode.trie import NONE, Trie, build_trie, keys_of

ARRAYS = {
    "first": "<u4",
    "label": "|u1",
    "key": "<u4",
    "posting_first": "<u4",
    "posting_name": "<u4",
    "name_first": "<u4",
    "name_key": "<u4",
    "text": "|u1",
    "text_first": "<u4",
    "weight": "<f4",
    "tag_set": "<u2",
    "text_hash": "<u4",
    "hash_name": "<u4",
    "stopped": "<u4",
}


@dataclass(frozen=True)
class NameTable:
    """N names under K keys.

    Attributes:
        trie: of the keys.
        arrays: by the names of ARRAYS. posting_*: the names of each key, by falling weight; name_*: the keys of each name; text*: UTF-8;
            tag_set: number in tag_sets; text_hash, hash_name: CRC-32 of the texts in rising order, and whose it is; stopped: keys that
            ordinary text has too often.
        tag_sets: each a tuple of tags; the first is empty.
    """

    trie: Trie
    arrays: Mapping[str, np.ndarray]
    tag_sets: Sequence[tuple[str, ...]]

    @classmethod
    def build(cls, keyed: KeyedNames, fold: np.ndarray) -> "NameTable":
        """Files the names under their keys, whose phones are first mapped by `fold`, (256,) uint8."""
        trie, key_of_row = build_trie(fold[keyed.phones], keyed.key_lens)
        pairs = np.unique(keyed.owners << 32 | key_of_row) if len(key_of_row) else np.zeros(0, np.int64)  # by name
        name_of_pair, key_of_pair = pairs >> 32, pairs & 0xFFFFFFFF
        num_names = len(keyed.names)
        weight = np.fromiter(map(attrgetter("weight"), keyed.names), np.float32, num_names)
        order = np.lexsort((-weight[name_of_pair], key_of_pair))
        texts = list(map(str.encode, map(attrgetter("text"), keyed.names)))
        hashes = np.fromiter(map(zlib.crc32, texts), np.uint32, num_names)
        by_hash = np.argsort(hashes, kind="stable")
        numbers = {tags: number for number, tags in enumerate(dict.fromkeys([(), *map(attrgetter("tags"), keyed.names)]))}
        tag_set = np.fromiter(map(numbers.__getitem__, map(attrgetter("tags"), keyed.names)), np.int64, num_names)
        if len(numbers) > 65_535:
            raise ValueError(f"at most 65535 different combinations of tags can be kept, but there are {len(numbers)}")
        arrays = {
            "first": trie.first,
            "label": trie.label,
            "key": trie.key,
            "posting_first": _firsts(key_of_pair, trie.num_keys),
            "posting_name": name_of_pair[order],
            "name_first": _firsts(name_of_pair, num_names),
            "name_key": key_of_pair,
            "text": np.frombuffer(b"".join(texts), np.uint8),
            "text_first": np.concatenate([[0], np.cumsum(np.fromiter(map(len, texts), np.int64, num_names))]),
            "weight": weight,
            "tag_set": tag_set,
            "text_hash": hashes[by_hash],
            "hash_name": by_hash,
            "stopped": np.zeros(0, np.uint32),
        }
        return cls(trie, {name: array.astype(ARRAYS[name], copy=False) for name, array in arrays.items()}, list(numbers))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], tag_sets: Sequence[Sequence[str]]) -> "NameTable":
        """The table of arrays that were read from a file. Raises ValueError when some are missing, or their lengths do not fit together."""
        wrong = [name for name, dtype in ARRAYS.items() if name not in arrays or arrays[name].dtype.str != dtype]
        if wrong:
            raise ValueError(f"no array {wrong[0]!r}")
        nodes, names = len(arrays["label"]), len(arrays["weight"])
        lengths = {"first": nodes + 1, "key": nodes, "name_first": names + 1, "text_first": names + 1, "tag_set": names}
        lengths |= {"text_hash": names, "hash_name": names, "name_key": len(arrays["posting_name"])}
        wrong = [name for name, length in lengths.items() if len(arrays[name]) != length]
        if wrong or nodes < 1 or len(arrays["posting_first"]) < 1 or not tag_sets:
            raise ValueError(f"array {(wrong or ['label'])[0]!r} has another length than it must")
        return cls(Trie(arrays["first"], arrays["label"], arrays["key"]), arrays, [tuple(tags) for tags in tag_sets])

    @property
    def num_names(self) -> int:
        return len(self.arrays["weight"])

    @property
    def num_keys(self) -> int:
        return len(self.arrays["posting_first"]) - 1

    def names_under(self, key: int) -> np.ndarray:
        """Numbers of the names of a key, the highest weight first."""
        first = self.arrays["posting_first"]
        return self.arrays["posting_name"][int(first[key]) : int(first[key + 1])]

    def keys_under(self, name: int) -> np.ndarray:
        """Numbers of the keys of a name."""
        first = self.arrays["name_first"]
        return self.arrays["name_key"][int(first[name]) : int(first[name + 1])]

    def text(self, name: int) -> str:
        first = self.arrays["text_first"]
        return bytes(self.arrays["text"][int(first[name]) : int(first[name + 1])]).decode(errors="replace")

    def tags(self, name: int) -> tuple[str, ...]:
        number = int(self.arrays["tag_set"][name])
        return self.tag_sets[number] if number < len(self.tag_sets) else ()

    def weight(self, name: int) -> float:
        return float(self.arrays["weight"][name])

    def find(self, texts: Sequence[str]) -> list[int | None]:
        """The number of each name; None where there is none."""
        hashes = np.fromiter(map(zlib.crc32, map(str.encode, texts)), np.uint32, len(texts))
        lows, highs = (np.searchsorted(self.arrays["text_hash"], hashes, side) for side in ("left", "right"))
        found: list[int | None] = [None] * len(texts)
        for place in np.flatnonzero(lows < highs).tolist():
            for name in self.arrays["hash_name"][lows[place] : highs[place]].tolist():
                if name < self.num_names and self.text(name) == texts[place]:
                    found[place] = name
        return found

    def live_names(self, dead: Collection[int], tags: Collection[str] | None) -> np.ndarray:
        """(N,) bool: names that are not dead, and have one of `tags`; None = whatever tags."""
        if tags is None:
            live = np.ones(self.num_names, bool)
        else:
            wanted = np.zeros(65_536, bool)
            wanted[[number for number, own in enumerate(self.tag_sets) if not set(own).isdisjoint(tags)]] = True
            live = wanted[self.arrays["tag_set"]]
        live[list(dead)] = False
        return live

    def live_keys(self, live_names: np.ndarray) -> np.ndarray:
        """(K,) uint8: keys that have a live name and are not stopped. Raises ValueError when the postings are damaged."""
        posting_name, first = self.arrays["posting_name"], self.arrays["posting_first"]
        if len(posting_name) and int(posting_name.max()) >= self.num_names:
            raise ValueError("a key has a name that does not exist")
        if self.num_keys and ((first[1:] <= first[:-1]).any() or first[0] != 0 or first[-1] != len(posting_name)):
            raise ValueError("the names of the keys do not add up")
        if live_names.all():
            live = np.ones(self.num_keys, np.uint8)
        else:
            live = np.logical_or.reduceat(live_names[posting_name], first[:-1]).astype(np.uint8) if self.num_keys else np.zeros(0, np.uint8)
        stopped = self.arrays["stopped"]
        live[stopped[stopped < self.num_keys]] = 0
        return live

    @cached_property
    def _key_phones(self) -> tuple[np.ndarray, np.ndarray]:
        return keys_of(self.trie)

    @cached_property
    def key_lens(self) -> np.ndarray:
        """(K,) int64."""
        return self._key_phones[1]

    @cached_property
    def _key_starts(self) -> np.ndarray:
        return np.cumsum(self.key_lens) - self.key_lens

    @cached_property
    def _key_nodes(self) -> np.ndarray:
        return np.flatnonzero(self.trie.key != NONE).astype(np.uint32)

    def key(self, number: int) -> np.ndarray:
        """(P,) uint8, the phones of a key."""
        return self.trie.phones_to(int(self._key_nodes[number]))

    def keyed_names(self, names: Iterable[int]) -> KeyedNames:
        """Some of the names with their keys, to build another table from; keys of stopped ones come along."""
        numbers = [int(name) for name in names]
        rows = [self.keys_under(name) for name in numbers]
        keys = np.concatenate(rows).astype(np.int64) if rows else np.zeros(0, np.int64)
        lens = self.key_lens[keys]
        places = np.repeat(self._key_starts[keys] - (np.cumsum(lens) - lens), lens) + np.arange(lens.sum())
        owners = np.repeat(np.arange(len(numbers)), [len(row) for row in rows])
        return KeyedNames([Name(self.text(name), self.weight(name), self.tags(name)) for name in numbers], self._key_phones[0][places], lens, owners)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def joined(parts: Sequence[KeyedNames]) -> KeyedNames:
    """Several lists of names as one; no text may be in two of them."""
    shifts = np.cumsum([0, *(len(part.names) for part in parts)])
    owners = [part.owners + shift for part, shift in zip(parts, shifts, strict=False)]
    names = [name for part in parts for name in part.names]
    return KeyedNames(names, *(np.concatenate(arrays) for arrays in ([p.phones for p in parts], [p.key_lens for p in parts], owners)))


def _firsts(sorted_or_not: np.ndarray, count: int) -> np.ndarray:
    """(count + 1,) where the entries of each number begin once they are sorted by it."""
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_or_not, minlength=count))])
