"""Tries from keys, and keys from tries. Sorting is linear in the number of phones, so that an index of names just added is made in milliseconds."""

import numpy as np

from nim4.corpus.machine_code import jit
from nim4.decode.trie import NONE, Trie


def build_trie(phones: np.ndarray, key_lens: np.ndarray) -> tuple[Trie, np.ndarray]:
    """A trie of keys in any order, repeated or not.

    Args:
        phones: (P,) uint8, the keys one after the other; no zeros.
        key_lens: (K,) int64, each at least 1.
    Returns:
        the trie, and (K,) int64: the number of each given key in it.
    Raises:
        ValueError: if the lengths do not fit, as those from a damaged file may not.
    """
    if int(key_lens.sum()) != len(phones) or (key_lens < 1).any():
        raise ValueError(f"keys of at least one phone, {int(key_lens.sum())} phones in all, are expected, but there are {len(phones)} phones")
    label, num_children = np.zeros(len(phones) + 1, np.uint8), np.zeros(len(phones) + 1, np.uint8)
    node = np.zeros(len(key_lens), np.int64)
    num_nodes = _grow(phones, np.cumsum(key_lens) - key_lens, key_lens, label, num_children, node)
    first = np.ones(num_nodes + 1, np.uint32)
    first[1:] += np.cumsum(num_children[:num_nodes], dtype=np.uint32)
    key = np.full(num_nodes, NONE, np.uint32)
    ends = np.zeros(num_nodes, bool)
    ends[node] = len(node) > 0
    key[ends] = np.arange(np.count_nonzero(ends))
    return Trie(first, label[:num_nodes].copy(), key), key[node].astype(np.int64)


@jit
def _grow(phones, starts, lens, label, num_children, node):
    """Writes the nodes of a trie level by level, and the one at which each key ends; returns how many there are.

    Args:
        phones: (P,) uint8. starts, lens: (K,) int64.
        label, num_children: (P + 1,) uint8, zeros; a node has at most 255 children, since no phone is 0.
        node: (K,) int64, zeros.
    """
    rows, by_phone, places = np.arange(lens.size), np.empty(lens.size, np.int64), np.empty(max(lens.size, 256) + 1, np.int64)
    size, depth, num_nodes, level = lens.size, 0, 1, 0  # keys that go on; level: the first node of the level above
    while size > 0:
        places[:257] = 0
        for i in range(size):
            places[phones[starts[rows[i]] + depth] + 1] += 1
        for i in range(256):
            places[i + 1] += places[i]
        for i in range(size):
            phone = phones[starts[rows[i]] + depth]
            by_phone[places[phone]] = rows[i]
            places[phone] += 1
        width = num_nodes - level
        places[: width + 1] = 0
        for i in range(size):
            places[node[rows[i]] - level + 1] += 1
        for i in range(width):
            places[i + 1] += places[i]
        for i in range(size):
            row = by_phone[i]
            rows[places[node[row] - level]] = row
            places[node[row] - level] += 1
        level, kept, before, parent = num_nodes, 0, 0, -1
        for i in range(size):
            row = rows[i]
            phone = phones[starts[row] + depth]
            if node[row] != parent or phone != before:
                parent, before = node[row], phone
                label[num_nodes] = phone
                num_children[parent] += 1
                num_nodes += 1
            node[row] = num_nodes - 1
            if lens[row] > depth + 1:
                rows[kept] = row
                kept += 1
        size, depth = kept, depth + 1
    return num_nodes


def keys_of(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a trie: (P,) uint8 phones one after the other, and (K,) int64 lengths, in the order of their numbers."""
    num_nodes = len(trie.label)
    parent = np.zeros(num_nodes, np.int64)
    parent[1:] = np.repeat(np.arange(num_nodes), np.diff(trie.first.astype(np.int64)))[: num_nodes - 1]
    node = np.flatnonzero(trie.key != NONE)
    path = []  # of each key, from its end to its beginning
    while node.any():
        path.append(np.where(node > 0, trie.label[node], 0))
        node = np.where(node > 0, parent[node], 0)
    table = np.stack(path[::-1], axis=1) if path else np.zeros((0, 0), np.uint8)
    return table[table > 0].astype(np.uint8), (table > 0).sum(1).astype(np.int64)
