"""GRPO: advantages and losses by hand, gradients that must be there and that must not, one prefill, and resuming."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from nim4.config import ChunkConfig, GrpoConfig, GrpoTrainConfig, KeywordConfig, RecipeError, RewardConfig
from nim4.corpus.batch import Source, TrainBatches
from nim4.corpus.keywords import Keywords, RewardExamples
from nim4.corpus.manifest import load_cuts
from nim4.train import grpo
from nim4.train.alarms import Alarms
from nim4.train.distributed import Processes
from nim4.train.grpo import Policy, Reference, advantages, check_settings, grpo_loss, policy_loss, temperature_at, validate_grpo
from nim4.train.loop import Draw, Trainer
from nim4.train.roles import assign_roles

ALONE = Processes(0, 1, torch.device("cpu"))
TRAIN = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "group_size": 3,
    "max_duration_s": 1.3,
    "num_buckets": 2,
    "num_workers": 0,
    "log_every": 2,
    "valid_every": 2,
    "save_every": 2,
    "keep_last": 2,
    "average_last": 1,
}


def settings(**train):
    return GrpoConfig(keywords=KeywordConfig(hint_prob=1.0), train=GrpoTrainConfig(**(TRAIN | train)))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.tiny_llm(tmp_path_factory.mktemp("llm"), scale=1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny.write_features(tmp_path_factory.mktemp("features"), "train", [34, 40, 30, 42, 36, 38])


def new_policy(llm, trained=("encoder", "adaptor", "llm")):
    policy = Policy(tiny.tiny_speech_llm(llm))
    assign_roles(policy, trained, policy.config.llm)
    return policy


def examples(policy, config):
    return RewardExamples(tiny.INVENTORY, policy.prompt, config.keywords, 0, Keywords(["a", "b c", "d"]))


def batch_of(policy, manifest, config, count=2):
    return examples(policy, config)(list(load_cuts(manifest))[:count], 0)


def draw(step=0, seed=0):
    return Draw(step, torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---------------------------------------------------------------------------------------------------------- the formulas


def test_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.30001]])
    found, skipped = advantages(rewards, GrpoTrainConfig())
    assert skipped.tolist() == [False, True, True]
    torch.testing.assert_close(found[0], torch.tensor([1.0, -1.0, 0.0, 0.0]) * math.sqrt(2), atol=1e-4, rtol=0)  # deviation 0.354
    assert not found[1:].any()
    found, _ = advantages(rewards, GrpoTrainConfig(dr_grpo=True))
    assert found[0].tolist() == [0.5, -0.5, 0.0, 0.0]
    drawn = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert advantages(drawn, GrpoTrainConfig())[0].sum(1).abs().max() < 1e-5
    shifted, _ = advantages(5 * drawn - 3, GrpoTrainConfig())
    torch.testing.assert_close(shifted, advantages(drawn, GrpoTrainConfig())[0], atol=1e-4, rtol=1e-4)


def logs(*ratios):
    return torch.tensor([[[math.log(ratio) for ratio in row] for row in ratios]])


LENS = torch.tensor([[2, 1]])
ADVANTAGE = torch.tensor([[1.0, -1.0]])
OLD = torch.zeros(1, 2, 2)
RATIOS = ([1.5, 0.9], [1.3, 99.0])  # the last one is padding


def test_grpo_by_hand():
    found = policy_loss(logs(*RATIOS), OLD, None, LENS, ADVANTAGE, GrpoTrainConfig())
    # first answer: (min(1.5, 1.2) + 0.9) / 2 = 1.05; second: min(-1.3, -1.2) = -1.3; mean of both
    assert float(found.loss) == pytest.approx(-(1.05 - 1.3) / 2)
    assert float(found.clipped) == pytest.approx((1 / 2 + 0) / 2)
    assert float(found.kl) == 0


def test_kl_by_hand():
    ref = logs([1.5, 0.9 * 2], [1.3 / 4, 1.0])
    found = policy_loss(logs(*RATIOS), OLD, ref, LENS, 0 * ADVANTAGE, GrpoTrainConfig(kl_weight=0.1))
    first, second = (0 + (2 - math.log(2) - 1)) / 2, 0.25 - math.log(0.25) - 1
    assert float(found.kl) == pytest.approx((first + second) / 2)
    assert float(found.loss) == pytest.approx(0.1 * (first + second) / 2)


def test_dr_grpo_by_hand():
    found = policy_loss(logs(*RATIOS), OLD, None, LENS, ADVANTAGE, GrpoTrainConfig(dr_grpo=True, dr_grpo_tokens=10.0))
    assert float(found.loss) == pytest.approx(-((1.2 + 0.9) / 10 - 1.3 / 10) / 2)


def test_gspo_by_hand():
    # one ratio per answer: sqrt(1.5 * 0.9) = 1.1619, and 1.3, which the minimum keeps where the advantage is negative
    for clip, first, clipped in ((0.2, 1.35**0.5, 0.0), (0.1, 1.1, 0.5)):
        found = policy_loss(logs(*RATIOS), OLD, None, LENS, ADVANTAGE, GrpoTrainConfig(gspo=True, clip=clip))
        assert float(found.loss) == pytest.approx(-(first - 1.3) / 2)
        assert float(found.clipped) == pytest.approx(clipped)


def test_the_clip_takes_the_gradient_away_where_a_step_has_gone_far_enough():
    for advantage, has_gradient in ((1.0, [False, True, True]), (-1.0, [True, True, False])):
        new = logs([1.5, 1.0, 0.5]).requires_grad_()
        policy_loss(new, torch.zeros(1, 1, 3), None, torch.tensor([[3]]), torch.tensor([[advantage]]), GrpoTrainConfig()).loss.backward()
        assert (new.grad[0, 0] != 0).tolist() == has_gradient


def test_the_gradient_at_ratio_one_is_that_of_the_policy_gradient():
    new = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantage, lens = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([[4, 2, 1], [3, 4, 1]])
    policy_loss(new, new.detach().clone(), None, lens, advantage, GrpoTrainConfig()).loss.backward()
    written = (torch.arange(4) < lens[..., None]).float()
    torch.testing.assert_close(new.grad, -advantage[..., None] * written / lens[..., None] / 3)


def test_temperature():
    config = GrpoTrainConfig(max_steps=101)
    assert [temperature_at(step, config) for step in (0, 50, 100)] == pytest.approx([1.0, 0.85, 0.7])
    assert temperature_at(25, config) == pytest.approx(0.7 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    assert temperature_at(0, GrpoTrainConfig(max_steps=1)) == 1.0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"group_size": 1}, "train.group_size: expected at least 2 answers to compare, found 1"),
        ({"temperature_end": 0.0}, "train.temperature_end: expected temperatures above 0"),
        ({"clip": 0.0}, "train.clip"),
        ({"kl_weight": -1.0}, "train.kl_weight"),
        ({"dr_grpo": True, "gspo": True}, "one of dr_grpo and gspo"),
        ({"dr_grpo_tokens": 0.0}, "train.dr_grpo_tokens"),
        ({"parallel": "fsdp2"}, "train.parallel: expected ddp"),
    ],
)
def test_settings_that_cannot_be_meant(train, message):
    with pytest.raises(RecipeError, match=message):
        check_settings(GrpoConfig(train=GrpoTrainConfig(**train)))
    check_settings(GrpoConfig())


def test_other_settings_that_cannot_be_meant():
    with pytest.raises(RecipeError, match=r"rewards\.context: expected recall or agreement"):
        check_settings(GrpoConfig(rewards=RewardConfig(context="both")))
    with pytest.raises(RecipeError, match=r"keywords\.max_keywords"):
        check_settings(GrpoConfig(keywords=KeywordConfig(max_keywords=-1)))


# --------------------------------------------------------------------------------------------------------------- a step


def rewarded(monkeypatch, function):
    """The reward of a text is what `function` says."""
    monkeypatch.setattr(grpo, "reward", lambda hyp, ref, keywords, config: SimpleNamespace(total=function(hyp)))


def test_equal_rewards_give_no_gradient_at_all(llm, manifest, monkeypatch):
    policy, config = new_policy(llm), settings(kl_weight=0.0)
    batch = batch_of(policy, manifest, config)
    for function, is_zero in ((lambda hyp: 0.3, True), (lambda hyp: 0.01 * len(hyp), False)):
        rewarded(monkeypatch, function)
        policy.zero_grad()
        parts = grpo_loss(policy, None, config, Alarms())(policy, batch, draw())
        parts["loss"].backward()
        found = gradients(policy)
        assert len(found) == sum(parameter.requires_grad for parameter in policy.parameters())  # DDP wants one for each
        assert (not any(gradient.any() for gradient in found.values())) is is_zero
        assert float(parts["zero_variance"]) == (2 if is_zero else 0)
        assert parts["loss"].item() == pytest.approx(0, abs=1e-5)  # at ratio 1 it is minus the sum of the advantages


def test_equal_rewards_leave_the_pull_of_the_reference(llm, manifest, monkeypatch):
    policy, config = new_policy(llm), settings(kl_weight=0.04)
    reference = Reference(policy)
    rewarded(monkeypatch, lambda hyp: 0.3)
    loss, batch = grpo_loss(policy, reference, config, Alarms()), batch_of(policy, manifest, config)
    parts = loss(policy, batch, draw())
    assert float(parts["kl"]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        policy.llm.model.norm.weight *= 5
    parts = loss(policy, batch, draw())
    assert float(parts["kl"]) > 0.05
    assert parts["loss"].item() == pytest.approx(0.04 * float(parts["kl"]), rel=1e-4)
    parts["loss"].backward()
    norm = policy.llm.model.norm.weight
    assert float((norm.grad * norm).sum()) > 0  # a step shrinks what was made too large


def test_only_what_has_a_role_gets_a_gradient(llm, manifest):
    policy, config = new_policy(llm, ("llm",)), settings(kl_weight=0.0)
    grpo_loss(policy, None, config, Alarms())(policy, batch_of(policy, manifest, config), draw())["loss"].backward()
    assert {name.split(".")[0] for name in gradients(policy)} == {"llm"}


def test_speech_is_encoded_and_prompts_are_read_once_per_step(llm, manifest):
    policy, config = new_policy(llm), settings()
    counts = {"encoder": 0, "adaptor": 0, "prompts": 0}

    def count(name):
        counts[name] += 1

    policy.acoustic.encoder.register_forward_hook(lambda *_: count("encoder"))
    policy.adaptor.register_forward_hook(lambda *_: count("adaptor"))
    policy.llm.model.register_forward_pre_hook(
        lambda module, args, kwargs: count("prompts") if kwargs.get("inputs_embeds") is not None else None, with_kwargs=True
    )
    grpo_loss(policy, None, config, Alarms())(policy, batch_of(policy, manifest, config), draw())["loss"].backward()
    assert counts == {"encoder": 1, "adaptor": 1, "prompts": 1}


def test_the_ratio_is_one_and_nothing_is_clipped(llm, manifest):
    policy, config = new_policy(llm), settings()
    batch = batch_of(policy, manifest, config)
    with torch.no_grad():
        answers, new = policy(batch.x, batch.x_lens, batch.suffixes, grpo.FULL_CONTEXT, 3, 0.8, draw().own)
    assert answers.ids.shape[0] == 6
    torch.testing.assert_close(new, answers.log_probs, atol=1e-4, rtol=1e-4)
    assert float(grpo_loss(policy, None, config, Alarms())(policy, batch, draw())["clipped"]) == 0


def test_a_step_can_be_repeated_and_follows_from_its_own_draw(llm, manifest):
    policy, config = new_policy(llm), settings(chunk=ChunkConfig(full_prob=1.0))
    loss, batch = grpo_loss(policy, None, config, Alarms()), batch_of(policy, manifest, config)

    def numbers(seed):
        return {name: value.item() for name, value in loss(policy, batch, draw(seed=seed)).items()}

    first = numbers(0)
    torch.manual_seed(77)
    assert numbers(0) == first
    assert numbers(1)["reward"] != first["reward"]


def test_policy_and_reference_use_the_temperature_of_the_step(llm, manifest, monkeypatch):
    policy, config = new_policy(llm), settings()
    reference, used = Reference(policy), []
    whole = grpo.log_probs
    monkeypatch.setattr(grpo, "sample", lambda *args, one=grpo.sample: (used.append(args[3]), one(*args))[1])
    monkeypatch.setattr(grpo, "log_probs", lambda *args: (used.append(args[3]), whole(*args))[1])
    loss, batch = grpo_loss(policy, reference, config, Alarms()), batch_of(policy, manifest, config)
    for step in (0, 3):
        used.clear()
        loss(policy, batch, draw(step))
        assert used == pytest.approx([temperature_at(step, config.train)] * 3)  # sampling, scoring, reference


def test_the_policy_never_drops_out(llm):
    policy = new_policy(llm).train()
    assert not any(module.training for module in policy.modules())


def test_a_reward_for_one_letter_makes_it_likely(llm, manifest, monkeypatch):
    policy, config = new_policy(llm, ("llm",)), settings(kl_weight=0.0, group_size=8, max_steps=1000)
    rewarded(monkeypatch, lambda hyp: hyp.count("e") / max(len(hyp), 1))
    loss, batch = grpo_loss(policy, None, config, Alarms()), batch_of(policy, manifest, config)
    wanted = policy.tokenizer.convert_tokens_to_ids("e")

    def probability():
        with torch.no_grad():
            return float(policy.read(batch.x, batch.x_lens, batch.suffixes, grpo.FULL_CONTEXT)[0].logits.softmax(-1)[:, wanted].mean())

    before = probability()
    optimizer = torch.optim.Adam(policy.llm.parameters(), lr=3e-3)
    for step in range(15):
        loss(policy, batch, draw(step, step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probability() > 2 * before


def test_what_is_logged(llm, manifest, monkeypatch):
    policy, config = new_policy(llm), settings()
    texts = ["a a a a a", "d", "", "x", "x", "x"]
    monkeypatch.setattr(Policy, "texts", lambda self, answers: texts)
    batch = batch_of(policy, manifest, config)
    for row in (0, 1):
        batch.texts[row], batch.hints[row], batch.keywords[row] = "b c", ["d", "b c"], ["d", "b c"]
    parts = {name: float(value) for name, value in grpo_loss(policy, Reference(policy), config, Alarms())(policy, batch, draw()).items()}
    expected = [grpo.reward(text, "b c", ["d", "b c"], config.rewards).total for text in texts]
    assert parts["reward"] == pytest.approx(sum(expected) / 3)
    assert parts["zero_variance"] == 1
    assert parts["length_ratio"] == pytest.approx((2.5 + 0.5 + 0) / 3 + 0.5)
    assert parts["loops"] == pytest.approx(1 / 3)
    assert parts["hint_copies"] == pytest.approx(0.5 / 3)
    assert 0 < parts["entropy"] / 2 < math.log(264)
    assert 0 <= parts["cut_short"] <= 2


# ------------------------------------------------------------------------------------------------------------- training


class Killed(Exception):
    pass


def train(llm, manifest, work, kill_at=None, **changes):
    config = settings(**changes)
    policy = Policy(tiny.tiny_speech_llm(llm))
    reference = Reference(policy)
    before = {name: value.clone() for name, value in reference.model.state_dict().items()}
    assign_roles(policy, ("encoder", "adaptor", "llm"), policy.config.llm)

    def stop(step):
        if step == kill_at:
            raise Killed

    work.mkdir(exist_ok=True)
    make = examples(policy, config)
    batches = TrainBatches([Source(manifest)], make, config.train)
    valid = make(list(load_cuts(manifest))[:2], -1)
    evaluate = lambda: validate_grpo(policy, [valid], config.rewards, ALONE.device)  # noqa: E731
    Trainer(policy, grpo_loss(policy, reference, config, Alarms()), batches, config.train, work, ALONE, evaluate=evaluate, after_step=stop).run()
    return policy, reference, before


def test_resuming_equals_not_stopping_and_the_reference_stays(llm, manifest, tmp_path):
    policy, reference, before = train(llm, manifest, tmp_path / "whole")
    after = reference.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    changed = {name.split(".")[0] for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"acoustic", "adaptor", "llm"}
    with pytest.raises(Killed):
        train(llm, manifest, tmp_path / "killed", kill_at=3)
    resumed, _, _ = train(llm, manifest, tmp_path / "killed")
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in resumed.state_dict().items())
    saved = torch.load(next((tmp_path / "whole" / "checkpoints").glob("step-4")) / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) == sum(parameter.requires_grad for parameter in policy.parameters())  # nothing of the reference


def test_validation_numbers(llm, manifest, monkeypatch):
    policy, config = new_policy(llm), settings()
    batch = batch_of(policy, manifest, config)
    batch.texts[:] = ["a b c d", "a b"]
    heard = {grpo.FULL_CONTEXT: ["a b c d", "a x"], grpo.DEPLOYED: ["", "a b"]}
    monkeypatch.setattr(Policy, "transcribe", lambda self, x, x_lens, context: heard[context])
    found = validate_grpo(policy, [batch], RewardConfig(), torch.device("cpu"))
    assert found["reward"] == pytest.approx((1 + math.exp(-1)) / 2)
    assert found["reward_streaming"] == pytest.approx((math.exp(-2) - 0.5 + 1) / 2)
    assert found["score"] == pytest.approx(-(found["reward"] + found["reward_streaming"]) / 2)
    assert (found["mer"], found["mer_streaming"]) == pytest.approx((100 / 6, 400 / 6))
