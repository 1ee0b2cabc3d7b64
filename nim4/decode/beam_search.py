"""The loops of the CTC prefix beam search, compiled.

A prefix is a sequence of words (each with its reading) and a node of the lexicon's trie, the phonemes of the next word so far. Its mass is
kept in two parts, of alignments that end in a blank and in its last phoneme. When a phoneme reaches a node where words end, the same mass
also begins the prefixes that go on behind each of them, which the n-gram then knows.
"""

import numpy as np

from nim4.corpus.machine_code import jit
from nim4.model.ctc import BLANK

MAX_PHONES = 24  # ours: phonemes that a prefix may go on with in a frame, the most probable ones
MAX_BEHIND = 20.0  # ours: nats that a prefix may be behind the best
INT_FIELDS, FLOAT_FIELDS = 5, 3
# integers of a prefix: identity of its words; its row of the history; trie node; state of the n-gram; word that would be its next row, or -1
WORDS, ROW, NODE, STATE, NEW = range(INT_FIELDS)
# floats of a prefix: mass ending in a blank, in the last phoneme; n-gram and bonus
IN_BLANK, IN_PHONE, OUTSIDE = range(FLOAT_FIELDS)


@jit
def joined(a, b, sum_paths):
    """The mass of two sets of alignments, in logarithms: their sum, or the better of the two."""
    high, low = max(a, b), min(a, b)
    return high if low == -np.inf or not sum_paths else high + np.log1p(np.exp(low - high))


@jit
def mixed(identity, word):
    """Identity of a sequence of words with one more (splitmix64's mixing: two sequences of one search hardly ever meet)."""
    x = np.uint64(identity) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(word + 1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((x ^ (x >> np.uint64(31))) >> np.uint64(1))


@jit
def follow(ngram, state, word):
    """Natural logarithm of a word's probability in a state, and the state behind it; minus infinity for a word that has no unigram."""
    first, words, logp, to, backoff_to, backoff = ngram
    total = 0.0
    while state >= 0:
        low, high = first[state], first[state + 1]
        while low < high:
            middle = (low + high) >> 1
            if words[middle] < word:
                low = middle + 1
            else:
                high = middle
        if low < first[state + 1] and words[low] == word:
            return total + logp[low], np.int64(to[low])
        total += backoff[state]
        state = np.int64(backoff_to[state])
    return -np.inf, np.int64(0)


@jit
def merged(ints, floats, count, num_nodes, sum_paths):
    """Candidates with the same words and node made one, in place; how many are left."""
    keys = np.empty(count, np.int64)
    for i in range(count):
        keys[i] = mixed(ints[i, WORDS], ints[i, NODE] + num_nodes)
    order = np.argsort(keys)
    kept = np.empty(count, np.int64)
    size = 0
    for place in range(count):
        i = order[place]
        if place and keys[i] == keys[order[place - 1]]:
            own = kept[size - 1]
            for part in range(2):
                floats[own, part] = joined(floats[own, part], floats[i, part], sum_paths)
            if ints[i, NEW] < 0 <= ints[own, NEW]:  # the words have a row of the history already
                ints[own, ROW], ints[own, NEW] = ints[i, ROW], -1
        else:
            kept[size] = i
            size += 1
    return kept[:size]


@jit
def spread(frame, phones, ints, floats, count, new_ints, new_floats, lexicon, ngram, settings, last_of_row):
    """The candidates after a frame that come from the prefixes before it: (how many, how many there would be with more room)."""
    first, label, key, first_entry, word_of, _, ahead = lexicon
    _, _, _, lm_weight, bonus, sum_paths = settings
    size, best = 0, -np.inf
    for i in range(count):
        node, row, state = ints[i, NODE], ints[i, ROW], ints[i, STATE]
        in_blank, in_phone, outside = floats[i, IN_BLANK], floats[i, IN_PHONE], floats[i, OUTSIDE]
        last = label[node] if node else (last_of_row[row] if row >= 0 else -1)
        mass = joined(in_blank, in_phone, sum_paths)
        if size == len(new_ints):
            return -1, 2 * len(new_ints)
        new_ints[size] = ints[i]
        new_floats[size, IN_BLANK] = mass + frame[BLANK]
        new_floats[size, IN_PHONE] = in_phone + frame[last] if last >= 0 else -np.inf
        new_floats[size, OUTSIDE] = outside
        best = max(best, new_floats[size, IN_BLANK] + outside + ahead[node] * (node > 0))
        size += 1
        for child in range(first[node], first[node + 1]):
            phone = label[child]
            if not phones[phone]:
                continue
            moved = (in_blank if phone == last else mass) + frame[phone]
            if moved + outside + ahead[child] < best - MAX_BEHIND:
                continue
            best = max(best, moved + outside + ahead[child])
            words_end = first_entry[key[child] + 1] - first_entry[key[child]] if key[child] >= 0 else 0
            if size + 1 + words_end > len(new_ints):
                return -1, 2 * len(new_ints) + words_end
            if first[child] < first[child + 1]:
                new_ints[size] = ints[i]
                new_ints[size, NODE] = child
                new_floats[size, IN_BLANK], new_floats[size, IN_PHONE], new_floats[size, OUTSIDE] = -np.inf, moved, outside
                size += 1
            for place in range(words_end):
                entry = first_entry[key[child]] + place
                logp, to = follow(ngram, state, word_of[entry])
                worth = outside + lm_weight * logp + bonus
                new_ints[size, WORDS], new_ints[size, ROW] = mixed(ints[i, WORDS], entry), row
                new_ints[size, NODE], new_ints[size, STATE], new_ints[size, NEW] = 0, to, entry
                new_floats[size, IN_BLANK], new_floats[size, IN_PHONE], new_floats[size, OUTSIDE] = -np.inf, moved, worth
                size += 1
    return size, size


@jit
def search_prefixes(log_probs, lexicon, ngram, settings):
    """The entries of the best sequence of words, and its score; none and minus infinity when none fits."""
    first, _, _, _, _, last_of, ahead = lexicon
    start, end_word, num_beams, lm_weight, _, sum_paths = settings
    ints, floats = np.zeros((1, INT_FIELDS), np.int64), np.zeros((1, FLOAT_FIELDS))
    ints[0, ROW], ints[0, STATE], ints[0, NEW], floats[0, IN_PHONE] = -1, start, -1, -np.inf
    room = 64 * num_beams
    new_ints, new_floats = np.empty((room, INT_FIELDS), np.int64), np.empty((room, FLOAT_FIELDS))
    before, entry_of = np.empty(1024, np.int64), np.empty(1024, np.int64)  # rows of the history: the row before, and the entry
    last_of_row, num_rows = np.empty(1024, np.int64), 0
    phones = np.zeros(log_probs.shape[1], np.bool_)
    for t in range(len(log_probs)):
        frame = log_probs[t].astype(np.float64)
        phones[:] = False
        phones[np.argsort(-frame)[: MAX_PHONES + 1]] = True
        phones[BLANK] = False
        while True:
            size, wanted = spread(frame, phones, ints, floats, len(ints), new_ints, new_floats, lexicon, ngram, settings, last_of_row)
            if size >= 0:
                break
            new_ints, new_floats = np.empty((wanted, INT_FIELDS), np.int64), np.empty((wanted, FLOAT_FIELDS))
        kept = merged(new_ints, new_floats, size, len(first), sum_paths)
        worth = np.empty(len(kept))
        for place in range(len(kept)):
            i = kept[place]
            worth[place] = joined(new_floats[i, IN_BLANK], new_floats[i, IN_PHONE], sum_paths) + new_floats[i, OUTSIDE]
            worth[place] += ahead[new_ints[i, NODE]] if new_ints[i, NODE] else 0.0
        best = np.argsort(-worth)[:num_beams]
        best = best[worth[best] >= worth[best[0]] - MAX_BEHIND]
        ints, floats = new_ints[kept[best]], new_floats[kept[best]]
        for i in range(len(ints)):
            if ints[i, NEW] < 0:
                continue
            if num_rows == len(before):
                before, entry_of = np.concatenate((before, before)), np.concatenate((entry_of, entry_of))
                last_of_row = np.concatenate((last_of_row, last_of_row))
            before[num_rows], entry_of[num_rows], last_of_row[num_rows] = ints[i, ROW], ints[i, NEW], last_of[ints[i, NEW]]
            ints[i, ROW], ints[i, NEW] = num_rows, -1
            num_rows += 1
    row, score = -1, -np.inf
    for i in range(len(ints)):
        if ints[i, NODE] == 0:
            logp, _ = follow(ngram, ints[i, STATE], end_word)
            mass = joined(floats[i, IN_BLANK], floats[i, IN_PHONE], sum_paths)
            if mass + floats[i, OUTSIDE] + lm_weight * logp > score:
                row, score = ints[i, ROW], mass + floats[i, OUTSIDE] + lm_weight * logp
    found = np.empty(num_rows, np.int64)
    size = 0
    while row >= 0:
        found[size], row = entry_of[row], before[row]
        size += 1
    return found[:size][::-1].copy(), score
