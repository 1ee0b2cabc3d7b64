"""What the comparison page says, as plain values: tables with intervals, and each clip with every system's text, aligned.

Texts are scored by the code of stage 12 and of `python -m nim4 score`, under each profile that the page can show. Nothing here decides how it looks.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.score import bootstrap
from nim4.score.decoded import DecodedSet, Event, Hypothesis
from nim4.score.error_rate import ScoredUtterance
from nim4.score.listed import read_system
from nim4.score.made_up import is_hallucinated, made_up
from nim4.score.normalising import normalised, score_normalised
from nim4.score.record import rates

log = logging.getLogger("nim4")
HINT_SETTINGS = {"hotwords", "max_hints"}  # of a decode config: what two systems may differ in, for the one to show what hotwords change


@dataclass(frozen=True)
class ScoredSet:
    """One test set under one profile; `systems` and `utts` are in the same order, `utts[i]` in the order of the references."""

    test_set: str
    profile: str
    metric: str
    systems: tuple[DecodedSet, ...]
    utts: tuple[tuple[ScoredUtterance, ...], ...]
    hallucinated: tuple[frozenset[int], ...]  # places of the references, by system
    rows: tuple[Mapping[str, Any], ...]  # by system: record.rates, `versus_first` and `made_up`; without rates where nothing is said

    @property
    def is_silent(self) -> bool:
        """Nothing is said in the whole set."""
        return not any(utt.ref for utt in self.utts[0])


def by_test_set(decoded: Sequence[DecodedSet], metric: str) -> dict[str, list[DecodedSet]]:
    """The systems of each test set that give what `metric` counts there. Raises RecipeError when two have other references."""
    found: dict[str, list[DecodedSet]] = {}
    for one in decoded:
        first = found.setdefault(one.test_set, [])
        if first and first[0].refs != one.refs:
            where = f"{one.config}/{one.test_set}"
            raise RecipeError(where, expected=f"the references of {first[0].config}", found="others", fix="run stage 11 again for both")
        counted = one.has_phones if metric == "PER" else one.has_text
        if counted or all(hyp.error is not None for hyp in one.hyps.values()):
            first.append(one)
    return {test_set: systems for test_set, systems in found.items() if systems}


def with_others(sets: Mapping[str, list[DecodedSet]], others: Mapping[str, Path]) -> dict[str, list[DecodedSet]]:
    """`sets` and, in those of which their files have an utterance, other systems.

    Args:
        others: file of texts (nim4/score/listed.py) by the system's name.
    Raises:
        RecipeError: when a name is taken, a file cannot be read, or ids do not say which set they are of.
    """
    sets = {test_set: list(systems) for test_set, systems in sets.items()}
    refs = {ref.id: ref for systems in sets.values() for ref in systems[0].refs}
    if others and len(refs) < sum(len(systems[0].refs) for systems in sets.values()):
        raise RecipeError("--hyp", expected="test sets without an id in common", found="some with", fix="decode and report them apart")
    for name, path in others.items():
        if any(name == system.config for systems in sets.values() for system in systems):
            raise RecipeError(f"--hyp {name}", expected="a name that is no decode config's", found=name, fix="choose another name")
        hyps = read_system(path, refs, name).hyps
        for test_set, systems in sets.items():
            own = {ref.id: hyps[ref.id] for ref in systems[0].refs if ref.id in hyps}
            if own:
                systems.append(DecodedSet(name, test_set, systems[0].refs, own, None, {}))
            else:
                log.info("%s has no utterance of %s: it is not in the tables of that set", name, test_set)
    return sets


def score_set(systems: Sequence[DecodedSet], metric: str, profile: str, num_processes: int = 1) -> ScoredSet:
    """All systems of one test set, each against the first.

    Args:
        metric: MER, CER, WER; or PER, of which phonemes are the units.
        profile: one of profiles.PROFILES; `phones` for PER.
    """
    refs, hyps = systems[0].refs, [system.hyps for system in systems]
    if metric != "PER":
        refs, hyps = normalised(refs, hyps, profile, num_processes=num_processes)
    scored = [tuple(score_normalised(refs, own, metric, profile)) for own in hyps]
    mixed = scored if metric in ("MER", "PER") else [score_normalised(refs, own, "MER", profile) for own in hyps]
    hallucinated = [frozenset(i for i, utt in enumerate(utts) if is_hallucinated(utt.ref, utt.hyp)) for utts in mixed]
    test_set, rows = systems[0].test_set, []
    for system, utts, mixed_utts in zip(systems, scored, mixed, strict=True):
        row: dict[str, Any] = {"made_up": made_up(mixed_utts)}
        if any(utt.ref for utt in utts):
            row |= rates(metric, utts, profile, f"{system.config}/{test_set}")
            row["versus_first"] = None if utts is scored[0] else _versus(scored[0], utts)
        rows.append(row)
    return ScoredSet(test_set, profile, metric, tuple(systems), tuple(scored), tuple(hallucinated), tuple(rows))


def _versus(first: Sequence[ScoredUtterance], other: Sequence[ScoredUtterance]) -> bootstrap.Difference:
    errors, other_errors = ([utt.errors for utt in utts] for utts in (first, other))
    return bootstrap.paired_difference(errors, other_errors, [len(utt.ref) for utt in first], [utt.speaker for utt in first])


def changed_by_hotwords(systems: Sequence[DecodedSet]) -> dict[str, tuple[str, frozenset[int]]]:
    """For each system with hotwords that has a twin without: the twin's name, and the places of the references whose texts differ."""
    found = {}
    for system in systems:
        twin = next((other for other in systems if _uses_hotwords(system) and not _uses_hotwords(other) and _same_else(system, other)), None)
        if twin is not None:
            texts = [[_text(one.hyps.get(ref.id), "text") for ref in system.refs] for one in (system, twin)]
            found[system.config] = twin.config, frozenset(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
    return found


def _settings(system: DecodedSet) -> Mapping[str, Any]:
    return system.done.get("made_from", {}).get("config", {})


def _uses_hotwords(system: DecodedSet) -> bool:
    settings = _settings(system)
    return bool(settings.get("hotwords")) or settings.get("decode", {}).get("hotwords", "none") != "none"


def _same_else(a: DecodedSet, b: DecodedSet) -> bool:
    both = [{key: value for key, value in _settings(one).get("decode", {}).items() if key not in HINT_SETTINGS} for one in (a, b)]
    return both[0] == both[1] != {} and a.done.get("model") == b.done.get("model")


def _text(hyp: Hypothesis | None, kind: str) -> str:
    return "" if hyp is None or hyp.error is not None else getattr(hyp, kind) or ""


def clips_of(under: Sequence[ScoredSet], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each utterance of one set: reference, and for each system of the page its text, or why there is none, as scored under each profile.

    Args:
        under: the set, scored under each profile.
        names: of all systems of the page, in its order; one that the set lacks is None in `systems`.
    """
    systems = {system.config: (index, system, _events(system.events)) for index, system in enumerate(under[0].systems)}
    kind = "phones" if under[0].metric == "PER" else "text"
    for place, ref in enumerate(under[0].systems[0].refs):
        rows: list[dict[str, Any] | None] = []
        for name in names:
            if name not in systems:
                rows.append(None)
                continue
            index, system, events = systems[name]
            hyp, utts = system.hyps.get(ref.id), [scored.utts[index][place] for scored in under]
            given = _settings(system).get("hotwords") or []
            row = {
                "text": _text(hyp, kind),
                "missing": _missing(hyp, utts[0]),
                "scores": [[utt.errors, len(utt.ref), pairs_of(utt)] for utt in utts],
                "hints": list(dict.fromkeys([*given, *(hyp.hints or () if hyp else ())])) if _uses_hotwords(system) else None,
                "shown": events.get(ref.id),
            }
            rows.append(row)
        yield {"id": ref.id, "set": under[0].test_set, "speaker": ref.speaker, "seconds": round(ref.audio_s, 3), "ref": ref.text, "systems": rows}


def pairs_of(utt: ScoredUtterance) -> list[str | list[str]]:
    """The alignment: a unit where both sides have it, else [reference, hypothesis], "" for the side that has none."""
    return [ref if ref == hyp else [ref, hyp] for ref, hyp in utt.pairs]


def _missing(hyp: Hypothesis | None, utt: ScoredUtterance) -> str | None:
    return f"failed: {hyp.error}" if hyp is not None and hyp.error is not None else utt.missing


def _events(events: Sequence[Event] | None) -> dict[str, list[list[Any]]]:
    """By utterance, [clock in s, text, characters of it that stay] of each text that differs from the one before it."""
    found: dict[str, list[list[Any]]] = {}
    for event in events or ():
        shown = [round(event.t_wall_s, 3), event.text, len(event.text) if event.is_final else event.settled_chars]
        own = found.setdefault(event.id, [])
        if not own or own[-1][1:] != shown[1:]:
            own.append(shown)
    return found


def versus_as_text(change: bootstrap.Difference) -> str:
    """Points, their interval, and how sure it is that the other system is better; as nim4/score/table.py writes it."""
    points, low, high, p_better = dataclasses.astuple(change)
    return f"{points:+.2f} [{low:+.2f}, {high:+.2f}] P {p_better:.2f}"
