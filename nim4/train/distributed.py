"""One process or many: what the training loop needs of torch.distributed, as started by torchrun.

Each process holds the whole model (DDP), or a shard of it (FSDP2). The functions on weights below are the same for both: what they
give and take is always whole, so a checkpoint does not depend on how many processes wrote it. What FSDP2 needs of torch is imported where
it is used: it takes most of a second, and most runs are one process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nim4.config import RecipeError


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the process that logs and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main process gave as `value`, on all processes: a decision that they must take alike."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gave as `value`, in the order of their ranks, on all processes."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()


_sharded: WeakSet[nn.Module] = WeakSet()  # what `shard` was called on


def shard(model: nn.Module, methods: tuple[str, ...] = ()) -> None:
    """Shards `model` over all processes in place (FSDP2): each block of a stack of blocks on its own, then what is left.

    Args:
        methods: names of methods beside `forward` that run the model.
    Raises:
        RecipeError: for a model with scalar parameters, which FSDP2 does not take: those of icefall's Zipformer.
    """
    if any(parameter.ndim == 0 for parameter in model.parameters()):
        raise RecipeError("train.parallel", expected="ddp: a Zipformer has scalar parameters", found="fsdp2", fix="--set train.parallel=ddp")
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)
    for name in methods:
        register_fsdp_forward_method(model, name)
    _sharded.add(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it: then whatever runs the model has to run on all processes."""
    return model in _sharded


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; under FSDP2 gathered, on the main process (the others get an empty one), tied weights once."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once, all_names = (dict(model.named_parameters(remove_duplicate=remove)) for remove in (True, False))
    return {name: tensor for name, tensor in weights.items() if name in once or name not in all_names}


def load_whole_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Takes a whole state dict, read on every process and checked to be this model's, into the model or its shards."""
    if not is_sharded(model):
        model.load_state_dict(weights, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimiser's state; under FSDP2 gathered, on the main process."""
    if not is_sharded(model):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Takes a whole optimiser state, read on every process. Raises ValueError or KeyError when it belongs to another model."""
    if not is_sharded(model):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises RecipeError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}", expected="auto, cpu or cuda", found=name, fix="choose one of them")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda", expected="a CUDA device", found="none", fix="use --device cpu, or install a CUDA build of torch")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0")) if name == "cuda" else None)


@contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Joins the process group that torchrun announces in the environment, if any; leaves it at the end."""
    device, world_size = pick_device(device_name), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
