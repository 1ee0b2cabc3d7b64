"""The first 20 steps of training have not moved. If they were meant to: `python tests/golden/renew.py`, and say why in the commit."""

import copy
import json

import pytest
from renew import CURVES, FOLDER, PRETRAIN, STEPS, deviation, make_data, run_curve

TOLERANCE = 1e-3  # relative; the same code on another CPU differs by some 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def found(data):
    """Every curve, made in order: those of later stages start from those of earlier ones."""
    return {name: run_curve(name, data) for name in CURVES}


def golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CURVES)
def test_training_has_not_moved(found, name):
    assert deviation(found[name], golden(name)) < TOLERANCE, f"found {found[name]}"


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_one_of_learning(name):
    curve = golden(name)
    assert len(curve["loss"]) == STEPS
    much = name in PRETRAIN  # the others start from what these have learned
    assert sum(curve["loss"][-3:]) < (0.7 if much else 1.0) * sum(curve["loss"][:3])
    assert ("cr" in curve) == (name == "pretrain_cr_ctc")


def test_a_small_move_is_seen():
    curve = golden("pretrain_cr_ctc")
    assert deviation(curve, curve) == 0
    for change in (1.002, float("nan")):
        moved = copy.deepcopy(curve)
        moved["ctc"][11] *= change
        assert deviation(moved, curve) > TOLERANCE
    moved = copy.deepcopy(curve)
    del moved["cr"]
    assert deviation(moved, curve) > TOLERANCE
