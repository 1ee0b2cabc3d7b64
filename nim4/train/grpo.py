"""Group-relative policy optimisation (stage 8; paper, section 3.5): answers are sampled, rewarded, and made more or less likely.

One step: the prompts are read once; G answers of each are sampled from that prefill; a reward is given to each; what it has above or below
its group's mean is its advantage; the log-probabilities of the answers come from the same prefill, now with gradients.
theta_old, the policy that sampled, is the policy at the start of the step, and there is one gradient step per sampling. So the ratio
is 1 but for rounding, and the clip holds only where numerics go astray; the log says how often it does.

Departures: GSPO and Dr. GRPO are flags. The paper's reinforcement learning is end-to-end; here encoder and adaptor are flags.
The policy stays in evaluation mode: with dropout, the policy that is scored would not be the one that sampled.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nim4.config import GrpoConfig, GrpoTrainConfig, RecipeError, RewardConfig
from nim4.corpus.batch import RewardBatch, TextBatch
from nim4.corpus.text import split_tokens
from nim4.model.asr import SpeechLlm, max_answer_tokens
from nim4.model.conformer import FULL_CONTEXT, Context
from nim4.model.llm import Llm, cut_at
from nim4.model.rollout import Answers, Prefill, log_probs, prefill, sample
from nim4.score.error_rate import edit_distance
from nim4.train.alarms import Alarms
from nim4.train.augment import draw_context
from nim4.train.cr_ctc import DEPLOYED
from nim4.train.loop import Draw
from nim4.train.rewards import copied_hints, is_loop, length_ratio, reward

log = logging.getLogger("nim4")
EPS = 1e-6  # added to the deviation of a group's rewards


class Policy(SpeechLlm):
    """The speech LLM whose forward pass is that of GRPO; weights, their names and everything else are the same.

    Args:
        model: its parts are taken over, not copied.
    """

    def __init__(self, model: SpeechLlm):
        super().__init__(model.acoustic, Llm(model.llm, model.tokenizer, ""), model.config)
        self.adaptor = model.adaptor

    def train(self, mode: bool = True) -> "Policy":
        """Stays in evaluation mode."""
        super().train(False)
        return self

    def read(self, x: Tensor, x_lens: Tensor, suffixes: list[list[int]], context: Context) -> tuple[Prefill, list[int]]:
        """The prompts of a batch of features, read once, and how long their answers may be."""
        speech, speech_lens = self.speech(x, x_lens, context)
        embeds, _, lens = self.rows(speech, speech_lens, suffixes)
        return prefill(self.llm, embeds, lens), [max_answer_tokens(n) for n in speech_lens.tolist()]

    def forward(
        self, x: Tensor, x_lens: Tensor, suffixes: list[list[int]], context: Context, group_size: int, temperature: float, draw: torch.Generator
    ) -> tuple[Answers, Tensor]:
        """G answers of each utterance, and (B G, N) float32 log-probabilities of their ids, with gradients."""
        prompts, limits = self.read(x, x_lens, suffixes, context)
        prompts, limits = prompts.fork(group_size), [limit for limit in limits for _ in range(group_size)]
        uniforms = torch.rand(len(limits), max(limits), generator=draw, dtype=torch.float64)
        answers = sample(self.llm, prompts, uniforms, temperature, limits, self.prompt.end)
        return answers, log_probs(self.llm, prompts, answers, temperature)

    def texts(self, answers: Answers) -> list[str]:
        """The transcripts of answers."""
        ids = [cut_at(row[:length], self.prompt.end) for row, length in zip(answers.ids.tolist(), answers.lens.tolist(), strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


class Reference:
    """The policy before the first step, frozen. It is no part of what is trained: neither saved nor sharded.

    It is a whole copy in the memory of each process: as much again as the weights, without gradients and optimiser.
    """

    def __init__(self, policy: Policy):
        self.model = copy.deepcopy(policy).requires_grad_(False)

    @torch.no_grad()
    def log_probs(self, batch: RewardBatch, context: Context, answers: Answers, group_size: int, temperature: float) -> Tensor:
        """(B G, N) float32, of the policy's answers."""
        prompts, _ = self.model.read(batch.x, batch.x_lens, batch.suffixes, context)
        return log_probs(self.model.llm, prompts.fork(group_size), answers, temperature)


def check_settings(config: GrpoConfig) -> None:
    """Raises RecipeError for settings that cannot be meant."""
    train = config.train
    wrong = [
        (train.group_size < 2, "train.group_size", "at least 2 answers to compare", train.group_size),
        (min(train.temperature_start, train.temperature_end) <= 0, "train.temperature_end", "temperatures above 0", train.temperature_end),
        (train.clip <= 0, "train.clip", "a bound above 0", train.clip),
        (train.kl_weight < 0, "train.kl_weight", "0 or more", train.kl_weight),
        (train.dr_grpo and train.gspo, "train.gspo", "one of dr_grpo and gspo", "both"),
        (train.dr_grpo_tokens <= 0, "train.dr_grpo_tokens", "more than 0", train.dr_grpo_tokens),
        (train.parallel != "ddp", "train.parallel", "ddp: answers end at different times, shards would wait for each other", train.parallel),
        (train.compile, "train.compile", "false: answers grow by a token at a time, and blocks are compiled for whole rows", train.compile),
        (config.rewards.context not in ("recall", "agreement"), "rewards.context", "recall or agreement", config.rewards.context),
        (config.keywords.max_keywords < 0, "keywords.max_keywords", "0 or more", config.keywords.max_keywords),
    ]
    for is_wrong, name, expected, found in wrong:
        if is_wrong:
            raise RecipeError(name, expected=expected, found=found, fix=f"correct it in --train-config, or by --set {name}=...")


def temperature_at(step: int, config: GrpoTrainConfig) -> float:
    """The temperature of a step: a cosine from `temperature_start` at the first to `temperature_end` at the last."""
    progress = min(step / max(config.max_steps - 1, 1), 1.0)
    return config.temperature_end + (config.temperature_start - config.temperature_end) * 0.5 * (1 + math.cos(math.pi * progress))


def advantages(rewards: Tensor, config: GrpoTrainConfig) -> tuple[Tensor, Tensor]:
    """How much better each answer is than its group.

    Args:
        rewards: (B, G) float.
    Returns:
        (B, G), summing to zero in each group; and (B,) bool, groups with so little difference that they are skipped: all zero.
    """
    std = rewards.std(1, correction=0)
    skipped = std < config.min_group_std
    centred = rewards - rewards.mean(1, keepdim=True)
    scaled = centred if config.dr_grpo else centred / (std[:, None] + EPS)
    return scaled.masked_fill(skipped[:, None], 0.0), skipped


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the utterances of a batch."""

    loss: Tensor
    kl: Tensor  # per utterance: mean over its answers of the mean over their tokens, nats
    clipped: Tensor  # share of tokens (gspo: of answers) whose gradient the clip takes away


def policy_loss(new: Tensor, old: Tensor, ref: Tensor | None, lens: Tensor, advantage: Tensor, config: GrpoTrainConfig) -> PolicyLoss:
    """What GRPO minimises.

    Args:
        new: (B, G, N) float32, log-probabilities with gradients.
        old: (B, G, N), of the policy that sampled.
        ref: (B, G, N), of the reference; None = no KL term.
        lens: (B, G) int64, at least 1.
        advantage: (B, G).
    Source: arXiv 2402.03300, equations 3 and 4 (the estimate of the KL divergence too: never negative); arXiv 2503.20783 (Dr. GRPO);
    arXiv 2507.18071 (GSPO).
    """
    written = (torch.arange(new.shape[2], device=new.device) < lens[..., None]).to(new.dtype)
    # per answer: a mean over its tokens; Dr. GRPO divides all by the same, so that long wrong answers are not made cheap
    over_tokens = written / config.dr_grpo_tokens if config.dr_grpo else written / lens[..., None]
    log_ratio, advantage = (new - old.detach()) * written, advantage[..., None]
    if config.gspo:
        log_ratio = log_ratio.sum(2, keepdim=True) / lens[..., None]
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    is_clipped = ((ratio * advantage > bounded * advantage).to(new.dtype)).expand_as(written)
    gap = (ref.detach() - new) * written if ref is not None else torch.zeros_like(new)
    kl = gap.exp() - gap - 1
    objective = ((gain - config.kl_weight * kl) * over_tokens).sum(2).mean(1)
    mean_of = written / lens[..., None]
    return PolicyLoss(-objective.sum(), (kl.detach() * mean_of).sum(2).mean(1).sum(), (is_clipped * mean_of).sum(2).mean(1).sum())


def grpo_loss(
    policy: Policy, reference: Reference | None, config: GrpoConfig, alarms: Alarms
) -> Callable[[nn.Module, RewardBatch, Draw], dict[str, Tensor]]:
    """The loss function for the training loop.

    Args:
        policy: the model itself, of which the loop may hand over a parallel form.
        reference: None when `kl_weight` is 0.
    Returns:
        a function of (model, batch, draw) that gives `loss` and what is logged, each summed over the utterances. The policy's gradient
        is exactly zero for groups without differences; their KL term stays, and holds the policy where it is right already.
    """
    train = config.train

    def loss(model: nn.Module, batch: RewardBatch, draw: Draw) -> dict[str, Tensor]:
        context, temperature = draw_context(train.chunk, draw.shared), temperature_at(draw.step, train)
        answers, new = model(batch.x, batch.x_lens, batch.suffixes, context, train.group_size, temperature, draw.own)
        ref = reference.log_probs(batch, context, answers, train.group_size, temperature) if reference else None
        rewards, seen = judge(policy.texts(answers), batch, config.rewards, train.group_size)
        rewards = rewards.to(new.device)
        advantage, skipped = advantages(rewards, train)
        shape = (len(batch.ids), train.group_size, -1)
        ref = ref.view(shape) if ref is not None else None
        parts = policy_loss(new.view(shape), answers.log_probs.view(shape), ref, answers.lens.view(shape[:2]), advantage, train)
        entropy = (answers.entropy.sum(1) / answers.lens).view(shape[:2]).mean(1).sum()
        cut_short = (answers.ids.gather(1, answers.lens[:, None] - 1)[:, 0] != policy.prompt.end).view(shape[:2]).to(new.dtype).mean(1).sum()
        sums = {"reward": rewards.mean(1).sum(), "reward_std": rewards.std(1, correction=0).sum(), "zero_variance": skipped.sum()}
        sums |= {"kl": parts.kl, "clipped": parts.clipped, "entropy": entropy, "cut_short": cut_short}
        sums |= {name: torch.tensor(value) for name, value in seen.items()}
        alarms.watch(draw.step, {name: float(value) for name, value in sums.items()}, batch.num_targets)
        return {"loss": parts.loss, **sums}

    return loss


def judge(texts: list[str], batch: RewardBatch, config: RewardConfig, group_size: int) -> tuple[Tensor, dict[str, float]]:
    """Rewards of the answers, and the signs of a model that games them.

    Args:
        texts: B G transcripts, those of an utterance in a row.
    Returns:
        (B, G) float32, on the CPU; and `length_ratio`, `loops`, `hint_copies`: means over a group's answers, summed over the utterances.
    """
    rewards, seen = torch.zeros(len(batch.texts), group_size), {"length_ratio": 0.0, "loops": 0.0, "hint_copies": 0.0}
    for row, (ref, keywords, hints) in enumerate(zip(batch.texts, batch.keywords, batch.hints, strict=True)):
        for column, hyp in enumerate(texts[row * group_size : (row + 1) * group_size]):
            rewards[row, column] = reward(hyp, ref, keywords, config).total
            seen["length_ratio"] += length_ratio(hyp, ref) / group_size
            seen["loops"] += is_loop(hyp) / group_size
            seen["hint_copies"] += copied_hints(hyp, ref, hints) / group_size
    return rewards, seen


def validate_grpo(model: SpeechLlm, batches: Iterable[TextBatch], config: RewardConfig, device: torch.device) -> dict[str, float]:
    """Validation numbers of greedy transcripts, without hints.

    Returns:
        `reward` and `reward_streaming`, with full and with the deployed context; `mer`, `mer_streaming`, percent;
        `score`: the mean reward of both with its sign changed, which decides on the best weights.
    """
    rewards, errors, num_units, num_texts = [0.0, 0.0], [0, 0], 0, 0
    for batch in batches:
        batch = batch.to(device)
        num_texts += len(batch.ids)
        num_units += sum(len(split_tokens(ref)) for ref in batch.texts)
        for row, context in enumerate((FULL_CONTEXT, DEPLOYED)):
            for hyp, ref in zip(model.transcribe(batch.x, batch.x_lens, context=context), batch.texts, strict=True):
                rewards[row] += reward(hyp, ref, (), config).total
                errors[row] += edit_distance(split_tokens(ref), split_tokens(hyp))
    mean, mean_streaming = (value / max(num_texts, 1) for value in rewards)
    mer, mer_streaming = (100 * value / max(num_units, 1) for value in errors)
    return {"score": -(mean + mean_streaming) / 2, "reward": mean, "reward_streaming": mean_streaming, "mer": mer, "mer_streaming": mer_streaming}
