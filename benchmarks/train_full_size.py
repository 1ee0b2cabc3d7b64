#!/usr/bin/env python3
"""Training steps of the paper's size on one GPU, stage by stage, against a padded Hugging Face loop on the same utterances.

Random weights of the true shape, noise as features, random ids, lengths from lengths.tsv. `ours` is the training loop of the stages with
compiled blocks: batches of like length, output layer on the answers alone, no attention mask. `naive` is the same optimiser, precision,
augmentation, encoder and number of utterances per step, in random order, in the fewest micro-batches that fit (from 2 on): padded to the
longest, under an attention mask, logits of all positions through `model(inputs_embeds, attention_mask, labels)`, blocks not compiled.
MFU counts the operations that real frames and tokens need (model_flops in full_size.py) against a bf16 matrix product of 8192 timed in
the same run. Batches are made before the clock starts.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch
from common import SEED, median_ratio, parser_for, publish, take_turns
from full_size import FRAMES_PER_S, RandomBatches, make_cuts, make_model, model_flops, read_lengths, row_lens
from torch import Tensor, nn

import nim4.stage
from nim4.config import AugmentConfig, RecipeError, SftConfig, TrainConfig
from nim4.corpus.batch import Source, TextBatch, TrainBatches
from nim4.corpus.manifest import save_cuts
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context, valid_mask
from nim4.train.cr_ctc import cr_ctc
from nim4.train.distributed import Processes, processes
from nim4.train.loop import Trainer
from nim4.train.roles import ROLES, assign_roles
from nim4.train.sft import sft_loss
from nim4.train.speed import as_written

STAGES = {3: "pretrain", 4: "align", 5: "ia_sft", 6: "joint_sft", 7: "context_sft"}
LENGTHS = Path(__file__).with_name("lengths.tsv")
WARM_ROUNDS = 2


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="ci: a tiny model on few utterances, to see that it runs")
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES), help="training stages")
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="utterances: seconds, ids of the transcript")
    parser.add_argument("--batch-s", type=float, default=640.0, help="padded audio per batch, in seconds")
    parser.add_argument("--steps", type=int, default=3, help="training steps per round")
    parser.add_argument("--hint-tokens", type=int, default=40, help="ids of hints in each prompt of stage 7")
    parser.add_argument("--compile", choices=("true", "false"), default="true", help="compiled blocks in `ours`, as by train.compile")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take longest in a step of `ours`")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product of random numbers; on a CPU of a small one in fp32."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        wait(device)
        started_s = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - started_s)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PaddedLoop(nn.Module):
    """What many training scripts do: whole padded rows, an attention mask, logits of all positions."""

    def __init__(self, model: SpeechLlm):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, x_lens: Tensor, suffixes: Sequence[list[int]], answers: Sequence[list[int]], context: Context
    ) -> tuple[Tensor, Tensor]:
        """As SpeechLlm.forward; the number of right ids is not counted."""
        embeds, labels, lens = self.model.rows(*self.model.speech(x, x_lens, context), suffixes, answers)
        mask = valid_mask(lens, embeds.shape[1]).long()
        out = self.model.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
        return out.loss * sum(map(len, answers)), lens.new_zeros(())


# the steps of a round, each a list of micro-batches
Steps = list[list[TextBatch]]


@dataclass(frozen=True)
class Work:
    """The utterances of one round.

    Attributes:
        ours: their steps as the stages make them, of one batch each.
        cuts: all of them in random order, for the padded loop.
    """

    ours: Steps
    cuts: list

    def naive(self, make: RandomBatches, num_micro_batches: int) -> Steps:
        """As many steps as `ours`, in the random order."""
        size = -(-len(self.cuts) // (num_micro_batches * len(self.ours)))
        batches = [make(self.cuts[start : start + size], 0) for start in range(0, len(self.cuts), size)]
        return [batches[start : start + num_micro_batches] for start in range(0, len(batches), num_micro_batches)]


def make_works(batches: TrainBatches, make: RandomBatches, num_steps: int, num_rounds: int) -> Iterator[Work]:
    """Rounds of work; the batches of each are spread over all lengths, as those of a long training are."""
    epoch = sorted((cuts for _, cuts in batches._own_cuts(0, 0)), key=lambda cuts: statistics.mean(cut.duration for cut in cuts))
    if len(epoch) < num_steps:
        raise RecipeError("--steps", expected=f"at most {len(epoch)}, the batches of an epoch", found=num_steps, fix="lower it, or --batch-s")
    for number in range(num_rounds):
        rng = random.Random(f"{SEED} {number}")
        chosen = [rng.choice(epoch[len(epoch) * i // num_steps : len(epoch) * (i + 1) // num_steps]) for i in range(num_steps)]
        rng.shuffle(chosen)
        cuts = [cut for batch in chosen for cut in batch]
        rng.shuffle(cuts)
        yield Work([[make(list(batch), 0)] for batch in chosen], cuts)


def make_trainer(model: SpeechLlm, stage: str, args: argparse.Namespace, batches: TrainBatches, peers: Processes, work: Path) -> Trainer:
    """The training loop of a stage, with its loss and what trains in it."""
    common = {"learning_rate": 1e-7, "precision": "bf16" if peers.device.type == "cuda" else "fp32", "compile": args.compile == "true"}
    model.requires_grad_(True)
    if stage == "pretrain":
        config, trained = TrainConfig(**common), model.acoustic
        loss = cr_ctc(model.acoustic.mean, config)
    else:
        assign_roles(model, ROLES[stage], model.config.llm)
        config, trained = SftConfig(**common, augment=AugmentConfig(time_mask_ratio=1.0)), model
        loss = sft_loss(model.acoustic.mean, config)
    return Trainer(trained.train(), loss, batches, config, work, peers, evaluate=dict)


class Peak:
    """Highest memory in use so far, of one way alone."""

    def __init__(self, device: torch.device):
        self.device, self.gb = device, 0.0

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.gb = max(self.gb, torch.cuda.max_memory_allocated(self.device) / 1e9)


def steps_of(trainer: Trainer, model: nn.Module, rounds: Sequence[Steps]) -> Callable[[], None]:
    """A function that trains on one round after the other, and returns when the GPU is done. Both ways draw the same contexts."""
    turns = itertools.cycle(enumerate(rounds))

    def run() -> None:
        number, steps = next(turns)
        trainer.step = 1000 * number
        for micro_batches in steps:
            if "skipped" in trainer._train_step(model, micro_batches):
                raise RecipeError("training step", expected="a finite loss", found="none", fix="run it again with another --batch-s")
            trainer.step += 1
        wait(trainer.processes.device)

    return run


def padding_percent(model: SpeechLlm, stage: str, rounds: Sequence[Steps]) -> float:
    """Share of tokens that are padding, in stage 3 of feature frames."""
    real = padded = 0
    for batch in (batch for steps in rounds for micro_batches in steps for batch in micro_batches):
        lens = batch.x_lens if stage == "pretrain" else row_lens(model, batch)
        real, padded = real + int(lens.sum()), padded + len(lens) * int(lens.max())
    return 100 * (1 - real / padded)


@dataclass
class Way:
    """One way of training in a stage.

    Attributes:
        trainer: with the loss and the optimiser, which the ways of a stage share.
        model: what the loss is given.
        rounds: what it trains on.
    """

    name: str
    trainer: Trainer
    model: nn.Module
    rounds: list[Steps]

    def __post_init__(self):
        self.peak = Peak(self.trainer.processes.device)

    def turns(self) -> Callable[[], None]:
        """A function that trains on one round after the other."""
        run = steps_of(self.trainer, self.model, self.rounds)

        def once() -> None:
            with self.peak, as_written(self.trainer.model) if self.name == "naive" else nullcontext():
                run()

        return once

    def fits(self) -> bool:
        """Trains on a few rounds before the clock starts, which compiles and asks for memory; False = there is too little of that."""
        started_s, run = time.perf_counter(), self.turns()
        try:
            for _ in self.rounds[:WARM_ROUNDS]:
                run()
        except torch.OutOfMemoryError:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return False
        finally:
            print(f"{self.name}: {time.perf_counter() - started_s:.0f} s before the clock starts", file=sys.stderr, flush=True)
            if self.peak.device.type == "cuda":
                torch.cuda.empty_cache()
        return True


def both_ways(model: SpeechLlm, trainer: Trainer, works: Sequence[Work], make: RandomBatches) -> list[Way]:
    """Ours and the padded loop, which gets as few micro-batches per step as fit into the memory, but 2: large ones pad more."""
    ways = [Way("ours", trainer, trainer.model, [work.ours for work in works])]
    if not ways[0].fits():
        raise RecipeError("--batch-s", expected="batches that fit into the memory of the GPU", found="too large ones", fix="lower it")
    for num_micro_batches in (2, 4, 8, 16):
        padded = trainer.model if trainer.model is model.acoustic else PaddedLoop(model)
        naive = Way("naive", trainer, padded, [work.naive(make, num_micro_batches) for work in works])
        if naive.fits():
            return [*ways, naive]
    raise RecipeError("--batch-s", expected="batches that the padded loop has memory for", found="too large ones", fix="lower it")


def measure(model: SpeechLlm, number: int, ways: Sequence[Way], num_rounds: int, peak_tflops: float) -> list[dict]:
    """The table's lines of one stage."""
    stage = STAGES[number]
    seconds = take_turns({way.name: way.turns() for way in ways}, num_rounds)
    batches = [[batch for micro_batches in steps for batch in micro_batches] for steps in ways[0].rounds]
    audio_s = statistics.median(sum(float(b.x_lens.sum()) / FRAMES_PER_S for b in round_) for round_ in batches)
    tokens = statistics.median(sum(float(row_lens(model, b).sum()) for b in round_) for round_ in batches)
    tflop = [sum(model_flops(model, stage, b) for b in round_) / 1e12 for round_ in batches]
    rows = []
    for way in ways:
        rate = statistics.median(work / s for work, s in zip(tflop, seconds[way.name], strict=True))
        median_s = statistics.median(seconds[way.name])
        rows.append(
            {
                "stage": f"{number} {stage}",
                "way": way.name,
                "audio_s_per_s": audio_s / median_s,
                "llm_tokens_per_s": "-" if stage == "pretrain" else tokens / median_s,
                "tflop_per_s": rate,
                "mfu_percent": 100 * rate / peak_tflops,
                "padding_percent": padding_percent(model, stage, way.rounds),
                "micro_batches": max(len(micro_batches) for steps in way.rounds for micro_batches in steps),
                "peak_memory_gb": way.peak.gb,
                "speed_to_naive": median_ratio(seconds["naive"], seconds[way.name]),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def profile(trainer: Trainer, work: Work) -> None:
    """Prints the kernels of one step that take longest."""
    with torch.profiler.profile() as seen:
        steps_of(trainer, trainer.model, [work.ours[:1]])()
    by = "self_device_time_total" if trainer.processes.device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80), file=sys.stderr, flush=True)


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    lengths = read_lengths(args.lengths)
    lengths = lengths if args.size == "full" else [row for row in lengths if row.audio_s < 4][:40]
    rows = []
    with tempfile.TemporaryDirectory() as folder, processes(args.device) as peers:
        model = make_model(args.size, peers.device)
        peak_tflops = matmul_tflops(peers.device)
        print(f"matrix product: {peak_tflops:.0f} TFLOP/s", file=sys.stderr, flush=True)
        save_cuts(make_cuts(lengths), Path(folder) / "train.jsonl.gz")
        settings = replace(SftConfig(), max_duration_s=args.batch_s, seed=SEED, num_buckets=20, num_workers=0, short_first_epochs=0)
        try:
            for number in args.stages:
                make = RandomBatches(model, args.hint_tokens if number == 7 else 0)
                batches = TrainBatches([Source(Path(folder) / "train.jsonl.gz")], make, settings)
                trainer = make_trainer(model, STAGES[number], args, batches, peers, Path(folder))
                works = list(make_works(batches, make, args.steps, args.rounds))
                ways = both_ways(model, trainer, works, make)
                rows += measure(model, number, ways, args.rounds, peak_tflops)
                if args.profile:
                    profile(trainer, works[0])
                del trainer, works, ways
        finally:  # interrupted, it tells what it has
            if rows:
                drawn = "the lengths of lengths.tsv" if args.lengths == LENGTHS else str(args.lengths)
                work = f"{args.steps} steps of {args.batch_s:g} s of padded audio per round"
                publish(args, __doc__.split("\n")[0], f"{drawn}, {work}, matrix product {peak_tflops:.0f} TFLOP/s", rows, peers.device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
