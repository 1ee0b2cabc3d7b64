"""`python -m nim4 score`: its options, what it does, and the tables it gives."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.corpus.grammars import ENGINES, cache_folder
from nim4.stage import atomic_write

ABOUT = """Error rates of any systems on one list of references, side by side: intervals, how sure a difference is, what kinds of errors there
are, and text that nobody said. Files are TSV (id, TAB, text; or with a first line of column names) or JSON lines (id, text), in UTF-8; references
may have `speaker` and `set`, hypotheses `error`. What is missing, failed or empty counts as deletions."""


def add_options(parser: Any) -> None:
    """To an argparse parser."""
    from nim4.corpus.hotword_list import default_jobs
    from nim4.score.made_up import OVERLAP
    from nim4.score.profiles import PROFILES

    parser.add_argument("--ref", type=Path, required=True, help="references")
    parser.add_argument("--hyp", type=Path, required=True, action="append", help="hypotheses of one system; repeatable, the first is compared with")
    parser.add_argument("--name", action="append", default=[], help="of a system, in the order of --hyp; none = the file's")
    parser.add_argument("--profile", choices=PROFILES, default="fair", help="what texts go through first, see nim4/score/profiles.py")
    metrics = "mixed errors (Chinese characters and words), characters, words"
    parser.add_argument("--metric", nargs="+", choices=("mer", "cer", "wer"), default=["mer"], help=metrics)
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="of the grammars of page and speechio")
    overlap = "a long hypothesis is made up if less than this share of it is common with its reference"
    parser.add_argument("--overlap", type=float, default=OVERLAP, help=overlap)
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes that normalise")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder in which normalised texts are kept")
    parser.add_argument("--out", type=Path, help="file for the whole record, see nim4/score/systems.py")
    layout = "folder for recogs-*, errs-* and wer-summary-* of the first metric in icefall's layout, see nim4/score/icefall_files.py"
    parser.add_argument("--icefall", type=Path, metavar="DIR", help=layout)


def run(args: Any, command: str) -> str:
    """Scores, writes --out, and gives the tables. Raises RecipeError."""
    from nim4.score.icefall_files import write_icefall_files
    from nim4.score.listed import read_references, read_system
    from nim4.score.systems import Settings, compare
    from nim4.stage import file_hash

    if args.jobs < 1:
        raise RecipeError("--jobs", expected="at least 1", found=args.jobs, fix="leave it out")
    if not 0 <= args.overlap <= 1:
        raise RecipeError("--overlap", expected="a share, 0 to 1", found=args.overlap, fix="leave it out")
    names = _names(args.hyp, args.name)
    refs, sets = read_references(args.ref)
    by_id = {ref.id: ref for ref in refs}
    systems = [read_system(path, by_id, name) for path, name in zip(args.hyp, names, strict=True)]
    metrics = tuple(metric.upper() for metric in dict.fromkeys(args.metric))
    settings = Settings(args.profile, metrics, args.engine, args.overlap, args.jobs, args.cache)
    record = compare(refs, sets, systems, settings)
    source = {"file": str(args.ref), "sha256": file_hash(args.ref), "num_utts": len(refs)}
    record = {"command": command, "refs": source, **record}
    if args.out:
        with atomic_write(args.out) as file:
            json.dump(record, file, ensure_ascii=False)
            file.write("\n")
    if args.icefall:
        write_icefall_files(record, args.icefall)
    return as_text(record)


def _names(paths: Sequence[Path], given: Sequence[str]) -> list[str]:
    """A name for each system: those given, else the files' stems, else their paths."""
    if given and len(given) != len(paths):
        raise RecipeError("--name", expected=f"one for each --hyp, {len(paths)}", found=len(given), fix="give as many, or none")
    for names in (list(given), [path.stem for path in paths], [str(path) for path in paths]):
        if names and len(set(names)) == len(names):
            return names
        if given:
            break
    found = ", ".join(given or map(str, paths))
    raise RecipeError("--name" if given else "--hyp", expected="systems of different names", found=found, fix="name each file once")


def as_text(record: Mapping[str, Any]) -> str:
    """The record as tables for a terminal: one per metric, kinds of errors, text that nobody said."""
    from nim4.score.table import aligned

    parts = []
    for metric in record["metrics"]:
        lines = [_rate_header(record, metric), *(_rate_cells(system, metric) for system in record["systems"])]
        parts.append([f"{metric} %", *aligned(lines, {1, 3, 4, 5, 6, 7}), _footer(record, metric)])
    for key, profile in (("attribution", "raw"), ("attribution_of_profile", record["profile"])):
        if record["systems"][0][key] is not None:
            lines = [["system", "errors", *record["systems"][0][key]]]
            lines += [[system["name"], *map(str, (sum(system[key].values()), *system[key].values()))] for system in record["systems"]]
            title = f"mixed errors of profile {profile} by the step of fair that takes them away; lexical: none does; missing: no hypothesis"
            parts.append([title, *aligned(lines, set(range(1, len(lines[0]))))])
    shares = [key for key in record["systems"][0]["made_up"] if key != "rule"]
    lines = [["system", *(key.replace("_", " ") for key in shares)]]
    lines += [[system["name"], *(_share(system["made_up"][key]) for key in shares)] for system in record["systems"]]
    parts.append([f"text that nobody said, k/n, % (95 % CI, Wilson); hallucination: {record['rule']}", *aligned(lines, set())])
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in record["seconds"].items())
    parts.append([f"commit {record['commit']}; {seconds}"])
    return "\n\n".join("\n".join(part) for part in parts)


def _rate_header(record: Mapping[str, Any], metric: str) -> list[str]:
    first = record["systems"][0]
    macro = first["rates"][metric]["macro"]
    versus = f"vs {first['name']} (95 % CI, P better)"
    missing = "missing (absent/failed/empty)"
    average = f"macro % over {macro['groups']} {macro['over']}s"
    return ["system", f"{metric} % (95 % CI)", versus, average, "ins/del/sub", missing, "ids unknown", "lines broken"]


def _rate_cells(system: Mapping[str, Any], metric: str) -> list[str]:
    rate = system["rates"][metric]
    versus = rate["versus_first"]
    change = "-" if versus is None else f"{versus['points']:+.2f} [{versus['low']:+.2f}, {versus['high']:+.2f}] P {versus['p_better']:.2f}"
    return [
        system["name"],
        f"{rate['rate']:.2f} [{rate['ci_low']:.2f}, {rate['ci_high']:.2f}]",
        change,
        f"{rate['macro']['rate']:.2f}",
        f"{rate['insertions']}/{rate['deletions']}/{rate['substitutions']}",
        f"{rate['missing']} ({rate['missing_absent']}/{rate['missing_failed']}/{rate['missing_empty']})",
        str(len(system["unknown"])),
        str(len(system["broken"])),
    ]


def _footer(record: Mapping[str, Any], metric: str) -> str:
    rate = record["systems"][0]["rates"][metric]
    made_with = "".join(f", {name} {version}" for name, version in record["made_with"].items())
    blocks = f"{rate['num_blocks']} {rate['block']}s"
    units = f"{rate['num_utts']} utterances, {rate['ref_units']} reference units"
    return f"profile {record['profile']} {record['profile_hash']}{made_with}; {units}; intervals and P over {blocks}"


def _share(share: Mapping[str, Any]) -> str:
    if not share["n"]:
        return "-"
    return f"{share['k']}/{share['n']}, {share['rate']:.3g} [{share['ci_low']:.3g}, {share['ci_high']:.3g}]"
