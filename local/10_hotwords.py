"""Stage 10: an index of hotwords by sound, from word lists, for retrieval while decoding.

A list has one name per line, or tab-separated columns: name, weight, tags (separated by commas), pronunciation (phones of tokens.txt or
pinyin with tones). The product is what `python -m nim4 hotwords` searches and changes; skipped.tsv says what could not be used.

    python local/10_hotwords.py --list names.tsv --units data/aishell/units --out exp/aishell/base/10_hotwords
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

from nim4 import stage
from nim4.config import RecipeError
from nim4.corpus.hotword_list import default_jobs
from nim4.decode.hotword_build import build_folder
from nim4.decode.hotword_search import TONES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--list", type=Path, nargs="+", required=True, help="word lists, .gz and .xz too")
    parser.add_argument("--units", type=Path, help="folder with the model's tokens.txt; none = the inventory of stage 2")
    parser.add_argument("--tones", choices=TONES, default="toned", help="toned; toneless: tones do not count; wildcard: a neutral tone is any")
    parser.add_argument("--ordinary", type=Path, help="text without hotwords, a sentence per line: names that it has too often are never hints")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.jobs < 1:
        raise RecipeError("--jobs", expected="at least 1", found=args.jobs, fix="correct the option")
    build_folder(args.list, args.out, units=args.units, tones=args.tones, ordinary=args.ordinary, jobs=args.jobs)


if __name__ == "__main__":
    stage.run(main, "hotwords")
