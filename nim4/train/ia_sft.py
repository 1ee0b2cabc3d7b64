"""Stage 5's encoder swaps: pre-training hands on encoders that have moved, adaptor and language model follow (paper, section 3.3).

    step 0              min_dwell            max_steps - final                            max_steps
    |---- first trigger ----|---- second trigger ----|------------- final snapshot -------------|
      of stage 4's product      as soon as the one        the last swap, whatever its CKA and
                                before had its dwell      however many are still in line

The steps of the swaps follow from (registry, config) alone: each trigger is taken up in order once the encoder in use has stayed for
`min_dwell` x max_steps, if it can stay as long itself before the last swap; those that cannot are passed over. With one snapshot only
nothing is swapped. The paper's 1 M + 1 M + 2 M of 4 M steps are min_dwell 0.25 and final 0.5.

Live, while stage 3 still runs, the rule is the same for the snapshots there are so far: training goes on with the encoder in use until
the next one appears, and waits at the last swap for the final one. What was decided is kept in decisions.jsonl, so that a run that was
killed swaps where it did before. With a registry that is complete from the start, live and replay are the same.

Ours: the paper does not say what happens to the rate at a swap; we warm it up anew, and keep the optimiser's state. The phoneme head
comes with its encoder. swaps.jsonl says what each swap did to the loss.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nim4.config import RecipeError, SftConfig, SwapConfig
from nim4.model.asr import SpeechLlm
from nim4.model.checkpoint import check_weights
from nim4.stage import read_jsonl, write_jsonl
from nim4.train.cka import Snapshot
from nim4.train.distributed import Processes, is_sharded, load_whole_weights
from nim4.train.loop import evaluated
from nim4.train.snapshots import SnapshotFolder, check_snapshot

log = logging.getLogger("nim4")
SWAPS, DECISIONS = "swaps.jsonl", "decisions.jsonl"
POLL_S = 10.0  # between two looks for the final snapshot
MAX_WINDOW_STEPS = 100  # the training loss is told over so many steps before and after a swap ...
WINDOW_SHARE = 0.02  # ... but at most this share of all, in whole lines of metrics.jsonl


@dataclass(frozen=True)
class Timeline:
    """When which snapshot is taken up. All times are training steps done.

    Attributes:
        dwell: steps an encoder stays at least.
        last: step of the last swap.
        max_steps: end of the training.
    """

    dwell: int
    last: int
    max_steps: int

    @classmethod
    def of(cls, config: SwapConfig, max_steps: int) -> "Timeline":
        """The settings' shares as steps. Raises RecipeError when one is no share."""
        for name in ("min_dwell", "final"):
            if not 0 < getattr(config, name) <= 1:
                raise RecipeError(f"swaps.{name}", expected="a share above 0, at most 1", found=getattr(config, name), fix="correct the setting")
        if not 0 <= config.rewarm <= 1:
            raise RecipeError("swaps.rewarm", expected="a share from 0 to 1", found=config.rewarm, fix="correct the setting")
        return cls(max(round(config.min_dwell * max_steps), 1), max_steps - max(round(config.final * max_steps), 1), max_steps)

    def next_swap(self, current: Snapshot, since: int, now: int, known: Sequence[Snapshot]) -> tuple[int, Snapshot] | None:
        """The next swap, given what is known: (step, snapshot), the step not before `now`; None when there is nothing to wait for.

        Args:
            current: the snapshot in use, since step `since`.
            known: see kept_snapshots.
        """
        if current.final:
            return None
        queued = next((snapshot for snapshot in known if snapshot.step > current.step and not snapshot.final), None)
        step = max(since + self.dwell, now)
        if queued is not None and step + self.dwell <= self.last:
            return step, queued
        final = next((snapshot for snapshot in known if snapshot.final), None)
        return (max(self.last, now), final) if final is not None else None

    def swaps(self, known: Sequence[Snapshot]) -> list[tuple[int, Snapshot]]:
        """All swaps of a replay of a whole registry."""
        found: list[tuple[int, Snapshot]] = []
        current, since = known[0], 0
        while (following := self.next_swap(current, since, since, known)) is not None:
            found.append(following)
            since, current = following
        return found


class EncoderSwaps:
    """Puts the next encoder into the running model, in place, when its time has come.

    Args:
        model: its acoustic part must be the first snapshot.
        folder: of stage 3.
        config, train: settings of the swaps, and of the training.
        work: the stage's folder; swaps.jsonl goes there, and metrics.jsonl is read there.
        peers: all processes swap at the same step; the main one reads the registry and decides.
        measure: validation numbers of the model as it is, `loss` and `loss_streaming` among them.
        max_wait_s: how long to wait for the final snapshot of a running stage 3.
    Raises:
        RecipeError: if the model's encoder is not the first snapshot; in a replay, if a snapshot that will be taken up is missing.
    """

    def __init__(
        self,
        model: SpeechLlm,
        folder: SnapshotFolder,
        config: SwapConfig,
        train: SftConfig,
        work: Path,
        peers: Processes,
        measure: Callable[[], dict[str, float]],
        max_wait_s: float,
    ):
        self._timeline = Timeline.of(config, train.max_steps)
        self._model, self._folder, self._work, self._peers = model, folder, work, peers
        self._measure, self._max_wait_s, self._log_every = measure, max_wait_s, train.log_every
        self._rewarm_steps = round(config.rewarm * train.max_steps)
        self._num_lines = math.ceil(min(MAX_WINDOW_STEPS, math.ceil(WINDOW_SHARE * train.max_steps)) / train.log_every)
        self._known = peers.from_main(folder.known())
        self._current, self._since = folder.first(), 0
        self._told = False  # whether the other processes know where the main one resumes
        self._rows: list[dict[str, Any]] = []  # of swaps.jsonl, on the main process
        self._decisions: dict[int, int] = {}  # step of a swap -> step of its snapshot; live, on the main process
        self._check_first()
        if not folder.live:
            self._check_replay()

    @property
    def hooks(self) -> dict[str, Any]:
        """What the Trainer is to call."""
        hooks = {"before_step": self.before_step, "after_step": self.after_step, "on_resume": self.resume}
        return hooks | {"rewarm_steps": self._rewarm_steps}

    def _check_first(self) -> None:
        first, own = self._folder.read(self._current), self._model.acoustic.state_dict()
        if first.keys() != own.keys() or not all(torch.equal(first[name], own[name].cpu()) for name in own):
            raise RecipeError(
                "--init",
                expected=f"the encoder of step {self._current.step} in {self._folder.path}",
                found="another one",
                fix="give stage 4's product as --init, and the stage-3 folder it was made from as --snapshots",
            )

    def _check_replay(self) -> None:
        """Logs the schedule, and finds out before the training whether the files are there."""
        path = self._folder.path
        if not self._known[-1].final:
            raise RecipeError(path, expected="a final snapshot", found="none in its registry", fix="let stage 3 finish, or use --live true")
        planned = self._timeline.swaps(self._known)
        for step, snapshot in planned:
            check_snapshot(path, snapshot)
            log.info("schedule: at step %d the encoder of pre-training step %d%s", step, snapshot.step, ", the final one" if snapshot.final else "")
        passed_over = len(self._known) - 1 - len(planned)
        if not planned:
            log.warning("no later snapshot in %s: the last one is that of --init, which stays", path)
        elif passed_over:
            log.info("schedule: %d snapshot(s) passed over, since an encoder stays for at least %d steps", passed_over, self._timeline.dwell)

    # ------------------------------------------------------------------------------------------------------ the Trainer's hooks

    def resume(self, step: int) -> None:
        """Takes up the swaps that the checkpoint of `step` holds, and drops the later ones: one at `step` itself was made after it."""
        self._rows = [row for row in self._read(SWAPS) if row["step"] < step]
        if self._rows:
            last = self._rows[-1]
            self._current, self._since = self._snapshot(last["snapshot_step"]), last["step"]
            last["train_loss_after"] = last["train_loss_after"] if self._closes_at(last["step"]) <= step else None
        write_jsonl(self._work / SWAPS, self._rows)
        self._decisions = {row["step"]: row["snapshot_step"] for row in self._read(DECISIONS)}

    def before_step(self, step: int) -> bool:
        """Swaps if it is time. True = the model has another encoder."""
        if not self._told:
            self._current, self._since = self._peers.from_main((self._current, self._since))
            self._told = True
        snapshot = self._due(step)
        if snapshot is not None:
            self._swap(step, snapshot)
        return snapshot is not None

    def after_step(self, step: int) -> None:
        """Notes the training loss after the last swap, once it is known."""
        if self._rows and self._rows[-1]["train_loss_after"] is None and step >= self._closes_at(self._rows[-1]["step"]):
            self._close_row()

    # ---------------------------------------------------------------------------------------------------------------- deciding

    def _due(self, step: int) -> Snapshot | None:
        """The snapshot to take up now, the same on all processes; may wait for the final one."""
        if self._current.final or step < min(self._since + self._timeline.dwell, self._timeline.last):
            return None
        if not self._folder.live:
            found = self._timeline.next_swap(self._current, self._since, step, self._known)
            return found[1] if found is not None and found[0] == step else None
        started_s, wait, snapshot = time.monotonic(), True, None
        while True:
            if self._peers.is_main:
                wait, snapshot = self._look(step)
            wait, snapshot, waited_s = self._peers.from_main((wait, snapshot, time.monotonic() - started_s))
            if not wait:
                return snapshot
            if waited_s > self._max_wait_s:
                raise RecipeError(
                    self._folder.path,
                    expected="the final snapshot of stage 3",
                    found=f"none after {waited_s:.0f} s",
                    fix="let stage 3 finish, or start it again, then run the same command again",
                )
            if waited_s < POLL_S:
                log.info("step %d: waiting for the final snapshot of stage 3 in %s, at most %.0f s", step, self._folder.path, self._max_wait_s)
            time.sleep(min(POLL_S, self._max_wait_s))

    def _look(self, step: int) -> tuple[bool, Snapshot | None]:
        """Live, on the main process: (whether to look again, the snapshot to take up now)."""
        self._known = self._folder.known()
        if self._decisions and max(self._decisions) >= step:  # made before the run was killed
            return False, self._snapshot(self._decisions[step]) if step in self._decisions else None
        found = self._timeline.next_swap(self._current, self._since, step, self._known)
        if found is None or found[0] > step:
            return found is None and step >= self._timeline.last, None
        self._decisions[step] = found[1].step
        write_jsonl(self._work / DECISIONS, [{"step": at, "snapshot_step": taken} for at, taken in self._decisions.items()])
        return False, found[1]

    def _snapshot(self, step: int) -> Snapshot:
        """The known snapshot of a pre-training step."""
        for snapshot in self._known:
            if snapshot.step == step:
                return snapshot
        raise RecipeError(
            self._folder.path, expected=f"the snapshot of step {step}, which was in use", found="none", fix="wait until stage 3 has made it again"
        )

    # ---------------------------------------------------------------------------------------------------------------- swapping

    def _swap(self, step: int, snapshot: Snapshot) -> None:
        """Takes up the weights of `snapshot` in place, so that the optimiser's state of all other parts stays; notes what it did."""
        before = self._measured()
        weights = self._folder.read(snapshot)
        check_weights(self._model.acoustic, weights, self._folder.path / str(snapshot.path))
        load_whole_weights(self._model, {f"acoustic.{name}": tensor for name, tensor in weights.items()})
        after = self._measured()
        replaced, self._current, self._since = self._current, snapshot, step
        if not self._peers.is_main:
            return
        if self._rows and self._rows[-1]["train_loss_after"] is None:
            self._close_row()
        row = {"step": step, "snapshot_step": snapshot.step, "final": snapshot.final, "cka": snapshot.cka, "sha256": snapshot.sha256}
        for name in ("loss", "loss_streaming"):
            row |= {f"valid_{name}_before": before[name], f"valid_{name}_after": after[name]}
        losses = self._train_losses(self._rows[-1]["step"] if self._rows else 0)
        self._rows.append(row | {"train_loss_before": _mean(losses[-self._num_lines :]), "train_loss_after": None})
        write_jsonl(self._work / SWAPS, self._rows)
        told = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in ("loss", "loss_streaming"))
        log.info("step %d: encoder of pre-training step %d in place of %d; validation: %s", step, snapshot.step, replaced.step, told)

    def _measured(self) -> dict[str, float]:
        if not (self._peers.is_main or is_sharded(self._model)):
            return {}
        return evaluated(self._model, self._measure)

    def _closes_at(self, swap: int) -> int:
        """The step at which the training loss after a swap is known."""
        first = math.ceil(swap / self._log_every) * self._log_every
        return min(first + self._num_lines * self._log_every, self._timeline.max_steps)

    def _close_row(self) -> None:
        row = self._rows[-1]
        row["train_loss_after"] = _mean(self._train_losses(row["step"])[: self._num_lines])
        write_jsonl(self._work / SWAPS, self._rows)
        told = [f"{row[name]:.4f}" if row[name] is not None else "unknown" for name in ("train_loss_before", "train_loss_after")]
        log.info("swap at step %d, training loss: %s before, %s after", row["step"], *told)

    def _train_losses(self, since: int) -> list[float]:
        """Loss in nats per id of each line of metrics.jsonl whose steps all come after `since`."""
        rows = [row for row in self._read("metrics.jsonl") if row["kind"] == "train" and "loss" in row]
        return [row["loss"] for row in rows if (row["step"] - 1) // self._log_every * self._log_every >= since]

    def _read(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self._work / name) if (self._work / name).is_file() else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
