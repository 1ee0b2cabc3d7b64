"""The score record: one JSON object per (decode config, test set, metric), with all that is needed to trust and to repeat it.

Beside the records stand each set's aligned utterances (`utts-<METRIC>.jsonl`), from which differences between systems are computed.
"""

import dataclasses
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.score import bootstrap
from nim4.score.decoded import DecodedSet, checked_rows
from nim4.score.error_rate import ScoredUtterance
from nim4.score.latency import Latency, real_time_factor, streaming_latency
from nim4.score.made_up import made_up
from nim4.score.profiles import profile_hash, profile_of
from nim4.score.punctuation import punctuation_scores
from nim4.stage import git_commit, write_jsonl

log = logging.getLogger("nim4")


@dataclass(frozen=True)
class Utterance:
    """One row of `utts-<METRIC>.jsonl`."""

    id: str
    speaker: str | None
    ref: str  # units separated by blanks
    hyp: str
    errors: int
    ref_units: int
    missing: str | None  # absent | failed | empty; None = there is a hypothesis


def hardware(num_threads: int | None = None) -> str:
    """The CPU's name and the number of threads in use (default: the cores this process may use), for the footer of a table."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        name = named[0] if named else name
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def make_record(decoded: DecodedSet, metric: str, scored: Sequence[ScoredUtterance], *, profile: str, command: str) -> dict[str, Any]:
    """The record of one scored set.

    Args:
        decoded: gives speed, latency and where the hypotheses came from.
        scored: `decoded` scored by `metric`, every utterance of the set.
        command: the command that scores.
    Raises:
        RecipeError: when the references hold no unit at all, so that there is no rate.
    """
    return {
        "config": decoded.config,
        "test_set": decoded.test_set,
        **rates(metric, scored, profile_of(metric, profile), f"{decoded.config}/{decoded.test_set}"),
        **_speed(decoded),
        "punctuation": None if metric == "PER" else _punctuation(decoded),
        "made_up": made_up(scored) if metric == "MER" else None,
        "commit": decoded.done["commit"],
        "score_commit": git_commit(),
        "model": decoded.done["model"],
        "model_step": decoded.done.get("model_step"),
        "hardware": decoded.done.get("hardware") or f"{hardware()} (of scoring; decoding did not say)",
        "seconds": decoded.done.get("seconds"),
        "command": command,
        "decode_command": decoded.done.get("command"),
    }


def rates(metric: str, scored: Sequence[ScoredUtterance], profile: str, where: str, engine: str = "wetext") -> dict[str, Any]:
    """What every record of errors says: the rate in percent with its 95 % interval, counts, what is missing and why, and the profile.

    Args:
        profile: the metric's, as of profile_of.
        where: what was scored, for messages.
    Raises:
        RecipeError: when the references hold no unit at all, so that there is no rate.
    """
    errors = [utt.errors for utt in scored]
    ref_units = [len(utt.ref) for utt in scored]
    speakers = [utt.speaker for utt in scored]
    if not sum(ref_units):
        raise RecipeError(where, expected=f"references with at least 1 unit for {metric}", found="none", fix="check the test set's text")
    low, high = bootstrap.interval(errors, ref_units, speakers)
    block = bootstrap.choose_block(speakers)
    reasons = [utt.missing for utt in scored]
    return {
        "metric": metric,
        "rate": round(100 * sum(errors) / sum(ref_units), 4),
        "errors": sum(errors),
        "ref_units": sum(ref_units),
        "insertions": sum(utt.insertions for utt in scored),
        "deletions": sum(utt.deletions for utt in scored),
        "substitutions": sum(utt.substitutions for utt in scored),
        "missing": sum(reason is not None for reason in reasons),
        "missing_absent": reasons.count("absent"),
        "missing_failed": reasons.count("failed"),
        "missing_empty": reasons.count("empty"),
        "num_utts": len(scored),
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "block": block,
        "num_blocks": len(set(speakers)) if block == "speaker" else len(scored),
        "profile": profile,
        "profile_hash": profile_hash(profile, engine),
    }


def _punctuation(decoded: DecodedSet) -> dict[str, dict[str, Any]] | None:
    """Scores of marks, "all" first; None where the references have none. An utterance without a text has none right."""
    texts = {id: "" if hyp.error is not None else hyp.text or "" for id, hyp in decoded.hyps.items()}
    scores = punctuation_scores((ref.text, texts.get(ref.id, "")) for ref in decoded.refs)
    if not scores["all"].in_refs:
        return None
    return {mark: {"f1": round(score.f1, 2), **dataclasses.asdict(score)} for mark, score in scores.items()}


def _speed(decoded: DecodedSet) -> dict[str, Any]:
    audio_s = {ref.id: ref.audio_s for ref in decoded.refs}
    rtf = real_time_factor(decoded.hyps.values())
    speed = {"audio_s": round(sum(audio_s.values()), 3), "rtf": None if rtf is None else round(rtf, 5)}
    if decoded.events is None:
        return {**speed, **{field.name: None for field in dataclasses.fields(Latency)}}
    latency = streaming_latency(decoded.events, audio_s, {ref.id: ref.text for ref in decoded.refs} if decoded.has_text else None)
    unfinished = sum(hyp.error is None for hyp in decoded.hyps.values()) - latency.final_utts
    if unfinished > 0:
        log.warning("%s/%s: %d utterances have no final event; they are in no final latency", decoded.config, decoded.test_set, unfinished)
    return {**speed, **dataclasses.asdict(latency)}


def write_utterances(path: Path, scored: Sequence[ScoredUtterance]) -> None:
    """`utts-<METRIC>.jsonl`: each utterance's units and errors."""
    rows = [Utterance(u.id, u.speaker, " ".join(u.ref), " ".join(u.hyp), u.errors, len(u.ref), u.missing) for u in scored]
    write_jsonl(path, [vars(row) for row in rows])


def read_utterances(path: Path) -> list[Utterance]:
    """What `write_utterances` wrote. Raises RecipeError when it is missing or broken."""
    if not path.is_file():
        raise RecipeError(path, expected="the utterances behind a record", found="no such file", fix="run stage 12 again")
    kinds = {"id": str, "speaker": str | None, "ref": str, "hyp": str, "errors": int, "ref_units": int, "missing": str | None}
    return [Utterance(*(row[key] for key in kinds)) for row in checked_rows(path, kinds)]


def utterances_path(folder: Path, config: str, test_set: str, metric: str) -> Path:
    """Where stage 12 keeps the utterances of a record; `folder` is its product."""
    return folder / config / test_set / f"utts-{metric}.jsonl"
