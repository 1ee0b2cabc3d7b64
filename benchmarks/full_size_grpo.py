"""Whole steps of GRPO for train_full_size.py: ours, from one read prompt per group, and as a plain loop does it.

Random weights would write until the limit, so each answer has exactly as many ids as its transcript, in both ways.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from full_size import RandomBatches
from lhotse import MonoCut
from torch import Tensor, nn

from nim4.config import GrpoConfig
from nim4.corpus.batch import RewardBatch, TextBatch
from nim4.model.asr import IGNORED, SpeechLlm
from nim4.model.conformer import Context, valid_mask
from nim4.model.rollout import Prefill
from nim4.train.alarms import Alarms
from nim4.train.augment import draw_context
from nim4.train.grpo import Policy, Reference, advantages, grpo_loss, judge, policy_loss, temperature_at
from nim4.train.loop import Draw, Loss, Trainer, _generator

NO_ID = -1


class RewardBatches(RandomBatches):
    """Batches of noise and random ids whose answers are rewarded; no hints."""

    def __call__(self, cuts: Sequence[MonoCut], epoch: int) -> RewardBatch:
        nothing: list[list[str]] = [[] for _ in cuts]
        return RewardBatch(**vars(super().__call__(cuts, epoch)), hints=nothing, keywords=nothing)


class FixedLength(Policy):
    """A policy whose answers are as long as it is told: no id ends them.

    Attributes:
        limits: lengths of the next answers.
    """

    def __init__(self, model: SpeechLlm):
        super().__init__(model)
        self.prompt.end = NO_ID
        self.limits: list[int] = []

    def read(self, x: Tensor, x_lens: Tensor, suffixes: list[list[int]], context: Context) -> tuple[Prefill, list[int]]:
        return super().read(x, x_lens, suffixes, context)[0], self.limits


def fixed_length_loss(policy: FixedLength, reference: Reference, config: GrpoConfig) -> Loss:
    """The loss of stage 8; answers get the lengths of the transcripts."""
    loss = grpo_loss(policy, reference, config, Alarms())

    def told(model: nn.Module, batch: RewardBatch, draw: Draw) -> dict[str, Tensor]:
        policy.limits = [len(answer) for answer in batch.answers]
        return loss(model, batch, draw)

    return told


@dataclass(frozen=True)
class Answered(RewardBatch):
    """Utterances with one sampled answer each.

    Attributes:
        advantage: (B,) float32.
    """

    advantage: Tensor


class PlainGrpo:
    """GRPO from what a Hugging Face user has at hand.

    Each of the G answers of a batch is sampled by a `generate` of its own, which encodes the speech and reads the prompts again, padded on the
    left, until the longest answer ends; and each is trained on as a batch of whole rows, with logits of all positions, in policy and reference.

    Attributes:
        trainer: a copy of the one of our way, with the same model and optimiser.
    """

    def __init__(self, policy: Policy, reference: Reference, config: GrpoConfig, trainer: Trainer):
        self._policy, self._reference, self._config = policy, reference, config
        self.trainer = copy.copy(trainer)
        self.trainer.loss = self._loss

    def train(self, micro_batches: list[TextBatch]) -> dict[str, float]:
        """One step, as Trainer._train_step."""
        device = self.trainer.processes.device
        answered = [one for batch in micro_batches for one in self._answer(batch.to(device))]
        return self.trainer._train_step(self._policy, answered)

    @torch.no_grad()
    def _answer(self, batch: RewardBatch) -> list[Answered]:
        """G batches of the same utterances, an answer to each in each."""
        train, step = self._config.train, self.trainer.step
        context, temperature = draw_context(train.chunk, _generator(train.seed, step)), temperature_at(step, train)
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            groups = [self._generate(batch, context, temperature) for _ in range(train.group_size)]
        texts = [self._policy.tokenizer.decode(answers[row], skip_special_tokens=True) for row in range(len(batch.ids)) for answers in groups]
        advantage, _ = advantages(judge(texts, batch, self._config.rewards, train.group_size)[0], train)
        return [Answered(**vars(batch) | {"answers": answers}, advantage=advantage[:, k].to(batch.x.device)) for k, answers in enumerate(groups)]

    def _generate(self, batch: RewardBatch, context: Context, temperature: float) -> list[list[int]]:
        embeds, _, lens = self._policy.rows(*self._policy.speech(batch.x, batch.x_lens, context), batch.suffixes, left=True)
        mask = torch.arange(embeds.shape[1], device=lens.device) >= (embeds.shape[1] - lens)[:, None]
        limits = [len(answer) for answer in batch.answers]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}
        ids = self._policy.llm.generate(inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=max(limits), **sampling)
        return [row[:limit] for row, limit in zip(ids.tolist(), limits, strict=True)]

    def _loss(self, model: nn.Module, batch: Answered, draw: Draw) -> dict[str, Tensor]:
        train, lens = self._config.train, torch.tensor([[len(answer)] for answer in batch.answers], device=batch.x.device)
        context, temperature = draw_context(train.chunk, draw.shared), temperature_at(draw.step, train)
        new = _log_probs(self._policy, batch, context, temperature)
        with torch.no_grad():
            ref = _log_probs(self._reference.model, batch, context, temperature)
        return {"loss": policy_loss(new, new, ref, lens, batch.advantage[:, None], train).loss}


def _log_probs(model: SpeechLlm, batch: Answered, context: Context, temperature: float) -> Tensor:
    """(B, 1, N) float32, log-probabilities of the answers' ids, zero beyond their lengths."""
    embeds, labels, lens = model.rows(*model.speech(batch.x, batch.x_lens, context), batch.suffixes, batch.answers)
    mask = valid_mask(lens, embeds.shape[1]).long()
    logits = model.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, :-1].float() / temperature
    labels = labels[:, 1:].to(embeds.device)
    all_positions = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none").view(labels.shape)
    answer_lens = torch.tensor([len(answer) for answer in batch.answers], device=lens.device)
    written = valid_mask(answer_lens, int(answer_lens.max()))
    return all_positions.new_zeros(written.shape).masked_scatter(written, all_positions[labels != IGNORED])[:, None]


def grpo_ways(model: SpeechLlm, config: GrpoConfig, make_trainer: Callable[[Policy, Loss], Trainer]) -> tuple[Trainer, PlainGrpo]:
    """Our trainer of stage 8 and the plain loop, which share policy, reference and optimiser.

    Args:
        make_trainer: makes the trainer of a policy, all of whose parts but the phoneme head train.
    """
    policy = FixedLength(model)
    reference = Reference(policy)
    trainer = make_trainer(policy, fixed_length_loss(policy, reference, config))
    return trainer, PlainGrpo(policy, reference, config, trainer)
