"""What acts on a Zipformer in training: gradients as icefall changes them, schedules, what is dropped; in evaluation nothing."""

import copy
import math

import pytest
import torch
from golden_zipformer import GOLDEN, SHAPE, activations
from safetensors.torch import load_file
from tiny import noise_batch

from nim4.config import ZipformerConfig
from nim4.model import regularisers
from nim4.model.regularisers import Balancer, Pace, Whiten, drop_sequences, limited, shared_dropout
from nim4.model.zipformer import Zipformer
from nim4.model.zipformer_layer import BiasNorm, Bypass, swoosh_l, swoosh_r


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(regularisers, "happens", lambda probability: probability > 0)


@pytest.mark.parametrize(
    ("name", "module"), [("balanced", Balancer(Pace(), 0.3, 0.7, 0.2, 4.0)), ("whitened", Whiten(Pace(), 1.5, scale=0.1, num_groups=2))]
)
def test_gradients_are_changed_as_by_icefall(always, name, module):
    x, gradient = activations()
    x.requires_grad_()
    y = module(x)
    assert torch.equal(y, x)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, load_file(GOLDEN)[name], atol=1e-5, rtol=1e-4)
    assert not torch.equal(x.grad, gradient)
    x.grad = None
    module.eval()(x).backward(gradient)
    assert torch.equal(x.grad, gradient)


def test_a_balancer_leads_every_channel_between_its_limits(always):
    x = torch.nn.Parameter(activations()[0])
    balancer, optimizer = Balancer(Pace(), 0.3, 0.7, 0.2, 4.0), torch.optim.SGD([x], lr=0.5)
    noise = torch.Generator().manual_seed(0)

    def outside():
        share, size = (x > 0).float().mean(0), x.abs().mean(0)
        return [int(channel) for channel in range(6) if not (0.27 < share[channel] < 0.73 and 0.18 < size[channel] < 4.2)]

    assert outside() == [0, 1, 2, 3]
    for _ in range(6000):
        optimizer.zero_grad()
        balancer(x).backward(torch.randn(x.shape, generator=noise) * x.detach().abs().clamp(min=0.05))
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        if not outside():
            return
    raise AssertionError(outside())


def test_whitening_stops_at_its_limit(always):
    generator = torch.Generator().manual_seed(0)
    white, gradient = torch.randn(500, 8, generator=generator), torch.randn(500, 8, generator=generator)
    for x, is_changed in ((white, False), (white[:, :1] + 0.1 * white, True)):
        x = x.clone().requires_grad_()
        Whiten(Pace(), 2.0)(x).backward(gradient)
        assert torch.equal(x.grad, gradient) is not is_changed


def test_a_parameter_beyond_its_limit_is_only_led_back():
    parameter = torch.tensor([0.05, 0.5, 1.5, 0.05, 1.5], requires_grad=True)
    limited(parameter, 0.1, 1.0).backward(torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]))
    assert parameter.grad.tolist() == [-1.0, 1.0, 1.0, -1.0, 1.0]


def test_schedules():
    pace, schedule = Pace(), ((10.0, 1.0), (20.0, 0.5), (40.0, 0.0))
    assert pace(schedule) == 0.0
    assert pace(0.7) == 0.7
    for batch, value in ((0, 1.0), (10, 1.0), (15, 0.75), (20, 0.5), (30, 0.25), (40, 0.0), (1e9, 0.0)):
        pace.batch = batch
        assert pace(schedule) == pytest.approx(value)


def test_the_steps_of_a_training_are_stretched_to_the_schedules():
    encoder = Zipformer(ZipformerConfig(**SHAPE, relax_steps=400))
    assert encoder._pace.batch == math.inf
    encoder.at_step(100)
    layers = [encoder.encoder.encoders[0].layers[0], encoder.encoder.encoders[1].layers[0]]
    assert {layer._pace.batch for layer in layers} == {5000.0}
    copied = copy.deepcopy(encoder)
    copied.at_step(0)
    assert copied.encoder.encoders[0].layers[0]._pace.batch == 0.0
    assert layers[0]._pace.batch == 5000.0


def test_whole_utterances_are_dropped():
    torch.manual_seed(0)
    kept = drop_sequences(torch.ones(2000, 3, 2), 0.25)
    assert set(kept.sum((1, 2)).tolist()) == {0.0, 6.0}
    assert 0.2 < 1 - float(kept.mean()) < 0.3
    kept = shared_dropout(torch.ones(50, 40, 30), 0.25)
    assert torch.equal(kept, kept[:, :1].expand(-1, 40, -1))
    assert 0.2 < float((kept == 0).float().mean()) < 0.3
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.05)


def test_a_layer_is_passed_by_at_its_rate():
    pace, before, after = Pace(), torch.zeros(2000, 3, 4), torch.ones(2000, 3, 4)
    bypass = Bypass(4, pace, ((0.0, 0.5), (100.0, 0.1)))
    for batch, rate in ((0, 0.5), (100, 0.1)):
        pace.batch = batch
        torch.manual_seed(0)
        assert float((bypass(before, after)[:, 0, 0] == 0).float().mean()) == pytest.approx(rate, abs=0.03)
    assert torch.equal(bypass.eval()(before, after), 0.5 * after)


def test_the_bypass_is_held_nearly_straight_through_at_first():
    pace = Pace()
    bypass = Bypass(1, pace)
    for batch, gradient in ((0, -1.0), (20_000, 1.0)):  # 0.5 is below 0.9, and above 0.2
        pace.batch, bypass.bypass_scale.grad = batch, None
        bypass(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)).sum().backward()
        assert float(bypass.bypass_scale.grad) == gradient


def test_bias_norm_and_activations():
    norm, x = BiasNorm(8), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.bias.fill_(0.5)
    expected = x / (x - 0.5).square().mean(-1, keepdim=True).sqrt() * math.e
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        norm.log_scale.fill_(2.0)  # beyond 1.5
    norm(x).norm().neg().backward()
    assert norm.log_scale.grad > 0
    values = torch.tensor([-30.0, 0.0, 1.0, 60.0])
    torch.testing.assert_close(swoosh_l(values), (1 + (values.double() - 4).exp()).log().float() - 0.08 * values - 0.035)
    torch.testing.assert_close(swoosh_r(values), (1 + (values.double() - 1).exp()).log().float() - 0.08 * values - 0.313261687)
    assert float(swoosh_r(torch.zeros(1))) == pytest.approx(0, abs=1e-6)


def test_training_is_random_evaluation_is_not_and_every_parameter_takes_part():
    encoder, batch = Zipformer(ZipformerConfig(**SHAPE)), noise_batch([80, 60])
    encoder.at_step(0)
    results = []
    for seed in (0, 0, 1):
        encoder.zero_grad()
        torch.manual_seed(seed)
        encoded, _ = encoder(batch.x, batch.x_lens)
        encoded.square().sum().backward()
        results.append((encoded.detach(), [parameter.grad.clone() for parameter in encoder.parameters()]))
    assert all(map(torch.equal, results[0][1], results[1][1]))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])
    encoder.eval()
    assert torch.equal(encoder(batch.x, batch.x_lens)[0], encoder(batch.x, batch.x_lens)[0])
