"""The training loop all training stages share: steps, schedule, checkpoints, exact resume.

Everything random in a step is seeded from (seed, step, micro-batch), so a run that was killed and resumed gives the same weights
as one that was not, on a CPU to the last digit. The loss of a step is the sum over all its micro-batches and processes divided by
the number of targets in all of them (frames, or the transcripts' tokens), so 1 process with 2 micro-batches equals 2 processes with 1.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nim4.config import OptimConfig, RecipeError
from nim4.corpus.batch import Batch, TrainBatches
from nim4.model.checkpoint import WEIGHTS, average_weights, check_weights, count_parameters, read_weights, save_weights
from nim4.stage import atomic_write, read_json, write_json
from nim4.train.checkpoints import Checkpoints, checkpoint_step
from nim4.train.distributed import (
    Processes,
    is_sharded,
    load_whole_optimizer,
    load_whole_weights,
    shard,
    whole_optimizer,
    whole_weights,
)
from nim4.train.optim import learning_rate, make_optimizer
from nim4.train.speed import as_written, compile_blocks, read_parts, room_on_the_gpu

log = logging.getLogger("nim4")

CHOICES = {
    "precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "muon", "scaled_adam"),
    "parallel": ("ddp", "fsdp2"),
    "schedule": ("cosine", "constant", "eden"),
}
# settings that count something there must be at least one of
COUNTS = (
    "max_steps",
    "eden_steps",
    "accum",
    "num_buckets",
    "log_every",
    "valid_every",
    "save_every",
    "keep_last",
    "average_last",
    "max_nonfinite_in_row",
)


@dataclass(frozen=True)
class Draw:
    """Sources of randomness of one micro-batch.

    Attributes:
        step: training step, from 0.
        shared: the same on all processes and micro-batches of the step (the chunk context).
        own: of this micro-batch alone (masks, warps).
    """

    step: int
    shared: Generator
    own: Generator


# loss(model, batch, draw) -> parts of the loss, each summed over the batch; "loss" is what is minimised
Loss = Callable[[nn.Module, Batch, Draw], dict[str, Tensor]]
# evaluate() -> named numbers; "score" is what is kept best, lower is better
Evaluate = Callable[[], dict[str, float]]


def _generator(*key: int) -> Generator:
    # SplitMix-like mixing of small integers into a seed that torch's generator spreads well.
    seed = 0
    for part in key:
        seed = (seed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return Generator().manual_seed(seed)


def evaluated(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """`evaluate` with `model` in evaluation mode, without touching the state of training."""
    model.eval()
    with as_written(model), torch.inference_mode():
        numbers = evaluate()
    model.train()
    return numbers


class Trainer:
    """Runs `config.max_steps` steps of `loss` on `model`, from the last checkpoint in `work` if there is one.

    Args:
        model: the module to train; only parameters with requires_grad change.
        loss: see `Loss`.
        batches: the training data.
        config: optimiser, schedule and intervals.
        work: the stage's OUT.tmp; checkpoints, metrics.jsonl and tensorboard go there.
        processes: this process and its peers.
        evaluate: run on the main process every `valid_every` steps and at the end.
        after_step: called on the main process after each step with the number of steps done, e.g. the CKA monitor.
        on_resume: called on the main process before the first step with the number of steps done, 0 in a new run.
        before_step: called on all processes before each step with the number of steps done; True = it put other weights into the
            model. The rate is then warmed up anew, over `rewarm_steps`, and the final weights are chosen from what comes after.
        rewarm_steps: length of such a warm-up.
        lr_ratios: see make_optimizer.
        sharded_methods: methods of the model beside `forward` that run it, for FSDP2.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: TrainBatches,
        config: OptimConfig,
        work: Path,
        processes: Processes,
        evaluate: Evaluate,
        after_step: Callable[[int], None] = lambda step: None,
        on_resume: Callable[[int], None] = lambda step: None,
        before_step: Callable[[int], bool] = lambda step: False,
        rewarm_steps: int = 0,
        lr_ratios: Mapping[str, float] = MappingProxyType({}),
        sharded_methods: tuple[str, ...] = (),
    ):
        for name, known in CHOICES.items():
            if getattr(config, name) not in known:
                usual = getattr(OptimConfig, name)
                raise RecipeError(f"train.{name}", expected=" or ".join(known), found=getattr(config, name), fix=f"--set train.{name}={usual}")
        for name in ("optimizer", "compile") if config.parallel == "fsdp2" else ():  # the others need whole parameters; hooks would be compiled
            found, usual = getattr(config, name), getattr(OptimConfig, name)
            if found != usual:
                raise RecipeError(f"train.{name}", expected=f"{usual} with train.parallel=fsdp2", found=found, fix=f"--set train.{name}={usual}")
        for name in COUNTS:
            if getattr(config, name) < 1:
                raise RecipeError(f"train.{name}", expected="at least 1", found=getattr(config, name), fix=f"--set train.{name}=1, or more")
        if config.eden_epochs <= 0:
            raise RecipeError("train.eden_epochs", expected="above 0", found=config.eden_epochs, fix="--set train.eden_epochs=3.5, or more")
        self.model, self.loss, self.batches, self.config, self.work = model, loss, batches, config, work
        self.processes, self.evaluate, self.after_step, self.on_resume = processes, evaluate, after_step, on_resume
        self.before_step, self.rewarm_steps = before_step, rewarm_steps
        if config.compile:
            compile_blocks(model)
        if processes.world_size > 1 and config.parallel == "fsdp2":
            shard(model, sharded_methods)
        self.optimizer = make_optimizer(model, config, lr_ratios)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.checkpoints = Checkpoints(work / "checkpoints", config.keep_last)
        self.step = 0
        self._place = (0, 0)  # epoch, step within the epoch: the next batch to use
        self._epoch = 0  # of the batch in use
        self._rewarmed_at = -rewarm_steps  # step of the last warm-up anew
        self._nonfinite_in_row = 0
        self._best = math.inf
        self._best_numbers: dict[str, float] = {}
        self._last: tuple[int, dict[str, float]] = (0, {})  # the last validation: after which step, and its numbers
        self._sums: dict[str, float] = {}  # of the steps since the last row in metrics.jsonl

    def run(self) -> dict[str, float]:
        """Trains to the end; `model` then holds the final weights. Returns the final validation numbers."""
        self._resume()
        several = self.processes.world_size > 1 and not is_sharded(self.model)
        parallel = DistributedDataParallel(self.model) if several else self.model
        parallel.train()
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        writer = SummaryWriter(str(self.work / "tensorboard"), purge_step=self.step + 1) if self.processes.is_main else None
        log.info("training from step %d to %d, %s trainable parameters", self.step, self.config.max_steps, count_parameters(self._trained))
        started_s = time.monotonic()
        steps = self.batches.steps(*self._place)
        while self.step < self.config.max_steps:
            if self.before_step(self.step):
                self._rewarmed_at, self._best = self.step, math.inf
            epoch, step_in_epoch, micro_batches = next(steps)
            self._epoch = epoch
            with room_on_the_gpu(self.step, self.config):
                parts = self._train_step(parallel, micro_batches)
            self.step += 1
            self._place = (epoch, step_in_epoch + 1)
            for name, value in parts.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            if self.step % self.config.log_every == 0 or self.step == self.config.max_steps:
                self._log_training(epoch, time.monotonic() - started_s, writer)
                started_s = time.monotonic()
            if self.processes.is_main:
                self.after_step(self.step)
            if self.step % self.config.valid_every == 0 or self.step == self.config.max_steps:
                paused_s = time.monotonic()
                self._validate(writer)
                started_s += time.monotonic() - paused_s
            if self.step % self.config.save_every == 0 or self.step == self.config.max_steps:
                self._save()
            self.processes.barrier()
        final = self._finish()
        if writer is not None:
            writer.close()
        self.processes.barrier()
        return final

    # ------------------------------------------------------------------------------------------------------------ a step

    def _train_step(self, parallel: nn.Module, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimiser step; returns the sums of the loss parts over this process's micro-batches, and counts."""
        rank, world_size, device = self.processes.rank, self.processes.world_size, self.processes.device
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        own_targets = sum(batch.num_targets for batch in micro_batches)
        targets = self._over_processes(own_targets)
        parts_of: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches):
            index = number * world_size + rank
            torch.manual_seed(_generator(self.config.seed, self.step, index, 1).initial_seed())  # dropout
            draw = Draw(self.step, _generator(self.config.seed, self.step), _generator(self.config.seed, self.step, index))
            if isinstance(parallel, DistributedDataParallel):
                parallel.require_backward_grad_sync = number == len(micro_batches) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                parts = self.loss(parallel, batch.to(device), draw)
            (parts["loss"] * (world_size / targets)).backward()
            parts_of.append({name: value.detach() for name, value in parts.items()})
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self._trained if parameter.grad is not None])
        norm = norm.full_tensor() if is_sharded(self.model) else norm
        sums, grad_norm, finite = read_parts(parts_of, norm)
        if self._over_processes(0.0 if finite else 1.0) > 0:
            self._skip_step([batch.ids for batch in micro_batches], finite)
            self.optimizer.zero_grad(set_to_none=True)
            return {"skipped": 1.0}
        self._nonfinite_in_row = 0
        if grad_norm > self.config.clip_norm:  # else all gradients would be read and written for nothing
            nn.utils.clip_grads_with_norm_(self._trained, self.config.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        padded = sum(batch.x.shape[0] * batch.x.shape[1] for batch in micro_batches)
        frames = float(sum(int(batch.x_lens.sum()) for batch in micro_batches))
        counts = {"targets": own_targets, "frames": frames, "padded_frames": float(padded), "grad_norm": grad_norm, "steps": 1.0}
        return sums | counts

    def _over_processes(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.processes.world_size == 1:
            return value  # without a wait for the GPU
        return float(self.processes.sum(torch.tensor(value, dtype=torch.float64, device=self._sum_device())))

    def _rate(self, step: int) -> float:
        """The learning rate of a step, the warm-up anew included."""
        rewarmed = (step - self._rewarmed_at + 1) / self.rewarm_steps if self.rewarm_steps else 1.0
        return learning_rate(step, self.config, self._epoch) * min(rewarmed, 1.0)

    def _skip_step(self, ids: list[list[str]], finite_here: bool) -> None:
        """Logs a step whose loss or gradient is not finite, and stops the training after too many in a row."""
        self._nonfinite_in_row += 1
        if not finite_here:
            log.error("step %d skipped: loss or gradient is not finite; utterances: %s", self.step, " ".join(name for batch in ids for name in batch))
        if self._nonfinite_in_row >= self.config.max_nonfinite_in_row:
            raise RecipeError(
                f"training step {self.step}",
                expected="a finite loss",
                found=f"{self._nonfinite_in_row} steps in a row without one (their utterances are in the log)",
                fix="lower train.learning_rate, or look at those utterances",
            )

    # ----------------------------------------------------------------------------------------------- logging and validation

    def _gather_sums(self) -> None:
        """Moves the sums of all processes to the main one."""
        names = sorted(self._sums)
        if names:
            totals = self.processes.sum(torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self._sum_device()))
            self._sums = dict(zip(names, totals.tolist() if self.processes.is_main else [0.0] * len(names), strict=True))

    def _log_training(self, epoch: int, seconds: float, writer: Any) -> None:
        self._gather_sums()
        sums, self._sums = self._sums, {}
        if not self.processes.is_main:
            return
        targets, frames, steps = (sums.pop(name, 0.0) for name in ("targets", "frames", "steps"))
        row: dict[str, float] = {"lr": self._rate(self.step - 1), "skipped": sums.pop("skipped", 0.0) / self.processes.world_size}
        row["grad_norm"] = sums.pop("grad_norm", 0.0) / max(steps, 1.0)
        row["padding_share"] = 1.0 - frames / max(sums.pop("padded_frames", 0.0), 1.0)
        row |= {name: value / max(targets, 1.0) for name, value in sums.items()}
        row["audio_s_per_s"] = frames / 100 / max(seconds, 1e-9)
        self._write(row, "train", writer, epoch=epoch)
        losses = ", ".join(f"{name} {row[name]:.4f}" for name in sums)
        numbers = self.step, self.config.max_steps, epoch, losses, row["lr"], row["audio_s_per_s"]
        log.info("step %d of %d, epoch %d: %s, rate %.2e, %.0f s of audio per s", *numbers)

    def _sum_device(self) -> torch.device:
        return self.processes.device if self.processes.device.type == "cuda" else torch.device("cpu")

    def _write(self, row: dict[str, float], kind: str, writer: Any, **extra: float) -> None:
        with open(self.work / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "kind": kind, **extra, **{name: round(value, 6) for name, value in row.items()}}) + "\n")
        if writer is not None:
            for name, value in row.items():
                writer.add_scalar(f"{kind}/{name}", value, self.step)

    def _runs_here(self) -> bool:
        """Whether this process takes part in validation: the main one, and under FSDP2 all."""
        return self.processes.is_main or is_sharded(self.model)

    def _save_best(self) -> None:
        weights = whole_weights(self.model)
        if self.processes.is_main:
            save_weights(self.work / "best.safetensors", weights)

    def _validate(self, writer: Any) -> None:
        if not self._runs_here():
            return
        numbers = evaluated(self.model, self.evaluate)
        self._last = self.step, numbers
        if self.processes.is_main:
            self._write(numbers, "valid", writer)
        log.info("step %d, validation: %s", self.step, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        if numbers["score"] < self._best:
            self._best, self._best_numbers = numbers["score"], numbers
            self._save_best()

    # ------------------------------------------------------------------------------------------------ checkpoints and the end

    def _save(self) -> None:
        self._gather_sums()
        weights, optimizer = whole_weights(self.model), whole_optimizer(self.model, self.optimizer)
        if self.processes.is_main:
            state = {
                "step": self.step,
                "rewarmed_at": self._rewarmed_at,
                "place": self._place,
                "best": self._best_numbers,
                "nonfinite": self._nonfinite_in_row,
                "sums": self._sums,
            }
            self.checkpoints.save(self.step, weights, optimizer, state)

    def _resume(self) -> None:
        """Takes up the last checkpoint; what was logged after it is dropped, since those steps are run again."""
        found = self.checkpoints.last()
        metrics = self.work / "metrics.jsonl"
        if found is not None:
            state = read_json(found / "trainer.json")
            self._load(read_weights(found / WEIGHTS), found)
            self.checkpoints.load_optimizer(found, lambda saved: load_whole_optimizer(self.model, self.optimizer, saved), self.processes.device)
            self._rewarmed_at = state["rewarmed_at"]
            self.step, self._place, self._nonfinite_in_row = state["step"], tuple(state["place"]), state["nonfinite"]
            self._best_numbers = state["best"]
            self._best = self._best_numbers.get("score", math.inf)
            self._sums = state["sums"] if self.processes.is_main else dict.fromkeys(state["sums"], 0.0)
            log.info("resuming at step %d from %s", self.step, found)
        if self.processes.is_main and metrics.is_file():
            whole_lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be torn, by a kill or a full disk
            kept = [row for row in map(json.loads, whole_lines) if row["step"] <= self.step]
            with atomic_write(metrics) as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
        if self.processes.is_main:
            self.on_resume(self.step)
        self.processes.barrier()

    def _finish(self) -> dict[str, float]:
        """Chooses the final weights on the validation set: the mean of the last checkpoints, or the best single one."""
        if not self._runs_here():
            return {}
        averaged = [path for path in self.checkpoints.all() if checkpoint_step(path) > self._rewarmed_at][-self.config.average_last :]
        self._load(average_weights([path / WEIGHTS for path in averaged]), "averaged checkpoints")
        is_last = [checkpoint_step(path) for path in averaged] == [self._last[0]]  # no mean, and measured a moment ago
        numbers = mean_numbers = self._last[1] if is_last else evaluated(self.model, self.evaluate)
        chosen = f"mean of the checkpoints at steps {', '.join(str(checkpoint_step(path)) for path in averaged)}"
        if self._best < mean_numbers["score"]:
            self._load(read_weights(self.work / "best.safetensors"), "best.safetensors")
            chosen, numbers = "best single checkpoint", self._best_numbers
        log.info("final weights: %s; validation: %s", chosen, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        if self.processes.is_main:
            write_json(self.work / "final.json", {"chosen": chosen, "step": self.step, "mean": mean_numbers, "valid": numbers})
        return numbers

    def _load(self, weights: dict[str, Tensor], where: object) -> None:
        """Takes whole weights into the model or its shards. Raises RecipeError when they are another model's."""
        check_weights(self.model, weights, where)
        load_whole_weights(self.model, weights)
