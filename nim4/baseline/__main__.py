"""`python -m nim4 baseline`: other recognisers on our manifests, each in an environment and a process of its own. See baselines/README.md."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nim4.config import RecipeError


def add_baseline(commands: Any) -> None:
    from nim4.baseline.process import Limits

    defaults = argparse.ArgumentDefaultsHelpFormatter
    about = "Texts of other recognisers, for `python -m nim4 score --hyp`."
    actions = commands.add_parser("baseline", description=about, help="texts of other recognisers").add_subparsers(required=True)

    about = "the baselines, and which are installed"
    actions.add_parser("list", description=about, help=about).set_defaults(run=show)

    about = "makes the environment of a baseline from its lock file"
    parser = actions.add_parser("install", description=about, help=about, formatter_class=defaults)
    parser.add_argument("name", metavar="NAME", help="a baseline of the list, or a folder, with a slash")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="interpreter to make it with, of the version that the baseline needs"
    )
    parser.set_defaults(run=install)

    about = "what is said in manifests, for `python -m nim4 score --ref`"
    parser = actions.add_parser("refs", description=about, help=about, formatter_class=defaults)
    parser.add_argument(
        "--manifest", type=Path, nargs="+", required=True, help="manifests of stage 0 or 2, .jsonl.gz; their names are those of the sets"
    )
    parser.add_argument("--limit", type=int, default=0, help="that of `run`, for each manifest")
    parser.add_argument("--out", type=Path, required=True, help="file of references, .jsonl")
    parser.set_defaults(run=refs)

    about = """Texts of a manifest, a row for each clip. A clip that fails, or takes too long, has its error in its row, and the rest goes on. A run
    that was stopped goes on where it was."""
    parser = actions.add_parser("run", description=about, help="texts of a manifest", formatter_class=defaults)
    parser.add_argument("name", metavar="NAME", help="a baseline of the list, or a folder, with a slash")
    what = "manifest of stage 0 or 2, .jsonl.gz; or a list, .jsonl, of objects with id, audio and language"
    parser.add_argument("--manifest", type=Path, required=True, help=what)
    parser.add_argument("--out", type=Path, required=True, help="file of texts, .jsonl; beside it what the baseline prints, .log")
    parser.add_argument(
        "--server", metavar="URL", help="OpenAI-like server that has the model, such as http://127.0.0.1:8000/v1; none = load it here"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of its settings.yaml; repeatable")
    parser.add_argument("--python", type=Path, help="interpreter with the baseline's packages; none = that of `install`")
    parser.add_argument("--limit", type=int, default=0, help="at most so many clips, spread over the manifest; 0 is all. A later run may add more")
    parser.add_argument("--timeout", type=float, default=Limits.clip_s, help="seconds for one clip")
    parser.add_argument("--load-timeout", type=float, default=Limits.load_s, help="seconds for loading the model")
    parser.add_argument("--jobs", type=int, default=Limits.jobs, help="processes; each has its own copy of the model, unless a server has it")
    parser.add_argument("--again", action="store_true", help="clips with an error are tried once more")
    parser.set_defaults(run=run)


def show(_: argparse.Namespace) -> None:
    """Prints name, title, model and state of each."""
    from nim4.baseline.adapters import is_installed, names, read_baseline

    for name in names():
        baseline = read_baseline(name)
        state = "installed" if is_installed(baseline) else "not installed"
        print(f"{name}\t{baseline.settings['title']}\t{baseline.settings['model']}\t{state}")


def install(args: argparse.Namespace) -> None:
    """Makes the environment."""
    from nim4.baseline.adapters import install as make
    from nim4.baseline.adapters import read_baseline

    make(read_baseline(args.name), args.python)


def refs(args: argparse.Namespace) -> None:
    """Writes --out."""
    from nim4.baseline.clips import references
    from nim4.stage import write_jsonl

    _check(args, limit=0)
    write_jsonl(args.out, references(args.manifest, args.limit))


def _check(args: argparse.Namespace, **least: float) -> None:
    for option, value in least.items():
        if not getattr(args, option) >= value:
            found = getattr(args, option)
            raise RecipeError(f"--{option.replace('_', '-')}", expected=f"at least {value}", found=found, fix="leave it out")
    if args.out.suffix != ".jsonl":
        raise RecipeError("--out", expected="a name that ends in .jsonl", found=args.out.name, fix=f"for example {args.out.with_suffix('.jsonl')}")


def run(args: argparse.Namespace) -> None:
    """Writes --out."""
    from nim4.baseline.adapters import python_of, read_baseline
    from nim4.baseline.clips import read_clips
    from nim4.baseline.predictions import predict
    from nim4.baseline.process import Limits

    _check(args, timeout=0.1, load_timeout=0.1, jobs=1, limit=0)
    baseline = read_baseline(args.name, args.set, args.server)
    python = python_of(baseline, args.python)
    limits = Limits(args.timeout, args.load_timeout, args.jobs)
    predict(baseline, python, read_clips(args.manifest), args.out, limits, args.limit, args.again)
