"""Pronunciations of English words that no dictionary holds: a joint-sequence n-gram.

A graphone is a pair of up to two letters and up to two phones, e.g. (ph, F), (e, ), (x, K S). A word is a sequence of graphones,
and an n-gram with back-off tells which sequence is likely. Decoding walks the word from left to right with a beam.
Trained by utils/train_letter_to_sound.py, which also measures the error and leaves it in the model's `metadata`.
Source: Bisani and Ney 2008, Joint-sequence models for grapheme-to-phoneme conversion. Ours: the best graphone sequence is taken,
not the sum over all that give the same phones.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.machine_code import jit

START, END = 0, 1  # graphone ids that stand for the edges of a word
MAX_LETTERS = 2  # on the letter side of a graphone
NODE = np.dtype([("first", "<i4"), ("shorter", "<i4"), ("context", "<i4"), ("symbol", "<u2"), ("cost", "u1"), ("backoff", "u1")])
NO_LIMIT = np.int64(1) << 40  # steps: more than any word costs
LOG_STEP = 1 / 16  # natural-log probabilities are kept as one byte, in these steps; sums of them are whole numbers, and exact


class LetterToSound:
    """The model, as a tree of n-grams stored breadth first.

    Args:
        letters: (V,) letter side of each graphone, sorted; empty for START and END.
        phones: (V,) phone side, space separated.
        symbol: (N,) graphone that leads from the parent to node n; node 0 is the root.
        num_children: (N,) children of node n; they follow one another, ordered by symbol.
        cost: (N,) uint8. -log p(symbol | path to the parent) / LOG_STEP.
        backoff: (N,) uint8. -log weight of the shorter context, when this path is the context, / LOG_STEP.
        metadata: how the model was trained and how well it does.

    Raises:
        ValueError: if the arrays do not fit together.
    """

    def __init__(
        self,
        letters: Sequence[str],
        phones: Sequence[str],
        symbol: np.ndarray,
        num_children: np.ndarray,
        cost: np.ndarray,
        backoff: np.ndarray,
        metadata: dict[str, object],
    ):
        self.metadata = metadata
        order, bits = int(metadata["order"]), len(letters).bit_length()
        if list(letters[END + 1 :]) != sorted(letters[END + 1 :]) or len(phones) != len(letters):
            raise ValueError("graphones must be sorted by their letters, and have phones each")
        if order < 2 or bits * (order - 1) > 63:
            raise ValueError(f"a history of {order - 1} graphones of {len(letters)} does not fit into 63 bits")
        first = 1 + np.concatenate([[0], np.cumsum(num_children, dtype=np.int64)])
        if not len(symbol) == len(num_children) == len(cost) == len(backoff) == first[-1] or (np.diff(symbol[1 : first[1]]) != 1).any():
            raise ValueError("the tree of n-grams is not whole")
        # Phones are numbered in their alphabetical order, from 1 on: of readings that cost the same the first in this order is taken.
        sides = [side.split() for side in phones]
        self._phone_names = sorted({phone for side in sides for phone in side})
        numbers = {phone: number for number, phone in enumerate(self._phone_names, 1)}
        width = max(map(len, sides))
        self._sides = np.array([[numbers[phone] for phone in side] + [0] * (width - len(side)) for side in sides], np.uint8)
        # The graphones of each letter side stand together: row `first letter`, column `second letter`, 0 for none.
        used = "".join(sorted(set("".join(letters))))
        self._letters = bytes(used.find(chr(code)) + 1 for code in range(256))
        self._ranges = np.zeros((len(used) + 1, len(used) + 1, 2), np.int64)
        for side, group in itertools.groupby(range(END + 1, len(letters)), key=lambda graphone: letters[graphone]):
            own, (one, two) = list(group), [*(used.index(letter) + 1 for letter in side), 0][:MAX_LETTERS]
            self._ranges[one, two] = own[0], own[-1] + 1
        self._tree = np.zeros(len(symbol) + 1, NODE)  # one more, so that the children of every node end where those of the next begin
        self._tree["first"] = first
        for name, values in (("symbol", symbol), ("cost", cost), ("backoff", backoff)):
            self._tree[name][:-1] = values
        _link(self._tree, order)
        self._shape = (order, bits, int(np.ptp(self._ranges, axis=2).max()))

    @classmethod
    def load(cls, path: Path) -> "LetterToSound":
        """Raises RecipeError when the file is missing or is no such model."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in ("letters", "phones", "symbol", "num_children", "cost", "backoff")}
                metadata = json.loads(str(arrays["metadata"]))
            return cls(fields["letters"].tolist(), fields["phones"].tolist(), *(fields[name] for name in list(fields)[2:]), metadata=metadata)
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(path, expected="a letter-to-sound model", found=error, fix="run utils/train_letter_to_sound.py") from error

    def phones(self, word: str, beam: int = 16) -> list[str]:
        """The likeliest phones of a lower-case word of letters a-z and apostrophes; empty when no graphone sequence spells it.

        Args:
            word: e.g. "paddington".
            beam: partial readings kept after each letter.
        """
        letters = np.frombuffer(word.encode("ascii", "replace").translate(self._letters), np.uint8)
        found = np.empty(len(word) * self._sides.shape[1], np.uint8)
        size = _read(letters, self._ranges, self._sides, self._tree, self._shape, beam, found)
        return [self._phone_names[number - 1] for number in found[:size].tolist()]


@jit
def _child(tree, node, graphone):
    """The child of a node, or the first one behind where it would be."""
    low, high = tree[node].first, tree[node + 1].first
    while low < high:
        middle = (low + high) >> 1
        if tree[middle].symbol < graphone:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _link(tree, order):
    """Fills `shorter`, the node of each path's longest suffix that is in the tree, and `context`, the node that the next graphone is looked up
    at: the own one, unless its path is as long as an n-gram already."""
    begin, end, depth = 0, 1, 1  # parents of one level; depth of their children
    while begin < end:
        for parent in range(begin, end):
            for node in range(tree[parent].first, tree[parent + 1].first):
                at = parent
                while at > 0:
                    at = tree[at].shorter
                    child = _child(tree, at, tree[node].symbol)
                    if child < tree[at + 1].first and tree[child].symbol == tree[node].symbol:
                        tree[node].shorter = child
                        break
                tree[node].context = node if depth < order else tree[node].shorter
        begin, end, depth = end, tree[end].first, depth + 1


@jit
def _is_before(phones_a, phones_b):
    """Whether one row of phones comes before another; both end with a 0."""
    for place in range(phones_a.size):
        if phones_a[place] != phones_b[place]:
            return phones_a[place] < phones_b[place]
        if phones_a[place] == 0:
            return False
    return False


@jit
def _end_cost(tree, node):
    """What it costs that a word ends behind the context of this node."""
    cost = 0
    while True:
        child = _child(tree, node, END)
        if child < tree[node + 1].first and tree[child].symbol == END:
            return cost + tree[child].cost
        if node == 0:
            return NO_LIMIT  # no word ends, says the model
        cost, node = cost + tree[node].backoff, tree[node].shorter


@jit
def _price(tree, node, so_far, limit, low, high, step, reached):
    """Writes what readings with this context cost with each of the graphones `low` to `high` behind them, and where they then are.

    The longest context that knows a graphone decides. -1 for those that cost more than `limit`.
    """
    left = high - low
    for graphone in range(left):
        step[graphone] = -1
    while so_far <= limit:
        child = _child(tree, node, low) if node > 0 else low - tree[1].symbol + 1
        while child < tree[node + 1].first and tree[child].symbol < high:
            graphone = tree[child].symbol - low
            if step[graphone] < 0:
                step[graphone], reached[graphone], left = so_far + tree[child].cost, tree[child].context, left - 1
            child += 1
        if node == 0 or left == 0:
            break
        so_far, node = so_far + tree[node].backoff, tree[node].shorter


@jit
def _choose(costs, phones, best):
    """Writes the best entries of a table in their order, as many as `best` takes, and returns how many there are."""
    num_best = 0
    for entry in range(costs.size):
        at = num_best
        while at > 0 and (
            costs[entry] < costs[best[at - 1]] or (costs[entry] == costs[best[at - 1]] and _is_before(phones[entry], phones[best[at - 1]]))
        ):
            at -= 1
        if at < best.size:
            num_best = min(num_best + 1, best.size)
            for j in range(num_best - 1, at, -1):
                best[j] = best[j - 1]
            best[at] = entry
    return num_best


@jit
def _find_twins(histories, recent, best, twin, is_twin):
    """Writes for each of the best entries the first one before it with the same recent graphones, or -1, and whether it is of such a pair."""
    for a in range(best.size):
        twin[a], is_twin[a] = -1, False
        for b in range(a):
            if (histories[best[a]] & recent) == (histories[best[b]] & recent):
                twin[a], is_twin[a], is_twin[b] = b, True, True
                break


@jit
def _insert(rising, value):
    """Puts a value at its place among rising ones, of which the last goes."""
    at = rising.size - 1
    while at > 0 and rising[at - 1] > value:
        rising[at] = rising[at - 1]
        at -= 1
    rising[at] = min(value, rising[at])


@jit
def _extend(phones, end, side, longer):
    """Writes the phones of a reading, one more graphone's and a 0 behind them; returns where the 0 is."""
    for place in range(end):
        longer[place] = phones[place]
    for phone in side:
        longer[end] = phone
        end += phone > 0
    longer[end] = 0
    return end


@jit
def _cheapest_whole(tree, costs, nodes, phones, least):
    """The entry of whole words that costs `least` with its end, the first by its phones; -1 when there is none."""
    chosen = -1
    for entry in range(costs.size):
        is_least = costs[entry] <= least and costs[entry] + _end_cost(tree, nodes[entry]) == least
        if is_least and (chosen < 0 or _is_before(phones[entry], phones[chosen])):
            chosen = entry
    return chosen


@jit
def _read(word, ranges, sides, tree, shape, beam, found):
    """Writes the likeliest phones of a word and returns how many they are.

    Partial readings (entries) lie in three tables that take turns: of the letters read so far, one more, and two more. Those with the same
    last `order - 1` graphones are one, the cheapest. Of the others the `beam` cheapest go on, by phones where they cost the same. What costs
    more than so many others is not written down; it could not go on.
    """
    order, bits, widest = shape
    whole, recent = (np.int64(1) << bits * (order - 1)) - 1, (np.int64(1) << bits * (order - 2)) - 1
    size = MAX_LETTERS * beam * widest
    counts = np.zeros(3, np.int64)
    costs, nodes, histories = np.empty((3, size), np.int64), np.empty((3, size), np.int64), np.empty((3, size), np.int64)
    phones, ends = np.empty((3, size, found.size + 1), np.uint8), np.empty((3, size), np.int64)
    cheapest, least = np.full((3, beam), NO_LIMIT), NO_LIMIT  # costs at each table's place; of a whole word
    best, twin, is_twin, begins = np.empty(beam, np.int64), np.empty(beam, np.int64), np.empty(beam, np.bool_), np.zeros((beam, 3), np.int64)
    step, reached = np.empty(widest, np.int64), np.empty(widest, np.int64)
    counts[0], costs[0, 0], histories[0, 0], phones[0, 0, 0], ends[0, 0] = 1, 0, START, 0, 0
    start = _child(tree, 0, START)
    nodes[0, 0] = tree[start].context if start < tree[1].first and tree[start].symbol == START else 0
    for i in range(word.size):
        here = i % 3
        num_best = _choose(costs[here, : counts[here]], phones[here], best)
        _find_twins(histories[here], recent, best[:num_best], twin, is_twin)
        for a, parent in enumerate(best[:num_best]):
            for length in range(1, min(MAX_LETTERS, word.size - i) + 1):
                low, high = ranges[word[i], word[i + 1] if length == 2 else 0]
                to, is_last = (i + length) % 3, i + length == word.size
                limit = NO_LIMIT if is_twin[a] else least if is_last else cheapest[to, beam - 1]
                if low == high or word[i] == 0 or word[i + length - 1] == 0 or costs[here, parent] > limit:
                    continue
                _price(tree, nodes[here, parent], costs[here, parent], limit, low, high, step, reached)
                begins[a, length] = counts[to]
                for graphone in range(high - low):
                    own = step[graphone]
                    if own < 0 or own > limit:
                        continue
                    entry = counts[to]
                    if twin[a] >= 0:
                        entry = begins[twin[a], length] + graphone
                        if own >= costs[to, entry]:
                            continue
                    else:
                        counts[to] += 1
                    ends[to, entry] = _extend(phones[here, parent], ends[here, parent], sides[low + graphone], phones[to, entry])
                    costs[to, entry], nodes[to, entry] = own, reached[graphone]
                    histories[to, entry] = (histories[here, parent] << bits | (low + graphone)) & whole
                    if is_last:
                        least = min(least, own + _end_cost(tree, nodes[to, entry]))
                    elif twin[a] < 0:
                        _insert(cheapest[to], own)
                    limit = NO_LIMIT if is_twin[a] else least if is_last else cheapest[to, beam - 1]
        counts[here], cheapest[here] = 0, NO_LIMIT
    here = word.size % 3
    chosen = _cheapest_whole(tree, costs[here, : counts[here]], nodes[here], phones[here], least)
    if chosen < 0:
        return 0
    found[: ends[here, chosen]] = phones[here, chosen, : ends[here, chosen]]
    return ends[here, chosen]
