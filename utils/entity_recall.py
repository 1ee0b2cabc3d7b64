#!/usr/bin/env python3
"""A table of entity recall: of the names of a list that were said in a test set, how many each decode config wrote.

utils/entity_recall.py exp/entities/base/11_decode --names DIR/names.tsv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.hotword_list import ListReport, read_list
from nim4.corpus.keywords import Keywords
from nim4.corpus.units import PhonemeInventory
from nim4.score.decoded import find_sets, read_set
from nim4.score.entity_recall import entity_recall
from nim4.score.hotword import Share


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("decode", type=Path, metavar="DIR", help="product of stage 11, exp/<corpus>/<tag>/11_decode")
    parser.add_argument("--names", type=Path, required=True, help="word list of the names, as `python -m nim4 hotwords build` reads it")
    return parser


def shown(share: Share) -> str:
    if share.percent is None:
        return f"{share.count}/{share.total}"
    return f"{share.percent:.2f} [{share.low:.2f}, {share.high:.2f}] {share.count}/{share.total}"


def main() -> None:
    args = build_parser().parse_args()
    report = ListReport()
    listed = [name.text for _, name in read_list(args.names, PhonemeInventory.default(), report)]
    report.names = len(listed)
    if report.skipped:
        report.log(args.names)
    if not listed:
        raise RecipeError(args.names, expected="at least one name", found="none", fix="correct the list")
    names = Keywords(listed)
    print("| test set | decode config | entity recall % (95 % CI) | written, not said % (95 % CI) |")
    print("| --- | --- | ---: | ---: |")
    for folder in sorted(find_sets(args.decode), key=lambda folder: folder.name):
        decoded = read_set(folder)
        if not decoded.has_text:
            nim4.stage.log.info("%s/%s: no words, so no names", decoded.config, decoded.test_set)
            continue
        recall, wrong = entity_recall(decoded, names)
        print(f"| {decoded.test_set} | {decoded.config} | {shown(recall)} | {shown(wrong)} |")


if __name__ == "__main__":
    nim4.stage.run(main, "entity_recall")
