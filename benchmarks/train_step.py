#!/usr/bin/env python3
"""Speed of stage 3's training step on batches of like length against random batches of a fixed size, with CR-CTC and with plain CTC.

Both kinds of batches hold the same utterances, and as many per batch on average; `bucketed` are those of stage 3 (lhotse's dynamic
buckets), `random` are padded to their longest utterance. Frames count once, without padding, though CR-CTC runs two views of each.
Batches are read before the clock starts: what is timed is warp, masks, both passes, clipping and the optimiser. Random weights.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch
from common import SEED, median_ratio, parser_for, publish, take_turns

import nim4.stage
from nim4.config import PretrainConfig, RecipeError, load, read_yaml
from nim4.corpus.batch import Batch, Source, TrainBatches, collate, phone_batches
from nim4.corpus.manifest import load_cuts, save_cuts
from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import with_vocab_size
from nim4.model.ctc import PhonemeModel
from nim4.stage import ROOT
from nim4.train.cr_ctc import cr_ctc
from nim4.train.distributed import Processes, processes
from nim4.train.loop import Trainer

FRAMES_PER_S = 100


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--model-config", type=Path, default=ROOT / "local/conf/model/mini.yaml", help="size of the model")
    parser.add_argument("--train-config", type=Path, default=ROOT / "local/conf/train/mini.yaml", help="its section `pretrain` is used")
    manifests = [ROOT / "data/mini/units/train_phrases.jsonl.gz"]
    parser.add_argument("--manifest", type=Path, nargs="+", default=manifests, help="training manifests of stage 2")
    parser.add_argument("--minutes", type=float, default=4.0, help="audio per round, drawn from the manifests, in minutes")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    return parser


def draw_cuts(manifests: Sequence[Path], minutes: float) -> list:
    """Utterances of `minutes` in all, in random order."""
    for path in manifests:
        if not path.is_file():
            raise RecipeError(path, expected="a manifest of stage 2", found="no such file", fix="make those of egs/mini: ./run.sh --stop-stage 2")
    cuts = sorted((cut for path in manifests for cut in load_cuts(path)), key=lambda cut: cut.id)
    random.Random(SEED).shuffle(cuts)
    ends_s = itertools.accumulate(cut.duration for cut in cuts)
    drawn = [cut for cut, end_s in zip(cuts, ends_s, strict=True) if end_s <= 60 * minutes]
    if len(drawn) < 2:
        raise RecipeError("--minutes", expected="room for at least 2 utterances", found=minutes, fix="name a larger number")
    return drawn


def bucketed_batches(cuts: list, inventory: PhonemeInventory, config: PretrainConfig, folder: Path) -> TrainBatches:
    """Stage 3's own batches of `cuts`, after the epochs that go from short to long."""
    save_cuts(cuts, folder / "train.jsonl.gz")
    settings = replace(config.train, accum=1, seed=SEED, num_workers=0, short_first_epochs=0)
    return TrainBatches([Source(folder / "train.jsonl.gz")], phone_batches(inventory), settings)


def epoch_pass(trainer: Trainer, batches: Sequence[Batch]) -> Callable[[], None]:
    """One training step per batch; every pass draws other chunk contexts and masks, the same ones for every kind of batches."""
    first_steps = itertools.count(0, 1000)

    def run() -> None:
        trainer.step = next(first_steps)
        for batch in batches:
            if "skipped" in trainer._train_step(trainer.model, [batch]):
                raise RecipeError("training step", expected="a finite loss", found="none", fix="correct --train-config or --manifest")
            trainer.step += 1

    return run


def make_trainer(config: PretrainConfig, cr_weight: float, batches: TrainBatches, peers: Processes, work: Path) -> Trainer:
    """A trainer with random weights and the loss of stage 3."""
    torch.manual_seed(SEED)
    train = replace(config.train, cr_weight=cr_weight)
    model = PhonemeModel(config.model).to(peers.device).train()
    return Trainer(model, cr_ctc(model.mean, train), batches, train, work, peers, evaluate=dict)


def make_rows(name: str, kinds: dict[str, list[Batch]], seconds: dict[tuple[str, str], list[float]]) -> list[dict]:
    """The table's lines of one loss; the first kind of batches is what the others are compared with."""
    rows, first = [], seconds[name, next(iter(kinds))]
    for kind, batches in kinds.items():
        frames = sum(int(batch.x_lens.sum()) for batch in batches)
        padded = sum(batch.x.shape[0] * batch.x.shape[1] for batch in batches)
        speed = frames / statistics.median(seconds[name, kind])
        rows.append(
            {
                "loss": name,
                "batches": kind,
                "utterances_per_batch": sum(len(batch.ids) for batch in batches) / len(batches),
                "padding_share": 1 - frames / padded,
                "frames_per_s": speed,
                "audio_s_per_s": speed / FRAMES_PER_S,
                "speed_to_random": median_ratio(first, seconds[name, kind]),
            }
        )
    return rows


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    values = {"model": read_yaml(args.model_config), **read_yaml(args.train_config).get("pretrain", {})}
    config = load(PretrainConfig, values, [], f"{args.model_config} + {args.train_config}")
    cuts = draw_cuts(args.manifest, args.minutes)
    inventory = PhonemeInventory.load(args.manifest[0].parent / "tokens.txt")
    config = replace(config, model=with_vocab_size(config.model, inventory))
    with tempfile.TemporaryDirectory() as folder, processes(args.device) as peers:
        source = bucketed_batches(cuts, inventory, config, Path(folder))
        bucketed = [step[0] for _, _, step in itertools.takewhile(lambda step: step[0] == 0, source.steps())]
        size = round(len(cuts) / len(bucketed))
        kinds = {"random": [collate(cuts[start : start + size], inventory) for start in range(0, len(cuts), size)], "bucketed": bucketed}
        ways = {}
        for name, cr_weight in (("CR-CTC", config.train.cr_weight or 0.2), ("plain CTC", 0.0)):
            trainer = make_trainer(config, cr_weight, source, peers, Path(folder))
            for kind, batches in kinds.items():
                epoch_pass(trainer, batches[:1])()  # memory and kernels are set up before the clock starts
                ways[name, kind] = epoch_pass(trainer, batches)
        seconds = take_turns(ways, args.rounds)
        rows = [row for name in ("CR-CTC", "plain CTC") for row in make_rows(name, kinds, seconds)]
        minutes = sum(cut.duration for cut in cuts) / 60
        manifests = " ".join(os.path.relpath(path, ROOT) for path in args.manifest)
        data = f"{len(cuts)} utterances, {minutes:.1f} min of {manifests}, {args.model_config.stem} model"
        publish(args, __doc__.split("\n")[0], data, rows, peers.device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
