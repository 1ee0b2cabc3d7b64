"""Pronunciations of English words that no dictionary holds: a joint-sequence n-gram.

A graphone is a pair of up to two letters and up to two phones, e.g. (ph, F), (e, ), (x, K S). A word is a sequence of graphones,
and an n-gram with back-off tells which sequence is likely. Decoding walks the word from left to right with a beam.
Trained by utils/train_letter_to_sound.py, which also measures the error and leaves it in the model's `metadata`.
Source: Bisani and Ney 2008, Joint-sequence models for grapheme-to-phoneme conversion. Ours: the best graphone sequence is taken,
not the sum over all that give the same phones.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nim4.config import RecipeError

START, END = 0, 1  # graphone ids that stand for the edges of a word
MAX_LETTERS = 2  # on the letter side of a graphone
LOG_STEP = 1 / 16  # natural-log probabilities are kept as one byte, in these steps


class LetterToSound:
    """The model, as a tree of n-grams stored breadth first.

    Args:
        letters: (V,) letter side of each graphone; empty for START and END.
        phones: (V,) phone side, space separated.
        symbol: (N,) graphone that leads from the parent to node n; node 0 is the root.
        num_children: (N,) children of node n; they follow one another, ordered by symbol.
        cost: (N,) uint8. -log p(symbol | path to the parent) / LOG_STEP.
        backoff: (N,) uint8. -log weight of the shorter context, when this path is the context, / LOG_STEP.
        metadata: how the model was trained and how well it does.
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
        self.letters = list(letters)
        self.phones_of = [tuple(side.split()) for side in phones]
        self.metadata = metadata
        self._first_child = (1 + np.concatenate(([0], np.cumsum(num_children, dtype=np.int64)))).tolist()
        self._symbol = symbol.tolist()
        self._cost = (cost * LOG_STEP).tolist()
        self._backoff = (backoff * LOG_STEP).tolist()
        self._graphones_of: dict[str, list[int]] = defaultdict(list)
        for graphone, side in enumerate(self.letters[END + 1 :], END + 1):
            self._graphones_of[side].append(graphone)
        self._children: dict[int, dict[int, int]] = {}

    @classmethod
    def load(cls, path: Path) -> "LetterToSound":
        """Raises RecipeError when the file is missing or is no such model."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in ("letters", "phones", "symbol", "num_children", "cost", "backoff")}
                metadata = json.loads(str(arrays["metadata"]))
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(path, expected="a letter-to-sound model", found=error, fix="run utils/train_letter_to_sound.py") from error
        return cls(fields["letters"].tolist(), fields["phones"].tolist(), *(fields[name] for name in list(fields)[2:]), metadata=metadata)

    def phones(self, word: str, beam: int = 16) -> list[str]:
        """The likeliest phones of a lower-case word of letters a-z and apostrophes; empty when no graphone sequence spells it.

        Args:
            word: e.g. "paddington".
            beam: partial readings kept after each letter.
        """
        order = int(self.metadata["order"])
        # beams[i]: last (order - 1) graphones -> (cost, phones) of the best reading of word[:i] that ends in them
        beams: list[dict[tuple[int, ...], tuple[float, tuple[str, ...]]]] = [{} for _ in range(len(word) + 1)]
        beams[0][(START,)] = (0.0, ())
        for i in range(len(word)):
            for history, (cost, phones) in sorted(beams[i].items(), key=lambda item: item[1])[:beam]:
                contexts = self._contexts(history)
                for num_letters in range(1, min(MAX_LETTERS, len(word) - i) + 1):
                    reached = beams[i + num_letters]
                    for graphone in self._graphones_of.get(word[i : i + num_letters], ()):
                        new_cost = cost + self._step_cost(contexts, graphone)
                        new_history = (*history, graphone)[-(order - 1) :]
                        if new_history not in reached or new_cost < reached[new_history][0]:
                            reached[new_history] = (new_cost, phones + self.phones_of[graphone])
        ends = [(cost + self._step_cost(self._contexts(history), END), phones) for history, (cost, phones) in beams[-1].items()]
        return list(min(ends)[1]) if ends else []

    def _contexts(self, history: tuple[int, ...]) -> list[int]:
        """Nodes of the suffixes of `history` that the tree holds, longest first; the last is the root."""
        nodes = []
        for start in range(len(history) + 1):
            node: int | None = 0
            for graphone in history[start:]:
                node = self._child(node, graphone)
                if node is None:
                    break
            if node is not None:
                nodes.append(node)
        return nodes

    def _step_cost(self, contexts: list[int], graphone: int) -> float:
        cost = 0.0
        for context in contexts:
            node = self._child(context, graphone)
            if node is not None:
                return cost + self._cost[node]
            cost += self._backoff[context]
        raise AssertionError(f"graphone {graphone} has no unigram")

    def _child(self, node: int, graphone: int) -> int | None:
        children = self._children.get(node)
        if children is None:
            first, last = self._first_child[node], self._first_child[node + 1]
            children = {self._symbol[child]: child for child in range(first, last)}
            self._children[node] = children
        return children.get(graphone)
