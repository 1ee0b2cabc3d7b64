"""Hints of training utterances: entities that are said, sound-alikes that are not, and entities that have nothing to do with it.

Source: paper, context SFT: the entities of the transcript, and per entity with some probability a distractor of identical or very similar
pronunciation. Ours, since not stated: all probabilities (HintConfig), utterances with wrong hints only, and what "very similar" means,
see SoundAlikes. A hint never changes what is to be written, and a distractor is never part of it.
"""

import itertools
import random
from collections.abc import Sequence

import numpy as np

from nim4.config import HintConfig, RecipeError
from nim4.corpus.entities import Entity
from nim4.corpus.keywords import Keywords
from nim4.corpus.text import split_tokens

MAX_PHONES = 40  # longer entities have no sound-alikes: the masks would be many, and so long a name is not mistaken for another


class SoundAlikes:
    """Which entries of a list sound like another one, found without comparing them all.

    Ours: entries with equally many phones, of which at most `max_changes` and at most half differ. For 2, that is one Mandarin syllable
    (北京 南京), two tones (北京 背景), or an initial and a final. Every entry is filed under each choice of so many masked places, as the sum
    of random 64-bit numbers of the (place, phone) pairs that are left: who shares a mask's sum is a candidate, and is then compared.
    Memory: about 12 bytes for each entry and mask, e.g. 34 MB for 100 000 names of four syllables.

    Args:
        keys: phones of the entries.
        max_changes: see above.
    """

    def __init__(self, keys: Sequence[Sequence[str]], max_changes: int):
        self._max_changes = max_changes
        self._place: list[tuple[int, int]] = [(0, 0)] * len(keys)  # of each entry: number of phones, row among those
        phone_ids = {phone: number for number, phone in enumerate(sorted({phone for key in keys for phone in key}))}
        chance = np.random.default_rng(0)
        self._numbers = chance.integers(2**64, size=(MAX_PHONES, max(len(phone_ids), 1)), dtype=np.uint64)
        by_length: dict[int, list[int]] = {}
        for entry, key in enumerate(keys):
            if 0 < len(key) <= MAX_PHONES:
                self._place[entry] = (len(key), len(by_length.setdefault(len(key), [])))
                by_length[len(key)].append(entry)
        self._entries = {length: np.array(entries) for length, entries in by_length.items()}
        self._phones = {length: np.array([[phone_ids[phone] for phone in keys[entry]] for entry in entries]) for length, entries in by_length.items()}
        self._files = {length: self._file(phones) for length, phones in self._phones.items()}

    def changes(self, num_phones: int) -> int:
        """How many phones may differ."""
        return min(self._max_changes, num_phones // 2)

    def _sums(self, phones: np.ndarray) -> np.ndarray:
        """(K, n) phone ids -> (K, M) uint64, one sum for each of the M masks."""
        num_phones = phones.shape[1]
        terms = self._numbers[np.arange(num_phones), phones]
        masks = np.array(list(itertools.combinations(range(num_phones), self.changes(num_phones))), dtype=np.int64)
        own = np.arange(len(masks), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # so that two masks never share a sum
        return terms.sum(1, dtype=np.uint64)[:, None] - terms[:, masks].sum(2, dtype=np.uint64) + own

    def _file(self, phones: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums in rising order, and the row that each belongs to."""
        sums = self._sums(phones)
        rows = np.repeat(np.arange(len(phones), dtype=np.int32), sums.shape[1])
        order = np.argsort(sums, axis=None)
        return sums.reshape(-1)[order], rows[order]

    def of(self, entry: int) -> dict[int, list[int]]:
        """The entries that sound like `entry`, by the number of phones that differ."""
        length, row = self._place[entry]
        if length == 0:
            return {}
        (sums, rows), phones = self._files[length], self._phones[length]
        own = self._sums(phones[row : row + 1])[0]
        spans = zip(np.searchsorted(sums, own, "left"), np.searchsorted(sums, own, "right"), strict=True)
        candidates = np.unique(np.concatenate([rows[start:end] for start, end in spans]))
        changes = (phones[candidates] != phones[row]).sum(1)
        found: dict[int, list[int]] = {}
        for candidate, count in zip(candidates.tolist(), changes.tolist(), strict=True):
            if candidate != row and count <= self.changes(length):
                found.setdefault(count, []).append(int(self._entries[length][candidate]))
        return dict(sorted(found.items()))


class Hints:
    """Draws the hints of an utterance; what is drawn follows from the text and the source of chance alone (DrawHints of examples.py).

    Args:
        entities: of the training transcripts.
        config: probabilities and limits.
    Raises:
        RecipeError: if the kinds' probabilities add up to more than 1, or a limit is below 1.
    """

    def __init__(self, entities: Sequence[Entity], config: HintConfig):
        kinds = (config.keywords_prob, config.only_distractors_prob, config.unrelated_prob)
        if min(*kinds, config.distractor_prob) < 0 or sum(kinds) > 1 + 1e-9 or config.distractor_prob > 1:
            raise RecipeError("hints", expected="probabilities, those of the three kinds adding up to at most 1", found=config, fix="lower them")
        if min(config.max_hints, config.max_unrelated) < 1 or config.max_phone_changes < 0:
            raise RecipeError("hints", expected="max_hints and max_unrelated of at least 1", found=config, fix="use the probabilities to have fewer")
        self._config = config
        self._texts = [entity.text for entity in entities]
        self._written = ["".join(split_tokens(text)) for text in self._texts]
        self._number = {text: number for number, text in enumerate(self._texts)}
        self._keywords = Keywords(self._texts)
        self._alike = SoundAlikes([entity.phones for entity in entities], config.max_phone_changes)

    def __call__(self, text: str, rng: random.Random) -> list[str]:
        """Hints in random order; often none. Only entities of the transcript are part of it, distractors and unrelated ones are not."""
        config, kind = self._config, rng.random()
        written = "".join(split_tokens(text))
        hints: list[str] = []
        if kind < config.keywords_prob:
            for keyword in self._keywords.within(text):
                hints.append(keyword)
                if rng.random() < config.distractor_prob:
                    hints += self._distractor(keyword, written, rng)
        elif kind < config.keywords_prob + config.only_distractors_prob:
            for keyword in self._keywords.within(text):
                hints += self._distractor(keyword, written, rng)
        elif kind < config.keywords_prob + config.only_distractors_prob + config.unrelated_prob:
            wanted = min(rng.randint(1, config.max_unrelated), len(self._texts))
            hints = [self._texts[number] for number in rng.sample(range(len(self._texts)), wanted) if self._written[number] not in written]
        hints = list(dict.fromkeys(hints))
        rng.shuffle(hints)
        return hints[: config.max_hints]

    def _distractor(self, keyword: str, written: str, rng: random.Random) -> list[str]:
        """One sound-alike that is not part of the transcript, if there is any. How near it is, is drawn first: exact ones are few."""
        alike = self._alike.of(self._number[keyword])
        usable = [[number for number in numbers if self._written[number] not in written] for numbers in alike.values()]
        usable = [numbers for numbers in usable if numbers]
        return [self._texts[rng.choice(rng.choice(usable))]] if usable else []
