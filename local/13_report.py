"""Stage 13: a page that compares all systems clip by clip: OUT/index.html, opened from disk in any browser, with what it needs beside it.

Reads what stage 11 decoded and stage 12 scored, and the manifests for the audio. Tables with intervals for each set and text profile, the figures
that others report, and every clip with its audio, reference and each system's text, aligned; streams can be played again as they were shown.
Other systems' texts come with --hyp NAME=FILE (TSV or JSON lines, nim4/score/listed.py). Audio is copied (FLAC), or linked where there is much.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.hotword_list import default_jobs
from nim4.corpus.manifest import MonoCut, load_cuts, split_paths
from nim4.report import clip_audio, clips, page, reported
from nim4.score import table
from nim4.score.decoded import find_sets, read_set, set_files
from nim4.score.profiles import PROFILES, profile_hash

REPORTED = nim4.stage.ROOT / "results" / "reported" / "tables.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--decode", type=Path, required=True, help="product of stage 11, exp/<corpus>/<tag>/11_decode")
    parser.add_argument("--score", type=Path, required=True, help="product of stage 12, exp/<corpus>/<tag>/12_score")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: manifests with the audio and language of each utterance")
    parser.add_argument("--hyp", action="append", default=[], help="NAME=FILE: another system's texts; repeatable")
    parser.add_argument("--profiles", default="plain fair", help=f"text profiles to choose from on the page, of {', '.join(PROFILES)}")
    parser.add_argument(
        "--audio", choices=clip_audio.WAYS, default="copy", help="copy: FLAC beside the page; link: the corpus's files where they are"
    )
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes that normalise texts, threads that read audio")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, exp/<corpus>/<tag>/13_report")
    return parser


def others_of(given: list[str]) -> dict[str, Path]:
    """File by name. Raises RecipeError for one that is no NAME=FILE, or whose name comes twice."""
    others: dict[str, Path] = {}
    for option in given:
        name, _, path = option.partition("=")
        if not name or not path or name in others:
            raise RecipeError(f"--hyp {option}", expected="NAME=FILE, each name once", found=option, fix="for example --hyp theirs=theirs.tsv")
        if not Path(path).is_file():
            raise RecipeError(f"--hyp {option}", expected="a file of texts", found="no such file", fix="correct the path")
        others[name] = Path(path)
    return others


def profiles_of(given: str) -> list[str]:
    """The profiles, each once. Raises RecipeError when there is none, or one that does not exist."""
    names = list(dict.fromkeys(given.split()))
    wrong = [name for name in names if name not in PROFILES]
    if wrong or not names:
        raise RecipeError("--profiles", expected=f"some of {', '.join(PROFILES)}", found=given or "none", fix="for example --profiles 'plain fair'")
    return names


def metric_of(records: list[table.Row], others: dict[str, Path]) -> str:
    """What stage 12 counted beside phonemes, or PER where it counted nothing else. Raises RecipeError when other systems' texts do not fit that."""
    found = [*dict.fromkeys(row.record["metric"] for row in records if row.record["metric"] != "PER"), "PER"][0]
    if found == "PER" and others:
        fix = "decode and score a config that gives texts, e.g. offline"
        raise RecipeError("--hyp", expected="test sets scored in words or characters", found="phonemes alone", fix=fix)
    return found


def main() -> None:
    args = build_parser().parse_args()
    others, profiles = others_of(args.hyp), profiles_of(args.profiles)
    if args.jobs < 1:
        raise RecipeError("--jobs", expected="at least 1", found=args.jobs, fix="leave it out")
    folders = find_sets(args.decode)
    manifests = {name: path for name, path in split_paths(args.units).items() if any(folder.name == name for folder in folders)}
    hashes = {name: profile_hash(name) for name in profiles}
    config = {"profiles": hashes, "audio": args.audio, "hyp": {name: str(path) for name, path in others.items()}}
    inputs = [path for folder in folders for path in set_files(folder)]
    stage = nim4.stage.StageOutput(
        args.out, config=config, inputs=[*inputs, table.score_folder(args.score), *manifests.values(), *others.values(), REPORTED]
    )
    if stage.is_done():
        return
    records = table.read_rows([args.score])
    metric = metric_of(records, others)
    sets = clips.with_others(clips.by_test_set([read_set(folder) for folder in folders], metric), others)
    profiles = ["phones"] if metric == "PER" else profiles
    scored = [[clips.score_set(systems, metric, profile, args.jobs) for profile in profiles] for systems in sets.values()]
    cuts: dict[tuple[str, str], MonoCut] = {(name, cut.id): cut for name in sets if name in manifests for cut in load_cuts(manifests[name])}
    languages = {key: cut.supervisions[0].language for key, cut in cuts.items() if cut.supervisions[0].language}
    work = stage.begin()
    ids = [(name, ref.id) for name, systems in sets.items() for ref in systems[0].refs]
    audio = clip_audio.clip_audio(cuts, ids, [f"{place:06d}" for place in range(len(ids))], work, args.audio, args.jobs)
    title = "/".join(args.out.resolve().parts[-3:-1])
    tables = reported.as_tables(REPORTED, reported.measured_in(records))
    page.write_page(work, page.report_of(title, scored, records, languages, tables), page.clips_with_audio(scored, audio, languages))
    stage.finish(clips=len(ids), without_audio=sum(one.missing is not None for one in audio))
    nim4.stage.log.info("%s: open it in a browser", args.out / "index.html")


if __name__ == "__main__":
    nim4.stage.run(main, "report")
