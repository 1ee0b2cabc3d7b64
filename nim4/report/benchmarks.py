"""Benchmark records as tables: what benchmarks/ prints and what stands in RESULTS.md is this rendering of the same record."""

from collections.abc import Mapping, Sequence
from typing import Any

from nim4.config import RecipeError
from nim4.score.table import display_width, pad

_KEYS = {
    "benchmark": str,
    "what": str,
    "command": str,
    "commit": str,
    "data": dict,
    "hardware": str,
    "torch": str,
    "load": float,
    "rounds": int,
    "rows": list,
}


def newest(records: Sequence[Mapping[str, Any]], where: object) -> list[Mapping[str, Any]]:
    """The last record of each benchmark, table (`what`), command and hardware, ordered by benchmark.

    Args:
        where: the file they come from, for messages.
    Raises:
        RecipeError: when a record lacks what its table must say.
    """
    for number, record in enumerate(records, 1):
        missing = [key for key, kind in _KEYS.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)]
        if not missing and (not record["rows"] or {"size", "seed"} - record["data"].keys()):
            missing = ["rows, data.size and data.seed"]
        if missing:
            found = f"no valid {', '.join(missing)}"
            raise RecipeError(f"{where}, row {number}", expected="the record of a benchmark", found=found, fix="remove the row and run it again")
    last = {tuple(record[key] for key in ("benchmark", "what", "command", "hardware")): record for record in records}
    return sorted(last.values(), key=lambda record: record["benchmark"])


def as_markdown(record: Mapping[str, Any]) -> str:
    """One record: what was measured, a GitHub table whose columns are the keys of its rows, and what made it.

    The load average counts the benchmark itself: well above its threads, the machine was busy with other things.
    """
    names = list(record["rows"][0])
    right = [all(not isinstance(row[name], str) for row in record["rows"]) for name in names]
    lines = [[name.replace("_", " ") for name in names], *([_shown(row[name]) for name in names] for row in record["rows"])]
    widths = [max(display_width(line[column]) for line in lines) for column in range(len(names))]
    rule = ["-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    padded = [[pad(cell, width, is_right) for cell, width, is_right in zip(line, widths, right, strict=True)] for line in lines]
    padded.insert(1, rule)
    table = "\n".join(f"| {' | '.join(line)} |" for line in padded)
    data = f"{record['data']['size']}, seed {record['data']['seed']}; median of {record['rounds']} rounds"
    made = f"commit {record['commit']}, {record['hardware']}, torch {record['torch']}, load average {record['load']:.1f}"
    return f"**{record['benchmark']}**: {record['what']}\n\n{table}\n\n`{record['command']}`: {data}; {made}"


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"
