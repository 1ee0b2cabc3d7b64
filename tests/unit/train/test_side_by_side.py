"""Halves of a batch in two threads: the losses and gradients of one."""

import pytest
import torch
from tiny import noise_batch, tiny_llm, tiny_model, tiny_speech_llm

from nim4.config import AugmentConfig, ChunkConfig, OptimConfig, TrainConfig
from nim4.model.conformer import FULL_CONTEXT, Context
from nim4.train.cr_ctc import cr_ctc
from nim4.train.loop import Draw
from nim4.train.roles import ROLES, assign_roles
from nim4.train.side_by_side import SideBySide, side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    assert {name for name, gradient in found.items() if gradient is None} == {name for name, gradient in expected.items() if gradient is None}
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-6, msg=name)


@pytest.mark.parametrize(("cr_weight", "full_view"), [(0.2, True), (0.2, False), (0.0, False)])
def test_the_loss_of_stage_3(cr_weight, full_view):
    config = TrainConfig(
        cr_weight=cr_weight, full_view=full_view, cr_warmup_steps=1, augment=AugmentConfig(), chunk=ChunkConfig(full_prob=0.0, deployed_prob=1.0)
    )
    model = tiny_model().train()
    batch = noise_batch([200, 120, 90], phones=((2, 3, 2), (4,), (1, 2)))
    found = []
    for way in (model, side_by_side(model, config)):
        draw = Draw(3, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
        parts = cr_ctc(model.mean, config)(way, batch, draw)
        found.append(({name: float(value) for name, value in parts.items()}, gradients(model, parts["loss"])))
    assert isinstance(way, SideBySide)
    (one, of_one), (two, of_two) = found
    assert two == pytest.approx(one, rel=1e-5)
    assert_alike(of_two, of_one)


@pytest.mark.parametrize("stage", ["align", "joint_sft"])
def test_the_loss_on_transcripts(stage, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path)).train()
    assign_roles(model, ROLES[stage], model.config.llm)
    halves = side_by_side(model, OptimConfig())
    assert isinstance(halves, SideBySide)
    x, x_lens = torch.randn(3, 200, 80), torch.tensor([200, 120, 90])
    suffixes, answers = [model.prompt.suffix([])] * 3, [model.prompt.answer(text) for text in ("北京", "a b c", "")]
    for context in (FULL_CONTEXT, Context(16, 4)):
        (one, right_of_one), (two, right_of_two) = (way(x, x_lens, suffixes, answers, context) for way in (model, halves))
        assert float(two) == pytest.approx(float(one), rel=1e-5)
        assert int(right_of_two) == int(right_of_one)
        assert_alike(gradients(model, 0.5 * two), gradients(model, 0.5 * one))


def test_a_single_utterance_stays_whole():
    model = tiny_model().train()
    x, x_lens = torch.randn(1, 80, 80), torch.tensor([80])
    assert torch.equal(SideBySide(model)(x, x_lens)[0], model(x, x_lens)[0])


def test_threads_keep_their_numbers():
    torch.set_num_threads(4)
    halves = SideBySide(tiny_model())
    assert halves.run(lambda part: torch.get_num_threads() + part, [0, 10]) == [2, 12]
    assert torch.get_num_threads() == 4


def test_an_error_in_a_half_is_raised():
    halves = SideBySide(tiny_model().train())
    with pytest.raises(AssertionError):
        halves(torch.randn(2, 80), torch.tensor([80, 80]))


def test_when_a_model_stays_as_it_is():
    model, config = tiny_model(), OptimConfig()
    assert side_by_side(model, OptimConfig(precision="bf16")) is model
    assert side_by_side(model, OptimConfig(compile=True)) is model
    linear = torch.nn.Linear(2, 2)
    assert side_by_side(linear, config) is linear
    assert isinstance(side_by_side(model, config), SideBySide)
    model.encoder.dropout.p = 0.1
    assert side_by_side(model, config) is model
    torch.set_num_threads(1)
    model.encoder.dropout.p = 0.0
    assert side_by_side(model, config) is model
