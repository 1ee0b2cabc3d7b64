"""The door to what can be asked of a prepared corpus: `python -m nim4 corpus check --help`."""

import argparse
from pathlib import Path
from typing import Any

from nim4 import stage


def add_corpus(commands: Any) -> None:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    about = """A report on manifests: lengths, rates, characters outside the units, duplicates, and leaks between splits to train on and to test on
    (named dev*, test*, valid* or eval*). Several folders are looked at together."""
    actions = commands.add_parser("corpus", description=about, help="a report on a prepared corpus").add_subparsers(required=True)
    parser = actions.add_parser("check", description=about, help="the report", formatter_class=defaults)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of manifests, data/<corpus>/manifests")
    parser.add_argument("--json", type=Path, help="file to write the report to as well")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> None:
    """Prints the report; what it finds is no error of the program."""
    from nim4.corpus.quality import as_lines, check_corpora

    quality = check_corpora(args.folders)
    if args.json is not None:
        stage.write_json(args.json, quality.as_json())
    print("\n".join(as_lines(quality)))
