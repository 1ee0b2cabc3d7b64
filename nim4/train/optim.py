"""The optimiser and the learning rate of a training run, as its settings say."""

import logging
import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from nim4.config import OptimConfig
from nim4.train.muon import MuonAdamW
from nim4.train.scaled_adam import ScaledAdam

log = logging.getLogger("nim4")

# parameters that Muon steps where it is chosen: the matrices between two hidden layers; in stage 3, and from stage 4 on
HIDDEN = ("encoder.blocks.", "encoder.encoder.", "head.layers.0.", "head.layers.3.")
HIDDEN += ("acoustic.encoder.blocks.", "acoustic.encoder.encoder.", "adaptor.", "llm.model.layers.")
EDEN_START = 0.5  # share of the rate with which Eden's warm-up begins


def learning_rate(step: int, config: OptimConfig, epoch: int = 0) -> float:
    """Linear warm-up, then what `schedule` says: a cosine from the peak down to `min_lr_ratio` of it, the peak, or Eden.

    Args:
        epoch: passes over the data before this one; Eden alone asks for it.
    Source: Eden is that of Zipformer (arXiv 2310.11230, section 3.5), whose warm-up starts at half the rate.
    """
    if config.schedule == "eden":
        warmup = EDEN_START + (1 - EDEN_START) * min(step / max(config.warmup_steps, 1), 1.0)
        return config.learning_rate * warmup * _faded(step / config.eden_steps) * _faded(epoch / config.eden_epochs)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min((step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1), 1.0)
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _faded(x: float) -> float:
    """1 at 0, and like 1 / sqrt(x) far beyond 1."""
    return (x * x + 1) ** -0.25


def make_optimizer(model: nn.Module, config: OptimConfig, lr_ratios: Mapping[str, float] = MappingProxyType({})) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, or Muon on HIDDEN and AdamW on the others; no weight decay on biases and norms. Or ScaledAdam over all.

    Args:
        lr_ratios: beginning of a parameter's name -> its rate relative to the others'.
    """
    scaled = config.optimizer == "scaled_adam"
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = next((ratio for start, ratio in lr_ratios.items() if name.startswith(start)), 1.0)
            decay = config.weight_decay if parameter.ndim > 1 and not scaled else 0.0
            muon = config.optimizer == "muon" and parameter.ndim == 2 and name.startswith(HIDDEN)
            group = groups.setdefault((ratio, -decay, muon), {"params": [], "weight_decay": decay, "lr_ratio": ratio, "muon": muon})
            group["params"].append(parameter)
    # in a fixed order, since a resumed run takes up its optimiser's state by it
    ordered = [groups[key] for key in sorted(groups)]
    if scaled:
        log.info("scaled_adam learns how large each parameter is, so train.weight_decay has no effect")
        return ScaledAdam(ordered, lr=config.learning_rate, betas=config.betas)
    optimizer = MuonAdamW if config.optimizer == "muon" else torch.optim.AdamW
    return optimizer(ordered, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)
