"""What a phoneme head nearly wrote: slots of alternative phones along an utterance, and the CTC score of a name in its frames.

Each run of frames with one best phone is a slot, and so is each run of blank frames in which one other phone is nearly as probable. A slot's
alternatives cost log p(best) - log p(phone) in its clearest frame; the blank among them is a gap, by which the slot can be stepped over.
"""

from dataclasses import dataclass

import numpy as np

from nim4.decode.trie import jit
from nim4.model.ctc import BLANK

WIDTH = 4  # alternatives of a slot, the best one included (ours, as in other lattices of phones)
MAX_COST = 4.0  # nats (ours); what costs more is no alternative


@dataclass(frozen=True)
class Slots:
    """T slots of an utterance.

    Attributes:
        phones: (T, WIDTH) uint8 ids, the cheapest first; BLANK is the gap.
        costs: (T, WIDTH) float32 nats; the first is 0.
        counts: (T,) int64, how many alternatives a slot has.
        frames: (T, 2) int64, first frame and the one behind the last.
    """

    phones: np.ndarray
    costs: np.ndarray
    counts: np.ndarray
    frames: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def of_phones(cls, ids: np.ndarray) -> "Slots":
        """Slots without alternatives: one per phone."""
        phones = np.zeros((len(ids), WIDTH), np.uint8)
        phones[:, 0] = ids
        places = np.arange(len(ids))
        return cls(phones, np.zeros((len(ids), WIDTH), np.float32), np.ones(len(ids), np.int64), np.stack([places, places + 1], axis=1))


class SlotMaker:
    """Slots of a stream, as its log-probabilities come; the run of frames at the end of a chunk stays open until the next."""

    def __init__(self) -> None:
        self._frames: np.ndarray | None = None  # of the open run, and the frame before it
        self._num_before = 0  # frames before those
        self._before = 0  # frames of _frames that belong to slots that are made

    def push(self, log_probs: np.ndarray, final: bool = False) -> Slots:
        """The slots that (S, V) float32 frames complete; with `final`, all that is left."""
        frames = log_probs if self._frames is None else np.concatenate([self._frames, log_probs])
        frames = np.ascontiguousarray(frames, np.float32)
        made, used = _slots(frames, self._before, final)
        slots = Slots(made.phones, made.costs, made.counts, made.frames + self._num_before)
        self._before = min(used, 1)
        self._num_before += used - self._before
        self._frames = frames[used - self._before :]
        return slots


def slots_of(log_probs: np.ndarray) -> Slots:
    """The slots of a whole utterance: (S, V) float32 log-probabilities."""
    return _slots(np.ascontiguousarray(log_probs, np.float32), 0, True)[0]


def _slots(frames: np.ndarray, begin: int, final: bool) -> tuple[Slots, int]:
    phones, costs = np.zeros((len(frames), WIDTH), np.uint8), np.zeros((len(frames), WIDTH), np.float32)
    counts, spans = np.zeros(len(frames), np.int64), np.zeros((len(frames), 2), np.int64)
    if not len(frames):
        return Slots(phones, costs, counts, spans), 0
    total, used = _find_slots(frames, begin, final, MAX_COST, phones, costs, counts, spans)
    return Slots(phones[:total], costs[:total], counts[:total], spans[:total]), used


@jit
def _label(row, skip):
    """The best column of a row other than `skip`."""
    best = np.int64(-1)
    for column in range(row.size):
        if column != skip and (best < 0 or row[column] > row[best]):
            best = column
    return best


@jit
def _find_slots(frames, begin, final, max_cost, phones, costs, counts, spans):
    """Fills the arrays from frame `begin` on; frame begin - 1, if there is one, only tells what was before. Returns slots, frames used."""
    total, at = 0, begin
    while at < frames.shape[0]:
        label = _label(frames[at], -1)
        other = _label(frames[at], BLANK) if label == BLANK else label
        end, peak = at, at
        while end < frames.shape[0] and _label(frames[end], -1) == label and (label != BLANK or _label(frames[end], BLANK) == other):
            if frames[end, other] - (frames[end, BLANK] if label == BLANK else 0.0) > frames[peak, other] - (
                frames[peak, BLANK] if label == BLANK else 0.0
            ):
                peak = end
            end += 1
        if end == frames.shape[0] and not final:
            break
        echo = label == BLANK and ((at > 0 and _label(frames[at - 1], -1) == other) or (end < frames.shape[0] and _label(frames[end], -1) == other))
        if label != BLANK or (not echo and frames[peak, BLANK] - frames[peak, other] <= max_cost):
            spans[total, 0], spans[total, 1] = at, end
            count = 0
            for column in range(frames.shape[1]):
                cost = frames[peak, label] - frames[peak, column]
                if cost > max_cost or (count == phones.shape[1] and cost >= costs[total, count - 1]):
                    continue
                count = min(count + 1, phones.shape[1])
                place = count - 1
                while place > 0 and costs[total, place - 1] > cost:
                    costs[total, place], phones[total, place] = costs[total, place - 1], phones[total, place - 1]
                    place -= 1
                costs[total, place], phones[total, place] = cost, column
            counts[total] = count
            total += 1
        at = end
    return total, at


@jit
def ctc_cost(log_probs, begin, end, phones):
    """Nats by which reading frames begin to end - 1 as `phones` is less probable than their best path; inf when they do not fit."""
    num_states = 2 * phones.size + 1
    score = np.full(num_states, -np.inf)
    best = 0.0
    for frame in range(begin, end):
        best += log_probs[frame, _label(log_probs[frame], -1)]
        moved = np.full(num_states, -np.inf)
        for state in range(num_states):
            label = BLANK if state % 2 == 0 else phones[state // 2]
            if frame == begin:
                total = 0.0 if state < 2 else -np.inf
            else:
                total = score[state]
                if state > 0:
                    total = np.logaddexp(total, score[state - 1])
                if state > 2 and state % 2 == 1 and phones[state // 2] != phones[state // 2 - 1]:
                    total = np.logaddexp(total, score[state - 2])
            moved[state] = total + log_probs[frame, label]
        score = moved
    if end <= begin:
        return np.inf
    return best - np.logaddexp(score[num_states - 1], score[num_states - 2])
