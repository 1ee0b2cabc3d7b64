"""One process or many: what the training loop needs of torch.distributed, as started by torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()


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
