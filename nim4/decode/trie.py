"""A trie in sorted arrays, and the walks through it. The only door to numba.

Nodes are numbered level by level, so that the children of a node stand side by side, in the order of their phones. Such arrays are built
by sorting, can lie in a file that many processes map into memory, and never change. A walk looks at nothing outside them, whatever a file
says: every number that is read from them is checked before it is used.

An automaton of Aho and Corasick reads each phone once; here the places where a key may have begun are kept instead (few: most end after
two phones), which takes as long in practice, needs a ninth of the memory, and lets a walk branch: over the alternatives of a phone.
"""

from dataclasses import dataclass

import numba
import numpy as np

from nim4.corpus.units import ARPABET, FINALS, INITIALS, ZERO_INITIAL, PhonemeInventory

NONE = 0xFFFFFFFF  # no key ends at this node
OTHER, INITIAL, FINAL, ENGLISH = range(4)
WORD_HORIZON = 24  # phones; no English word is longer
MAX_GAPS = 3  # slots that a match may step over
_jit = numba.njit(cache=True, nogil=True)


@dataclass(frozen=True)
class Trie:
    """Keys over phone ids 1..255. Node 0 is the root.

    Attributes:
        first: (N + 1,) uint32; the children of node i are first[i] to first[i + 1] - 1.
        label: (N,) uint8, the phone that leads to a node.
        key: (N,) uint32, the number of the key that ends there, or NONE. Keys are numbered by length, then by their phones.
    """

    first: np.ndarray
    label: np.ndarray
    key: np.ndarray

    @property
    def num_keys(self) -> int:
        return int(np.count_nonzero(self.key != NONE))

    def find(self, phones: np.ndarray) -> int | None:
        """The number of a key."""
        node = 0
        for phone in phones:
            node = child_of(self.first, self.label, node, phone)
        return int(self.key[node]) if node >= 0 and self.key[node] != NONE else None


def build_trie(phones: np.ndarray, key_lens: np.ndarray) -> tuple[Trie, np.ndarray]:
    """A trie of keys in any order, repeated or not.

    Args:
        phones: (P,) uint8, the keys one after the other; no zeros.
        key_lens: (K,) int64, each at least 1.
    Returns:
        the trie, and (K,) int64: the number of each given key in it.
    """
    starts = np.cumsum(key_lens) - key_lens
    node = np.zeros(len(key_lens), np.int64)  # where each key has got to
    rows = np.arange(len(key_lens))
    parents, labels, num_nodes, depth = [np.zeros(0, np.int64)], [np.zeros(1, np.uint8)], 1, 0
    while len(rows):
        code = node[rows] << 8 | phones[starts[rows] + depth]
        order = np.argsort(code)
        rows, code = rows[order], code[order]
        is_new = np.empty(len(code), bool)
        is_new[0] = True
        np.not_equal(code[1:], code[:-1], out=is_new[1:])
        node[rows] = num_nodes - 1 + np.cumsum(is_new)
        parents.append(code[is_new] >> 8)
        labels.append((code[is_new] & 255).astype(np.uint8))
        num_nodes += len(labels[-1])
        depth += 1
        rows = rows[key_lens[rows] > depth]
    first = np.ones(num_nodes + 1, np.uint32)
    first[1:] += np.cumsum(np.bincount(np.concatenate(parents), minlength=num_nodes)).astype(np.uint32)
    key = np.full(num_nodes, NONE, np.uint32)
    ends = np.zeros(num_nodes, bool)
    ends[node] = len(node) > 0
    key[ends] = np.arange(np.count_nonzero(ends))
    return Trie(first, np.concatenate(labels), key), key[node].astype(np.int64)


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


def phone_kinds(inventory: PhonemeInventory) -> np.ndarray:
    """(256,) int8: INITIAL, FINAL, ENGLISH or OTHER for each phone id."""
    kinds = np.full(256, OTHER, np.int8)
    for number, token in enumerate(inventory.tokens):
        if token in INITIALS or token == ZERO_INITIAL:
            kinds[number] = INITIAL
        elif token.rstrip("12345") in FINALS:
            kinds[number] = FINAL
        elif token in ARPABET:
            kinds[number] = ENGLISH
    return kinds


@_jit
def child_of(first, label, node, phone):
    """The child of `node` by `phone`; -1 when there is none, or the arrays are damaged."""
    if node < 0 or node + 1 >= first.size:
        return np.int64(-1)
    low, high = np.int64(first[node]), min(np.int64(first[node + 1]), np.int64(label.size))
    if low <= node:
        return np.int64(-1)
    end = high
    while low < high:
        middle = (low + high) >> 1
        if label[middle] < phone:
            low = middle + 1
        else:
            high = middle
    return low if low < end and label[low] == phone else np.int64(-1)


@_jit
def advance(first, label, key, is_live, alike, num_alike, kinds, phones, begin, end, starts, nodes, num_active, rows):
    """Reads phones[begin:end] and writes every live key that ends there.

    Args:
        first, label, key: of the trie. is_live: (K,) uint8, keys that count.
        alike, num_alike: (256, M) uint8 and (256,) int64: phones that a phone may be taken for, itself first.
        kinds: (256,) int8.
        phones: (N,) uint8, the utterance so far.
        starts, nodes: (A,) int64, the open keys: where each began and how far it has got; changed in place.
        num_active: how many are open.
        rows: (R, 3) int64, takes (start, end, key), by end, then start.
    Returns:
        keys that are open now, rows written; (-1, needed) when an array is too small: then nothing may be used.
    """
    num_rows = 0
    for place in range(begin, end):
        phone = phones[place]
        inside = kinds[phone] == FINAL and place > 0 and kinds[phones[place - 1]] == INITIAL
        kept, num_old = 0, num_active
        if not inside:
            if num_active + 1 > starts.size:
                return -1, 2 * starts.size
            starts[num_active], nodes[num_active] = place, 0
            num_old = num_active + 1
        stepped = np.empty((num_old * num_alike[phone], 2), np.int64)
        for i in range(num_old):
            for j in range(num_alike[phone]):
                node = child_of(first, label, nodes[i], alike[phone, j])
                if node < 0:
                    continue
                stepped[kept, 0], stepped[kept, 1] = starts[i], node
                kept += 1
                number = np.int64(key[node]) if node < key.size else np.int64(NONE)
                if number < is_live.size and is_live[number]:
                    if num_rows < rows.shape[0]:
                        rows[num_rows, 0], rows[num_rows, 1], rows[num_rows, 2] = starts[i], place + 1, number
                    num_rows += 1
        if kept > starts.size:
            return -1, 2 * kept
        for i in range(kept):
            starts[i], nodes[i] = stepped[i, 0], stepped[i, 1]
        num_active = kept
    return num_active, num_rows


@_jit
def word_costs(first, label, key, kinds, phones, begin, end, costs, runs):
    """How few English words the phones up to each place can be read as; brings costs[begin + 1 : end + 1] and runs up to date.

    Args:
        first, label, key: of a trie of English words.
        costs: (N + 1,) float32: words, or phones that are in no word, since the last phone that is not English.
        runs: (N + 1,) int64: where the English phones before a place begin; the place itself when there is none.
    """
    if begin == 0:
        costs[0], runs[0] = 0.0, 0
    for place in range(begin, end):
        costs[place + 1] = np.inf
    at = max(begin - WORD_HORIZON, 0)
    while at < end:
        if at > begin:
            if kinds[phones[at - 1]] == ENGLISH:
                costs[at], runs[at] = min(costs[at], costs[at - 1] + 1.0), runs[at - 1]
            else:
                costs[at], runs[at] = 0.0, at
        node, place = np.int64(0), at
        while place < end and place - at < WORD_HORIZON and kinds[phones[place]] == ENGLISH:
            node = child_of(first, label, node, phones[place])
            if node < 0:
                break
            place += 1
            if place > begin and node < key.size and key[node] != NONE:
                costs[place] = min(costs[place], costs[at] + 1.0)
        at += 1
    if end > begin:
        if kinds[phones[end - 1]] == ENGLISH:
            costs[end], runs[end] = min(costs[end], costs[end - 1] + 1.0), runs[end - 1]
        else:
            costs[end], runs[end] = 0.0, end


@_jit
def stands_alone(first, label, key, kinds, phones, size, costs, runs, start, end):
    """Whether a match cuts no English word: the phones around it read as words at least as well with the match as one word.

    Returns:
        whether it may stand, and whether later phones can change that.
    """
    open_left = start > 0 and kinds[phones[start]] == ENGLISH and kinds[phones[start - 1]] == ENGLISH
    open_right = end < size and kinds[phones[end - 1]] == ENGLISH and kinds[phones[end]] == ENGLISH
    at_edge = end == size and kinds[phones[end - 1]] == ENGLISH
    if not open_left and not open_right:
        return True, at_edge
    own_end = end
    if open_left and not open_right:
        own_end = start
        while own_end < end and kinds[phones[own_end]] == ENGLISH:
            own_end += 1
        return costs[start] + 1.0 <= costs[own_end], at_edge
    own_start = max(start, runs[end])
    horizon = end
    while horizon < size and horizon - end < WORD_HORIZON and kinds[phones[horizon]] == ENGLISH:
        horizon += 1
    is_cut = horizon < size and kinds[phones[horizon]] == ENGLISH  # the run goes on: the last word may be unfinished
    changes = horizon == size and horizon - end < WORD_HORIZON
    with_match = np.full(WORD_HORIZON + 1, np.inf, np.float32)
    with_match[0] = costs[own_start] + 1.0
    best = costs[horizon]
    for at in range(max(own_start - WORD_HORIZON, runs[end]), horizon):
        inner = at - end
        if inner > 0:
            with_match[inner] = min(with_match[inner], with_match[inner - 1] + 1.0)
        node, place = np.int64(0), at
        while place < horizon and place - at < WORD_HORIZON:
            node = child_of(first, label, node, phones[place])
            if node < 0:
                break
            place += 1
            ends_word = (node < key.size and key[node] != NONE) or (is_cut and place == horizon)
            if ends_word and inner >= 0:
                with_match[place - end] = min(with_match[place - end], with_match[inner] + 1.0)
            if ends_word and place == horizon:
                best = min(best, costs[at] + 1.0)
    last = horizon - end
    if last > 0:
        with_match[last] = min(with_match[last], with_match[last - 1] + 1.0)
    may = with_match[last] <= best
    if open_left and own_start > start:  # another run of English phones begins the match
        reach = start
        while kinds[phones[reach]] == ENGLISH:
            reach += 1
        may = may and costs[start] + 1.0 <= costs[reach]
    return may, changes


@_jit
def choose_maximal(rows, num_rows, allowed, kept):
    """Of allowed rows (start, end, ...), by end, then start: those not inside another; same spans stay together. Returns how many."""
    count = 0
    for i in range(num_rows):
        if not allowed[i]:
            continue
        start, end = rows[i, 0], rows[i, 1]
        if count > 0 and rows[kept[count - 1], 1] == end and rows[kept[count - 1], 0] < start:
            continue
        while count > 0 and rows[kept[count - 1], 0] >= start and not (rows[kept[count - 1], 0] == start and rows[kept[count - 1], 1] == end):
            count -= 1
        kept[count] = i
        count += 1
    return count


@_jit
def check_words(first, label, key, kinds, phones, size, costs, runs, rows, num_rows, allowed):
    """Fills `allowed` for rows (start, end, ...); returns the first row whose fate later phones can change, or num_rows."""
    first_open = num_rows
    for i in range(num_rows):
        may, changes = stands_alone(first, label, key, kinds, phones, size, costs, runs, rows[i, 0], rows[i, 1])
        allowed[i] = may
        if changes and i < first_open:
            first_open = i
    return first_open
