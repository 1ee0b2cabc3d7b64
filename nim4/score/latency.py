"""Speed of a decoding run: real-time factor; for streaming how long a user waits for text, and how much of what they see is taken back.

The clock is the one in events.jsonl: a user speaks in real time, a chunk can be decoded when its last sample has been spoken, and
compute time that is waited for is added (`t_wall_s = t_audio_s + waiting`): that of a decoder that follows as many speakers at once as the
config's `speakers` says (nim4/decode/speakers.py). So latencies depend on the hardware of the run; those by audio do not: they are what a
machine without limits would leave, the time until enough has been heard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nim4.corpus.text import split_tokens
from nim4.score.decoded import Event, Hypothesis
from nim4.score.error_rate import edit_distance


@dataclass(frozen=True)
class Latency:
    """Percentiles over utterances, or partials, in ms; None where there is no such event.

    Waiting counts compute (`t_wall_s`); of the first text both are told. By audio alone a partial and a final text have no lag: they are written
    when what they are of has been heard. Flicker, UPWR and the second pass are None too where nothing that was shown can change later. They
    count tokens: Chinese characters, Latin words, numbers (nim4/corpus/text.py). An update keeps the tokens that both texts begin with; those
    behind them are taken back in the old text, and emitted in the new one.
    """

    first_text_p50_ms: float | None  # from the start of the audio to the first text that is not empty
    first_text_p95_ms: float | None
    first_text_audio_p50_ms: float | None  # the same without compute: audio heard before the first text
    first_text_audio_p95_ms: float | None
    final_p50_ms: float | None  # from the end of the audio to the final text
    final_p90_ms: float | None
    final_p95_ms: float | None
    final_p99_ms: float | None
    partial_lag_p50_ms: float | None  # from the audio that a partial has heard to the partial; those that changed the text
    partial_lag_p95_ms: float | None
    flicker: float | None  # percent of the tokens emitted in partials that later partials took back
    upwr: float | None  # tokens of partials that later partials took back, in percent of the tokens of the final texts
    second_pass_change: float | None  # token edits from the last partials to the final texts, in percent of the tokens of these
    second_pass_gain: float | None  # points of error rate from the last partials to the final texts; positive: these are better
    first_text_utts: int  # utterances that got any text; the others are in no first-text figure
    final_utts: int


def real_time_factor(hyps: Iterable[Hypothesis]) -> float | None:
    """Decoding seconds per second of audio, over utterances that were decoded; None when no time was measured."""
    timed = [hyp for hyp in hyps if hyp.error is None and hyp.wall_s is not None]
    audio_s = sum(hyp.audio_s for hyp in timed)
    return sum(hyp.wall_s for hyp in timed) / audio_s if audio_s > 0 else None


def streaming_latency(events: Sequence[Event], audio_s: Mapping[str, float], refs: Mapping[str, str] | None = None) -> Latency:
    """What `events` tell about waiting, and about changing one's mind.

    Args:
        events: of one test set, each utterance's in the order in which they happened.
        audio_s: length of each utterance; its end stands for the end of speech.
        refs: the text of each, as published; None: the gain of the second pass is not told.
    """
    by_id: dict[str, list[Event]] = {}
    for event in events:
        by_id.setdefault(event.id, []).append(event)
    firsts = [event for own in by_id.values() for event in [next((event for event in own if event.text.strip()), None)] if event is not None]
    finals = [event for event in events if event.is_final]
    first_text = _percentiles_ms([event.t_wall_s for event in firsts], (50, 95))
    first_text += _percentiles_ms([event.t_audio_s for event in firsts], (50, 95))
    final = _percentiles_ms([event.t_wall_s - audio_s[event.id] for event in finals], (50, 90, 95, 99))
    lag = _percentiles_ms([event.t_wall_s - event.t_audio_s for own in by_id.values() for event in _changed(own)], (50, 95))
    revised = [own for own in by_id.values() if own[0].settled_chars is not None]
    gain = None if refs is None else second_pass_gain(revised, refs)
    changes = (flicker(revised), upwr(revised), second_pass_change(revised), gain)
    return Latency(*first_text, *final, *lag, *changes, len(firsts), len(finals))


def flicker(utterances: Iterable[Sequence[Event]]) -> float | None:
    """Percent of the tokens emitted in partials that later partials took back; None when nothing was emitted."""
    counts = [_emitted(events) for events in utterances]
    emitted, taken_back = (sum(own[side] for own in counts) for side in (0, 1))
    return round(100 * taken_back / emitted, 2) if emitted else None


def upwr(utterances: Iterable[Sequence[Event]]) -> float | None:
    """Unstable partial word ratio: tokens of partials that later partials took back, in percent of the tokens of the final texts.

    None when these have none. Source: Shangguan et al. 2020, arXiv 2006.01416, with our tokens for words; what the second pass changes is in
    second_pass_change, not here.
    """
    taken_back = num_tokens = 0
    for events in utterances:
        taken_back += _emitted(events)[1]
        num_tokens += sum(len(split_tokens(event.text)) for event in events if event.is_final)
    return round(100 * taken_back / num_tokens, 2) if num_tokens else None


def _emitted(events: Sequence[Event]) -> tuple[int, int]:
    """Tokens emitted in the partials of an utterance, and how many of them were taken back."""
    emitted, taken_back = 0, 0
    before: list[str] = []
    for event in _partials(events):
        now = split_tokens(event.text)
        same = next((place for place, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), min(len(before), len(now)))
        emitted, taken_back, before = emitted + len(now) - same, taken_back + len(before) - same, now
    return emitted, taken_back


def second_pass_change(utterances: Iterable[Sequence[Event]]) -> float | None:
    """Token edits from last partials to final texts, in percent of the final tokens; None when there are none."""
    edits = num_tokens = 0
    for events in utterances:
        partials, finals = _partials(events), [event for event in events if event.is_final]
        if finals:
            after = split_tokens(finals[-1].text)
            edits += _edits(split_tokens(partials[-1].text) if partials else [], after)
            num_tokens += len(after)
    return round(100 * edits / num_tokens, 2) if num_tokens else None


def second_pass_gain(utterances: Iterable[Sequence[Event]], refs: Mapping[str, str]) -> float | None:
    """Error rate of the last partials less that of the final texts, in points; both of tokens, against `refs`. None when these have none.

    An utterance without partials counts with an empty one: nothing was seen before its final text.
    """
    saved = num_tokens = 0
    for events in utterances:
        partials, finals = _partials(events), [event for event in events if event.is_final]
        if finals:
            ref = split_tokens(refs[finals[-1].id])
            before, after = (split_tokens(shown[-1].text) if shown else [] for shown in (partials, finals))
            saved += _edits(ref, before) - _edits(ref, after)
            num_tokens += len(ref)
    return round(100 * saved / num_tokens, 2) if num_tokens else None


def _edits(a: Sequence[str], b: Sequence[str]) -> int:
    ids = {token: number for number, token in enumerate(dict.fromkeys([*a, *b]))}
    return edit_distance([ids[token] for token in a], [ids[token] for token in b])


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
