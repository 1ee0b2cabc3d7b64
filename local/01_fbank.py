#!/usr/bin/env python3
"""Stage 1: 80-bin log-Mel features of every manifest, and their global mean and variance.

Writes into --out: `<split>.jsonl.gz` (the cuts, now with features), `feats/<split>/NNNNN.lca` (lilcom archives of about 15 minutes of
audio), `cmvn.json`, `unreadable.jsonl` (audio that could not be read: id, split, path, error) and `done.json`. The archives do not
depend on how many processes made them. With --executor the work goes to the workers of a Dask cluster, which must see the same files
under the same paths.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
from nim4 import stage
from nim4.config import RecipeError, nearest
from nim4.corpus import feats, manifest
from nim4.corpus.progress import Progress

log = logging.getLogger("nim4")

SHARD_S = 900.0  # audio per archive
SPEEDS = (0.9, 1.1)
MAX_UNREADABLE = 0.5  # of a split


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--manifests", type=Path, required=True, help="folder that stage 0 wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the features")
    parser.add_argument("--cmvn-splits", default="train", help="training splits, in quotes, for cmvn.json; none: no cmvn.json")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes")
    parser.add_argument("--executor", default="", help="address of a Dask scheduler, e.g. tcp://host:8786; empty: processes on this machine")
    parser.add_argument("--speed-perturb", choices=("true", "false"), default="false", help="add copies of --cmvn-splits at speeds 0.9 and 1.1")
    return parser


@contextmanager
def workers(jobs: int, address: str) -> Iterator[Executor | None]:
    """Where shards are computed: a Dask cluster, a pool of processes, or None for this process."""
    if address:
        try:
            from distributed import Client
        except ImportError as error:
            raise RecipeError("--executor", expected="the package distributed", found=error, fix="pip install distributed") from error
        try:
            client = Client(address, timeout=10)
        except (OSError, ValueError, TimeoutError) as error:
            raise RecipeError(f"--executor {address}", expected="a Dask scheduler", found=error, fix="start one, or leave the option out") from error
        with client, client.get_executor(pure=False) as pool:
            check_cluster(client)
            yield pool
    elif jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:  # spawn would import torch again in each
            yield pool
    else:
        yield None


def check_cluster(client: Any) -> None:
    """Makes sure that the workers can import this repository. Raises RecipeError otherwise."""
    try:
        answers = client.run(exec, "import nim4.corpus.feats")
    except ImportError as error:
        raise RecipeError("--executor", expected="nim4 on the workers", found=error, fix="start them with this checkout in PYTHONPATH") from error
    log.info("Dask cluster: %s", f"{len(answers)} workers" if answers else "no workers yet, waiting for them")


def sped_up(cuts: Sequence[Any]) -> list[Any]:
    """The cuts, then their copies at each speed, with ids such as sp0.9-<id>."""
    copies = [cut.perturb_speed(speed, affix_id=False).with_id(f"sp{speed}-{cut.id}") for speed in SPEEDS for cut in cuts]
    return [*cuts, *copies]


def shards(cuts: Sequence[Any]) -> list[list[Any]]:
    """The cuts in order, in groups of about SHARD_S seconds."""
    groups: list[list[Any]] = []
    filled_s = SHARD_S
    for cut in cuts:
        if filled_s >= SHARD_S:
            groups.append([])
            filled_s = 0.0
        groups[-1].append(cut)
        filled_s += cut.duration
    return groups


def extract(tasks: Sequence[tuple[str, Path, list[Any]]], jobs: int, address: str) -> list[feats.Shard]:
    """The shards of all splits, in the order of `tasks`: (split, archive, cuts)."""
    progress = Progress("features", sum(cut.duration for _, _, cuts in tasks for cut in cuts) / 3600, "hours")
    made: dict[int, feats.Shard] = {}
    futures: dict[Future, int] = {}
    with workers(min(jobs, len(tasks)), address) as pool:
        try:
            if pool is None:
                for number, (_, archive, cuts) in enumerate(tasks):
                    made[number] = feats.extract_shard(cuts, archive)
                    progress.add(made[number].audio_s / 3600)
            else:
                futures = {pool.submit(feats.extract_shard, cuts, archive): number for number, (_, archive, cuts) in enumerate(tasks)}
                for future in as_completed(futures):
                    made[futures[future]] = future.result()
                    progress.add(future.result().audio_s / 3600)
        except BrokenProcessPool as error:
            raise RecipeError(
                "stage 1", expected="all processes to live", found="one was killed, perhaps for memory", fix="use fewer --jobs"
            ) from error
        finally:
            for future in futures:
                future.cancel()  # after an error: what has not begun never will
    return [made[number] for number in range(len(tasks))]


def read_manifests(folder: Path, cmvn_splits: Sequence[str], speed_perturb: bool) -> dict[str, list[Any]]:
    """Cuts per split. Raises RecipeError when a split that is named does not exist."""
    paths = manifest.split_paths(folder)
    for split in cmvn_splits:
        if split not in paths:
            raise RecipeError(f"--cmvn-splits {split}", expected=f"a manifest in {folder}", found="none", fix=nearest(split, list(paths)))
    splits = {split: list(manifest.load_cuts(path)) for split, path in paths.items()}
    return {split: sped_up(cuts) if speed_perturb and split in cmvn_splits else cuts for split, cuts in splits.items()}


def save_split(split: str, made: Sequence[feats.Shard], work: Path) -> list[dict[str, str]]:
    """Writes one manifest with features; the utterances that could not be read. Raises RecipeError if they are the most."""
    cuts = [cut for shard in made for cut in shard.cuts]
    unreadable = [{"split": split, **row} for shard in made for row in shard.unreadable]
    if not cuts or len(unreadable) > MAX_UNREADABLE * (len(cuts) + len(unreadable)):
        found = f"{len(unreadable)} of {len(cuts) + len(unreadable)} unreadable; first: {unreadable[0]['path']}: {unreadable[0]['error']}"
        raise RecipeError(f"split {split!r}", expected="readable audio", found=found, fix="check that the corpus is still where stage 0 found it")
    manifest.save_cuts(cuts, work / f"{split}{manifest.SUFFIX}")
    return unreadable


def main() -> None:
    args = build_parser().parse_args()
    cmvn_splits = args.cmvn_splits.split()
    if args.jobs < 1:
        raise RecipeError("--jobs", expected="at least 1", found=args.jobs, fix="correct the option")
    config = {"cmvn_splits": cmvn_splits, "speed_perturb": args.speed_perturb}
    output = stage.StageOutput(args.out, config=config, inputs=[args.manifests])
    if output.is_done():
        return
    splits = read_manifests(args.manifests, cmvn_splits, args.speed_perturb == "true")
    work = output.begin().resolve()
    tasks = []
    for split, cuts in splits.items():
        (work / "feats" / split).mkdir(parents=True)
        tasks += [(split, work / "feats" / split / f"{number:05d}.lca", group) for number, group in enumerate(shards(cuts))]
    made = extract(tasks, args.jobs, args.executor)
    by_split = {split: [shard for task, shard in zip(tasks, made, strict=True) if task[0] == split] for split in splits}
    unreadable = [row for split in splits for row in save_split(split, by_split[split], work)]
    stage.write_jsonl(work / "unreadable.jsonl", unreadable)
    if cmvn_splits:
        feats.Cmvn.merge([shard.cmvn for split in dict.fromkeys(cmvn_splits) for shard in by_split[split]]).save(work / "cmvn.json")
    hours = {split: round(sum(shard.audio_s for shard in by_split[split]) / 3600, 4) for split in splits}
    for split in splits:
        lost = sum(row["split"] == split for row in unreadable)
        log.info("%-18s %8d utterances, %8.2f hours, %d unreadable", split, sum(len(shard.cuts) for shard in by_split[split]), hours[split], lost)
    output.finish(hours=hours, unreadable=len(unreadable))
    if unreadable:
        log.warning("%d utterances could not be read; they are listed in %s", len(unreadable), args.out / "unreadable.jsonl")


if __name__ == "__main__":
    stage.run(main, "fbank")
