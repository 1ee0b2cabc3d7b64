"""Several answers to each prompt of a batch: the prompts are read once, their keys and values are forked, the answers are sampled.

    prefill  [ prefix | speech | suffix ]  once per utterance, with gradients where they are wanted
    fork     G copies of its keys and values
    sample   G answers, without gradients              log_probs   of those answers, with gradients, from the same prefill

Prompts are padded on the right and answers follow the padding, which a mask hides and positions step over; so nothing that is
padded can reach an answer, and no row attends to nothing. Letters: B utterances, G answers of each, R = B G rows, L, N tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.model.llm import fork


@dataclass(frozen=True)
class Prefill:
    """Prompts that a language model has read.

    Attributes:
        cache: transformers' keys and values, of B rows or, forked, of R.
        lens: (B,) or (R,) int64, lengths of the prompts.
        width: L, to which they are padded.
        logits: (B, V) or (R, V) float32, expectation of the first token of the answer.
    """

    cache: Any
    lens: Tensor
    width: int
    logits: Tensor

    def fork(self, times: int) -> "Prefill":
        """Each prompt `times` times in a row; what is appended to a fork changes nothing here."""
        cache = fork(self.cache)
        cache.batch_repeat_interleave(times)
        return Prefill(cache, self.lens.repeat_interleave(times), self.width, self.logits.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Answers:
    """Sampled answers.

    Attributes:
        ids: (R, N) int64, zero beyond `lens`; the end of the turn is the last id, unless the limit cut the answer.
        lens: (R,) int64, at least 1.
        log_probs: (R, N) float32, of each id at the temperature it was sampled with; zero beyond `lens`.
        entropy: (R, N) float32, nats, of the distribution it was sampled from; zero beyond `lens`.
    """

    ids: Tensor
    lens: Tensor
    log_probs: Tensor
    entropy: Tensor


def prefill(model: nn.Module, embeds: Tensor, lens: Tensor) -> Prefill:
    """Reads prompts.

    Args:
        model: transformers' causal model.
        embeds: (B, L, D) float, padded on the right.
        lens: (B,) int64.
    """
    out = model.model(inputs_embeds=embeds, use_cache=True)
    last = out.last_hidden_state[torch.arange(len(lens), device=lens.device), lens - 1]
    return Prefill(out.past_key_values, lens, embeds.shape[1], model.lm_head(last).float())


@torch.no_grad()
def sample(model: nn.Module, prompts: Prefill, uniforms: Tensor, temperature: float, limits: Sequence[int], end: int) -> Answers:
    """Samples answers until all rows have ended.

    Args:
        prompts: forked, R rows.
        uniforms: (R, N) float64 in [0, 1), N at least the largest limit. Token t of row r follows from uniforms[r, t] and the row's
            own distribution alone (inverse of its cumulative sum), so a row does not depend on its neighbours.
        temperature: what logits are divided by; near 0 the answers are the greedy ones.
        limits: largest number of tokens of each row, at least 1.
        end: id that ends a row.
    """
    limit, uniforms = torch.tensor(limits, device=prompts.lens.device), uniforms.to(prompts.lens.device)
    logits, cache, going = prompts.logits, prompts.fork(1).cache, torch.ones_like(limit, dtype=torch.bool)
    steps: list[tuple[Tensor, ...]] = []
    for t in range(max(limits)):
        log_probs = F.log_softmax(logits / temperature, -1)
        probs = log_probs.exp()
        ids = _inverse(probs, uniforms[:, t])
        entropy = -(probs * log_probs.clamp(min=-1e4)).sum(-1)
        steps.append((ids * going, log_probs.gather(1, ids[:, None])[:, 0] * going, entropy * going, going))
        going = going & (ids != end) & (limit > t + 1)
        if not going.any():
            break
        hidden = _append(model, cache, prompts, ids[:, None], t)
        logits = model.lm_head(hidden[:, -1]).float()
    ids, log_probs, entropy, written = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    return Answers(ids, written.sum(1), log_probs, entropy)


def log_probs(model: nn.Module, prompts: Prefill, answers: Answers, temperature: float) -> Tensor:
    """What the model thinks of given answers: (R, N) float32 log-probabilities of their ids, zero beyond their lengths.

    Args:
        prompts: forked, R rows; gradients reach whatever they were made of.
        temperature: the one the answers were sampled with.
    """
    written = torch.arange(answers.ids.shape[1], device=answers.lens.device) < answers.lens[:, None]
    logits = prompts.logits[:, None]
    if answers.ids.shape[1] > 1:
        hidden = _append(model, prompts.fork(1).cache, prompts, answers.ids[:, :-1], 0)
        wanted = written[:, 1:]
        later = -F.cross_entropy(model.lm_head(hidden[wanted]).float() / temperature, answers.ids[:, 1:][wanted], reduction="none")
        later = later.new_zeros(wanted.shape).masked_scatter(wanted, later)
    else:
        later = logits.new_zeros(len(answers.ids), 0)
    first = -F.cross_entropy(logits[:, 0] / temperature, answers.ids[:, 0], reduction="none")
    return torch.cat((first[:, None], later), 1)


def _append(model: nn.Module, cache: Any, prompts: Prefill, ids: Tensor, num_before: int) -> Tensor:
    """Reads `ids` (R, M), which follow `num_before` ids of the answers, into the cache; returns (R, M, D) hidden states."""
    num_rows, num_new = ids.shape
    seen = torch.arange(prompts.width, device=ids.device) < prompts.lens[:, None]
    mask = torch.cat((seen, seen.new_ones(num_rows, num_before + num_new)), 1).long()
    positions = prompts.lens[:, None] + num_before + torch.arange(num_new, device=ids.device)
    out = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.last_hidden_state


def _inverse(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The id of each row at which the cumulative sum of `probs` (R, V) passes `uniforms` (R,); never one of probability 0."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return ids.clamp(max=probs.shape[1] - 1)
