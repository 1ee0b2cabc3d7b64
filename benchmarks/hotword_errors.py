"""Made utterances for benchmarks/hotwords.py: running phones with a name in them, and what a phoneme head would make of them.

The errors are assumptions: a wrong phone is one of 4 that sound alike (finals: 2 in other tones, 2 others in the same tone); the right one
is among the slot's alternatives in 85 % of errors, 0.2 to 2 nats behind, a deleted one as the alternative of a gap, 1.5 nats behind; an
inserted one can be stepped over for 1 nat; and 20 % of the right phones have a rival 0.7 to 3 nats behind.
"""

from collections.abc import Sequence

import numpy as np

from nim4.corpus.units import PhonemeInventory
from nim4.decode.confusion import WIDTH, Slots
from nim4.decode.trie import FINAL, phone_kinds

SEEN = 0.85  # share of errors whose right phone is an alternative


class ErrorModel:
    """Draws errors; all from one generator, so that a seed repeats them."""

    def __init__(self, inventory: PhonemeInventory, rng: np.random.Generator):
        self._rng, kinds = rng, phone_kinds(inventory)
        self._phones = np.arange(2, len(inventory))
        self._alike: dict[int, list[int]] = {}
        for phone in self._phones.tolist():
            others = [int(other) for other in self._phones if kinds[other] == kinds[phone] and other != phone]
            if kinds[phone] == FINAL:
                token = inventory.tokens[phone]
                tones = [other for other in others if inventory.tokens[other][:-1] == token[:-1]]
                finals = [other for other in others if inventory.tokens[other][-1] == token[-1]]
                others = [*rng.permutation(tones)[:2].tolist(), *rng.permutation(finals)[:2].tolist()]
            self._alike[phone] = [int(other) for other in rng.permutation(others)[:4]]

    def slots(self, phones: Sequence[int], substituted: float, deleted: float, inserted: float) -> Slots:
        """The slots of an utterance at these rates per phone."""
        rng, found = self._rng, []
        for phone in (int(own) for own in phones):
            chance = rng.random()
            if chance < deleted:
                if rng.random() < SEEN:
                    found.append([(0, 0.0), (phone, 1.5)])
                continue
            if chance < deleted + inserted:
                found.append([(int(rng.choice(self._phones)), 0.0), (0, 1.0)])
            if deleted + inserted <= chance < deleted + inserted + substituted:
                slot = [(self._rival(phone), 0.0), (int(rng.choice(self._phones)), 2.5)]
                if rng.random() < SEEN:
                    slot.append((phone, float(rng.uniform(0.2, 2.0))))
            else:
                slot = [(phone, 0.0)]
                if rng.random() < 0.2:
                    slot.append((self._rival(phone), float(rng.uniform(0.7, 3.0))))
            found.append(sorted(slot, key=lambda pair: pair[1]))
        slots = Slots.of_phones(np.zeros(len(found), np.uint8))
        for number, slot in enumerate(found):
            slots.counts[number] = len(slot)
            for place, (phone, cost) in enumerate(slot[:WIDTH]):
                slots.phones[number, place], slots.costs[number, place] = phone, cost
        return slots

    def _rival(self, phone: int) -> int:
        return int(self._rng.choice(self._alike[phone]))


def planted(carrier: np.ndarray, key: np.ndarray, num_phones: int, rng: np.random.Generator) -> np.ndarray:
    """(num_phones,) uint8: a stretch of running phones, with a name over some of them, at a syllable's edge."""
    start = 2 * int(rng.integers((len(carrier) - num_phones) // 2))
    phones = carrier[start : start + num_phones].copy()
    at = 2 * int(rng.integers((num_phones - len(key)) // 2 + 1))
    phones[at : at + len(key)] = key
    return phones
