"""ScaledAdam and Eden: icefall's numbers, and what each part of them is for."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nim4.config import OptimConfig
from nim4.train.optim import learning_rate
from nim4.train.scaled_adam import ScaledAdam

GROUPS = (("weight0", "weight1", "one", "tiny"), ("bias", "single"))  # matrices, a vector at the largest size, single entries, a vanishing matrix


@pytest.fixture(scope="module")
def golden():
    """Gradients of 215 steps, rates of both groups, and parameters after some of them, by icefall's optimiser (tests/unit/renew_published.py)."""
    return load_file(Path(__file__).parent / "scaled_adam.safetensors")


def run(golden, steps, optimizer=None, params=None, start=0):
    params = params or {name: torch.nn.Parameter(golden[f"init.{name}"].clone()) for group in GROUPS for name in group}
    optimizer = optimizer or ScaledAdam([{"params": [params[name] for name in group]} for group in GROUPS])
    for step in range(start, steps):
        for group, rate in zip(optimizer.param_groups, golden["rates"][step].tolist(), strict=True):
            group["lr"] = rate
        for name, parameter in params.items():
            parameter.grad = golden[f"grads.{name}"][step].clone()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("steps", [1, 4, 5, 11, 16, 61, 101, 151, 215])
def test_the_same_numbers_as_icefall(golden, steps):
    """Outliers at steps 15, 60 and 150 are clipped by the early medians and by those of 100 steps."""
    params, _ = run(golden, steps)
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.detach(), golden[f"{steps}.{name}"], rtol=1e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_golden_run_is_clipped(golden):
    """Otherwise it would say nothing about clipping."""
    params = {name: torch.nn.Parameter(golden[f"init.{name}"].clone()) for group in GROUPS for name in group}
    run(golden, 16, ScaledAdam([{"params": [params[name] for name in group]} for group in GROUPS], clipping=None), params)
    assert not torch.allclose(params["weight0"].detach(), golden["16.weight0"], rtol=1e-3)


def test_the_rates_are_those_of_icefalls_eden(golden):
    config = OptimConfig(schedule="eden", learning_rate=0.045, warmup_steps=20, eden_steps=40, eden_epochs=3.0)
    rates = [learning_rate(step, config, epoch=step // 50) for step in range(215)]
    assert rates == pytest.approx(golden["rates"][:, 0].tolist(), rel=1e-6)
    assert rates[0] == pytest.approx(0.5 * 0.045)


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_the_course_does_not_depend_on_how_large_a_parameter_is(scale):
    """f(p) from p, and f(p / s) from s p: the second stays s times the first."""
    generator = torch.Generator().manual_seed(0)
    start, towards = torch.randn(4, 6, generator=generator) * 0.1, torch.randn(4, 6, generator=generator) * 0.1
    plain, scaled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start * scale)
    optimizers = [ScaledAdam([parameter]) for parameter in (plain, scaled)]
    for step in range(30):
        noise = torch.randn(4, 6, generator=generator)
        for parameter, factor, optimizer in zip((plain, scaled), (1.0, scale), optimizers, strict=True):
            loss = (parameter / factor - towards + noise).square().mean() * (50.0 if step == 20 else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not torch.allclose(plain.detach(), start, rtol=0.1)
    torch.testing.assert_close(scaled.detach(), plain.detach() * scale, rtol=1e-4, atol=0)


def test_a_saved_state_goes_on_to_the_last_digit(golden):
    whole, _ = run(golden, 130)
    params, optimizer = run(golden, 55)
    state = copy.deepcopy(optimizer.state_dict())
    copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in params.items()}
    fresh = ScaledAdam([{"params": [copies[name] for name in group]} for group in GROUPS])
    fresh.load_state_dict(state)
    run(golden, 130, fresh, copies, start=55)
    assert all(torch.equal(copies[name], whole[name]) for name in whole)


def test_a_missing_gradient_counts_as_zeros():
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    twins = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    one, two = ScaledAdam(params), ScaledAdam(twins)
    for step in range(6):
        params[0].grad = twins[0].grad = torch.full((2, 3), 1.0 + step)
        params[1].grad, twins[1].grad = None, torch.zeros(2, 3)
        one.step()
        two.step()
    assert torch.equal(params[0], twins[0])
    assert torch.equal(params[1], torch.ones(2, 3))
    assert not torch.equal(params[0], torch.ones(2, 3))
