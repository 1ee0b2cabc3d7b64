"""Speed of a decoding run: real-time factor; for streaming how long a user waits for text, and how much of what they see is taken back.

The clock is the one in events.jsonl: a user speaks in real time, a chunk can be decoded when its last sample has been spoken, and
compute time that is waited for is added (`t_wall_s = t_audio_s + waiting`). So latencies depend on the hardware of the run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.corpus.text import split_tokens
from nim4.score.decoded import Event, Hypothesis
from nim4.score.error_rate import edit_distance


@dataclass(frozen=True)
class Latency:
    """Percentiles over utterances, or partials, in ms; None where there is no such event.

    Flicker and the second pass are None too where nothing that was shown can change later. They count tokens: Chinese characters, Latin
    words, numbers (nim4/corpus/text.py). An update keeps the tokens that both texts begin with; those behind them are taken back in the old
    text, and emitted in the new one.
    """

    first_text_p50_ms: float | None  # from the start of the audio to the first text that is not empty
    first_text_p95_ms: float | None
    final_p50_ms: float | None  # from the end of the audio to the final text
    final_p90_ms: float | None
    final_p95_ms: float | None
    final_p99_ms: float | None
    partial_lag_p50_ms: float | None  # from the audio that a partial has heard to the partial; those that changed the text
    partial_lag_p95_ms: float | None
    flicker: float | None  # percent of the tokens emitted in partials that later partials took back
    second_pass_change: float | None  # token edits from the last partials to the final texts, in percent of the tokens of these
    first_text_utts: int  # utterances that got any text; the others are in no first-text figure
    final_utts: int


def real_time_factor(hyps: Iterable[Hypothesis]) -> float | None:
    """Decoding seconds per second of audio, over utterances that were decoded; None when no time was measured."""
    timed = [hyp for hyp in hyps if hyp.error is None and hyp.wall_s is not None]
    audio_s = sum(hyp.audio_s for hyp in timed)
    return sum(hyp.wall_s for hyp in timed) / audio_s if audio_s > 0 else None


def streaming_latency(events: Sequence[Event], audio_s: dict[str, float]) -> Latency:
    """What `events` tell about waiting, and about changing one's mind.

    Args:
        events: of one test set, each utterance's in the order in which they happened.
        audio_s: length of each utterance; its end stands for the end of speech.
    """
    by_id: dict[str, list[Event]] = {}
    for event in events:
        by_id.setdefault(event.id, []).append(event)
    first_text_s = [next((event.t_wall_s for event in own if event.text.strip()), None) for own in by_id.values()]
    first_text_s = [seconds for seconds in first_text_s if seconds is not None]
    finals = [event for event in events if event.is_final]
    first_text = _percentiles_ms(first_text_s, (50, 95))
    final = _percentiles_ms([event.t_wall_s - audio_s[event.id] for event in finals], (50, 90, 95, 99))
    lag = _percentiles_ms([event.t_wall_s - event.t_audio_s for own in by_id.values() for event in _changed(own)], (50, 95))
    revised = [own for own in by_id.values() if own[0].settled_chars is not None]
    return Latency(*first_text, *final, *lag, flicker(revised), second_pass_change(revised), len(first_text_s), len(finals))


def flicker(utterances: Iterable[Sequence[Event]]) -> float | None:
    """Percent of the tokens emitted in partials that later partials took back; None when nothing was emitted."""
    emitted = taken_back = 0
    for events in utterances:
        before: list[str] = []
        for event in _partials(events):
            now = split_tokens(event.text)
            same = next((place for place, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), min(len(before), len(now)))
            emitted, taken_back, before = emitted + len(now) - same, taken_back + len(before) - same, now
    return round(100 * taken_back / emitted, 2) if emitted else None


def second_pass_change(utterances: Iterable[Sequence[Event]]) -> float | None:
    """Token edits from last partials to final texts, in percent of the final tokens; None when there are none."""
    edits = num_tokens = 0
    for events in utterances:
        partials, finals = _partials(events), [event for event in events if event.is_final]
        if finals:
            before, after = split_tokens(partials[-1].text) if partials else [], split_tokens(finals[-1].text)
            ids = {token: number for number, token in enumerate(dict.fromkeys(before + after))}
            edits += edit_distance([ids[token] for token in before], [ids[token] for token in after])
            num_tokens += len(after)
    return round(100 * edits / num_tokens, 2) if num_tokens else None


def _partials(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if not event.is_final]


def _changed(events: Sequence[Event]) -> list[Event]:
    """The partials of an utterance whose text is not that of the one before."""
    partials = _partials(events)
    return [event for event, text in zip(partials, ["", *(before.text for before in partials)], strict=False) if event.text != text]


def _percentiles_ms(seconds: Sequence[float], points: Sequence[int]) -> list[float | None]:
    if not seconds:
        return [None] * len(points)
    return [round(1000 * float(value), 1) for value in np.percentile(seconds, points)]
