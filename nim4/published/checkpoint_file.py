"""Checkpoints of other projects, read without running what they hold, and what is taken from them."""

import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nim4.config import ConformerConfig, RecipeError, ZipformerConfig

# Beside tensors, numbers and texts, training programs save their options, and those hold paths. None of it runs anything.
OPTIONS = [(types.SimpleNamespace, "argparse.Namespace"), pathlib.PosixPath, pathlib.PurePosixPath]
NUM_DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class PublishedEncoder:
    """An encoder as it was published, in our terms.

    Attributes:
        config: its shape.
        weights: by our names, those of `encoder.` in a PhonemeModel.
        mean, std: (80,) float32 of our features, with which it was trained.
        head: weight (V, D) and bias (V,) of its CTC output; None = it has none.
        tokens: what that writes; None = not known.
        notes: for the log: what differs from an encoder that was trained here.
    """

    config: ConformerConfig | ZipformerConfig
    weights: dict[str, Tensor]
    mean: Tensor
    std: Tensor
    head: tuple[Tensor, Tensor] | None = None
    tokens: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_checkpoint(path: Path, expected: str, fix: str) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU; tensors stay on the disk until they are used.

    Args:
        expected, fix: for the message when it is something else.
    Raises:
        RecipeError: if it cannot be read, holds what could run code, or is no dictionary.
    """
    try:
        with torch.serialization.safe_globals(OPTIONS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # torch's reader may raise anything, and its message may advise to run what is in there
        kind = re.search(r"GLOBAL ([\w.]+) was", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        found = f"an object of {kind[1]} in it, which could run code" if kind else f"no file of torch.save ({type(error).__name__})"
        raise RecipeError(path, expected=expected, found="no such file" if not path.is_file() else found, fix=fix) from error
    if not isinstance(loaded, dict):
        raise RecipeError(path, expected=expected, found=f"a {type(loaded).__name__}", fix=fix)
    return loaded


def size_of(weights: Mapping[str, Tensor], name: str, axis: int, where: object, expected: str, fix: str) -> int:
    """The length of a tensor. Raises RecipeError when there is none of that name."""
    tensor = weights.get(name)
    if tensor is None or tensor.ndim <= axis:
        raise RecipeError(where, expected=f"{expected}, with {name}", found="none" if tensor is None else tuple(tensor.shape), fix=fix)
    return tensor.shape[axis]


def check_fits(encoder: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Raises RecipeError that lists the first differences, and the shape that was tried, unless `weights` are all of an encoder like this.

    Args:
        encoder: on any device, `meta` too.
    """
    own = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    differences = [f"{name} missing" for name in own if name not in weights]
    differences += [
        f"{name} {tuple(weights[name].shape)} not {shape}" for name, shape in own.items() if name in weights and weights[name].shape != shape
    ]
    differences += [f"{name} unknown" for name in weights if name not in own]
    if differences:
        more = len(differences) - NUM_DIFFERENCES_SHOWN
        found = "; ".join(differences[:NUM_DIFFERENCES_SHOWN]) + (f"; {more} more" if more > 0 else "")
        fix = f"no encoder of ours is like that; nearest is {as_setting(encoder.config)}"
        raise RecipeError(where, expected="the weights of one encoder", found=found, fix=fix)


def as_setting(config: ConformerConfig | ZipformerConfig) -> str:
    """The shape as one `--set`, with what differs from the defaults."""
    usual = asdict(type(config)())
    values = {name: value for name, value in asdict(config).items() if name == "kind" or value != usual[name]}
    told = ", ".join(f"{name}: {_as_yaml(value)}" for name, value in values.items())
    return f"--set 'model.encoder={{{told}}}'"


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
