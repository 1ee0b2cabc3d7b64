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

NEVER = -1e30


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
        self._labels, self._starts, self._ends = np.array(labels), np.array(starts), np.array(ends)
        inside = np.ones(len(labels), dtype=bool)  # states that another state of the same word comes before
        inside[0] = False
        inside[self._starts] = False
        self._inside = inside
        # A blank may be stepped over between two different phonemes.
        self._can_skip = np.zeros(len(labels), dtype=bool)
        self._can_skip[2:] = inside[2:] & inside[1:-1] & (self._labels[2:] != BLANK) & (self._labels[2:] != self._labels[:-2])
        # A word may follow another without a blank only if the phonemes where they meet differ.
        self._clash = self._labels[self._ends][None, :] == self._labels[self._starts][:, None]  # (next word, word before)

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
        num_states = len(self._labels)
        score = np.full(num_states, NEVER)
        score[0] = 0.0
        history = np.full(num_states, -1)  # index into `links` of the last word begun
        links: list[tuple[int, int]] = []  # (index of the link before, reading)
        for frame in log_probs:
            candidates = np.full((3, num_states), NEVER)
            candidates[0] = score
            candidates[1, 1:][self._inside[1:]] = score[:-1][self._inside[1:]]
            candidates[2, 2:][self._can_skip[2:]] = score[:-2][self._can_skip[2:]]
            choice = candidates.argmax(0)
            best = candidates[choice, np.arange(num_states)]
            new_history = history[np.arange(num_states) - choice]
            # Between words: from the end of any word into the blank, or from blank or another word's end into a word.
            end_scores = score[self._ends]
            leaving = int(end_scores.argmax())
            if end_scores[leaving] > best[0]:
                best[0], new_history[0] = end_scores[leaving], history[self._ends[leaving]]
            before = np.where(self._clash, NEVER, end_scores[None, :])
            word_before = before.argmax(1)
            direct = before[np.arange(len(word_before)), word_before]
            entering = np.maximum(direct, score[0]) + self._word_score
            for reading in np.flatnonzero(entering > best[self._starts]):
                state = self._starts[reading]
                origin = self._ends[word_before[reading]] if direct[reading] > score[0] else 0
                links.append((int(history[origin]), int(reading)))
                best[state], new_history[state] = entering[reading], len(links) - 1
            score, history = best + frame[self._labels], new_history
        final = max([0, *self._ends], key=lambda state: score[state])
        words, link = [], int(history[final])
        while link >= 0:
            link, reading = links[link]
            words.append(self._words[reading])
        return words[::-1]


def join_words(words: Sequence[str]) -> str:
    """Words as text: a blank wherever a Latin word meets another word, none between Chinese words."""
    text = ""
    for word in words:
        text += " " * bool(text and (text[-1].isascii() or word[0].isascii())) + word
    return text
