"""A log line every few seconds while something long is under way."""

import logging
import time

log = logging.getLogger("nim4")


class Progress:
    """Counts work and logs it now and then.

    Args:
        what: what is being done, as the log line begins.
        total: amount of work; 0 = unknown.
        unit: name of the unit, written after the numbers.
        before: amount that an earlier run had done; it does not count for the rate.
        every_s: seconds between two lines; nothing is logged for work that is shorter.
    """

    def __init__(self, what: str, total: float, unit: str, before: float = 0.0, every_s: float = 5.0):
        self.what, self.total, self.unit, self.before, self.every_s = what, total, unit, before, every_s
        self.done = before
        self._start_s = self._last_s = time.monotonic()

    def add(self, amount: float = 1.0) -> None:
        """Counts `amount` as done."""
        self.done += amount
        now_s = time.monotonic()
        if now_s - self._last_s < self.every_s:
            return
        self._last_s = now_s
        rate = (self.done - self.before) / max(now_s - self._start_s, 1e-9)
        if self.total > 0:
            left_s = max(self.total - self.done, 0.0) / max(rate, 1e-9)
            log.info("%s: %.5g of %.5g %s, %.3g %s/s, about %.0f s left", self.what, self.done, self.total, self.unit, rate, self.unit, left_s)
        else:
            log.info("%s: %.5g %s, %.3g %s/s", self.what, self.done, self.unit, rate, self.unit)
