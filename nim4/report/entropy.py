"""The entropy report of nim4/train/entropy.py as a table and as a picture. Both say that the definitions are ours."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nim4 import stage
from nim4.config import RecipeError
from nim4.score.plot import picture
from nim4.score.table import display_width, pad

NOTE = "NSE, PAI and CSAI are our definitions: arXiv 2604.08003 names the measures, its formulas were not available to us"


def as_text(records: Sequence[Mapping[str, Any]]) -> str:
    """One row per checkpoint as aligned columns, and what they were made of; records as in entropy.jsonl, of one run."""
    header = ["checkpoint", "step", "NSE", "PAI nats", "PAI/H(P) %", "CSAI nats"]
    rows = [
        [
            record["name"],
            "-" if record["step"] is None else str(record["step"]),
            f"{record['nse']:.3f}",
            _with_deviation(record["pai"], record["pai_std"], 3),
            _with_deviation(record["pai_share"], record["pai_share_std"], 1, 100.0),
            _with_deviation(record["csai"], record["csai_std"], 4),
        ]
        for record in records
    ]
    table = [header, *rows]
    widths = [max(display_width(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(pad(cell, widths[column], column > 0) for column, cell in enumerate(line)) for line in table]
    one = records[0]
    left_out = ", ".join(f"{reason} {count}" for reason, count in one["left_out"].items() if count)
    seeds = f"mean ± standard deviation over seeds {', '.join(map(str, one['seeds']))} of halves and probes; NSE uses neither"
    return "\n".join(
        [
            *lines,
            f"H(P) {one['phone_entropy']:.3f} nats; CSAI is at most {one['unit_entropy_given_phones']:.4f} nats, the entropy of a text unit given "
            f"its phones: {one['homophones']} of {one['text_units']} units have a homophone here",
            f"{one['split']}: {one['utterances']} utterances{f' (left out: {left_out})' if left_out else ''}, {one['frames']} frames with a phone "
            f"as {one['reference']} aligned them, commit {one['commit']}",
            seeds,
            NOTE,
        ]
    )


def plot(records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws the three measures of each checkpoint, with deviations, as the PNG file `out`: over the step where every record has another."""
    steps = [record["step"] for record in records]
    over_steps = None not in steps and len(set(steps)) == len(steps)
    places = steps if over_steps else list(range(len(records)))
    with picture(out, num_rows=3) as axes:
        for axis, (name, label) in zip(axes, (("nse", "NSE"), ("pai_share", "PAI / H(P)"), ("csai", "CSAI (nats)")), strict=True):
            deviations = [record.get(f"{name}_std") or 0.0 for record in records]
            axis.errorbar(places, [record[name] for record in records], yerr=deviations, marker="o", capsize=3)
            axis.set_ylabel(label)
        low, high = axes[-1].get_ylim()
        axes[-1].set_ylim(min(low, -0.01), max(high, 0.05))  # or a list without homophones would show the noise of a CSAI of nothing
        axes[0].set_title("Encoder frames by our definitions (arXiv 2604.08003 names the measures)", fontsize=10)
        if over_steps:
            axes[-1].set_xlabel("training step")
        else:
            axes[-1].set_xticks(places, ["/".join(Path(record["name"]).parts[-2:]) for record in records], rotation=20, ha="right")


def step_of(path: Path) -> int | None:
    """Training steps of a checkpoint: in a snapshot's name, in a stage's record; None where neither says."""
    if path.is_file():
        match = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
        return int(match[1]) if match else None
    return stage.read_json(path / "done.json").get("step") if (path / "done.json").is_file() else None


def language_of(units: Path) -> str:
    """The language in which stage 2 read the texts. Raises RecipeError when its record does not say."""
    record = stage.read_json(units / "done.json")
    try:
        return record["made_from"]["config"]["language"]
    except (KeyError, TypeError) as error:
        raise RecipeError(
            units / "done.json", expected="the record of stage 2", found=f"no {error}", fix="give the folder of stage 2 as --units"
        ) from error


def _with_deviation(value: float, deviation: float | None, digits: int, scale: float = 1.0) -> str:
    shown = f"{scale * value:.{digits}f}"
    return shown if deviation is None else f"{shown} ± {scale * deviation:.{digits}f}"
