"""Writes the comparison page: its own files as they are, and what it shows as scripts beside it, since a page from disk may load nothing else.

`data/report.js` holds what is known of all clips: tables, names, and the columns by which clips are chosen and put in order;
`data/clips-N.js` PER_FILE clips each, loaded when they are looked at. Both are calls with a JSON value, ASCII, so that no text can be more than text.
The same input gives the same bytes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nim4.report.clip_audio import ClipAudio
from nim4.report.clips import ScoredSet, changed_by_hotwords, clips_of, versus_as_text
from nim4.score import table
from nim4.score.bootstrap import NUM_DRAWS, SEED, Difference
from nim4.stage import atomic_write

FOLDER = Path(__file__).parent / "page"
PER_FILE = 20
SPEED = ["RTF", "first text p50/p95 ms"]


def write_page(folder: Path, report: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> None:
    """`index.html`, what it loads, and `data/` in `folder`.

    Args:
        report: see report_of.
        clips: all of them, in the order of the report's columns.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for path in sorted(path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")):
        shutil.copyfile(path, folder / path.name)
    _write_call(folder / "data" / "report.js", "receiveReport", report)
    for number, start in enumerate(range(0, len(clips), PER_FILE)):
        _write_call(folder / "data" / f"clips-{number}.js", "receiveClips", number, clips[start : start + PER_FILE])


def _write_call(path: Path, function: str, *values: Any) -> None:
    with atomic_write(path) as file:
        file.write(f"{function}({', '.join(json.dumps(value, ensure_ascii=True, separators=(',', ':')) for value in values)});\n")


def report_of(
    title: str,
    scored: Sequence[Sequence[ScoredSet]],
    records: Sequence[table.Row],
    languages: Mapping[tuple[str, str], str],
    reported: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All that is known before a clip is looked at.

    Args:
        scored: by test set and profile.
        records: of stage 12: rates of phonemes, speed, latency.
        languages: of (test set, id), where a manifest says it.
        reported: tables of figures that others report, as of reported.as_tables.
    """
    names = names_of(scored)
    blocks = table.make_blocks([row for row in records if row.record["metric"] == "PER"])
    words = [words_table(one, records) | {"profile": i} for i, of in enumerate(zip(*scored, strict=True)) for one in of if one.metric != "PER"]
    return {
        "title": title,
        "metric": scored[0][0].metric,
        "profiles": [one.profile for one in scored[0]],
        "systems": names,
        "sets": [under[0].test_set for under in scored],
        "tables": [*words, *(phones_table(block) for block in blocks)],
        "reported": reported,
        "notes": _notes(scored),
        "perFile": PER_FILE,
        "columns": _columns(scored, names, languages),
        "twins": {name: twin for under in scored for name, (twin, _) in changed_by_hotwords(under[0].systems).items()},
    }


def names_of(scored: Sequence[Sequence[ScoredSet]]) -> list[str]:
    """The systems of all sets, in the order in which they come."""
    return list(dict.fromkeys(system.config for under in scored for system in under[0].systems))


def clips_with_audio(scored: Sequence[Sequence[ScoredSet]], audio: Sequence[ClipAudio], languages: Mapping[tuple[str, str], str]) -> list[dict]:
    """All clips, set by set; `audio` in the same order."""
    names = names_of(scored)
    clips = [clip for under in scored for clip in clips_of(under, names)]
    return [
        clip | {"language": languages.get((clip["set"], clip["id"])), "audio": one.address, "peaks": list(one.peaks), "noAudio": one.missing}
        for clip, one in zip(clips, audio, strict=True)
    ]


def _columns(scored: Sequence[Sequence[ScoredSet]], names: Sequence[str], languages: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """What clips are chosen and ordered by, each a list over all clips; `errors`, `units`, `hallucinated` by profile, then by system.

    -1: the clip's set lacks the system. `hallucinated` and `changed` (by hotwords, by system) list the places of the clips.
    """
    sets, spoken = [], []
    for number, under in enumerate(scored):
        sets += [number] * len(under[0].utts[0])
        spoken += [languages.get((under[0].test_set, utt.id)) for utt in under[0].utts[0]]
    columns: dict[str, Any] = {
        "set": sets,
        "language": spoken,
        "errors": [],
        "units": [],
        "hallucinated": [],
        "changed": {name: [] for name in names},
    }
    for profile in range(len(scored[0])):
        errors: list[list[int]] = [[] for _ in names]
        units, hallucinated, start = [], [[] for _ in names], 0
        for under in scored:
            one = under[profile]
            by_name = {system.config: index for index, system in enumerate(one.systems)}
            for place, name in enumerate(names):
                index = by_name.get(name)
                errors[place] += [-1] * len(one.utts[0]) if index is None else [utt.errors for utt in one.utts[index]]
                hallucinated[place] += [] if index is None else [start + i for i in sorted(one.hallucinated[index])]
            units += [len(utt.ref) for utt in one.utts[0]]
            start += len(one.utts[0])
        columns["errors"].append(errors)
        columns["units"].append(units)
        columns["hallucinated"].append(hallucinated)
    start = 0
    for under in scored:
        for name, (_, changed) in changed_by_hotwords(under[0].systems).items():
            columns["changed"][name] += [start + i for i in sorted(changed)]
        start += len(under[0].utts[0])
    return columns


def words_table(scored: ScoredSet, records: Sequence[table.Row]) -> dict[str, Any]:
    """One test set under one profile. A cell is a text, {"text", "kind"} where the kind is better or worse, or {"interval", "most"}."""
    if scored.is_silent:
        header = ["system", "output where nothing is said", "95 % interval"]
        shares = [row["made_up"]["non_speech_text"] for row in scored.rows]
        rows = [
            [system.config, f"{share['k']} of {share['n']}", {"interval": [share["ci_low"], share["rate"], share["ci_high"]], "most": 100}]
            for system, share in zip(scored.systems, shares, strict=True)
        ]
        return {"title": f"{scored.test_set}: nothing is said", "set": scored.test_set, "header": header, "rows": rows, "note": ""}
    speed = {(row.record["config"], row.record["test_set"]): row.record for row in records}
    header = [*_header(scored.metric, scored.systems[0].config), "made up (95 % CI)", *SPEED]
    rows = []
    for system, row in zip(scored.systems, scored.rows, strict=True):
        share = row["made_up"]["hallucination"]
        made_up = f"{share['k']} of {share['n']} [{share['ci_low']:.1f}, {share['ci_high']:.1f}] %"
        cells = _rate_cells(system.config, row, row["versus_first"], scored.rows)
        rows.append([*cells, made_up, *_speed_cells(speed.get((system.config, scored.test_set), {}))])
    note = f"{_note(scored.rows[0])}; made up: {scored.rows[0]['made_up']['rule']}"
    return {"title": f"{scored.test_set}, {scored.metric} %", "set": scored.test_set, "header": header, "rows": rows, "note": note}


def phones_table(block: table.Block) -> dict[str, Any]:
    """Phonemes of one test set, from the records of stage 12; it is the same under every profile of texts."""
    records = [row.record for row in block.rows]
    changes = zip(block.rows, block.differences, strict=True)
    rows = [[*_rate_cells(row.label, row.record, change, records), *_speed_cells(row.record)] for row, change in changes]
    header = [*_header(block.metric, block.rows[0].label), *SPEED]
    return {"title": block.title, "set": block.test_set, "profile": None, "header": header, "rows": rows, "note": _note(records[0])}


def _header(metric: str, first: str) -> list[str]:
    return ["system", f"{metric} %", "95 % interval", f"vs {first}, points (95 % CI, P better)", "ins/del/sub", "missing"]


def _rate_cells(name: str, row: Mapping[str, Any], change: Difference | None, all_rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    kind = None if change is None else "better" if change.p_better >= table.SURE else "worse" if change.p_better <= 1 - table.SURE else None
    interval = {"interval": [row["ci_low"], row["rate"], row["ci_high"]], "most": max(one["ci_high"] for one in all_rows)}
    versus = "first" if change is None else {"text": versus_as_text(change), "kind": kind}
    return [name, f"{row['rate']:.2f}", interval, versus, f"{row['insertions']}/{row['deletions']}/{row['substitutions']}", str(row["missing"])]


def _speed_cells(record: Mapping[str, Any]) -> list[str]:
    wait = [record.get(f"first_text_{point}_ms") for point in ("p50", "p95")]
    rtf = "-" if record.get("rtf") is None else f"{record['rtf']:.3f}"
    return [rtf, "-" if None in wait else f"{wait[0]:.0f} / {wait[1]:.0f}"]


def _note(row: Mapping[str, Any]) -> str:
    blocks = f"{row['num_blocks']} {row['block']}s"
    return f"profile {row['profile']} {row['profile_hash']}, {row['num_utts']} utterances, {row['ref_units']} units, intervals over {blocks}"


def _notes(scored: Sequence[Sequence[ScoredSet]]) -> list[str]:
    """Where the texts come from, each said once, and how intervals are made."""
    made: dict[str, list[str]] = {}
    for under in scored:
        for system in under[0].systems:
            done = system.done
            step = "" if done.get("model_step") is None else f" step {done['model_step']}"
            source = f"model {done['model']}{step}, commit {done['commit']}, {done.get('hardware')}" if done else "texts given with --hyp"
            made.setdefault(source, []).append(system.config)
    lines = [f"{', '.join(dict.fromkeys(names))}: {source}" for source, names in made.items()]
    return [*lines, f"Paired bootstrap, {NUM_DRAWS} draws, seed {SEED}; better or worse: P at least {table.SURE:.2f}."]
