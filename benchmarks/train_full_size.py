#!/usr/bin/env python3
"""Training steps of the paper's size on one GPU, stage by stage, against a padded Hugging Face loop on the same utterances.

Random weights of the true shape, noise as features, random ids, lengths from lengths.tsv. `ours` is the training loop of the stages with
compiled blocks: batches of like length, output layer on the answers alone, no attention mask. `naive` is the same optimiser, precision,
augmentation and number of utterances per step, in two micro-batches of random order: padded to the longest, under an attention mask, logits
of all positions through `model(inputs_embeds, attention_mask, labels)`. MFU counts the operations that real frames and tokens need
(model_flops in full_size.py) against a bf16 matrix product of 8192 timed in the same run. Batches are made before the clock starts.
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
from full_size import RandomBatches, make_cuts, make_model, model_flops, read_lengths, row_lens
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
NAIVE_MICRO_BATCHES = 2  # per step: a whole step at once does not fit beside its full logits


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


@dataclass(frozen=True)
class Work:
    """The steps of one round, each a list of micro-batches; both hold the same utterances."""

    ours: list[list[TextBatch]]
    naive: list[list[TextBatch]]


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
        size = -(-len(cuts) // (NAIVE_MICRO_BATCHES * num_steps))
        naive = [make(cuts[start : start + size], 0) for start in range(0, len(cuts), size)]
        steps = [naive[start : start + NAIVE_MICRO_BATCHES] for start in range(0, len(naive), NAIVE_MICRO_BATCHES)]
        yield Work([[make(list(batch), 0)] for batch in chosen], steps)


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


def steps_of(trainer: Trainer, model: nn.Module, rounds: Sequence[list[list[TextBatch]]]) -> Callable[[], None]:
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


def padding_percent(model: SpeechLlm, stage: str, rounds: Sequence[list[list[TextBatch]]]) -> float:
    """Share of tokens that are padding, in stage 3 of feature frames."""
    real = padded = 0
    for batch in (batch for steps in rounds for micro_batches in steps for batch in micro_batches):
        lens = batch.x_lens if stage == "pretrain" else row_lens(model, batch)
        real, padded = real + int(lens.sum()), padded + len(lens) * int(lens.max())
    return 100 * (1 - real / padded)


def measure(model: SpeechLlm, number: int, trainer: Trainer, works: Sequence[Work], args: argparse.Namespace, peak_tflops: float) -> list[dict]:
    """The table's lines of one stage."""
    stage, device = STAGES[number], trainer.processes.device
    rounds = {"ours": [work.ours for work in works], "naive": [work.naive for work in works]}
    models = {"ours": trainer.model, "naive": trainer.model if stage == "pretrain" else PaddedLoop(model)}
    peaks = {way: Peak(device) for way in rounds}

    def in_turn(way: str) -> Callable[[], None]:
        run = steps_of(trainer, models[way], rounds[way])

        def once() -> None:
            with peaks[way], as_written(model) if way == "naive" else nullcontext():
                run()

        return once

    for way in rounds:  # compiles, and asks for memory, before the clock starts
        started_s, run = time.perf_counter(), in_turn(way)
        for _ in works[:WARM_ROUNDS]:
            run()
        print(f"stage {number}, {way}: warm after {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
    runs = {way: in_turn(way) for way in rounds}
    seconds = take_turns(runs, args.rounds)
    batches = [[batch for steps in work.ours for batch in steps] for work in works]
    audio_s = statistics.median(sum(float(b.x_lens.sum()) / 100 for b in round_) for round_ in batches)
    tokens = statistics.median(sum(float(row_lens(model, b).sum()) for b in round_) for round_ in batches)
    flops = [sum(model_flops(model, stage, b) for b in round_) for round_ in batches]
    rows = []
    for way in runs:
        rates = [flops[i % len(flops)] / s / 1e12 for i, s in enumerate(seconds[way])]
        median_s = statistics.median(seconds[way])
        rows.append(
            {
                "stage": f"{number} {stage}",
                "way": way,
                "audio_s_per_s": audio_s / median_s,
                "llm_tokens_per_s": "-" if stage == "pretrain" else tokens / median_s,
                "tflop_per_s": statistics.median(rates),
                "mfu_percent": 100 * statistics.median(rates) / peak_tflops,
                "padding_percent": padding_percent(model, stage, rounds[way]),
                "peak_memory_gb": peaks[way].gb,
                "speed_to_naive": median_ratio(seconds["naive"], seconds[way]),
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
                rows += measure(model, number, trainer, works, args, peak_tflops)
                if args.profile:
                    profile(trainer, works[0])
                del trainer, works
        finally:  # interrupted, it tells what it has
            if rows:
                drawn = "the lengths of lengths.tsv" if args.lengths == LENGTHS else str(args.lengths)
                work = f"{args.steps} steps of {args.batch_s:g} s of padded audio per round"
                publish(args, __doc__.split("\n")[0], f"{drawn}, {work}, matrix product {peak_tflops:.0f} TFLOP/s", rows, peers.device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
