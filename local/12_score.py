"""Stage 12: scores every (decode config, test set) of stage 11.

Reads `<config>/<test set>/{refs,hyps,events}.jsonl` below --decode and writes below --out:
- `records.jsonl`: one object per config, test set and metric: the rate with its 95 % interval, counts, speed, latency, and where it all came from;
- `<config>/<test set>/utts-<METRIC>.jsonl`: units and errors of each utterance, for paired comparisons (utils/compare.py);
- `<config>/<test set>/{errs,recogs}-<METRIC>.txt`: error lists in icefall's layout.

PER is always counted; the word metric where a config gives words. A hypothesis that is missing, failed or empty counts as deletions.
A set in which nothing is said has no error rate, and no record: its utts file holds what was made up.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.hotword_list import default_jobs
from nim4.score import table
from nim4.score.decoded import DecodedSet, find_sets, read_set, set_files
from nim4.score.error_stats import error_stats, recogs
from nim4.score.normalising import normalised, score_normalised
from nim4.score.profiles import PROFILES, profile_hash, profile_of
from nim4.score.record import make_record, utterances_path, write_utterances

log = logging.getLogger("nim4")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--decode", type=Path, required=True, help="product of stage 11, exp/<corpus>/<tag>/11_decode")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, exp/<corpus>/<tag>/12_score")
    parser.add_argument("--metric", choices=("mer", "cer", "wer"), default="mer", help="word metric: mixed units, characters, or words")
    parser.add_argument("--profile", choices=PROFILES, default="plain", help="what texts go through first, see nim4/score/profiles.py")
    return parser


def score_set(decoded: DecodedSet, metrics: list[str], profile: str, work: Path) -> list[dict[str, Any]]:
    """The records of one config and test set; its lists of errors are written below `work`."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], nim4.stage.ROOT), *sys.argv[1:]])
    records = []
    refs, (hyps,) = normalised(decoded.refs, [decoded.hyps], profile, num_processes=default_jobs())
    for metric in metrics:
        has_units, units = (decoded.has_phones, "phonemes") if metric == "PER" else (decoded.has_text, "words")
        if not has_units and any(hyp.error is None for hyp in decoded.hyps.values()):
            log.info("%s/%s: no %s, so no %s", decoded.config, decoded.test_set, units, metric)
            continue
        scored = score_normalised(refs, hyps, metric, profile)
        path = utterances_path(work, decoded.config, decoded.test_set, metric)
        write_utterances(path, scored)
        if not any(utt.ref for utt in scored) and not any(ref.text.strip() for ref in decoded.refs):
            made_up = sum(bool(utt.hyp) for utt in scored)
            log.info("%s/%s: nothing is said there, so no %s; output for %d of %d", decoded.config, decoded.test_set, metric, made_up, len(scored))
            continue
        records.append(make_record(decoded, metric, scored, profile=profile, command=command))
        for name, lines in (("errs", error_stats(metric, scored)), ("recogs", recogs(scored))):
            with nim4.stage.atomic_write(path.with_name(f"{name}-{metric}.txt")) as file:
                file.writelines(f"{line}\n" for line in lines)
    return records


def main() -> None:
    args = build_parser().parse_args()
    folders = find_sets(args.decode)
    metrics = ["PER", args.metric.upper()]
    hashes = {metric: profile_hash(profile_of(metric, args.profile)) for metric in metrics}
    inputs = [path for folder in folders for path in set_files(folder)]
    stage = nim4.stage.StageOutput(args.out, config={"profile": args.profile, "profile_hash": hashes}, inputs=inputs)
    if stage.is_done():
        return
    work = stage.begin()
    records = []
    for folder in folders:
        records += score_set(read_set(folder), metrics, args.profile, work)
    if not records:
        raise RecipeError(args.decode, expected="a test set in which something is said", found="none", fix="check the texts of the test sets")
    nim4.stage.write_jsonl(work / "records.jsonl", records)
    stage.finish(num_records=len(records))
    for line in table.as_text(table.make_blocks(table.read_rows([args.out]))).splitlines():
        if line:
            log.info("%s", line)


if __name__ == "__main__":
    nim4.stage.run(main, "score")
