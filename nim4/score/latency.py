"""Speed of a decoding run: real-time factor, and for streaming how long a user waits for text.

The clock is the one in events.jsonl: a user speaks in real time, a chunk can be decoded when its last sample has been spoken, and
compute time that is waited for is added (`t_wall_s = t_audio_s + waiting`). So latencies depend on the hardware of the run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.score.decoded import Event, Hypothesis


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile over utterances, in ms; None where no utterance has such an event."""

    first_text_p50_ms: float | None  # from the start of the audio to the first text that is not empty
    first_text_p95_ms: float | None
    final_p50_ms: float | None  # from the end of the audio to the final text
    final_p95_ms: float | None
    first_text_utts: int  # utterances that got any text; the others are in no first-text figure
    final_utts: int


def real_time_factor(hyps: Iterable[Hypothesis]) -> float | None:
    """Decoding seconds per second of audio, over utterances that were decoded; None when no time was measured."""
    timed = [hyp for hyp in hyps if hyp.error is None and hyp.wall_s is not None]
    audio_s = sum(hyp.audio_s for hyp in timed)
    return sum(hyp.wall_s for hyp in timed) / audio_s if audio_s > 0 else None


def streaming_latency(events: Sequence[Event], audio_s: dict[str, float]) -> Latency:
    """What `events` tell about waiting.

    Args:
        events: of one test set, each utterance's in the order in which they happened.
        audio_s: length of each utterance; its end stands for the end of speech.
    """
    first_text_s: dict[str, float] = {}
    final_s: dict[str, float] = {}
    for event in events:
        if event.text.strip():
            first_text_s.setdefault(event.id, event.t_wall_s)
        if event.is_final:
            final_s[event.id] = event.t_wall_s - audio_s[event.id]
    return Latency(*_percentiles_ms(first_text_s.values()), *_percentiles_ms(final_s.values()), len(first_text_s), len(final_s))


def _percentiles_ms(seconds: Iterable[float]) -> tuple[float | None, float | None]:
    values = list(seconds)
    if not values:
        return None, None
    p50, p95 = np.percentile(values, [50, 95])
    return round(1000 * float(p50), 1), round(1000 * float(p95), 1)
