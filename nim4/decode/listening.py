"""An endless stream: segments where somebody speaks, each with a session of its own that hears nothing else."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.decode.streaming import Hypothesis, Recogniser, StreamingSession
from nim4.decode.vad import VadEvent, VoiceActivity


@dataclass(frozen=True)
class Update:
    """What has become known of a stream.

    Attributes:
        kind: speech_started, partial, speech_stopped or final; of a segment in this order, partials any number of times.
        segment: counted from 0.
        audio_s: seconds of the stream: where speech started or stopped; of a text, how far it goes.
        hypothesis: of partial and final; its own times are of the segment.
    """

    kind: Literal["speech_started", "partial", "speech_stopped", "final"]
    segment: int
    audio_s: float
    hypothesis: Hypothesis | None = None


class Listener:
    """One endless stream: partials while somebody speaks, a final text for each segment.

    Samples are kept while it is not known whether they are of a segment, a second at most before speech and a few in it
    (VoiceActivity.settled); then one session gets them, or nobody. Memory is bounded by a segment and the longest piece that is pushed.

    Args:
        recogniser: shared by all streams.
        vad: how the stream is cut.
        given: hints by hand, for every segment.
        clock: seconds, for the logs of the sessions.

    Raises:
        RecipeError: if silero-vad is not installed, or a setting is out of its range.
    """

    def __init__(
        self, recogniser: Recogniser, vad: VadConfig | None = None, given: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter
    ):
        self._recogniser, self._given, self._clock = recogniser, given, clock
        self._activity = VoiceActivity(vad)
        self._kept = np.zeros(0, np.float32)
        self._place = 0  # of the first kept sample in the stream
        self._session: StreamingSession | None = None
        self._segment = -1
        self._revision = 0
        self._open = True

    def push(self, samples: np.ndarray) -> list[Update]:
        """What (N,) float32 samples in [-1, 1] at 16 kHz make known. It does not depend on how the stream is split.

        Raises:
            ValueError: if they are of another shape, type or scale; the stream goes on without them.
            RuntimeError: after `finish` or `abort`.
        """
        self._check_open()
        events = self._activity.push(samples)
        self._kept = np.concatenate([self._kept, samples.astype(np.float32)])
        updates = self._follow(events)
        return updates + self._pass_on(self._activity.settled)

    def finish(self) -> list[Update]:
        """What the end of the stream makes known."""
        self._check_open()
        updates = self._follow(self._activity.finish())
        self.abort()
        return updates

    def abort(self) -> None:
        """Ends the stream without a text for what is going on, and lets go of its memory; may be called at any time."""
        if self._session is not None:
            self._session.abort()
        self._session, self._kept, self._open = None, np.zeros(0, np.float32), False

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the stream has ended: a new one needs a new Listener")

    def _follow(self, events: Sequence[VadEvent]) -> list[Update]:
        updates: list[Update] = []
        for event in events:
            updates += self._pass_on(event.sample)
            if event.kind == "speech_started":
                self._segment, self._revision = self._segment + 1, 0
                self._session = self._recogniser.session(self._given, self._clock)
                updates.append(self._update("speech_started"))
            else:
                updates.append(self._update("speech_stopped"))
                updates.append(self._update("final", self._session.finalize()))
                self._session = None
        return updates

    def _pass_on(self, end: int) -> list[Update]:
        """Gives the kept samples up to `end` to the session, or to nobody where nobody speaks."""
        samples, self._kept = self._kept[: end - self._place], self._kept[end - self._place :].copy()
        updates: list[Update] = []
        while len(samples):
            piece = samples if self._session is None else samples[: self._session.missing_samples]
            samples = samples[len(piece) :]
            self._place += len(piece)
            if self._session is not None:
                completes = len(piece) == self._session.missing_samples
                self._session.append(piece)
                if completes and (hypothesis := self._session.partial()).revision > self._revision:
                    self._revision = hypothesis.revision
                    updates.append(self._update("partial", hypothesis))
        return updates

    def _update(self, kind: Literal["speech_started", "partial", "speech_stopped", "final"], hypothesis: Hypothesis | None = None) -> Update:
        return Update(kind, self._segment, self._place / SAMPLING_RATE_HZ, hypothesis)
