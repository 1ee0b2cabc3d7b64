"""Systems side by side on one list of references: the record that `python -m nim4 score --out` writes.

The record is one JSON object:
- `profile`, `profile_hash`, `made_with` (packages of the normaliser), `metrics`, `commit`, `command`, `seconds` (of normalising, aligning,
  attributing), `refs` (file, SHA-256, number of utterances), `rule` (of hallucination);
- `systems`, in the order given: `name`, `file`, `sha256`, `unknown` (ids without a reference), `broken` (lines that could not be read), `rates` (for
  each metric the counts and interval of record.rates, `macro`, and `versus_first`: points, low, high and p_better, null for the first), `attribution`
  (of the errors of raw text) and `attribution_of_profile` (of this profile's, null where it is raw or fair), `made_up`;
- `utterances`: `id`, `speaker`, `set`, `ref` (as published), and `systems`, in their order: `hyp`, `missing`, `error` (why there is no text),
  `errors` and `ref_units` by metric, and `units`: reference and hypothesis as the first metric counted them, blanks between units;
  error_rate.align aligns them.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.corpus.text import is_han
from nim4.decode.processes import in_processes
from nim4.score import bootstrap, profiles
from nim4.score.attribution import KINDS, attribute, distance
from nim4.score.decoded import Hypothesis, Reference
from nim4.score.error_rate import ScoredUtterance
from nim4.score.listed import System
from nim4.score.made_up import OVERLAP, made_up
from nim4.score.normalising import AT_ONCE, normalised, score_normalised
from nim4.score.record import rates
from nim4.stage import file_hash, git_commit

Scored = Sequence[Sequence[ScoredUtterance]]  # by system and reference


@dataclass(frozen=True)
class Settings:
    """How systems are scored."""

    profile: str = "fair"
    metrics: tuple[str, ...] = ("MER",)
    engine: str = "wetext"  # of the profile's grammars
    overlap: float = OVERLAP  # below which a long hypothesis is a hallucination
    jobs: int = 1  # processes
    cache: Path | None = None  # folder of normalised texts


def compare(refs: Sequence[Reference], sets: Mapping[str, str], systems: Sequence[System], settings: Settings) -> dict[str, Any]:
    """The record of all systems, but for what only the command knows. Raises RecipeError, see profiles.check and record.rates."""
    profiles.check(settings.profile, settings.engine)
    with _clock() as normalise_s:
        hyps_of = [system.hyps for system in systems]
        normal_refs, normal_hyps = normalised(refs, hyps_of, settings.profile, settings.engine, settings.jobs, settings.cache)
    with _clock() as align_s:
        metrics = dict.fromkeys((*settings.metrics, "MER"))
        scored = {metric: [score_normalised(normal_refs, hyps, metric, settings.profile) for hyps in normal_hyps] for metric in metrics}
        measured = [_rates(settings, index, scored, sets, system) for index, system in enumerate(systems)]
    with _clock() as attribute_s:
        chinese = {ref.id: any(map(is_han, ref.text)) for ref in refs}
        raw = [_attribution(refs, system.hyps, chinese, "raw", None, settings.jobs) for system in systems]
        own: list[dict[str, int] | None] = [None] * len(systems)
        if settings.profile not in ("raw", "fair"):
            both = zip(normal_hyps, scored["MER"], strict=True)
            own = [_attribution(normal_refs, hyps, chinese, settings.profile, utts, settings.jobs) for hyps, utts in both]
    return {
        "profile": settings.profile,
        "profile_hash": profiles.profile_hash(settings.profile, settings.engine),
        "made_with": profiles.made_with(settings.profile, settings.engine),
        "metrics": list(settings.metrics),
        "commit": git_commit(),
        "seconds": {"normalise": normalise_s[0], "align": align_s[0], "attribute": attribute_s[0]},
        "rule": made_up(scored["MER"][0], settings.overlap)["rule"],
        "systems": [
            {
                "name": system.name,
                "file": str(system.path),
                "sha256": file_hash(system.path),
                "unknown": list(system.unknown),
                "broken": list(system.broken),
                "rates": measured[index],
                "attribution": raw[index],
                "attribution_of_profile": own[index],
                "made_up": made_up(scored["MER"][index], settings.overlap),
            }
            for index, system in enumerate(systems)
        ],
        "utterances": list(_utterances(refs, sets, systems, settings.metrics, scored)),
    }


@contextmanager
def _clock() -> Iterator[list[float]]:
    seconds: list[float] = []
    started_s = time.perf_counter()
    yield seconds
    seconds.append(round(time.perf_counter() - started_s, 3))


def _rates(settings: Settings, index: int, scored: Mapping[str, Scored], sets: Mapping[str, str], system: System) -> dict[str, Any]:
    """Of one system, by metric."""
    found = {}
    for metric in settings.metrics:
        first, utts = scored[metric][0], scored[metric][index]
        versus = None
        if index:
            errors, other_errors, ref_units = ([utt.errors for utt in first], [utt.errors for utt in utts], [len(utt.ref) for utt in utts])
            difference = bootstrap.paired_difference(errors, other_errors, ref_units, [utt.speaker for utt in utts])
            versus = {key: round(value, 4) for key, value in dataclasses.asdict(difference).items()}
        record = rates(metric, utts, settings.profile, str(system.path), settings.engine)
        found[metric] = record | {"macro": macro(utts, sets), "versus_first": versus}
    return found


def macro(utts: Sequence[ScoredUtterance], sets: Mapping[str, str]) -> dict[str, Any]:
    """The mean of the rates of sets, if every utterance has one, else of speakers, else of utterances; groups without a unit are left out."""
    speakers = {utt.id: utt.speaker for utt in utts if utt.speaker}
    if all(utt.id in sets for utt in utts):
        over, group_of = "set", sets
    elif len(speakers) == len(utts) and len(set(speakers.values())) > 1:
        over, group_of = "speaker", speakers
    else:
        over, group_of = "utterance", {utt.id: utt.id for utt in utts}
    errors, ref_units = Counter(), Counter()
    for utt in utts:
        errors[group_of[utt.id]] += utt.errors
        ref_units[group_of[utt.id]] += len(utt.ref)
    by_group = {group: 100 * errors[group] / total for group, total in ref_units.items() if total}
    rate = round(sum(by_group.values()) / len(by_group), 4)
    by_set = {group: round(value, 4) for group, value in by_group.items()} if over == "set" else None
    return {"over": over, "groups": len(by_group), "rate": rate, "rates": by_set}


def _attribution(
    refs: Sequence[Reference],
    hyps: Mapping[str, Hypothesis],
    chinese: Mapping[str, bool],
    profile: str,
    scored: Sequence[ScoredUtterance] | None,
    jobs: int,
) -> dict[str, int]:
    """Errors by kind; `scored` None: those of `profile` are counted first. An utterance without a hypothesis has errors of kind `missing`."""
    pairs, missing = [], 0
    for i, ref in enumerate(refs):
        hyp = hyps.get(ref.id)
        if hyp is None or hyp.error is not None or not hyp.text:
            missing += len(profiles.units(ref.text, "MER", profile))
        elif scored is None and hyp.text != ref.text:
            pairs.append((ref.text, hyp.text, None, chinese[ref.id], profile))
        elif scored is not None and scored[i].errors:
            pairs.append((ref.text, hyp.text, scored[i].errors, chinese[ref.id], profile))
    parts = [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
    total: Counter[str] = Counter(missing=missing)
    for kinds in in_processes(_attribute_part, parts, jobs):
        total.update(kinds)
    return {kind: total[kind] for kind in (*KINDS, "missing")}


def _attribute_part(pairs: Sequence[tuple[str, str, int | None, bool, str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for ref, hyp, errors, chinese, profile in pairs:
        if errors is None:
            errors = distance(*(tuple(profiles.units(text, "MER", profile)) for text in (ref, hyp)))
        total.update(attribute(ref, hyp, errors, chinese=chinese))
    return total


def _utterances(
    refs: Sequence[Reference],
    sets: Mapping[str, str],
    systems: Sequence[System],
    metrics: Sequence[str],
    scored: Mapping[str, Scored],
) -> Iterator[dict[str, Any]]:
    for i, ref in enumerate(refs):
        rows = []
        for index, system in enumerate(systems):
            utt, hyp = scored[metrics[0]][index][i], system.hyps.get(ref.id)
            counts = {metric: scored[metric][index][i] for metric in metrics}
            rows.append(
                {
                    "hyp": None if hyp is None else hyp.text,
                    "missing": utt.missing,
                    "error": None if hyp is None else hyp.error,
                    "errors": {metric: of.errors for metric, of in counts.items()},
                    "ref_units": {metric: len(of.ref) for metric, of in counts.items()},
                    "units": [" ".join(utt.ref), " ".join(utt.hyp)],
                }
            )
        yield {"id": ref.id, "speaker": ref.speaker, "set": sets.get(ref.id), "ref": ref.text, "systems": rows}
