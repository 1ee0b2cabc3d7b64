"""Checkpoints a training run resumes from: weights, optimiser state and place in the data, each folder whole or absent."""

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nim4.config import RecipeError
from nim4.model.checkpoint import WEIGHTS, save_weights
from nim4.stage import atomic_write, write_json


def checkpoint_step(path: Path) -> int:
    """The number of steps that the checkpoint folder `step-N` holds."""
    return int(path.name.removeprefix("step-"))


class Checkpoints:
    """The folders `step-N` below `folder`; only the newest `keep_last` stay."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, max(keep_last, 1)

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".tmp"]
        return sorted(found, key=checkpoint_step)

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(self.all()), None)

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes `step-N` (`optimizer` is its state dict) and removes those that are too old."""
        path = self.folder / f"step-{step}"
        work = path.with_suffix(".tmp")
        for stale in (work, path):
            if stale.exists():
                shutil.rmtree(stale)
        save_weights(work / WEIGHTS, weights)
        with atomic_write(work / "optimizer.pt", "wb") as file:
            torch.save(dict(optimizer), file)
        write_json(work / "trainer.json", dict(state))
        os.replace(work, path)
        for old in self.all()[: -self.keep_last]:
            shutil.rmtree(old)

    def load_optimizer(self, checkpoint: Path, load: Callable[[dict], None], device: torch.device) -> None:
        """Restores the optimiser by `load`, which takes its state dict. Raises RecipeError when the file is broken or another model's."""
        path = checkpoint / "optimizer.pt"
        try:
            load(torch.load(path, map_location=device, weights_only=True))
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise RecipeError(
                path, expected="the optimiser state of this run", found=error, fix=f"remove {checkpoint} to resume from the one before"
            ) from error
