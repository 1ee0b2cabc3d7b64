"""An endless stream: segments where somebody speaks, each with a session of its own that hears nothing else.

    samples --Cutter--> speech_started, speech, speech_stopped --Listener--> speech_started, partial, speech_stopped, final

The server has the same Cutter, and does the rest itself, since it waits for a model that many share (nim4/serve/realtime.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.decode.encoder import spoken
from nim4.decode.streaming import Hypothesis, Recogniser, StreamingSession
from nim4.decode.together import Work, alone
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


@dataclass(frozen=True)
class Step:
    """What comes next in a stream.

    Attributes:
        kind: speech_started, speech or speech_stopped; of a segment in this order, speech any number of times.
        sample: of the stream, where speech started or stopped, or these samples of it end.
        samples: of speech, (N,) float32, N at least 1.
    """

    kind: Literal["speech_started", "speech", "speech_stopped"]
    sample: int
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class Cutter:
    """Tells the speech of a stream from the rest, and cuts it into segments.

    Samples are kept while it is not known whether they are of a segment, a second at most before speech and a few in it
    (VoiceActivity.settled), unless the settings say more.

    Args:
        vad: how the stream is cut.
        start: where in the stream the first sample stands.
    Raises:
        RecipeError: if silero-vad is not installed, or a setting is out of its range.
    """

    def __init__(self, vad: VadConfig | None = None, start: int = 0):
        self._activity = VoiceActivity(vad)
        self._start = start
        self._place = 0  # of the first kept sample, counted from `start`
        self.kept = np.zeros(0, np.float32)  # samples of which nothing is known

    @property
    def speaking(self) -> bool:
        """Whether a segment is going on."""
        return self._activity.speaking

    def push(self, samples: np.ndarray) -> list[Step]:
        """What (N,) float32 samples in [-1, 1] at 16 kHz make known. It does not depend on how the stream is split.

        Raises:
            ValueError: if they are of another shape, type or scale; the stream goes on without them.
        """
        return alone(self.pushing(samples))

    def finish(self) -> list[Step]:
        """What the end of the stream makes known."""
        return alone(self.finishing())

    def pushing(self, samples: np.ndarray) -> Work[list[Step]]:
        """`push` as work for nim4/decode/together.py."""
        events = yield from self._activity.pushing(samples)
        self.kept = np.concatenate([self.kept, samples.astype(np.float32)])
        steps = self._follow(events)
        return [*steps, *self._pass(self._activity.settled, self.speaking)]

    def finishing(self) -> Work[list[Step]]:
        """`finish` as such work."""
        return self._follow((yield from self._activity.finishing()))

    def _follow(self, events: Sequence[VadEvent]) -> list[Step]:
        steps = []
        for event in events:
            steps += [*self._pass(event.sample, event.kind == "speech_stopped"), Step(event.kind, self._start + event.sample)]
        return steps

    def _pass(self, end: int, is_speech: bool) -> list[Step]:
        """Lets go of the kept samples up to `end`."""
        samples, self.kept = self.kept[: end - self._place], self.kept[end - self._place :].copy()
        self._place = end
        return [Step("speech", self._start + end, samples)] if is_speech and len(samples) else []


class Listener:
    """One endless stream: partials while somebody speaks, a final text for each segment.

    Memory is bounded by a segment and the longest piece that is pushed.

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
        self._cutter: Cutter | None = Cutter(vad)
        self._session: StreamingSession | None = None
        self._segment = -1
        self._revision = 0

    def push(self, samples: np.ndarray) -> list[Update]:
        """What (N,) float32 samples in [-1, 1] at 16 kHz make known. It does not depend on how the stream is split.

        Raises:
            ValueError: if they are of another shape, type or scale; the stream goes on without them.
            RuntimeError: after `finish` or `abort`.
        """
        return self._follow(self._open_cutter().push(samples))

    def finish(self) -> list[Update]:
        """What the end of the stream makes known."""
        updates = self._follow(self._open_cutter().finish())
        self.abort()
        return updates

    def abort(self) -> None:
        """Ends the stream without a text for what is going on, and lets go of its memory; may be called at any time."""
        if self._session is not None:
            self._session.abort()
        self._session = self._cutter = None

    def _open_cutter(self) -> Cutter:
        if self._cutter is None:
            raise RuntimeError("the stream has ended: a new one needs a new Listener")
        return self._cutter

    def _follow(self, steps: Sequence[Step]) -> list[Update]:
        updates: list[Update] = []
        for step in steps:
            if step.kind == "speech":
                updates += self._hear(step)
                continue
            updates.append(Update(step.kind, self._segment + (step.kind == "speech_started"), step.sample / SAMPLING_RATE_HZ))
            if step.kind == "speech_started":
                self._segment, self._revision = self._segment + 1, 0
                self._session = self._recogniser.session(self._given, self._clock)
            else:
                updates.append(Update("final", self._segment, step.sample / SAMPLING_RATE_HZ, self._session.finalize()))
                self._session = None
        return updates

    def _hear(self, step: Step) -> list[Update]:
        updates, heard = [], step.sample - len(step.samples)
        for piece in spoken(step.samples, self._session):
            completes = len(piece) == self._session.missing_samples
            heard += len(piece)
            self._session.append(piece)
            if completes and (hypothesis := self._session.partial()).revision > self._revision:
                self._revision = hypothesis.revision
                updates.append(Update("partial", self._segment, heard / SAMPLING_RATE_HZ, hypothesis))
        return updates
