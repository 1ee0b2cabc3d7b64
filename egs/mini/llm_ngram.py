"""The baseline of the language model of egs/mini: an interpolated Kneser-Ney n-gram over the same tokens."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

START = -1


class KneserNey:
    """Counts of n-grams, one discount per order; below all of them every token of the vocabulary is equally likely.

    Args:
        sequences: token ids of each text, its end included.
        order: tokens in the longest n-gram.
        vocab_size: number of tokens V.
    Source: Chen and Goodman 1999, section 2.7, interpolated.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], order: int, vocab_size: int):
        self.order, self.vocab_size = order, vocab_size
        raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for sequence in sequences:
            padded = (START,) * (order - 1) + tuple(sequence)
            for end in range(order, len(padded) + 1):
                for n in range(1, order + 1):
                    raw[n][padded[end - n : end]] += 1
        self._followers: list[dict[tuple[int, ...], dict[int, int]]] = []
        self._discounts: list[float] = []
        for n in range(1, order + 1):
            # Below the highest order: in how many different left contexts. A text's start has one left context only, so its counts stay.
            counts = Counter(ngram[1:] for ngram in raw[n + 1]) if n < order else raw[n]
            if n < order:
                counts.update({ngram: count - counts[ngram] for ngram, count in raw[n].items() if ngram[0] == START})
            followers: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
            for ngram, count in counts.items():
                followers[ngram[:-1]][ngram[-1]] = count
            ones, twos = (sum(count == value for count in counts.values()) for value in (1, 2))
            self._followers.append(dict(followers))
            self._discounts.append(ones / (ones + 2 * twos) if ones and twos else 0.5)
        self._totals = [{context: sum(tokens.values()) for context, tokens in level.items()} for level in self._followers]

    def prob(self, context: Sequence[int], token: int) -> float:
        """Probability of `token` after `context`, of which the last order - 1 tokens count. A text starts with the empty context."""
        padded = ((START,) * (self.order - 1) + tuple(context))[len(context) :]
        p = 1.0 / self.vocab_size
        for n, (level, totals, discount) in enumerate(zip(self._followers, self._totals, self._discounts, strict=True)):
            past = padded[self.order - 1 - n :]
            if past in level:
                seen = level[past]
                p = (max(seen.get(token, 0) - discount, 0.0) + discount * len(seen) * p) / totals[past]
        return p

    def cost(self, sequence: Sequence[int]) -> float:
        """Negative log probability of a whole text in nats."""
        return -sum(math.log(self.prob(sequence[:place], token)) for place, token in enumerate(sequence))
