"""Stages 4 to 6 as programs: what trains and what is frozen, to the last bit, and mistakes in their options."""

import shutil

import pytest
import torch
from made_snapshots import aligned, options, pretrained, write_units
from tiny import tiny_llm, write_yaml

from nim4.model.checkpoint import read_weights
from nim4.stage import read_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`3` with one trigger, `4` aligned on it, `llm`, `units`, and model.yaml."""
    folder = tmp_path_factory.mktemp("sft")
    llm = tiny_llm(folder / "llm")
    aligned(folder / "4", pretrained(folder / "3", 1), llm)
    write_units(folder / "units")
    write_yaml(folder / "model.yaml", {"adaptor": {"hidden_dim": 16}, "llm": {"name": str(llm)}})
    return folder


def weights(folder):
    """All weights of a model folder, with the part of each in front of its name."""
    found = {f"llm.{name}": tensor for name, tensor in read_weights(folder / "llm" / "model.safetensors").items()}
    for name, tensor in read_weights(folder / "model.safetensors").items():
        found[name if name.startswith(("encoder.", "head.", "adaptor.")) else f"normalisation.{name}"] = tensor
    return found


def changed(before, after):
    """The parts of which any weight differs."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_alignment_changes_the_adaptor_only(command, folders, tmp_path):
    align = command("04_align")
    shared = [*options(folders / "units", tmp_path, max_steps=4), "--model-config", folders / "model.yaml", "--init", folders / "3"]
    assert align(*shared, "--out", tmp_path / "4") == (0, [])
    before = weights(folders / "4")  # of the same snapshot and language model, with an adaptor that has not learned
    assert changed(before, weights(tmp_path / "4")) == {"adaptor"}


def test_alignment_can_start_beside_a_running_stage_3(command, folders, tmp_path):
    align = command("04_align")
    running = tmp_path / "3.tmp"
    shutil.copytree(folders / "3", running)
    (running / "done.json").unlink()
    (running / "model.safetensors").unlink()
    shared = [*options(folders / "units", tmp_path, max_steps=4), "--model-config", folders / "model.yaml", "--init", tmp_path / "3"]
    code, errors = align(*shared, "--out", tmp_path / "4")
    assert (code, len(errors)) == (2, 1)
    assert align(*shared, "--live", "true", "--out", tmp_path / "4") == (0, [])
    first = read_weights(folders / "4" / "model.safetensors")
    made = read_weights(tmp_path / "4" / "model.safetensors")
    assert all(torch.equal(first[name], made[name]) for name in first if name.startswith("encoder."))


def test_ia_sft_changes_adaptor_and_llm_and_takes_the_last_encoder(command, folders, tmp_path):
    ia_sft = command("05_ia_sft")
    shared = [*options(folders / "units", tmp_path, max_steps=4), "--init", folders / "4", "--snapshots", folders / "3"]
    assert ia_sft(*shared, "--out", tmp_path / "5") == (0, [])
    before, after = weights(folders / "4"), weights(tmp_path / "5")
    assert changed(before, after) == {"encoder", "head", "adaptor", "llm"}
    final = read_weights(folders / "3" / "snapshots" / "step-100.safetensors")
    assert all(torch.equal(tensor, after.get(name, after.get(f"normalisation.{name}"))) for name, tensor in final.items())


def test_joint_sft_changes_all_but_the_head(command, folders, tmp_path):
    joint_sft = command("06_joint_sft")
    shared = [*options(folders / "units", tmp_path, max_steps=4), "--init", folders / "4"]
    assert joint_sft(*shared, "--out", tmp_path / "6", "--set", "drift_alarm=1.0") == (0, [])
    assert changed(weights(folders / "4"), weights(tmp_path / "6")) == {"encoder", "adaptor", "llm"}
    rows = [row for row in read_jsonl(tmp_path / "6" / "metrics.jsonl") if row["kind"] == "valid"]
    assert all(0 < row["encoder_cka"] < 1 for row in rows)
    assert "WARNING drift alarm" in joint_sft.log
    assert joint_sft(*shared, "--out", tmp_path / "slow", "--set", "train.encoder_lr_ratio=0.0") == (0, [])
    assert changed(weights(folders / "4"), weights(tmp_path / "slow")) == {"adaptor", "llm"}
    assert "WARNING drift alarm" not in joint_sft.log


def test_joint_sft_cuts_utterances_short(command, trained, units, folders, tmp_path):
    """On a corpus as stages 1 to 3 leave it: the texts are Chinese, the phonemes real."""
    init = aligned(tmp_path / "4", trained, folders / "llm")
    joint_sft = command("06_joint_sft")
    shared = [*options(units, tmp_path, max_steps=6, partial_prob=1.0), "--init", init, "--out", tmp_path / "6"]
    assert joint_sft(*shared) == (0, [])
    rows = read_jsonl(tmp_path / "6" / "word_ends.jsonl")
    assert len(rows) == 12
    assert all([end for end, _ in row["ends"]] == [1, 2] for row in rows)
    assert "12 of the 12 utterances drawn for it can be cut short" in joint_sft.log
    assert joint_sft(*shared, "--language", "en") == (0, [])
    assert 'rebuilding, language was "zh-en" and is "en"' in joint_sft.log


@pytest.mark.parametrize(
    ("program", "changes", "message"),
    [
        ("05_ia_sft", {"--init": "3"}, "3: expected a model folder of stage 4 or later, found no llm/ in it"),
        ("05_ia_sft", {"--init": "nowhere"}, "nowhere: expected the product of an earlier stage"),
        ("05_ia_sft", {"--snapshots": "4"}, "registry.jsonl: expected the snapshots of stage 3, found none"),
        ("05_ia_sft", {"--set": "train.partial_prob=0.5"}, "train.partial_prob: expected 0 in this stage, found 0.5"),
        ("05_ia_sft", {"--set": "swaps.finale=1"}, "expected a known setting, found 'finale'. Fix: did you mean 'final'?"),
        ("06_joint_sft", {"--init": "3"}, "3: expected a model folder of stage 4 or later, found no llm/ in it"),
        ("06_joint_sft", {"--train-config": "model.yaml"}, "model.yaml: joint_sft: expected a group of settings, found None"),
    ],
)
def test_mistakes(command, folders, tmp_path, program, changes, message):
    given = dict(zip(*[iter(options(folders / "units", tmp_path))] * 2, strict=True)) | {"--init": folders / "4", "--out": tmp_path / "out"}
    given |= {"--snapshots": folders / "3"} if program == "05_ia_sft" else {}
    given |= {name: value if name == "--set" else folders / value for name, value in changes.items()}
    code, errors = command(program)(*[part for pair in given.items() for part in pair])
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert ". Fix: " in errors[0]
    assert not (tmp_path / "out").exists()
