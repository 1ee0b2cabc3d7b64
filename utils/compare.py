#!/usr/bin/env python3
"""Prints the scores of decode configs side by side, or the utterances on which two of them differ.

Examples:
  utils/compare.py exp/mini/base                               one table per test set and metric
  utils/compare.py exp/mini/base exp/mini/plain                rows of several runs, named tag:config
  utils/compare.py exp/mini/base --markdown --write README.md --block results
  utils/compare.py exp/mini/base --diff ctc_greedy/test_joins ctc_streaming/test_joins
  utils/compare.py --diff exp/mini/base:ctc_greedy/test_joins exp/mini/plain:ctc_greedy/test_joins
"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError
from nim4.score import diff, table

log = logging.getLogger("nim4")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="*", type=Path, metavar="DIR", help="exp/<corpus>/<tag>, its 12_score, or a records.jsonl")
    parser.add_argument("--first", metavar="ROW", help="the row that the others are compared with (default: the first one)")
    parser.add_argument("--markdown", action="store_true", help="print GitHub tables (default: aligned columns)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE instead of printing it; needs --block")
    parser.add_argument("--block", metavar="NAME", help="where in FILE: between <!-- NAME:begin --> and <!-- NAME:end -->")
    side = "CONFIG/SET (in the one DIR given) or DIR:CONFIG/SET"
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help=f"list the utterances that changed from A to B, worst first; each is {side}")
    parser.add_argument("--metric", help="of --diff: PER, MER, CER or WER (default: the word metric if both have one, else PER)")
    parser.add_argument("--limit", type=int, default=50, help="of --diff: utterances listed at most (default: 50)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="of --diff: ANSI colours (default: auto, on a terminal)")
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    if (args.write is None) != (args.block is None):
        raise RecipeError("--write", expected="--write FILE together with --block NAME", found="only one of them", fix="give both")
    if args.diff:
        if args.write or args.markdown or args.first:
            raise RecipeError("--diff", expected="no --write, --markdown or --first beside it", found="one of them", fix="leave it out")
        if args.limit < 1:
            raise RecipeError("--limit", expected="at least 1", found=args.limit, fix="name a larger number")
        print_diff(args)
        return
    if not args.dirs:
        raise RecipeError("DIR", expected="at least one folder with scores", found="none", fix="for example utils/compare.py exp/mini/base")
    blocks = table.make_blocks(table.read_rows(args.dirs), args.first)
    text = table.as_markdown(blocks) if args.markdown else table.as_text(blocks)
    if args.write is None:
        print(text)
    else:
        table.replace_block(args.write, args.block, text)
        log.info("%s: block %s written", args.write, args.block)


def print_diff(args: argparse.Namespace) -> None:
    a, b = (diff.parse_side(spec, args.dirs) for spec in args.diff)
    metric = diff.choose_metric(a, b, args.metric)
    on_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colour = args.color == "always" or (args.color == "auto" and on_terminal)
    for line in diff.diff_lines(a, b, metric, colour=colour, width=shutil.get_terminal_size((120, 24)).columns, limit=args.limit):
        print(line)


if __name__ == "__main__":
    nim4.stage.run(main, "compare")
