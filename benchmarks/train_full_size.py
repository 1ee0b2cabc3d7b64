#!/usr/bin/env python3
"""Training steps of the paper's size on one GPU, stage by stage, against a padded Hugging Face loop on the same utterances.

Random weights of the true shape, noise as features, random ids, lengths from lengths.tsv. `ours` is the training loop of the stages with
compiled blocks: batches of like length, output layer on the answers alone, no attention mask. `naive` is the same optimiser, precision,
augmentation, encoder and number of utterances per step, in random order, in the fewest micro-batches that fit (from 2 on): padded to the
longest, under an attention mask, logits of all positions through `model(inputs_embeds, attention_mask, labels)`, blocks not compiled.
Stage 8 times one whole step of GRPO per round, its answers as long as the transcripts, blocks not compiled: `ours` samples the group of 8
from one read prompt and trains on that; `naive` is 8 times `generate` and 8 passes over whole rows, for each micro-batch (from 1 on).
Its tokens per second count the prompts once, each sampled token, and each token of the update; the reference's count in MFU only.
MFU counts the operations that real frames and tokens need (model_flops in full_size.py) against a bf16 matrix product of 8192 timed in
the same run. Batches are made before the clock starts. In fp32, the 2.36 G weights, their gradients and AdamW's states take 38 GB, the
reference of stage 8 another 9; where the rest of 80 GB is too little for a step of ours, it is cut into 2, 4 or 8 micro-batches.
The record is kept after each stage; one that does not fit, or fails, does not stop the others.
"""

import argparse
import functools
import gc
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch
from common import SEED, keep, make_record, median_ratio, parser_for, take_turns
from full_size import FRAMES_PER_S, RandomBatches, llm_tokens, make_cuts, make_model, model_flops, read_lengths, tokens_in_rows
from full_size_grpo import RewardBatches, grpo_ways
from torch import Tensor, nn

import nim4.stage
from nim4.config import AugmentConfig, GrpoConfig, GrpoTrainConfig, OptimConfig, RecipeError, SftConfig, TrainConfig
from nim4.corpus.batch import Source, TextBatch, TrainBatches
from nim4.corpus.manifest import save_cuts
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context, valid_mask
from nim4.report.benchmarks import as_markdown
from nim4.train.cr_ctc import cr_ctc
from nim4.train.distributed import Processes, processes
from nim4.train.loop import Loss, Trainer
from nim4.train.roles import ROLES, assign_roles
from nim4.train.sft import sft_loss
from nim4.train.speed import as_written

log = logging.getLogger("nim4")
STAGES = {3: "pretrain", 4: "align", 5: "ia_sft", 6: "joint_sft", 7: "context_sft", 8: "grpo"}
LENGTHS = Path(__file__).with_name("lengths.tsv")
COPIES = 20  # utterances of each length: in a long training nearly all batches are full
MICRO_BATCHES = (1, 2, 4, 8)  # per step, the fewest that fit


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="ci: a tiny model on few utterances, to see that it runs")
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES), help="training stages")
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="utterances: seconds, ids of the transcript")
    parser.add_argument("--batch-s", type=float, default=640.0, help="padded audio per training step, in seconds")
    parser.add_argument("--grpo-batch-s", type=float, default=80.0, help="the same in stage 8; 80 is that of local/conf/train/nim4.yaml")
    parser.add_argument("--steps", type=int, default=3, help="training steps per round; stage 8 has one")
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
        out = self.model.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels.to(embeds.device), use_cache=False)
        return out.loss * sum(map(len, answers)), lens.new_zeros(())


# the steps of a round, each a list of micro-batches
Steps = list[list[TextBatch]]


@dataclass(frozen=True)
class Work:
    """The utterances of one round.

    Attributes:
        ours: their steps as the stages make them.
        cuts: all of them in random order, for the padded loop.
    """

    ours: Steps
    cuts: list

    def naive(self, make: RandomBatches, num_micro_batches: int) -> Steps:
        """As many steps as `ours`, in the random order."""
        size = -(-len(self.cuts) // (num_micro_batches * len(self.ours)))
        batches = [make(self.cuts[start : start + size], 0) for start in range(0, len(self.cuts), size)]
        return [batches[start : start + num_micro_batches] for start in range(0, len(batches), num_micro_batches)]


@dataclass(frozen=True)
class Rounds:
    """Makes the rounds of work of a stage.

    Attributes:
        manifest: the utterances.
        batch_s: padded audio per step of ours, in seconds.
        steps: per round.
    """

    manifest: Path
    make: RandomBatches
    batch_s: float
    steps: int
    rounds: int

    def batches(self, num_micro_batches: int) -> TrainBatches:
        """Where our steps' batches come from, as in the stages."""
        settings = replace(SftConfig(), max_duration_s=self.batch_s / num_micro_batches, seed=SEED, num_buckets=50, num_workers=0)
        return TrainBatches([Source(self.manifest)], self.make, replace(settings, short_first_epochs=0))

    def works(self, num_micro_batches: int) -> Iterator[Work]:
        """The rounds; the batches of each are spread over all lengths, as those of a long training are."""
        drawn = (cuts for _, cuts in self.batches(num_micro_batches)._own_cuts(0, 0))
        epoch = sorted(drawn, key=lambda cuts: statistics.mean(cut.duration for cut in cuts))
        num_batches = self.steps * num_micro_batches
        if len(epoch) < num_batches:
            expected = f"at most {len(epoch) // num_micro_batches}, the steps of an epoch"
            raise RecipeError("--steps", expected=expected, found=self.steps, fix="lower it, or --batch-s")
        for number in range(self.rounds):
            rng = random.Random(f"{SEED} {number}")
            chosen = [rng.choice(epoch[len(epoch) * i // num_batches : len(epoch) * (i + 1) // num_batches]) for i in range(num_batches)]
            rng.shuffle(chosen)
            cuts = [cut for batch in chosen for cut in batch]
            rng.shuffle(cuts)
            yield Work([[self.make(list(batch), 0) for batch in chosen[step :: self.steps]] for step in range(self.steps)], cuts)


@dataclass(frozen=True)
class Contest:
    """How the two ways of a stage train; each takes the micro-batches of a step.

    Attributes:
        ours, naive: the trainer of each, which share model and optimiser, and its function.
        least_naive: micro-batches per step of the padded loop, at least: large ones pad more.
    """

    ours: tuple[Trainer, Callable[[list[TextBatch]], dict[str, float]]]
    naive: tuple[Trainer, Callable[[list[TextBatch]], dict[str, float]]]
    least_naive: int


def make_contest(model: SpeechLlm, stage: str, args: argparse.Namespace, batches: TrainBatches, peers: Processes, work: Path) -> Contest:
    """The training loops of a stage, with its loss and what trains in it."""
    common = {"learning_rate": 1e-7, "precision": "bf16" if peers.device.type == "cuda" else "fp32", "compile": args.compile == "true"}

    def trainer_of(trained: nn.Module, loss: Loss, config: OptimConfig) -> Trainer:
        if stage != "pretrain":
            assign_roles(trained, ROLES[stage], model.config.llm)
        return Trainer(trained.train(), loss, batches, config, work, peers, evaluate=dict)

    model.requires_grad_(True)
    if stage == "grpo":
        config = GrpoConfig(train=GrpoTrainConfig(**common | {"compile": False}))
        trainer, plain = grpo_ways(model, config, lambda policy, loss: trainer_of(policy, loss, config.train))
        return Contest((trainer, functools.partial(trainer._train_step, trainer.model)), (plain.trainer, plain.train), least_naive=1)
    if stage == "pretrain":
        config = TrainConfig(**common)
        trainer, padded = trainer_of(model.acoustic, cr_ctc(model.acoustic.mean, config), config), model.acoustic
    else:
        config = SftConfig(**common, augment=AugmentConfig(time_mask_ratio=1.0))
        trainer, padded = trainer_of(model, sft_loss(model.acoustic.mean, config), config), PaddedLoop(model)
    ours, naive = (functools.partial(trainer._train_step, one) for one in (trainer.model, padded))
    return Contest((trainer, ours), (trainer, naive), least_naive=2)


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


@dataclass
class Way:
    """One way of training in a stage.

    Attributes:
        trainer: with the loss and the optimiser.
        train: trains on the micro-batches of a step.
        rounds: what it trains on.
        peak: the memory it used.
    """

    name: str
    trainer: Trainer
    train: Callable[[list[TextBatch]], dict[str, float]]
    rounds: list[Steps]
    peak: Peak = field(init=False)

    def __post_init__(self):
        self.peak = Peak(self.trainer.processes.device)

    @property
    def is_compiled(self) -> bool:
        return self.name == "ours" and self.trainer.config.compile

    def run(self, number: int) -> None:
        """Trains on a round, and returns when the GPU is done. Both ways draw the same contexts."""
        self.trainer.step = 1000 * number
        with self.peak, nullcontext() if self.is_compiled else as_written(self.trainer.model):
            for micro_batches in self.rounds[number]:
                if "skipped" in self.train(micro_batches):
                    raise RecipeError("training step", expected="a finite loss", found="none", fix="run it again with another --batch-s")
                self.trainer.step += 1
            wait(self.peak.device)

    def turns(self) -> Callable[[], None]:
        """A function that trains on one round after the other."""
        numbers = itertools.cycle(range(len(self.rounds)))
        return lambda: self.run(next(numbers))

    def fits(self) -> bool:
        """Trains before the clock starts, which compiles and asks for memory, on the largest batches; False = there is too little of that."""
        largest = [max(batch.x.shape[0] * batch.x.shape[1] for batch in itertools.chain(*steps)) for steps in self.rounds]
        started_s, by_size = time.perf_counter(), sorted(range(len(largest)), key=lambda number: -largest[number])
        try:
            for number in by_size[: 2 if self.is_compiled else 1]:
                self.run(number)
        except torch.OutOfMemoryError:
            self.trainer.optimizer.zero_grad(set_to_none=True)
            return False
        finally:
            print(f"{self.name}: {time.perf_counter() - started_s:.0f} s before the clock starts", file=sys.stderr, flush=True)
            free_memory()
        return True


def free_memory() -> None:
    """Returns what nobody uses to the GPU: a failed step leaves cycles behind that hold much of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def both_ways(contest: Contest, rounds: Rounds) -> list[Way]:
    """Ours and the padded loop on the same utterances, each in as few micro-batches per step as fit; without the one that never does."""
    for number in MICRO_BATCHES:
        works = list(rounds.works(number))
        ours = Way("ours", *contest.ours, [work.ours for work in works])
        if ours.fits():
            break
    else:
        return []
    for number in (contest.least_naive * count for count in MICRO_BATCHES):
        naive = Way("naive", *contest.naive, [work.naive(rounds.make, number) for work in works])
        if naive.fits():
            return [ours, naive]
    return [ours]


COLUMNS = ("audio_s_per_s", "llm_tokens_per_s", "tflop_per_s", "mfu_percent", "padding_percent", "micro_batches", "peak_memory_gb", "speed_to_naive")


def measure(model: SpeechLlm, number: int, ways: Sequence[Way], num_rounds: int, peak_tflops: float) -> list[dict]:
    """The table's lines of one stage; a way that has not fit into the memory has one that says so."""
    stage = STAGES[number]
    seconds = take_turns({way.name: way.turns() for way in ways}, num_rounds) if ways else {}
    rows = []
    for name in ("ours", "naive"):
        way = next((way for way in ways if way.name == name), None)
        row = {"stage": f"{number} {stage}", "way": name if way else f"{name}: out of memory"}
        if way is None:
            rows.append(row | dict.fromkeys(COLUMNS, "-"))
            continue
        batches = [list(itertools.chain(*steps)) for steps in way.rounds]
        audio_s = [sum(float(batch.x_lens.sum()) / FRAMES_PER_S for batch in round_) for round_ in batches]
        tokens = [sum(llm_tokens(model, stage, batch) for batch in round_) for round_ in batches]
        tflop = [sum(model_flops(model, stage, batch) for batch in round_) / 1e12 for round_ in batches]
        real, padded = zip(*(tokens_in_rows(model, stage, batch, apart=name == "ours") for round_ in batches for batch in round_), strict=True)
        rate, per_s, tokens_per_s = (statistics.median(a / s for a, s in zip(sums, seconds[name], strict=True)) for sums in (tflop, audio_s, tokens))
        numbers = (
            per_s,
            "-" if stage == "pretrain" else tokens_per_s,
            rate,
            100 * rate / peak_tflops,
            100 * (1 - sum(real) / sum(padded)),
            max(len(micro_batches) for steps in way.rounds for micro_batches in steps),
            way.peak.gb,
            median_ratio(seconds["naive"], seconds[name]) if "naive" in seconds else "-",
        )
        rows.append(row | dict(zip(COLUMNS, numbers, strict=True)))
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def profile(way: Way) -> None:
    """Prints the kernels of one round that take longest."""
    with torch.profiler.profile() as seen:
        way.run(0)
    by = "self_device_time_total" if way.peak.device.type == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80), file=sys.stderr, flush=True)


def run_stage(number: int, model: SpeechLlm, args: argparse.Namespace, peers: Processes, folder: Path, peak_tflops: float) -> list[dict]:
    """The table's lines of one stage, from a fresh optimiser and compiler."""
    torch.compiler.reset()  # else variants of a block from other stages could use up how often it may be compiled
    if number == 8:
        rounds = Rounds(folder / "train.jsonl.gz", RewardBatches(model), args.grpo_batch_s, 1, args.rounds)
    else:
        make = RandomBatches(model, args.hint_tokens if number == 7 else 0)
        rounds = Rounds(folder / "train.jsonl.gz", make, args.batch_s, args.steps, args.rounds)
    contest = make_contest(model, STAGES[number], args, rounds.batches(1), peers, folder)
    ways = both_ways(contest, rounds)
    rows = measure(model, number, ways, args.rounds, peak_tflops)
    if args.profile and ways:
        profile(ways[0])
    return rows


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    lengths = read_lengths(args.lengths)
    lengths = COPIES * lengths if args.size == "full" else [row for row in lengths if row.audio_s < 4][:40]
    rows, kept, failed = [], None, []
    with tempfile.TemporaryDirectory() as folder, processes(args.device) as peers:
        model = make_model(args.size, peers.device)
        peak_tflops = matmul_tflops(peers.device)
        print(f"matrix product: {peak_tflops:.0f} TFLOP/s", file=sys.stderr, flush=True)
        save_cuts(make_cuts(lengths), Path(folder) / "train.jsonl.gz")
        drawn = "the lengths of lengths.tsv" if args.lengths == LENGTHS else str(args.lengths)
        work = f"{args.steps} steps of {args.batch_s:g} s of padded audio per round, in stage 8 one of {args.grpo_batch_s:g} s"
        for number in args.stages:
            try:
                rows += run_stage(number, model, args, peers, Path(folder), peak_tflops)
            except RecipeError as error:
                log.error("stage %d: %s", number, error)
                failed.append(number)
            except torch.OutOfMemoryError:  # among the timed rounds
                rows += measure(model, number, [], args.rounds, peak_tflops)
            except Exception:  # told and counted: a fault in one stage shall not cost the others their minutes on a GPU
                log.exception("stage %d", number)
                failed.append(number)
            model.zero_grad(set_to_none=True)
            free_memory()
            if rows:  # killed, it leaves the stages before
                size = f"{drawn}, {work}, matrix product {peak_tflops:.0f} TFLOP/s"
                record = make_record(args, __doc__.split("\n")[0], size, rows, peers.device)
                keep(args, record, instead_of=kept)
                kept = record
        if kept:
            print(as_markdown(kept))
    if failed:
        found = f"stages {failed} that failed"
        raise RecipeError("--stages", expected="stages that run to their end", found=found, fix="see the errors above")


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
