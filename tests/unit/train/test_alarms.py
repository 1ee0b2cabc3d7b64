"""Alarms: each fires when its mean leaves its range, not before there are enough steps, and not at every step."""

import logging

import pytest

from nim4.train.alarms import RANGES, STEPS, Alarms

FINE = {"length_ratio": 1.0, "loops": 0.0, "hint_copies": 0.0, "entropy": 0.5, "zero_variance": 0.5, "kl": 0.01, "clipped": 0.0}


def warnings(caplog, values, steps, per_step=1):
    caplog.clear()
    alarms = Alarms()
    with caplog.at_level(logging.WARNING, "nim4"):
        for step in range(steps):
            for _ in range(per_step):
                alarms.watch(step, {name: 4 * value for name, value in (FINE | values(step)).items()}, 4.0)
    return [record.getMessage() for record in caplog.records]


def test_all_is_well(caplog):
    assert FINE.keys() == RANGES.keys()
    assert warnings(caplog, lambda step: {}, 5 * STEPS) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length_ratio", 2.0),
        ("length_ratio", 0.3),
        ("loops", 0.2),
        ("hint_copies", 0.3),
        ("entropy", 1e-4),
        ("entropy", 4.0),
        ("zero_variance", 1.0),
        ("kl", 3.0),
        ("clipped", 0.2),
    ],
)
def test_each_fires(caplog, name, value):
    assert warnings(caplog, lambda step: {name: value}, STEPS - 1) == []
    told = warnings(caplog, lambda step: {name: value}, 3 * STEPS - 1, per_step=2)
    assert [line.split(":")[0] for line in told] == [f"step {STEPS}", f"step {2 * STEPS}"]
    assert all(f"{name.replace('_', ' ')} is {value:.4g} over the last {STEPS} steps" in line for line in told)


def test_it_is_the_mean_of_the_last_steps(caplog):
    assert warnings(caplog, lambda step: {"loops": 0.1 if step == STEPS else 0.0}, 3 * STEPS) == []  # 0.1 in one of ten
    assert len(warnings(caplog, lambda step: {"loops": 1.0 if step == STEPS else 0.0}, 3 * STEPS)) == 1
