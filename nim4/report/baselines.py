"""Baselines beside our model: one row per test set and system, from the record of `python -m nim4 score` on references with sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.corpus.text import is_han
from nim4.score import bootstrap
from nim4.score.error_rate import align
from nim4.stage import read_json

HEADER = [
    "test set",
    "system",
    "% (95 % CI)",
    "vs {first} (95 % CI, P better)",
    "English words % (ours: of these alone)",
    "missing",
    "text where nobody speaks",
]


def as_markdown(path: Path) -> str:
    """The table. Raises RecipeError when the file is no such record, or an utterance has no set."""
    record = read_json(path)
    try:
        names = [system["name"] for system in record["systems"]]
        metric = record["metrics"][0]
        sets: dict[str, list[dict[str, Any]]] = {}
        for utt in record["utterances"]:
            sets.setdefault(utt["set"], []).append(utt)
        header = [metric + " " + HEADER[2] if i == 2 else cell.format(first=names[0]) for i, cell in enumerate(HEADER)]
        lines = [header, ["---", "---", *["---:"] * 5]]
        lines += [[str(name), system, *_cells(utts, index, metric)] for name, utts in sets.items() for index, system in enumerate(names)]
        counts = ", ".join(f"{len(utts)} of {name}" for name, utts in sets.items())
        made = f"profile {record['profile']} {record['profile_hash']}; utterances: {counts}; commit {record['commit']}; made by `{record['command']}`"
    except (KeyError, TypeError, IndexError) as error:
        raise RecipeError(path, expected="a record of python -m nim4 score", found=f"{error!r}", fix="score again with --out") from error
    if None in sets:
        raise RecipeError(path, expected="references with sets", found="none", fix="make them with python -m nim4 baseline refs, and score again")
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", made])


def _cells(utts: Sequence[Mapping[str, Any]], index: int, metric: str) -> list[str]:
    """Of one system on one set."""
    rows = [utt["systems"][index] for utt in utts]
    first = [utt["systems"][0]["errors"][metric] for utt in utts]
    errors, units = [row["errors"][metric] for row in rows], [row["ref_units"][metric] for row in rows]
    speakers = [utt["speaker"] for utt in utts]
    rate = versus = "-"
    if sum(units):
        low, high = bootstrap.interval(errors, units, speakers)
        rate = f"{100 * sum(errors) / sum(units):.2f} [{low:.2f}, {high:.2f}]"
        if index:
            change = bootstrap.paired_difference(first, errors, units, speakers)
            versus = f"{change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}] P {change.p_better:.2f}"
    silent = [row for utt, row in zip(utts, rows, strict=True) if not utt["ref"].strip()]
    written = sum(bool(row["units"][1]) for row in silent)
    missing = sum(row["missing"] is not None for utt, row in zip(utts, rows, strict=True) if utt["ref"].strip())
    return [rate, versus, _english(rows), str(missing), f"{written} of {len(silent)}" if silent else "-"]


def _english(rows: Sequence[Mapping[str, Any]]) -> str:
    """Errors of English words, with the Chinese characters of both sides left out: an English word written for Chinese is one too many."""
    errors = words = 0
    for row in rows:
        ref, hyp = (side.split() for side in row["units"])
        ref, hyp = ([unit for unit in side if not any(map(is_han, unit))] for side in (ref, hyp))
        errors += sum(a != b for a, b in align(ref, hyp))
        words += len(ref)
    return f"{100 * errors / words:.2f}" if words else "-"
