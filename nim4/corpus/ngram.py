"""n-gram language models: Kneser-Ney counts of texts, and ARPA files, written, and read and checked line by line."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nim4.config import RecipeError
from nim4.stage import atomic_write

START = -1
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
NEVER = -99.0  # log10 of what ARPA writes for the start of a text, which is never predicted
MAKE = "make it again, for example ./run.sh --only 2 --ngram 3"


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
        return self._prob(((START,) * (self.order - 1) + tuple(context))[len(context) :], token)

    def _prob(self, past: tuple[int, ...], token: int) -> float:
        """Probability of `token` by the n-grams of at most len(past) + 1 tokens."""
        p = 1.0 / self.vocab_size
        for n in range(len(past) + 1):
            context = past[len(past) - n :]
            if context in self._followers[n]:
                seen = self._followers[n][context]
                p = max(seen.get(token, 0) - self._discounts[n], 0.0) / self._totals[n][context] + self._backoff(n, context) * p
        return p

    def _backoff(self, n: int, context: tuple[int, ...]) -> float:
        return self._discounts[n] * len(self._followers[n][context]) / self._totals[n][context]

    def cost(self, sequence: Sequence[int]) -> float:
        """Negative log probability of a whole text in nats."""
        return -sum(math.log(self.prob(sequence[:place], token)) for place, token in enumerate(sequence))

    def save_arpa(self, path: Path, names: Sequence[str]) -> None:
        """Writes the same probabilities as an ARPA file.

        Args:
            names: of the V tokens, by id; among them </s> for the end of a text and <unk>.
        """
        probs, backoffs = self._arpa_entries()
        by_order: list[list[tuple[int, ...]]] = [[] for _ in range(self.order)]
        for ngram in sorted(probs):
            by_order[len(ngram) - 1].append(ngram)
        with atomic_write(path) as file:
            file.write("\\data\\\n" + "".join(f"ngram {n}={len(ngrams)}\n" for n, ngrams in enumerate(by_order, 1)))
            for n, ngrams in enumerate(by_order, 1):
                file.write(f"\n\\{n}-grams:\n")
                for ngram in ngrams:
                    backoff = f"\t{math.log10(backoffs[ngram]):.6f}" if ngram in backoffs else ""
                    words = " ".join(BEGIN if token == START else names[token] for token in ngram)
                    file.write(f"{math.log10(probs[ngram]) if probs[ngram] else NEVER:.6f}\t{words}{backoff}\n")
            file.write("\n\\end\\\n")

    def _arpa_entries(self) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
        """Probabilities and back-off weights by n-gram. ARPA has one start of text where we count as many as a context is long, so the
        n-grams that differ in nothing but their number are one: with the probability of the longest, and the product of the weights."""
        probs = {(token,): self._prob((), token) for token in range(self.vocab_size)} | {(START,): 0.0}
        backoffs: dict[tuple[int, ...], float] = {}
        for n, level in enumerate(self._followers[1:], 1):
            for context, seen in level.items():
                rest = tuple(token for token in context if token != START)
                key = rest if len(rest) == n else (START, *rest)
                past = rest if len(rest) == n else (START,) * (self.order - 1 - len(rest)) + rest
                backoffs[key] = backoffs.get(key, 1.0) * self._backoff(n, context)
                probs.update({(*key, token): self._prob(past, token) for token in seen})
        return probs, backoffs


def count_ngrams(texts: Iterable[Sequence[str]], order: int) -> tuple[KneserNey, list[str]]:
    """The n-grams of texts in words (or phonemes), and the names of their token ids: </s>, <unk>, and the words, sorted."""
    listed = [list(text) for text in texts]
    names = [END, UNKNOWN, *sorted({word for text in listed for word in text} - {END, UNKNOWN})]
    ids = {name: number for number, name in enumerate(names)}
    return KneserNey(([*(ids[word] for word in text), ids[END]] for text in listed), order, len(names)), names


class Ngram(NamedTuple):
    """One line of an ARPA file, in log10; a back-off weight that is not written is 0."""

    words: tuple[str, ...]
    prob: float
    backoff: float


def read_arpa(path: Path) -> Iterator[Ngram]:
    """The n-grams of an ARPA file, the short ones first; read line by line, so a large one takes no memory.

    Raises:
        RecipeError: with the line, when its header, counts, sections, numbers or end are not as ARPA wants them.
    """
    try:
        with open(path, "rb") as file:
            if file.read(7) == b"mmap lm":
                raise RecipeError(
                    path, expected="an ARPA file", found="KenLM's binary form, which holds no words", fix="give the ARPA it was made from"
                )
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from _Reader(path, enumerate(file, 1)).ngrams()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a readable ARPA file", found=error, fix=MAKE) from error


class _Reader:
    def __init__(self, path: Path, lines: Iterator[tuple[int, str]]):
        self._path, self._lines, self._number = path, lines, 0

    def ngrams(self) -> Iterator[Ngram]:
        while self._next("\\data\\") != "\\data\\":  # comments may come before
            pass
        counts, line = [], self._next("ngram 1=COUNT")
        while match := re.fullmatch(r"ngram\s+(\d+)\s*=\s*(\d+)", line):
            if int(match[1]) != len(counts) + 1:
                raise self._error(f"ngram {len(counts) + 1}=COUNT", line)
            counts.append(int(match[2]))
            line = self._next("\\1-grams:")
        if not counts or not counts[0]:
            raise self._error("ngram 1=COUNT, COUNT at least 1", line)
        for n, count in enumerate(counts, 1):
            if line != f"\\{n}-grams:":
                raise self._error(f"\\{n}-grams:", line)
            found = 0
            while not (line := self._next("\\end\\")).startswith("\\"):
                found += 1
                yield self._ngram(line, n, len(counts))
            if found != count:
                raise self._error(f"{count} {n}-grams, as the header says", found)
        if line != "\\end\\":
            raise self._error("\\end\\", line)

    def _next(self, expected: str) -> str:
        """The next line that is not empty."""
        for number, line in self._lines:
            self._number = number
            if line := line.strip(" \t\r\n"):
                return line
        raise self._error(expected, "the end of the file")

    def _ngram(self, line: str, n: int, order: int) -> Ngram:
        prob, *rest = re.split("[ \t]+", line)
        if len(rest) not in ((n, n + 1) if n < order else (n,)):
            raise self._error(f"log10 probability, {n} words{' and perhaps a back-off weight' * (n < order)}", line)
        try:
            ngram = Ngram(tuple(rest[:n]), float(prob), float(rest[n]) if len(rest) > n else 0.0)
        except ValueError:
            raise self._error("numbers before and behind the words", line) from None
        if not (math.isfinite(ngram.prob) and ngram.prob <= 0 and math.isfinite(ngram.backoff)):
            raise self._error("a log10 probability of at most 0", line)
        return ngram

    def _error(self, expected: str, found: object) -> RecipeError:
        return RecipeError(f"{self._path}, line {self._number}", expected=expected, found=repr(found) if isinstance(found, str) else found, fix=MAKE)


@dataclass(frozen=True)
class NgramStates:
    """An n-gram as an automaton: a state for each context, an arc for each n-gram, and from each state a way to the next shorter context.

    Attributes:
        words: by id; the last one is </s>. <unk> is left out: what searches with this knows its words.
        start: the state at the start of a text. State 0 is the empty context.
        first: (N + 1,) int64; the arcs of state i are first[i] to first[i + 1] - 1, in the order of their words.
        word: (A,) int32 ids. logp: (A,) float64, natural logarithms. to: (A,) int32 states.
        backoff_to: (N,) int32, -1 for state 0. backoff: (N,) float64, natural logarithms.
    """

    words: tuple[str, ...]
    start: int
    first: np.ndarray
    word: np.ndarray
    logp: np.ndarray
    to: np.ndarray
    backoff_to: np.ndarray
    backoff: np.ndarray

    @classmethod
    def of_arpa(cls, path: Path) -> "NgramStates":
        """Reads an ARPA file into memory. Raises RecipeError as `read_arpa`, without <s> or </s>, and when an n-gram's context is missing."""
        ngrams = [ngram for ngram in read_arpa(path) if not {"<unk>", "<UNK>"} & set(ngram.words)]
        listed = [ngram.words[0] for ngram in ngrams if len(ngram.words) == 1]
        if missing := {BEGIN, END} - set(listed):
            raise RecipeError(path, expected="<s> and </s> among its words", found=f"no {min(missing)}", fix=MAKE)
        words = (*(word for word in listed if word not in (BEGIN, END)), END)
        ids, order = {word: number for number, word in enumerate(words)}, max(len(ngram.words) for ngram in ngrams)
        contexts = [ngram for ngram in ngrams if len(ngram.words) < order and ngram.words[-1] != END]
        states = {(): 0} | {ngram.words: number for number, ngram in enumerate(contexts, 1)}
        if order == 1:
            states[BEGIN,] = 0

        def state_of(suffix: tuple[str, ...]) -> int:
            while suffix not in states:
                suffix = suffix[1:]
            return states[suffix]

        rows = []
        for *context, word in (ngram.words for ngram in ngrams):
            if tuple(context) not in states:
                raise RecipeError(f"{path}, {' '.join((*context, word))}", expected="its context as an n-gram, too", found="none", fix=MAKE)
            rows.append((states[tuple(context)], ids.get(word, -1), 0 if word == END else state_of((*context, word))))
        table, logp = np.array(rows, np.int64), np.array([ngram.prob for ngram in ngrams]) * math.log(10)
        kept = np.lexsort((table[:, 1], table[:, 0]))
        kept = kept[table[kept, 1] >= 0]  # nothing leads to the start of a text
        table, num_states = table[kept], len(contexts) + 1
        first = np.searchsorted(table[:, 0], np.arange(num_states + 1))
        backoff_to = np.array([-1, *(state_of(ngram.words[1:]) for ngram in contexts)], np.int32)
        backoff = np.array([0.0, *(ngram.backoff for ngram in contexts)]) * math.log(10)
        arrays = (table[:, 1].astype(np.int32), logp[kept], table[:, 2].astype(np.int32))
        return cls(words, states[BEGIN,], first, *arrays, backoff_to, backoff)
