"""The training of egs/mini's language model.

Loss is on answers and on plain documents. Everything else of a prompt is given whenever the model is used: the prefix and the instructions never
vary, and hints are drawn at random, so that predicting them would only cost capacity.
"""

import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from llm_examples import draw_example
from llm_network import MiniLlmConfig
from llm_tokens import NOT_PREDICTED, Encoder, collate, embed

log = logging.getLogger("nim4")


def batches(texts: Sequence[str], encode: Encoder, config: MiniLlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, one document of each text per pass; those of similar length together, in pools of 16 batches."""
    rng = random.Random(f"{config.seed} examples")
    shares = {name: getattr(config, name) for name in ("plain", "spoken", "hints", "partial")}
    while True:
        pool: list[tuple[list[tuple[int, ...]], int]] = []
        for text in rng.sample(texts, len(texts)):
            pool.append(encode(draw_example(text, texts, rng, **shares)))
            if len(pool) == 16 * config.batch:
                pool.sort(key=lambda document: len(document[0]))
                starts = list(range(0, len(pool), config.batch))
                rng.shuffle(starts)
                yield from (collate(pool[start : start + config.batch]) for start in starts)
                pool = []


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[Tensor, Tensor]], config: MiniLlmConfig, device: str) -> list[dict[str, float]]:
    """AdamW with a warm-up and a cosine; gives the mean loss of every 100 steps. The matrices decay, gains of norms and embeddings do not."""
    model.to(device).train()
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min((step + 1) / config.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    curve, losses = [], []
    for step in range(1, config.steps + 1):
        x, labels = (tensor.to(device) for tensor in next(data))
        logits = model(inputs_embeds=embed(model.get_input_embeddings(), x)).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NOT_PREDICTED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == config.steps:
            curve.append({"step": step, "loss": round(float(torch.stack(losses).mean()), 4)})
            log.info("step %d of %d: loss %.4f", step, config.steps, curve[-1]["loss"])
            losses = []
    return curve
