"""Has the encoder moved? Linear CKA against a reference snapshot, and the registry of snapshots that IA-SFT consumes.

The paper compares the encoder in training with a reference checkpoint on a fixed evaluation set; when their CKA falls below a
threshold, the encoder is handed on and becomes the new reference (section 3.3). Silent there, decided here ("ours"):
frames are pooled over the whole list, without padding or augmentation, under full context; the unbiased estimator is the default.

Why the estimator matters: the biased one gives two *independent* random matrices of width 1280 a CKA of 0.91 at 128 frames and
still 0.20 at 5000, so a threshold carries over to another width or list only when frames are many or the estimator is unbiased.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nim4.config import CkaConfig
from nim4.corpus.batch import Batch
from nim4.model.checkpoint import read_weights, save_weights
from nim4.model.conformer import valid_mask
from nim4.score.plot import picture
from nim4.stage import atomic_write, file_hash, read_jsonl

log = logging.getLogger("nim4")


class PooledCka:
    """Linear CKA of two views of the same frames, accumulated in pieces as D x D sums: exact, whatever the number of frames.

    Both estimators follow from sums over frames. With x_i, y_i the rows and k_i = |x_i|^2, l_i = |y_i|^2 the diagonals of the two
    Gram matrices, biased HSIC is |X^T Y|^2 of the centred X, Y; unbiased HSIC_1 (Song et al. 2007) drops the diagonals.
    Sources: Kornblith et al. 2019 (arXiv 1905.00414) for CKA; Nguyen et al. 2021 (arXiv 2010.15327) for HSIC_1 in it.
    """

    def __init__(self, unbiased: bool):
        self.unbiased = unbiased
        self.num_frames = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds frames: x (N, D1) and y (N, D2), the same N frames in both."""
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"x and y must be (N, D1) and (N, D2), but are {tuple(x.shape)} and {tuple(y.shape)}")
        self.num_frames += len(x)
        x, y = x.double(), y.double()
        for (a_name, a), (b_name, b) in ((("x", x), ("x", x)), (("x", x), ("y", y)), (("y", y), ("y", y))):
            a_diagonal, b_diagonal = a.square().sum(1), b.square().sum(1)
            pieces = {
                "cross": a.T @ b,
                "a": a.sum(0),
                "b": b.sum(0),
                "a_by_b": b_diagonal @ a,
                "b_by_a": a_diagonal @ b,
                "diagonals": a_diagonal @ b_diagonal,
            }
            for name, piece in (pieces | {"a_trace": a_diagonal.sum(), "b_trace": b_diagonal.sum()}).items():
                key = f"{a_name}{b_name}.{name}"
                self._sums[key] = self._sums[key] + piece if key in self._sums else piece

    def _hsic(self, pair: str) -> float:
        n = self.num_frames
        cross, a, b = (self._sums[f"{pair}.{name}"] for name in ("cross", "a", "b"))
        if not self.unbiased:
            return float((cross - torch.outer(a, b) / n).square().sum())
        # HSIC_1 is unchanged by centring, which removes the large common terms and keeps the sums accurate.
        mean_a, mean_b = a / n, b / n
        centred = cross - n * torch.outer(mean_a, mean_b)
        a_trace = self._sums[f"{pair}.a_trace"] - n * mean_a @ mean_a
        b_trace = self._sums[f"{pair}.b_trace"] - n * mean_b @ mean_b
        diagonals = self._centred_diagonals(pair, mean_a, mean_b)
        # Rows of the centred Gram matrices sum to 0, so without the diagonal row i sums to -k_i, and all of it to -trace.
        trace = centred.square().sum() - diagonals
        rows = diagonals
        return float((trace + a_trace * b_trace / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3)))

    def _centred_diagonals(self, pair: str, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        """sum_i |a_i - mean_a|^2 |b_i - mean_b|^2, expanded into the sums that were kept."""
        n = self.num_frames
        cross, a, b, a_by_b, b_by_a, diagonals, a_trace, b_trace = (
            self._sums[f"{pair}.{name}"] for name in ("cross", "a", "b", "a_by_b", "b_by_a", "diagonals", "a_trace", "b_trace")
        )
        a_square, b_square = mean_a @ mean_a, mean_b @ mean_b
        return (
            diagonals
            - 2 * b_by_a @ mean_b
            - 2 * a_by_b @ mean_a
            + a_trace * b_square
            + b_trace * a_square
            + 4 * mean_a @ cross @ mean_b
            - 2 * a_square * (b @ mean_b)
            - 2 * b_square * (a @ mean_a)
            + n * a_square * b_square
        )

    def value(self) -> float:
        """CKA: 1 for equal views up to rotation and scale, near 0 for independent ones.

        Raises:
            ValueError: with fewer than 4 frames.
        """
        if self.num_frames < 4:
            raise ValueError(f"at least 4 frames are needed, but there are {self.num_frames}")
        scale = self._hsic("xx") * self._hsic("yy")
        return self._hsic("xy") / scale**0.5 if scale > 0 else float("nan")


@dataclass(frozen=True)
class Snapshot:
    """One line of the registry.

    Attributes:
        step: training steps done.
        cka: likeness to the reference; None for the first reference.
        ctc_agreement: share of frames whose best phoneme is the reference's, a second opinion: outliers move CKA.
        trigger: this snapshot became the reference, and is there for IA-SFT to use.
        final: the last step of pre-training; IA-SFT ends on it whatever its CKA.
        path, sha256: the weights, relative to the stage's folder; None where only the numbers were kept.
    """

    step: int
    cka: float | None
    ctc_agreement: float | None
    trigger: bool
    final: bool
    path: str | None = None
    sha256: str | None = None


def read_registry(path: Path) -> list[Snapshot]:
    """All lines of a registry; an empty list when there is none yet."""
    return [Snapshot(**row) for row in read_jsonl(path)] if Path(path).is_file() else []


class CkaMonitor:
    """Watches an encoder while it trains and keeps the snapshot registry.

    Args:
        model: the PhonemeModel in training.
        batches: the fixed list, already batched; only valid frames count, at most `config.max_frames`.
        config: threshold, start and interval.
        work: the stage's folder; `registry.jsonl` and `snapshots/` go there.
        max_steps: length of the training, for the fractions in `config`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], config: CkaConfig, work: Path, max_steps: int):
        self._model, self._batches, self._config, self._work, self._max_steps = model, batches, config, work, max_steps
        self._start = max(round(config.start_fraction * max_steps), 1)
        self._every = max(round(config.every_fraction * max_steps), 1)
        self._registry = work / "registry.jsonl"
        self._reference: tuple[Tensor, Tensor] | None = None

    def resume(self, step: int) -> None:
        """Drops what was noted after `step`, and takes up the last trigger's features as the reference."""
        kept = [row for row in read_registry(self._registry) if row.step <= step]
        self._write(kept)
        last = next((row for row in reversed(kept) if row.trigger), None)
        if last is not None:
            saved = read_weights(self._features_path(last.step))
            self._reference = saved["frames"], saved["best"]

    def after_step(self, step: int) -> None:
        """To be called after each training step; compares where one is due."""
        final = step == self._max_steps
        due = step >= self._start and (step - self._start) % self._every == 0
        if not (due or final):
            return
        frames, best = self._features()
        cka, agreement = None, None
        if self._reference is not None:
            pooled = PooledCka(self._config.unbiased)
            pooled.add(frames, self._reference[0])
            cka, agreement = pooled.value(), float((best == self._reference[1]).float().mean())
        trigger = due and (cka is None or cka < self._config.threshold)
        row = Snapshot(step, cka, agreement, trigger, final)
        if trigger or final:
            row = self._keep(row)
        if trigger:
            self._reference = frames, best
            save_weights(self._features_path(step), {"frames": frames, "best": best})
        self._write([*read_registry(self._registry), row])
        told = "first reference" if cka is None else f"CKA {cka:.4f}, CTC agreement {agreement:.3f}"
        log.info(
            "step %d: %s%s%s", step, told, ", trigger: new reference" if trigger and cka is not None else "", ", final snapshot" if final else ""
        )

    def _features(self) -> tuple[Tensor, Tensor]:
        """Valid encoder frames (N, D) float32 and their best phonemes (N,), under full context and without dropout."""
        self._model.eval()
        frames, best, left = [], [], self._config.max_frames
        with torch.inference_mode():
            for batch in self._batches:
                batch = batch.to(self._model.mean.device)
                encoded, lens = self._model.encoder(self._model.normalise(batch.x), batch.x_lens)
                valid = valid_mask(lens, encoded.shape[1])
                frames.append(encoded[valid].float().cpu()[:left])
                best.append(self._model.head(encoded).argmax(-1)[valid].to(torch.int16).cpu()[:left])
                left -= len(frames[-1])
                if left <= 0:
                    break
        self._model.train()
        return torch.cat(frames).clone(), torch.cat(best).clone()

    def _features_path(self, step: int) -> Path:
        return self._work / "snapshots" / f"step-{step}-reference.safetensors"

    def _keep(self, row: Snapshot) -> Snapshot:
        path = Path("snapshots") / f"step-{row.step}.safetensors"
        save_weights(self._work / path, self._model.state_dict())
        return Snapshot(**{**asdict(row), "path": str(path), "sha256": file_hash(self._work / path)})

    def _write(self, rows: Sequence[Snapshot]) -> None:
        with atomic_write(self._registry) as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def plot_registry(registry: Path, threshold: float, out: Path) -> None:
    """Draws CKA and CTC agreement over the steps, with the triggers, as a picture."""
    rows = read_registry(registry)
    compared = [row for row in rows if row.cka is not None]
    with picture(out) as (axis,):
        axis.plot([row.step for row in compared], [row.cka for row in compared], label="CKA with the reference")
        axis.plot([row.step for row in compared], [row.ctc_agreement for row in compared], label="CTC agreement", linestyle=":")
        axis.axhline(threshold, color="grey", linewidth=0.8, label=f"threshold {threshold:g}")
        for row in rows:
            if row.trigger:
                axis.axvline(row.step, color="tab:red", linewidth=0.8, linestyle="--")
        axis.set(xlabel="pre-training step", ylabel="likeness", title="Encoder snapshots (dashed: became the reference)")
        axis.legend()


def take_frames(batches: Iterator[Batch], max_frames: int) -> list[Batch]:
    """The first batches that together hold `max_frames` encoder frames (or all there are)."""
    taken, frames = [], 0
    for batch in batches:
        taken.append(batch)
        frames += int(batch.x_lens.sum()) // 4
        if frames >= max_frames:
            break
    return taken
