"""Names of a hotword index, the keys they are filed under, and what is said about them; arrays that lie in memory or in a file."""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np

from nim4.corpus.hotword_list import KeyedNames
from nim4.decode.trie import NONE, Trie
from nim4.decode.trie_build import build_trie, keys_of

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
class Rows:
    """N names with their keys, as arrays that are quickly cut and joined; a table is made of them.

    Attributes:
        text, text_lens: (B,) uint8, UTF-8, one after the other, and (N,) int64.
        text_hash: (N,) uint32, CRC-32 of the texts. weight: (N,) float32. tag_set: (N,) int64, numbers in tag_sets, whose first is empty.
        phones, key_lens, owners: see KeyedNames.
    """

    text: np.ndarray
    text_lens: np.ndarray
    text_hash: np.ndarray
    weight: np.ndarray
    tag_set: np.ndarray
    tag_sets: Sequence[tuple[str, ...]]
    phones: np.ndarray
    key_lens: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, keyed: KeyedNames, fold: np.ndarray) -> "Rows":
        """The rows of names whose phones are first mapped by `fold`, (256,) uint8."""
        count, texts = len(keyed.names), list(map(str.encode, map(attrgetter("text"), keyed.names)))
        numbers = {tags: number for number, tags in enumerate(dict.fromkeys([(), *map(attrgetter("tags"), keyed.names)]))}
        return cls(
            text=np.frombuffer(b"".join(texts), np.uint8),
            text_lens=np.fromiter(map(len, texts), np.int64, count),
            text_hash=np.fromiter(map(zlib.crc32, texts), np.uint32, count),
            weight=np.fromiter(map(attrgetter("weight"), keyed.names), np.float32, count),
            tag_set=np.fromiter(map(numbers.__getitem__, map(attrgetter("tags"), keyed.names)), np.int64, count),
            tag_sets=list(numbers),
            phones=fold[keyed.phones],
            key_lens=keyed.key_lens,
            owners=keyed.owners,
        )

    def only(self, keep: np.ndarray) -> "Rows":
        """Those names for which (N,) bool `keep` is true."""
        keys = keep[self.owners]
        return Rows(
            text=self.text[np.repeat(keep, self.text_lens)],
            text_lens=self.text_lens[keep],
            text_hash=self.text_hash[keep],
            weight=self.weight[keep],
            tag_set=self.tag_set[keep],
            tag_sets=self.tag_sets,
            phones=self.phones[np.repeat(keys, self.key_lens)],
            key_lens=self.key_lens[keys],
            owners=(np.cumsum(keep) - 1)[self.owners[keys]],
        )

    def with_more(self, more: "Rows") -> "Rows":
        """These names, then others; no text may be in both."""
        numbers = {tags: number for number, tags in enumerate(dict.fromkeys([*self.tag_sets, *more.tag_sets]))}
        tag_set = np.concatenate([self.tag_set, np.fromiter(map(numbers.__getitem__, more.tag_sets), np.int64)[more.tag_set]])
        joined = {name: np.concatenate([getattr(self, name), getattr(more, name)]) for name in ("text", "text_lens", "text_hash", "weight")}
        joined |= {name: np.concatenate([getattr(self, name), getattr(more, name)]) for name in ("phones", "key_lens")}
        owners = np.concatenate([self.owners, more.owners + len(self.weight)])
        return Rows(**joined, tag_set=tag_set, tag_sets=list(numbers), owners=owners)


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
    def build(cls, rows: Rows) -> "NameTable":
        """Files the names under their keys. Raises ValueError when they have too many combinations of tags."""
        trie, key_of_row = build_trie(rows.phones, rows.key_lens)
        pairs = np.unique(rows.owners << 32 | key_of_row) if len(key_of_row) else np.zeros(0, np.int64)  # by name
        name_of_pair, key_of_pair = pairs >> 32, pairs & 0xFFFFFFFF
        num_names = len(rows.weight)
        order = np.lexsort((-rows.weight[name_of_pair], key_of_pair))
        by_hash = np.argsort(rows.text_hash, kind="stable")
        used, tag_set = np.unique(np.append(rows.tag_set, 0), return_inverse=True)  # the empty one stays the first
        if len(used) > 65_535:
            raise ValueError(f"at most 65535 different combinations of tags can be kept, but there are {len(used)}")
        arrays = {
            "first": trie.first,
            "label": trie.label,
            "key": trie.key,
            "posting_first": _firsts(key_of_pair, trie.num_keys),
            "posting_name": name_of_pair[order],
            "name_first": _firsts(name_of_pair, num_names),
            "name_key": key_of_pair,
            "text": rows.text,
            "text_first": np.concatenate([[0], np.cumsum(rows.text_lens)]),
            "weight": rows.weight,
            "tag_set": tag_set[:-1],
            "text_hash": rows.text_hash[by_hash],
            "hash_name": by_hash,
            "stopped": np.zeros(0, np.uint32),
        }
        tag_sets = [rows.tag_sets[number] for number in used.tolist()]
        return cls(trie, {name: array.astype(ARRAYS[name], copy=False) for name, array in arrays.items()}, tag_sets)

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
    def _key_nodes(self) -> np.ndarray:
        return np.flatnonzero(self.trie.key != NONE).astype(np.uint32)

    def key(self, number: int) -> np.ndarray:
        """(P,) uint8, the phones of a key."""
        return self.trie.phones_to(int(self._key_nodes[number]))

    def rows(self) -> Rows:
        """The names with their keys, to build another table from; keys of stopped ones come along."""
        phones, key_lens = self._key_phones
        keys, counts = self.arrays["name_key"].astype(np.int64), np.diff(self.arrays["name_first"].astype(np.int64))
        lens, starts, ends = key_lens[keys], np.cumsum(key_lens) - key_lens, np.cumsum(key_lens[keys])
        places = np.repeat(starts[keys] - (ends - lens), lens) + np.arange(lens.sum())
        text_lens = np.diff(self.arrays["text_first"].astype(np.int64))
        text_hash = np.zeros(self.num_names, np.uint32)
        text_hash[self.arrays["hash_name"]] = self.arrays["text_hash"]
        weight, tag_set, owners = self.arrays["weight"], self.arrays["tag_set"].astype(np.int64), np.repeat(np.arange(self.num_names), counts)
        return Rows(self.arrays["text"], text_lens, text_hash, weight, tag_set, self.tag_sets, phones[places], lens, owners)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def _firsts(sorted_or_not: np.ndarray, count: int) -> np.ndarray:
    """(count + 1,) where the entries of each number begin once they are sorted by it."""
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_or_not, minlength=count))])
