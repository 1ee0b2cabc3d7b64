"""Alarms in reinforcement learning: means over the last steps that leave their range, which often means that the reward is gamed.

The ranges are ours. An alarm warns, and warns again only after as many steps; it never stops the training.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

log = logging.getLogger("nim4")
STEPS = 10  # of which the mean is taken


@dataclass(frozen=True)
class Range:
    """Where a mean may be, and what it may mean when it is not there."""

    low: float
    high: float
    meaning: str


RANGES = {
    "length_ratio": Range(0.8, 1.25, "answers grow longer or shorter than what was said"),
    "loops": Range(0.0, 0.02, "answers repeat themselves"),
    "hint_copies": Range(0.0, 0.1, "hints are copied though nobody said them"),
    "entropy": Range(1e-3, 2.0, "the policy has become sure of everything, or of nothing"),
    "zero_variance": Range(0.0, 0.95, "nearly all groups have equal rewards, so there is little to learn from"),
    "kl": Range(0.0, 1.0, "the policy is far from where it began"),
    "clipped": Range(0.0, 0.01, "log-probabilities differ between sampling and scoring"),
}


class Alarms:
    """Watches the means over utterances of the last `STEPS` steps."""

    def __init__(self) -> None:
        self._sums: deque[tuple[int, Mapping[str, float], float]] = deque()
        self._warned_at: dict[str, int] = {}

    def watch(self, step: int, sums: Mapping[str, float], num_utterances: float) -> None:
        """Takes the sums of a micro-batch of a step; warns once there are enough steps.

        Args:
            sums: per name, summed over the utterances; names without a range are ignored.
        """
        self._sums.append((step, sums, num_utterances))
        while self._sums[0][0] <= step - STEPS:
            self._sums.popleft()
        if step - self._sums[0][0] < STEPS - 1:
            return
        total = sum(count for _, _, count in self._sums)
        for name, allowed in RANGES.items():
            mean = sum(values.get(name, 0.0) for _, values, _ in self._sums) / total
            if not allowed.low <= mean <= allowed.high and step - self._warned_at.get(name, -STEPS) >= STEPS:
                self._warned_at[name] = step
                told = f"{name.replace('_', ' ')} is {mean:.4g} over the last {STEPS} steps, outside {allowed.low:g} to {allowed.high:g}"
                log.warning("step %d: %s: %s", step + 1, told, allowed.meaning)
