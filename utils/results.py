#!/usr/bin/env python3
"""Writes the tables of README.md and RESULTS.md from the records in results/, so that no number there is typed by hand.

A table stands between <!-- NAME:begin --> and <!-- NAME:end -->. NAME `benchmarks` is results/benchmarks.jsonl, which
`benchmarks/run_all.sh` adds to; `page_clips` is results/reported/clips.json, scored again; `baselines` is
results/baselines/record.json, which `python -m nim4 score --out` writes; `reported` is results/reported/tables.json, beside what the
kept runs measured on the same sets; any other NAME is the runs kept in results/NAME/, compared with each other.

Examples:
  utils/results.py                                             write every table again
  utils/results.py --keep mini exp/mini/base                   keep the scores of a run in results/mini/base, then write
  utils/results.py --keep cr_ctc exp/mini/plain exp/mini/base  several runs in one table; the first is what the others are compared with
"""

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError
from nim4.report import baselines, benchmarks, page_clips, reported
from nim4.score import table
from nim4.score.record import utterances_path

log = logging.getLogger("nim4")
PAGES = ("README.md", "RESULTS.md")
RESERVED = ("benchmarks", "baselines", "page_clips", "reported")  # what stands in results/ and is no run
ORDER = "runs.txt"  # the kept runs of a table, in its order


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="+", metavar=("NAME", "DIR"), help="keep the scores of the runs DIR... as results/NAME, replacing it")
    parser.add_argument("--root", type=Path, default=nim4.stage.ROOT, help="folder with the pages and results/ (default: this repository)")
    return parser


def keep(name: str, runs: Sequence[Path], results: Path) -> None:
    """Copies what a table of `runs` needs, the records and the utterances they count, to `results`/`name`."""
    if name in RESERVED or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RecipeError(
            "--keep",
            expected=f"a name of lower-case letters and digits, not {', '.join(map(repr, RESERVED))}",
            found=name,
            fix="choose another name",
        )
    if not runs:
        raise RecipeError(f"--keep {name}", expected="the folder of at least 1 run", found="none", fix=f"for example --keep {name} exp/mini/base")
    rows = table.read_rows(runs)
    table.make_blocks(rows)  # refuses what cannot stand in one table
    folders = list(dict.fromkeys(row.folder for row in rows))
    tags = [(folder.parent if folder.name == "12_score" else folder).resolve().name for folder in folders]
    if len(set(tags)) < len(tags):
        raise RecipeError(f"--keep {name}", expected="runs with different tags", found=", ".join(tags), fix="name one run per tag")
    work = results / f"{name}.tmp"
    if work.exists():
        shutil.rmtree(work)
    for folder, tag in zip(folders, tags, strict=True):
        (work / tag).mkdir(parents=True)
        shutil.copyfile(folder / "records.jsonl", work / tag / "records.jsonl")
        for record in (row.record for row in rows if row.folder == folder):
            key = record["config"], record["test_set"], record["metric"]
            utterances_path(work / tag, *key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(utterances_path(folder, *key), utterances_path(work / tag, *key))
    (work / ORDER).write_text("".join(f"{tag}\n" for tag in tags), encoding="utf-8")
    if (results / name).exists():
        shutil.rmtree(results / name)
    work.rename(results / name)
    log.info("%s: kept %s", results / name, ", ".join(tags))


def render(name: str, results: Path) -> str:
    """The text of the block `name`. Raises RecipeError when there are no records for it."""
    if name == "benchmarks":
        path = results / "benchmarks.jsonl"
        records = benchmarks.newest(nim4.stage.read_jsonl(path), path)
        return "\n\n".join(benchmarks.as_markdown(record) for record in records)
    if name == "page_clips":
        return page_clips.as_markdown(results / "reported" / "clips.json")
    if name == "baselines":
        return baselines.as_markdown(results / "baselines" / "record.json")
    if name == "reported":
        kept = [order.parent / tag for order in sorted(results.glob(f"*/{ORDER}")) for tag in order.read_text(encoding="utf-8").split()]
        return reported.as_markdown(results / "reported" / "tables.json", reported.measured_in(table.read_rows(kept)))
    order = results / name / ORDER
    if not order.is_file():
        raise RecipeError(f"block {name}", expected=f"kept runs in {order.parent}", found="none", fix=f"utils/results.py --keep {name} EXP_DIR...")
    rows = table.read_rows([order.parent / tag for tag in order.read_text(encoding="utf-8").split()])
    made = [row.record.get(key) for row in rows for key in ("decode_command", "command")]
    commands = [f"- made by `{command}`" for command in dict.fromkeys(made) if command]
    return "\n".join([table.as_markdown(table.make_blocks(rows)), *commands])


def blocks_of(page: Path) -> list[str]:
    """The names of the blocks in a page."""
    return re.findall(r"<!-- (\w+):begin -->", page.read_text(encoding="utf-8"))


def main() -> None:
    args = build_parser().parse_args()
    results = args.root / "results"
    if args.keep:
        keep(args.keep[0], [Path(run) for run in args.keep[1:]], results)
    errors = []
    for page in (args.root / name for name in PAGES if (args.root / name).is_file()):
        for name in blocks_of(page):
            try:
                text = render(name, results)
            except RecipeError as error:  # the other blocks are written all the same
                errors.append(error)
                continue
            table.replace_block(page, name, text)
            log.info("%s: block %s written", page, name)
    if errors:
        raise errors[0]


if __name__ == "__main__":
    nim4.stage.run(main, "results")
