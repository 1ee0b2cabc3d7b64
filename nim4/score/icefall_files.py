"""A record of `python -m nim4 score` as the files that icefall's decoding programs leave, for scripts that read those.

    recogs-<set>-<system>.txt       references and hypotheses as lists of units
    errs-<set>-<system>.txt         counts, alignments, and how often which unit went wrong
    wer-summary-<set>-all.txt       the rates of all systems, the best first

Units are those of the record's first metric; icefall writes WER over whatever its units are. Utterances are in the order of their ids.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.score.error_rate import ScoredUtterance
from nim4.score.error_stats import error_stats, recogs
from nim4.stage import atomic_write

log = logging.getLogger("nim4")
ONLY_SET = "test"  # where references name no sets


def write_icefall_files(record: Mapping[str, Any], folder: Path) -> None:
    """Writes them into `folder`. Raises RecipeError when two names would be one file. A set in which nothing is said gets none, and is told."""
    names = [system["name"].replace("/", "-") for system in record["systems"]]
    if len(set(names)) < len(names) or "all" in names:
        raise RecipeError("--name", expected="systems whose names differ as parts of file names, and are not 'all'", found=names, fix="give others")
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for utterance in sorted(record["utterances"], key=lambda utterance: utterance["id"]):
        by_set.setdefault((utterance["set"] or ONLY_SET).replace("/", "-"), []).append(utterance)
    for name, utterances in by_set.items():
        if not any(utterance["systems"][0]["units"][0] for utterance in utterances):
            log.info("%s: nothing is said there, so no files in icefall's layout", name)
            continue
        rates = {}
        for index, system in enumerate(names):
            scored = [_scored(utterance, index) for utterance in utterances]
            lines = list(error_stats("WER", scored))
            rates[system] = float(lines[0].rpartition("=")[2])
            _write(folder / f"errs-{name}-{system}.txt", lines)
            _write(folder / f"recogs-{name}-{system}.txt", list(recogs(scored)))
        best_first = sorted(rates.items(), key=lambda item: item[1])
        _write(folder / f"wer-summary-{name}-all.txt", ["settings\tWER", *(f"{system}\t{rate}" for system, rate in best_first)])


def _scored(utterance: Mapping[str, Any], index: int) -> ScoredUtterance:
    system = utterance["systems"][index]
    ref, hyp = (tuple(units.split()) for units in system["units"])
    return ScoredUtterance(utterance["id"], utterance["speaker"], ref, hyp, 0, 0, 0, system["missing"])


def _write(path: Path, lines: list[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)
