"""Training a small model on a CPU: both halves of a batch at once, each on half of the cores.

The operations of a small model are too short to be shared by cores, and what runs between them is not shared at all. So each half goes
through the model, and its gradient back, in a thread of its own. The sums are the same, added up in another order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nim4.config import OptimConfig
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel
from nim4.model.zipformer import Zipformer

Part = TypeVar("Part")
Result = TypeVar("Result")


def side_by_side(model: nn.Module, config: OptimConfig) -> nn.Module:
    """The model in two threads; or as it is on a GPU, on one core, where results would depend on which thread is faster (dropout), and
    with what a thread does not inherit (bf16) or cannot share (compiled blocks). So is a model whose forward pass draws answers."""
    is_plain = type(model) in (PhonemeModel, SpeechLlm) and config.precision == "fp32" and not config.compile
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return SideBySide(model) if is_plain and on_cpu and torch.get_num_threads() > 1 and not _is_random(model) else model


def _is_random(model: nn.Module) -> bool:
    """Whether a part of it leaves something to chance in training: dropout, a module or in attention a number; a Zipformer, which skips layers."""
    if any(isinstance(part, Zipformer) for part in model.modules()):
        return True
    shares = [part.p if isinstance(part, nn.Dropout) else getattr(part, "attention_dropout", 0.0) for part in model.modules()]
    return max(shares) > 0


def _begin(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.get_num_threads()  # only now is it this thread's own: what a thread does first takes the number that was set last, by any of them


class SideBySide(nn.Module):
    """A PhonemeModel or SpeechLlm that takes and gives what it did, in two threads.

    Args:
        module: two contexts of a PhonemeModel are of the halves of a batch already, and become one for each.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        num_threads = torch.get_num_threads()
        self._pools = [ThreadPoolExecutor(1, initializer=_begin, initargs=(num_threads // 2,)) for _ in range(2)]
        self.run(id, [0, 0])  # both threads begin now,
        torch.set_num_threads(num_threads)  # before what further ones begin with is set back

    def run(self, work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """`work` of each of two parts, at once."""
        futures = [pool.submit(work, part) for pool, part in zip(self._pools, parts, strict=True)]
        return [future.result() for future in futures]

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        if len(args[0]) < 2:
            return self.module(*args)
        return _Halves.apply(self, _halves(args), *(parameter for parameter in self.module.parameters() if parameter.requires_grad))


def _halves(args: Sequence[Any]) -> list[list[Any]]:
    """Tensors and lists by rows, and a context for each half."""
    rows, contexts = [arg for arg in args if not isinstance(arg, Context)], [arg for arg in args if isinstance(arg, Context)]
    middle = len(rows[0]) // 2
    return [[*(part[:middle] for part in rows), *contexts[:1]], [*(part[middle:] for part in rows), *contexts[-1:]]]


class _Halves(torch.autograd.Function):
    """Both halves have a graph of their own, which backward() goes through in the thread that has made it."""

    @staticmethod
    def forward(ctx: Any, model: SideBySide, halves: list[list[Any]], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.model, ctx.parameters = model, parameters
        ctx.outputs = model.run(lambda half: model.module(*half), halves)
        joined = tuple(torch.cat(pair) if pair[0].ndim else sum(pair) for pair in zip(*ctx.outputs, strict=True))
        ctx.mark_non_differentiable(*(tensor for tensor in joined if not tensor.is_floating_point()))
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def of_half(number: int) -> Sequence[Tensor | None]:
            outputs, own = [], []
            for output, gradient in zip(ctx.outputs[number], gradients, strict=True):
                if output.requires_grad:
                    outputs.append(output)
                    own.append(gradient if not output.ndim else gradient[-len(output) :] if number else gradient[: len(output)])
            return torch.autograd.grad(outputs, ctx.parameters, own, allow_unused=True)

        first, second = ctx.model.run(of_half, [0, 1])
        return None, None, *(one if two is None else two if one is None else one.add_(two) for one, two in zip(first, second, strict=True))
