"""Figures as others report them, beside what is measured here on the set of the same name: in columns of their own, never in one.

The file of figures says where each comes from, and, where a recipe of egs/ makes that set, which corpus and test set it is. What is measured stands
there only where the metric is the same; its profile stands with it, since that of reported figures is not known.
"""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.score.table import Row
from nim4.stage import read_json

TITLES = {"public": "Public test sets", "internal": "The authors' own test sets", "hallucination": "Hallucination"}
Measured = Mapping[tuple[str, str, str], Sequence[str]]  # (corpus, test set, metric) -> "config rate [interval] (profile hash)"


def measured_in(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[str]]:
    """What score records say, by corpus, test set and metric; the corpus is the folder of the --units that were decoded."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        record = row.record
        words = shlex.split(record.get("decode_command") or "")
        units = next((value for option, value in itertools.pairwise(words) if option == "--units"), None)
        if units is not None:
            key = Path(units).parent.name, record["test_set"], record["metric"]
            rate = f"{record['rate']:.2f} [{record['ci_low']:.2f}, {record['ci_high']:.2f}]"
            found.setdefault(key, []).append(f"{row.label} {rate} ({record['profile']} {record['profile_hash']})")
    return found


def as_tables(path: Path, measured: Measured) -> list[dict[str, Any]]:
    """One table per kind of test set: `title`, `source`, `header`, `reported` (the columns, first and behind the last, that others report), `rows`.

    Raises RecipeError when the file is not one of reported figures.
    """
    content = read_json(path)
    try:
        names = {row["table"] for row in content["rows"]}
        return [_table(content, name, title, measured) for name, title in TITLES.items() if name in names]
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no {error}"
        raise RecipeError(path, expected="reported figures: source, rows, benchmark, values", found=found, fix="restore the file") from error


def _table(content: Mapping[str, Any], name: str, title: str, measured: Measured) -> dict[str, Any]:
    rows = [row for row in content["rows"] if row["table"] == name]
    systems = list(dict.fromkeys(system for row in rows for system in row["values"]))
    cells = []
    for row in rows:
        test_set = " ".join(filter(None, (row["benchmark"], row["subset"])))
        here = measured.get((row.get("corpus"), row.get("set"), row["metric"]), ())
        values = ["-" if row["values"].get(system) is None else f"{row['values'][system]:.2f}" for system in systems]
        cells.append([row["group"] or "", test_set, row["metric"], *values, "; ".join(here) or "-"])
    header = ["group", "test set", "metric", *systems, "measured here"]
    return {"title": title, "source": content["source"], "header": header, "reported": [3, 3 + len(systems)], "rows": cells}


def as_markdown(path: Path, measured: Measured) -> str:
    """The tables for RESULTS.md."""
    parts = []
    for table in as_tables(path, measured):
        first, end = table["reported"]
        header = [f"reported: {name}" if first <= i < end else name for i, name in enumerate(table["header"])]
        rule = ["---:" if first <= i < end else "---" for i in range(len(header))]
        lines = [f"| {' | '.join(line)} |" for line in (header, rule, *table["rows"])]
        parts.append("\n".join([f"**{table['title']}**, reported: {table['source']}", "", *lines]))
    return "\n\n".join(parts)
