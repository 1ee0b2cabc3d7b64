"""What makes a training step faster, or says why it cannot run: compiled blocks, and a GPU whose memory is too small."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from nim4.config import OptimConfig, RecipeError
from nim4.model.zipformer_layer import ZipformerLayer

RESUMABLE = ("train.max_duration_s", "train.accum", "train.compile")  # settings that a run may change when it is resumed


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a stack of: those of the encoder, and the layers of the language model."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for stack in stacks for block in stack if any(True for _ in block.parameters())]


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles each block of `model` in place; names and weights stay as they are.

    Blocks of one kind share their kernels, and these take any number of utterances and frames: a new shape of batch compiles nothing.
    Layers of a Zipformer stay as they are: their schedules change with every step, and each would be compiled anew.
    """
    for block in blocks_of(model):
        if not isinstance(block, ZipformerLayer):
            block.compile(dynamic=True, backend=backend)


def as_written(model: nn.Module) -> AbstractContextManager:
    """Inside it, compiled blocks run as they are written: validation has other shapes and modes, each of which would be compiled."""
    is_compiled = any(block._compiled_call_impl is not None for block in blocks_of(model))
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def read_parts(parts_of: list[dict[str, Tensor]], norm: Tensor) -> tuple[dict[str, float], float, bool]:
    """What a step came to, in one transfer: each number read alone would wait for the GPU.

    Args:
        parts_of: of each micro-batch, the parts of the loss, () each.
        norm: () of the gradient.
    Returns:
        the sums of the parts over the micro-batches, the norm, and whether norm and losses are finite.
    """
    values = [value.to(norm.device, torch.float64) for parts in parts_of for value in parts.values()]
    *numbers, grad_norm = torch.stack([*values, norm.double()]).tolist()
    sums: dict[str, float] = {}
    finite = math.isfinite(grad_norm)
    for (name, _), number in zip((item for parts in parts_of for item in parts.items()), numbers, strict=True):
        sums[name] = sums.get(name, 0.0) + number
        finite &= name != "loss" or math.isfinite(number)
    return sums, grad_norm, finite


@contextmanager
def room_on_the_gpu(step: int, config: OptimConfig) -> Iterator[None]:
    """Turns an exhausted GPU memory into a RecipeError that names the settings to change; checkpoints stay, and are resumed from."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller, accum = round(config.max_duration_s / 2, 1), 2 * config.accum
        raise RecipeError(
            f"training step {step}",
            expected=f"a batch that fits into the memory of the GPU (train.max_duration_s={config.max_duration_s:g})",
            found=" ".join(str(error).split()).partition(". GPU ")[0],
            fix=f"run the same command again with --set train.max_duration_s={smaller:g} --set train.accum={accum}; it resumes",
        ) from error
