"""How much a linear probe can tell about labels: the difference of two cross-entropies on utterances it was not fitted to.

What is known before (frequencies of the labels, given some condition) is a fixed offset of the logits and the probe starts at zero on
top of it; the step that does best on held-out utterances is kept, the start included. So input that helps nobody gives about 0,
however many dimensions it has for the probe to learn by heart.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nim4.config import EntropyConfig

FIT, STOP, TEST = range(3)  # parts of the utterances: to fit the probe, to choose its step, to measure it
MIN_UTTERANCES = 4
SMOOTHINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # ours: how many observations the frequencies without condition may weigh
NUM_CHECKS = 50  # ours: how often the held-out utterances are looked at while a probe is fitted


def draw_parts(num_utterances: int, seed: int) -> Tensor:
    """Which part each utterance belongs to: half TEST, and of the other half a fifth STOP (at least 1) and the rest FIT.

    Returns:
        (num_utterances,) int64.
    Raises:
        ValueError: with fewer than 4 utterances.
    """
    if num_utterances < MIN_UTTERANCES:
        raise ValueError(f"at least {MIN_UTTERANCES} utterances are needed, but there are {num_utterances}")
    order = torch.randperm(num_utterances, generator=torch.Generator().manual_seed(seed))
    num_test = num_utterances // 2
    num_stop = max((num_utterances - num_test) // 5, 1)
    parts = torch.full((num_utterances,), FIT)
    parts[order[:num_test]], parts[order[num_test : num_test + num_stop]] = TEST, STOP
    return parts


@dataclass(frozen=True)
class Question:
    """Labels that a probe is to tell, and what is known of them without it.

    Attributes:
        kept: (N,) bool, rows whose label and condition occur in FIT; no probe can learn another. The following are about these rows only.
        labels: (M,) int64, 0 to C - 1.
        parts: (M,) int64, FIT, STOP or TEST.
        known: (M, C) float32, log-probabilities of the labels before the probe.
        seed: order of the probe's minibatches.
    """

    kept: Tensor
    labels: Tensor
    parts: Tensor
    known: Tensor
    seed: int

    def to(self, device: torch.device) -> "Question":
        """The same question with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("kept", "labels", "parts", "known")}
        return replace(self, **moved)

    @property
    def entropy(self) -> float:
        """Cross-entropy in nats of the labels in TEST, given what is known."""
        return _cross_entropy(self.known, self.labels, self.parts == TEST)

    @property
    def unseen_share(self) -> float:
        """Share of all rows that are not kept."""
        return 1.0 - float(self.kept.float().mean())


def ask(labels: Tensor, conditions: Tensor, parts: Tensor, seed: int) -> Question:
    """The question what `labels` are when `conditions` are known: all (N,) int64, `parts` by row as from draw_parts.

    Known are the labels' frequencies under the condition in FIT: the best that a probe of the condition as one symbol could do there.
    They are smoothed with the frequencies under any condition, by the weight that does best on STOP.

    Raises:
        ValueError: if a part has no row left.
    """
    labels, conditions = (values.unique(return_inverse=True)[1] for values in (labels, conditions))
    counts = torch.zeros(int(conditions.max()) + 1, int(labels.max()) + 1)
    fit = parts == FIT
    counts.index_put_((conditions[fit], labels[fit]), torch.ones(int(fit.sum())), accumulate=True)
    seen = counts.sum(0) > 0
    kept = seen[labels] & (counts.sum(1) > 0)[conditions]
    labels, conditions, parts, counts = (seen.cumsum(0) - 1)[labels[kept]], conditions[kept], parts[kept], counts[:, seen]
    if len(parts.unique()) < 3:
        raise ValueError("labels that occur in one part of the utterances only")
    overall = counts.sum(0) / counts.sum()
    candidates = [((counts + weight * overall) / (counts.sum(1, keepdim=True) + weight)).log() for weight in SMOOTHINGS]
    stop = parts == STOP
    known = min((candidate[conditions] for candidate in candidates), key=lambda known: _cross_entropy(known, labels, stop))
    return Question(kept, labels, parts, known, seed)


def fit_probe(question: Question, x: Tensor, config: EntropyConfig) -> Tensor:
    """Adds to what is known what a linear layer can tell from `x` (M, D) float32, the kept rows.

    At most `config.steps` steps of Adam with a falling rate on minibatches of FIT; the weights are those that did best on STOP.

    Returns:
        (M, C) float32 log-probabilities.
    """
    generator = torch.Generator().manual_seed(question.seed)
    fit_rows = (question.parts == FIT).nonzero()[:, 0].cpu()
    stop = question.parts == STOP
    num_classes = question.known.shape[1]
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias])
    best, best_weights = float("inf"), (weight.detach().clone(), bias.detach().clone())
    check_every = max(config.steps // NUM_CHECKS, 1)
    for step in range(config.steps + 1):
        if step % check_every == 0 or step == config.steps:
            with torch.no_grad():
                held_out = float(F.cross_entropy(question.known[stop] + F.linear(x[stop], weight, bias), question.labels[stop]))
            if held_out < best:
                best, best_weights = held_out, (weight.detach().clone(), bias.detach().clone())
        if step == config.steps:
            break
        rows = fit_rows[torch.randint(len(fit_rows), (min(config.batch_rows, len(fit_rows)),), generator=generator)].to(x.device)
        loss = F.cross_entropy(question.known[rows] + F.linear(x[rows], weight, bias), question.labels[rows])
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (question.known + F.linear(x, *best_weights)).log_softmax(-1)


def information(question: Question, x: Tensor, config: EntropyConfig) -> float:
    """V-information in nats: how much lower the cross-entropy in TEST is for a linear probe of `x` (M, D) than without it.

    Source: Xu et al. 2020 (arXiv 2002.10689), with linear probes as the family V.
    """
    return question.entropy - _cross_entropy(fit_probe(question, x, config), question.labels, question.parts == TEST)


def _cross_entropy(log_probs: Tensor, labels: Tensor, rows: Tensor) -> float:
    return float(F.cross_entropy(log_probs[rows].double(), labels[rows]))
