#!/usr/bin/env python3
"""Stage 0: a corpus as checked manifests.

`egs/<corpus>/prepare.py` says what the corpus has; this program checks it and writes, into --out,

    <split>.jsonl.gz   one cut per utterance: 16 kHz, one channel, with text, speaker and language
    report.json        counts per split, and every utterance with a problem: id, split, reason, and whether it was left out
    done.json          what the folder was made from

Missing or unreadable audio, a missing transcript, a repeated id, or a length outside 0.1 to 60 s leaves an utterance out, and the stage
goes on; an empty split, or more than half of a split left out, ends it. Where the recipe knows how many utterances are published
(COUNTS), another number is told.
"""

import argparse
import fnmatch
import importlib.util
import inspect
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
from nim4 import stage
from nim4.config import RecipeError, nearest
from nim4.corpus import download, manifest
from nim4.corpus.table import spread

log = logging.getLogger("nim4")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", required=True, help="name of a folder under --recipes")
    parser.add_argument("--source", type=Path, required=True, help="folder with the corpus as published")
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifests")
    parser.add_argument("--download", choices=("true", "false"), default="false", help="fetch the corpus into --source first")
    parser.add_argument("--limit", type=int, default=0, help="utterances per split, spread evenly over it; 0 = all")
    parser.add_argument("--recipes", type=Path, default=stage.ROOT / "egs", help="folder with one folder per corpus")
    return parser


def load_recipe(recipes: Path, corpus: str) -> ModuleType:
    """The corpus's prepare.py as a module. Raises RecipeError, with the nearest name, when there is none."""
    path = recipes / corpus / "prepare.py"
    if not path.is_file():
        known = sorted(found.parent.name for found in recipes.glob("*/prepare.py"))
        fix = nearest(corpus, known) if known else f"put a corpus under {recipes}, see CONTRIBUTING.md"
        raise RecipeError(f"--corpus {corpus}", expected=f"a file {path}", found="no such file", fix=fix)
    spec = importlib.util.spec_from_file_location(f"prepare_{corpus.replace('-', '_')}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "prepare"):
        raise RecipeError(path, expected="def prepare(source, work)", found="none", fix="see CONTRIBUTING.md")
    return module


def inputs_of(recipe: Path, source: Path) -> list[Path]:
    """The files that decide the product: the recipe's own, and the source's where it is kept beside the recipe.

    A downloaded corpus is taken as unchanging: to read all of it would cost as much as the stage itself.
    """
    folders = [recipe, source] if source.is_relative_to(recipe.resolve()) else [recipe]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file() and path.name != "run.sh")


def fetch_if_asked(recipe: ModuleType, args: argparse.Namespace) -> None:
    """Runs the recipe's download(); without it, makes sure that the source is there."""
    has_download = hasattr(recipe, "download")
    if args.download == "true":
        if not has_download:
            fix = f"get it by hand (egs/{args.corpus}/run.sh says where) and name its folder with --source"
            raise RecipeError(
                "--download true", expected=f"a corpus that can be fetched by a program, which {args.corpus} is not", found="no", fix=fix
            )
        args.source.mkdir(parents=True, exist_ok=True)
        recipe.download(args.source)
    elif not args.source.is_dir():
        fetch = "add --download true to fetch it, or " if has_download else ""
        fix = f"{fetch}give the corpus's folder with --source (egs/{args.corpus}/run.sh says where to get it)"
        raise RecipeError(f"--source {args.source}", expected="a folder with the corpus", found="no such folder", fix=fix)


def log_report(report: dict[str, Any]) -> None:
    """The report as a short table in the log."""
    log.info("%-18s %10s %9s %8s %8s  %s", "split", "utterances", "hours", "speakers", "left out", "listed")
    for split, counts in report["splits"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items()) or "-"
        log.info("%-18s %10d %9.2f %8d %8d  %s", split, counts["utterances"], counts["hours"], counts["speakers"], counts["left_out"], reasons)


def check_counts(recipe: ModuleType, utterances: dict[str, int]) -> dict[str, dict[str, int]]:
    """What the recipe's COUNTS expect and what was kept, per pattern of split names; a difference is told, as the source may be a part.

    A pattern may cover several splits, `test_real_*`; one that covers no split that is there is not looked at.
    """
    compared = {}
    for pattern, expected in getattr(recipe, "COUNTS", {}).items():
        kept = [count for split, count in utterances.items() if fnmatch.fnmatchcase(split, pattern)]
        if not kept:
            continue
        compared[pattern] = {"expected": expected, "kept": sum(kept)}
        if sum(kept) != expected:
            log.warning("%s: %d utterances kept, but %d are published: is the source whole? See report.json", pattern, sum(kept), expected)
    return compared


def main() -> None:
    args = build_parser().parse_args()
    if args.limit < 0:
        raise RecipeError("--limit", expected="0 or more", found=args.limit, fix="0 keeps everything")
    args.source = args.source.resolve()
    recipe = load_recipe(args.recipes, args.corpus)
    config = {"corpus": args.corpus, "source": str(args.source), "limit": args.limit}
    config |= {name: os.environ.get(name) for name in getattr(recipe, "SETTINGS", ())}  # variables that decide what the recipe reads
    output = stage.StageOutput(args.out, config=config, inputs=inputs_of(args.recipes / args.corpus, args.source))
    if output.is_done():
        return
    fetch_if_asked(recipe, args)
    work = output.begin()
    makes_audio = "limit" in inspect.signature(recipe.prepare).parameters
    splits, problems = manifest.validate(recipe.prepare(args.source, work / "audio", *([args.limit] if makes_audio else [])))
    published = {} if args.limit else check_counts(recipe, {split: len(cuts) for split, cuts in splits.items()})
    if args.limit:
        splits = {split: spread(list(cuts), args.limit) for split, cuts in splits.items()}
    for split, cuts in splits.items():
        manifest.save_cuts(cuts, work / f"{split}{manifest.SUFFIX}")
    report = {"corpus": args.corpus, "archives": download.unpacked_archives(args.source), **manifest.report(splits, problems), "published": published}
    stage.write_json(work / "report.json", report)
    log_report(report)
    output.finish(utterances={split: len(cuts) for split, cuts in splits.items()}, problems=len(problems))
    if problems:
        log.info("%d problems are listed in %s", len(problems), args.out / "report.json")


if __name__ == "__main__":
    stage.run(main, "prepare")
