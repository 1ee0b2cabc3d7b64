"""A trie in sorted arrays, and the walks through it.

Nodes are numbered level by level, so that the children of a node stand side by side, in the order of their phones. Such arrays are built
by sorting, can lie in a file that many processes map into memory, and never change. A walk looks at nothing outside them, whatever a file
says: every number that is read from them is checked before it is used.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nim4.corpus.machine_code import jit
from nim4.corpus.units import ARPABET, FINALS, INITIALS, ZERO_INITIAL, PhonemeInventory

NONE = 0xFFFFFFFF  # no key ends at this node
OTHER, INITIAL, FINAL, ENGLISH = range(4)
WORD_HORIZON, MAX_GAPS = 24, 3  # phones, no English word is longer; slots that a match may step over


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

    @cached_property
    def depth(self) -> int:
        """Phones of the longest key."""
        depth, begin, end = 0, 0, 1
        while begin < end <= len(self.label) and depth < 256:
            begin, end, depth = end, max(int(self.first[end]), end), depth + 1
        return depth - 1

    def find(self, phones: np.ndarray) -> int | None:
        """The number of a key."""
        node = 0
        for phone in phones:
            node = child_of(self.first, self.label, node, phone)
        return int(self.key[node]) if node >= 0 and self.key[node] != NONE else None

    def phones_to(self, node: int) -> np.ndarray:
        """(P,) uint8, the phones that lead to a node."""
        phones = []
        while node > 0:
            phones.append(self.label[node])
            node = min(int(np.searchsorted(self.first, np.uint32(node), side="right")) - 1, node - 1)
        return np.array(phones[::-1], np.uint8)


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


@jit
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


@jit
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
        if num_alike[phone] == 1:
            for i in range(num_old):
                node = child_of(first, label, nodes[i], alike[phone, 0])
                if node >= 0:
                    starts[kept], nodes[kept] = starts[i], node
                    kept += 1
        else:
            old_starts, old_nodes = starts[:num_old].copy(), nodes[:num_old].copy()
            for i in range(num_old):
                for j in range(num_alike[phone]):
                    node = child_of(first, label, old_nodes[i], alike[phone, j])
                    if node >= 0:
                        if kept == starts.size:
                            return -1, 2 * kept
                        starts[kept], nodes[kept] = old_starts[i], node
                        kept += 1
        for i in range(kept):
            number = np.int64(key[nodes[i]]) if nodes[i] < key.size else np.int64(NONE)
            if number < is_live.size and is_live[number]:
                if num_rows < rows.shape[0]:
                    rows[num_rows, 0], rows[num_rows, 1], rows[num_rows, 2] = starts[i], place + 1, number
                num_rows += 1
        num_active = kept
    return num_active, num_rows


@jit
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


@jit
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


@jit
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


@jit
def check_words(first, label, key, kinds, phones, size, costs, runs, rows, num_rows, allowed):
    """Fills `allowed` for rows (start, end, ...); returns the first row whose fate later phones can change, or num_rows."""
    first_open = num_rows
    for i in range(num_rows):
        may, changes = stands_alone(first, label, key, kinds, phones, size, costs, runs, rows[i, 0], rows[i, 1])
        allowed[i] = may
        if changes and i < first_open:
            first_open = i
    return first_open


@jit
def walk_slots(first, label, key, is_live, alike, num_alike, tones, kinds, phones, costs, counts, begin, limits, stack, spent, rows, row_costs):
    """Writes every live key that can be read along slots from `begin` on, cheaply enough.

    Args:
        tones: (256, 4) uint8, the same final in other tones, 0 where there are fewer.
        phones, costs, counts: see confusion.Slots; 0 is the gap.
        limits: (4,) float64: nats per match, nats per phone, phones of a match that costs anything, nats for the best final in another tone.
        stack: (H, 4) int64, spent: (H,) float64, to work with: slot, node, phones, gaps, and nats of each way that is still to go.
        rows: (R, 4) int64, takes (first slot, slot behind the last, key, phones), row_costs: (R,) float64. A key can come several times.
    Returns:
        rows there are, which may be more than R; -1 when the stack is too small.
    """
    total, before = 0, np.int64(0)  # before: the best phone in front of a slot
    taken, taken_costs = np.empty(32 + alike.shape[1] * phones.shape[1], np.int64), np.empty(32 + alike.shape[1] * phones.shape[1])
    for start in range(counts.size):
        height = 0
        if start >= begin:
            stack[0], spent[0], height = (start, 0, 0, 0), 0.0, 1
        while height > 0:
            height -= 1
            slot, node, depth, gaps, cost = stack[height, 0], stack[height, 1], stack[height, 2], stack[height, 3], spent[height]
            if slot >= counts.size:
                continue
            if height + taken.size >= spent.size:
                return -1
            num_taken = 0
            for i in range(counts[slot]):
                if phones[slot, i] == 0:
                    if depth > 0 and (i == 0 or gaps < MAX_GAPS) and cost + costs[slot, i] <= limits[0]:
                        stack[height], spent[height] = (slot + 1, node, depth, gaps + (i > 0)), cost + costs[slot, i]
                        height += 1
                    continue
                for j in range(num_alike[phones[slot, i]]):
                    taken[num_taken], taken_costs[num_taken] = alike[phones[slot, i], j], costs[slot, i]
                    num_taken += 1
            for j in range(tones.shape[1]):
                if tones[phones[slot, 0], j] != 0:
                    taken[num_taken], taken_costs[num_taken] = tones[phones[slot, 0], j], limits[3]
                    num_taken += 1
            for i in range(num_taken):
                nats = cost + taken_costs[i]
                if nats > limits[0] or (depth == 0 and kinds[taken[i]] == FINAL and kinds[before] == INITIAL):
                    continue
                child = child_of(first, label, node, taken[i])
                if child < 0:
                    continue
                number = np.int64(key[child]) if child < key.size else np.int64(NONE)
                cheap = nats < 1e-6 or (depth + 1 >= limits[2] and nats <= limits[1] * (depth + 1))
                if number < is_live.size and is_live[number] and cheap:
                    if total < row_costs.size:
                        rows[total], row_costs[total] = (start, slot + 1, number, depth + 1), nats
                    total += 1
                stack[height], spent[height] = (slot + 1, child, depth + 1, gaps), nats
                height += 1
        if phones[start, 0] != 0:
            before = np.int64(phones[start, 0])
    return total


@jit
def choose_cheapest(rows, costs, allowed, per_phone, kept):
    """Of rows (first slot, slot behind the last, key, phones), sorted by first slot: those that no row around them beats.

    A row is worth per_phone * phones - cost; of rows with one span all stay that are worth the most less per_phone. Returns how many.
    """
    count, longest = 0, np.int64(0)
    for i in range(costs.size):
        longest = max(longest, rows[i, 1] - rows[i, 0])
    for i in range(costs.size):
        if not allowed[i]:
            continue
        worth, beaten, j = per_phone * rows[i, 3] - costs[i], False, i
        while j > 0 and rows[j - 1, 0] >= rows[i, 1] - longest:
            j -= 1
        while j < costs.size and rows[j, 0] <= rows[i, 0] and not beaten:
            if allowed[j] and rows[j, 1] >= rows[i, 1]:
                other = per_phone * rows[j, 3] - costs[j]
                if rows[j, 0] == rows[i, 0] and rows[j, 1] == rows[i, 1]:
                    beaten = other > worth + per_phone or (rows[j, 2] == rows[i, 2] and (other > worth or (other == worth and j < i)))
                else:
                    beaten = other >= worth
            j += 1
        if not beaten:
            kept[count] = i
            count += 1
    return count
