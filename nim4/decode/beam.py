"""CTC prefix beam search with an n-gram: words that a lexicon spells, or phonemes.

Ours, because the kept libraries do not fit a phoneme head: flashlight-text wants every spelling to end in a separator (without one, the last
phoneme of a word lasts a single frame, and a double one needs no blank) and holds six words of one sound, of which Mandarin has dozens;
pyctcdecode wants symbols that are written, and a numpy before 2. KenLM's models come as ARPA files.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nim4.config import DecodeConfig, RecipeError
from nim4.corpus.g2p import Lexicon, han_readings, load_lexicon
from nim4.corpus.ngram import NgramStates
from nim4.corpus.units import UNKNOWN, PhonemeInventory
from nim4.decode.beam_search import search_prefixes
from nim4.decode.trie import NONE
from nim4.decode.trie_build import build_trie

log = logging.getLogger("nim4")

Readings = Mapping[str, Sequence[Sequence[int]]]


class BeamSearch:
    """The most probable text under CTC and an n-gram, by a beam over prefixes whose alignments are summed (arXiv 1408.2873, with a lexicon's trie).

    Args:
        ngram: of the words of `readings`; a word that the n-gram lacks is never found.
        readings: word -> its readings, each a sequence of phoneme ids.
        num_beams: prefixes kept after each frame.
        lm_weight: of the n-gram's natural logarithm.
        word_bonus: nats for each word, against the leaning of n-grams to short texts.
        sum_paths: False = a prefix is worth its best alignment, as in a Viterbi search.
    Raises:
        RecipeError: if there is no word, or one without phonemes.
    """

    def __init__(
        self, ngram: NgramStates, readings: Readings, *, num_beams: int, lm_weight: float = 1.0, word_bonus: float = 0.0, sum_paths: bool = True
    ):
        empty = [word for word, variants in readings.items() if not variants or not all(variants)]
        if not readings or empty:
            raise RecipeError("the n-gram", expected="words with a pronunciation", found=empty[:3] or "no words", fix="give an n-gram of other words")
        ids = {word: number for number, word in enumerate(ngram.words)}
        entries = [(ids[word], tuple(phones)) for word, variants in readings.items() if word in ids for phones in variants]
        flat = np.array([phone for _, phones in entries for phone in phones], np.uint8)
        trie, keys = build_trie(flat, np.array([len(phones) for _, phones in entries], np.int64))
        order = np.argsort(keys, kind="stable")
        self._words, self._entries = ngram.words, [entries[number] for number in order.tolist()]
        of_word = np.array([word for word, _ in self._entries], np.int64)
        # The words of key k are the entries first_entry[k] to first_entry[k + 1] - 1.
        first_entry = np.searchsorted(keys[order], np.arange(trie.num_keys + 1))
        unigram = np.full(len(ngram.words), -np.inf)
        unigram[ngram.word[: ngram.first[1]]] = ngram.logp[: ngram.first[1]]
        self._trie = (trie.first.astype(np.int64), trie.label.astype(np.int64), np.where(trie.key == NONE, -1, trie.key.astype(np.int64)))
        ahead = _best_below(trie.first, self._trie[2], first_entry, lm_weight * unigram[of_word] + word_bonus)
        self._lexicon = (*self._trie, first_entry, of_word, np.array([phones[-1] for _, phones in self._entries], np.int64), ahead)
        self._ngram = (ngram.first, ngram.word, ngram.logp, ngram.to, ngram.backoff_to, ngram.backoff)
        self._settings = (ngram.start, len(ngram.words) - 1, num_beams, float(lm_weight), float(word_bonus), sum_paths)

    @classmethod
    def of_config(cls, config: DecodeConfig, inventory: PhonemeInventory, arpa: Path, lexicon: Path | None = None) -> "BeamSearch":
        """The search of a decode config; `arpa` and `lexicon` as `ngram_files` gives them."""
        ngram = NgramStates.of_arpa(arpa)
        readings = readings_of_config(config, inventory, ngram, arpa, lexicon)
        return cls(ngram, readings, num_beams=config.num_beams, lm_weight=config.lm_weight, word_bonus=config.word_bonus)

    def search(self, log_probs: np.ndarray) -> tuple[list[int], list[str]]:
        """(S, V) float32 log-probabilities -> phoneme ids, and the words that they spell."""
        phones, words, _ = self.scored(log_probs)
        return phones, words

    def scored(self, log_probs: np.ndarray) -> tuple[list[int], list[str], float]:
        """As `search`, and the score in nats: of CTC, the n-gram (end of text included) and the bonus.

        No words, and minus infinity, where no sequence of whole words fits the frames.
        """
        assert log_probs.ndim == 2, log_probs.shape
        found, score = search_prefixes(np.ascontiguousarray(log_probs, np.float32), self._lexicon, self._ngram, self._settings)
        entries = [self._entries[number] for number in found.tolist()]
        return [phone for _, phones in entries for phone in phones], [self._words[word] for word, _ in entries], float(score)


def _best_below(first: np.ndarray, key: np.ndarray, first_entry: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(N,) float64: for each node of a trie, the best score of the entries that end in it or below."""
    best = np.full(len(key), -np.inf)
    for node in range(len(key) - 1, -1, -1):  # children have higher numbers
        below = best[int(first[node]) : int(first[node + 1])]
        own = score[first_entry[key[node]] : first_entry[key[node] + 1]] if key[node] >= 0 else score[:0]
        best[node] = max(below.max(initial=-np.inf), own.max(initial=-np.inf))
    return best


def readings_of_config(
    config: DecodeConfig, inventory: PhonemeInventory, ngram: NgramStates, arpa: Path, lexicon: Path | None = None
) -> dict[str, list[list[int]]]:
    """What a decode config searches for: the words of its n-gram, or the phonemes; `arpa` is where it came from."""
    words = ngram.words[:-1]
    return readings_of(words, inventory, lexicon) if config.ngram == "words" else phonemes_of(arpa, words, inventory)


def readings_of(words: Sequence[str], inventory: PhonemeInventory, lexicon: Path | None = None) -> dict[str, list[list[int]]]:
    """Phoneme ids of each word that can be read; a warning tells of the others.

    Args:
        lexicon: lexicon.tsv of stage 2, whose readings come first. Words that it lacks are read by the G2P; a Chinese character has all
            of its readings that are in use.
    Raises:
        RecipeError: if no word can be read, or a word has phonemes that the inventory lacks.
    """
    known, reader = load_lexicon(lexicon) if lexicon else {}, Lexicon()
    readings, unread = {}, []
    for word in words:
        found = [tuple(phones) for phones in known.get(word) or [reader.phones(word)]] + list(han_readings(word) if len(word) == 1 else ())
        found = [phones for phones in dict.fromkeys(found) if phones and UNKNOWN not in phones]
        if found:
            readings[word] = [inventory.encode(phones) for phones in found]
        else:
            unread.append(word)
    if not readings:
        found = f"none among {len(words)}, which begin with {' '.join(words[:3])}"
        raise RecipeError("the n-gram", expected="words that can be read", found=found, fix="give an n-gram of words")
    if unread:
        log.warning("%d of %d words of the n-gram cannot be read and are never found: %s", len(unread), len(words), " ".join(unread[:5]))
    return readings


def phonemes_of(arpa: Path, words: Sequence[str], inventory: PhonemeInventory) -> dict[str, list[list[int]]]:
    """Each phoneme as a word of its own. Raises RecipeError when a unigram is no phoneme of the inventory."""
    foreign = [word for word in words if word not in inventory]
    if foreign:
        found = f"{len(foreign)} others of {len(words)}, first {foreign[0]!r}"
        raise RecipeError(arpa, expected="phonemes of the model's tokens.txt", found=found, fix="make it with the units of this model")
    return {word: [inventory.encode([word])] for word in words}


def ngram_files(configs: Mapping[str, DecodeConfig], arpa: Path | None, units: Path) -> dict[str, list[Path]]:
    """What each decode config reads for its n-gram, by name: the ARPA file, given or stage 2's, and of words the readings in stage 2's lexicon.

    Raises:
        RecipeError: if there is no n-gram where one is wanted, or one is given that no config uses.
    """
    if arpa is not None and all(config.ngram == "none" for config in configs.values()):
        raise RecipeError("--arpa", expected="a decode config with an n-gram", found=" ".join(configs), fix="for example --configs ctc_beam")
    files: dict[str, list[Path]] = {name: [] for name in configs}
    for name, config in configs.items():
        if config.ngram == "none":
            continue
        path = arpa or units / f"{config.ngram}.arpa"
        if not path.is_file():
            fix = "run stage 2 with it, ./run.sh --only 2 --ngram 3, or give --arpa FILE"
            raise RecipeError(path, expected=f"an n-gram of {config.ngram}", found="no such file", fix=fix)
        files[name] = [path, *([units / "lexicon.tsv"] if config.ngram == "words" else [])]
    return files
