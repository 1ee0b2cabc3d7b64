"""Phonemes to words for a closed vocabulary: the best word sequence under CTC, by an exact search over a loop of the words.

It shows what CTC alone knows: every word may follow every word with the same probability, so there is no language model to help.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import PhonemeInventory
from nim4.model.ctc import BLANK


class LexiconSearch:
    """Viterbi search over `words`, each a chain of phonemes with optional blanks, in a loop.

    Args:
        pronunciations: word -> its readings, each a sequence of phoneme ids; the words are equally likely.

    Raises:
        RecipeError: if there is no word, or one without phonemes.
    """

    def __init__(self, pronunciations: Mapping[str, Sequence[Sequence[int]]]):
        readings = [(word, list(phones)) for word, variants in pronunciations.items() for phones in variants]
        empty = [word for word, phones in readings if not phones]
        if not readings or empty:
            raise RecipeError("--lexicon", expected="words with a pronunciation", found=empty[:3] or "no words", fix="correct the word list")
        self._words = [word for word, _ in readings]
        self._word_score = -math.log(len(pronunciations))
        # State 0 is the blank between words; each reading has its phonemes, and a blank behind each but the last.
        labels, starts, ends = [BLANK], [], []
        for _, phones in readings:
            starts.append(len(labels))
            for phone in phones:
                labels += [phone, BLANK]
            labels.pop()
            ends.append(len(labels) - 1)
        self._labels = np.array(labels)
        # Within a word: a state is kept, or reached from the one before; a blank may be stepped over between two different phonemes.
        may_step, may_skip = np.ones(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool)
        may_step[[0, *starts]] = False
        may_skip[2:] = may_step[2:] & may_step[1:-1] & (self._labels[2:] != BLANK) & (self._labels[2:] != self._labels[:-2])
        self._step_cost, self._skip_cost = _cost(may_step), _cost(may_skip)
        # Between words: from the blank, or from the end of a word (columns), into the blank or the start of a word (rows). A word may
        # follow another without a blank only if the phonemes where they meet differ.
        self._sources, self._targets = np.array([0, *ends]), np.array([0, *starts])
        meet = self._labels[self._sources][None, :] != self._labels[self._targets][:, None]
        meet[0, :] = meet[:, 0] = True
        self._between_cost = _cost(meet)
        self._word_score = np.array([0.0] + [-math.log(len(pronunciations))] * len(readings))

    @classmethod
    def of_file(cls, path: Path, inventory: PhonemeInventory) -> "LexiconSearch":
        """The words of a list, one per line, with the readings of the G2P. Raises RecipeError when the list cannot be read."""
        try:
            words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(path, expected="a readable word list", found=error, fix="correct --lexicon") from error
        reader = Lexicon()
        return cls({word: [inventory.encode(reader.phones(word))] for word in words})

    def search(self, log_probs: np.ndarray) -> list[str]:
        """The best words for (S, V) log-probabilities; none for no frames, or where blanks are best."""
        emitted = log_probs[:, self._labels].astype(np.float64)
        num_frames, num_states = emitted.shape
        states, rows = np.arange(num_states), np.arange(len(self._targets))
        came_from = np.empty((num_frames, num_states), dtype=np.int64)
        ways = np.full((3, num_states), -np.inf)  # staying, from the state before, from the one before that
        score = np.full(num_states, -np.inf)
        score[0] = 0.0
        for frame in range(num_frames):
            ways[0] = score
            ways[1, 1:] = score[:-1] + self._step_cost[1:]
            ways[2, 2:] = score[:-2] + self._skip_cost[2:]
            origin = states - ways.argmax(0)
            best = ways.max(0)
            between = score[self._sources] + self._between_cost
            last = between.argmax(1)
            entering = between[rows, last] + self._word_score
            entered = entering > best[self._targets]
            origin[self._targets] = np.where(entered, self._sources[last], origin[self._targets])
            best[self._targets] = np.where(entered, entering, best[self._targets])
            came_from[frame] = origin
            score = best + emitted[frame]
        state = self._sources[score[self._sources].argmax()]
        word_at, words = dict(zip(self._targets[1:].tolist(), self._words, strict=True)), []
        for frame in range(num_frames - 1, -1, -1):
            before = came_from[frame, state]
            if before != state and int(state) in word_at:  # the start of a word is reached from outside it alone
                words.append(word_at[int(state)])
            state = before
        return words[::-1]


def _cost(allowed: np.ndarray) -> np.ndarray:
    """What a step adds to a score: nothing where it is allowed, else minus infinity."""
    return np.where(allowed, 0.0, -np.inf)


def join_words(words: Sequence[str]) -> str:
    """Words as text: a blank wherever a Latin word meets another word, none between Chinese words."""
    text = ""
    for word in words:
        text += " " * bool(text and (text[-1].isascii() or word[0].isascii())) + word
    return text
