#!/usr/bin/env python3
"""Writes SOURCE/script.tsv, what is to be read out: each name of SOURCE/names.tsv in a sentence that fits its tag.

Record each line as SOURCE/recordings/<speaker>/<id>.wav, by as many speakers as you like; then egs/entities/run.sh --source SOURCE.
An existing script is not replaced, as its recordings belong to it.

    egs/entities/make_script.py SOURCE --per-tag 200
"""

import argparse
import logging
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs alone

from nim4 import stage
from nim4.config import RecipeError
from nim4.corpus.hotword_list import ListReport, merge_names, read_list
from nim4.corpus.loaders import read_table
from nim4.corpus.table import spread
from nim4.corpus.units import PhonemeInventory

log = logging.getLogger("nim4")
CARRIERS = Path(__file__).with_name("carriers.tsv")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with names.tsv, a word list with tags")
    parser.add_argument("--carriers", type=Path, default=CARRIERS, help="table of tag and sentence, {} where the name goes")
    parser.add_argument("--per-tag", type=int, default=0, help="names of each tag, spread evenly over the list; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of which name meets which sentence")
    return parser


def make_script(names: list[tuple[str, str]], carriers: dict[str, list[str]], per_tag: int, seed: int) -> list[tuple[str, str, str]]:
    """(id, tag, text) for (tag, name) pairs: the sentences of a tag in turn, from a drawn place on."""
    lines = []
    for tag in dict.fromkeys(tag for tag, _ in names):
        own = [name for other, name in names if other == tag]
        chosen = spread(own, per_tag) if per_tag else own
        start = random.Random(f"{seed} {tag}").randrange(len(carriers[tag]))
        for number, name in enumerate(chosen):
            lines.append((f"{tag}-{number:04d}", tag, carriers[tag][(start + number) % len(carriers[tag])].replace("{}", name)))
    return lines


def read_carriers(path: Path) -> dict[str, list[str]]:
    """The sentences of each tag. Raises RecipeError, with the sentence, when one has no place for the name."""
    carriers: dict[str, list[str]] = {}
    for row in read_table(path, ["tag", "sentence"]):
        if row["sentence"].count("{}") != 1:
            raise RecipeError(path, expected="{} once in each sentence", found=repr(row["sentence"]), fix="put it where the name goes")
        carriers.setdefault(row["tag"], []).append(row["sentence"])
    return carriers


def main() -> None:
    args = build_parser().parse_args()
    target, path, report = args.source / "script.tsv", args.source / "names.tsv", ListReport()
    if target.exists():
        raise RecipeError(target, expected="no script yet", found="one", fix="move it away together with its recordings")
    carriers = read_carriers(args.carriers)
    listed = [name for _, name in merge_names(read_list(path, PhonemeInventory.default(), report), report).values()]
    report.names = len(listed)
    if report.skipped or report.merged:
        report.log(path)
    names = [(tag, name.text) for name in listed for tag in name.tags]
    if not names:
        raise RecipeError(path, expected="names with tags", found="none", fix="write name<TAB>1<TAB>poi, see --help of nim4 hotwords build")
    for tag, name in names:
        if tag not in carriers:
            raise RecipeError(args.carriers, expected=f"a sentence with the tag {tag!r}, of {name!r}", found=", ".join(carriers), fix="add one")
    lines = make_script(names, carriers, args.per_tag, args.seed)
    with stage.atomic_write(target) as file:
        file.writelines("\t".join(line) + "\n" for line in [("id", "tag", "text"), *lines])
    log.info("%s: %d lines to read out", target, len(lines))


if __name__ == "__main__":
    stage.run(main, "make_script")
