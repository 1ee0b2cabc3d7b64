"""Stage 8 as a program: its product, its mistakes, and two processes against one."""

import json
import multiprocessing
import os
import socket
import sys

import pytest
import tiny
import torch
from made_corpora import load_program

from nim4 import stage
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import read_weights
from nim4.stage import read_json, read_jsonl

TRAIN = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "group_size": 2,
    "max_duration_s": 0.9,
    "num_buckets": 2,
    "num_workers": 0,
    "log_every": 1,
    "valid_every": 2,
    "save_every": 1,
    "keep_last": 1,
    "average_last": 1,
    "short_first_epochs": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`units` with splits train and dev, `init` as stages 4 to 7 leave a model, `train.yaml` and `entities.jsonl`."""
    folder = tmp_path_factory.mktemp("grpo")
    tiny.write_features(folder / "units", "train", [34, 40, 30, 42, 36, 38, 33, 35])
    tiny.write_features(folder / "units", "dev", [32, 40], prefix="v")
    tiny.INVENTORY.save(folder / "units" / "tokens.txt")
    model = tiny.tiny_speech_llm(tiny.tiny_llm(folder / "llm"))
    model.save(folder / "init", model.state_dict(), tiny.INVENTORY)
    (folder / "init" / "done.json").write_text("{}")
    tiny.write_yaml(folder / "train.yaml", {"grpo": {"train": TRAIN, "keywords": {"distractor_prob": 0.5}}})
    (folder / "entities.jsonl").write_text("".join(json.dumps({"text": text, "count": 1, "phones": text}) + "\n" for text in ("a", "b c", "d d")))
    return folder


@pytest.fixture
def grpo(command):
    return command("08_grpo")


def options_of(folder, **changes):
    names = {"units": folder / "units", "train": "train", "valid": "dev", "train-config": folder / "train.yaml", "init": folder / "init"}
    names |= {"entities": folder / "entities.jsonl", "device": "cpu"} | changes
    return [part for name, value in names.items() if value is not None for part in (f"--{name}", str(value))]


def test_the_product(grpo, folder, tmp_path):
    assert grpo(*options_of(folder), "--out", tmp_path / "8") == (0, [])
    assert "roles: encoder" in grpo.log
    assert read_json(tmp_path / "8" / "done.json")["step"] == 2
    assert read_json(tmp_path / "8" / "settings.json")["train"]["group_size"] == 2
    model, inventory = load_speech_llm(tmp_path / "8", torch.device("cpu"))
    assert inventory.tokens == tiny.INVENTORY.tokens
    assert len(model.transcribe(*(lambda batch: (batch.x, batch.x_lens))(tiny.noise_batch([40])))) == 1
    rows = read_jsonl(tmp_path / "8" / "metrics.jsonl")
    told = {"loss", "reward", "reward_std", "zero_variance", "kl", "clipped", "entropy", "cut_short", "length_ratio", "loops", "hint_copies"}
    assert told <= rows[0].keys()
    assert all(row["lr"] == 1e-3 for row in rows if row["kind"] == "train")  # constant, no warm-up
    assert {"reward", "reward_streaming", "mer", "mer_streaming"} <= rows[-1].keys()
    before, after = (read_weights(path / "model.safetensors") for path in (folder / "init", tmp_path / "8"))
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"encoder", "adaptor"}
    assert grpo(*options_of(folder), "--out", tmp_path / "8") == (0, [])
    assert "skipped, same inputs and settings" in grpo.log


def test_only_the_language_model(grpo, folder, tmp_path):
    frozen = ["--set", "train.train_encoder=false", "--set", "train.train_adaptor=false", "--set", "train.kl_weight=0"]
    assert grpo(*options_of(folder, entities=None), *frozen, "--out", tmp_path / "8") == (0, [])
    before, after = (read_weights(path / "model.safetensors") for path in (folder / "init", tmp_path / "8"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    before, after = (read_weights(path / "llm" / "model.safetensors") for path in (folder / "init", tmp_path / "8"))
    assert all(not torch.equal(value, after[name]) for name, value in before.items() if value.ndim > 1)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"entities": "nowhere.jsonl"}, [], "nowhere.jsonl, line 1: expected one JSON object per line"),
        ({"important": "nowhere.txt"}, [], "nowhere.txt: expected a UTF-8 file with one word or name per line"),
        ({"init": "nowhere"}, [], "nowhere"),
        ({}, ["--set", "train.group_size=1"], "train.group_size: expected at least 2 answers to compare, found 1"),
        ({}, ["--set", "train.group_sise=4"], "did you mean 'group_size'?"),
        ({}, ["--set", "train.schedule=linear"], "train.schedule: expected cosine or constant"),
        ({}, ["--set", "rewards.context=none"], "rewards.context: expected recall or agreement"),
    ],
)
def test_mistakes(grpo, folder, tmp_path, changes, more, message):
    code, errors = grpo(*options_of(folder, **changes), *more, "--out", tmp_path / "8")
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not (tmp_path / "8").exists()


def run_peer(arguments, environment):
    """Stage 8 as one of several processes."""
    os.environ |= environment
    sys.argv = ["08_grpo", *arguments]
    stage.run(load_program("08_grpo").main, "08_grpo")


def test_two_processes_equal_one_with_two_micro_batches(grpo, folder, tmp_path):
    """Forked, since a fresh interpreter takes longer to import than they take to train."""
    options = [*options_of(folder), "--set", "train.accum="]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    peers = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    fork = multiprocessing.get_context("fork")
    arguments = [*options[:-1], "train.accum=1", "--out", str(tmp_path / "two")]
    processes = [fork.Process(target=run_peer, args=(arguments, peers | {"RANK": rank, "LOCAL_RANK": rank}), daemon=True) for rank in ("0", "1")]
    for process in processes:
        process.start()
    assert grpo(*options[:-1], "train.accum=2", "--out", tmp_path / "one") == (0, [])
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) > 2
    for row, other in zip(one, two, strict=True):
        for name in row.keys() - {"audio_s_per_s", "kind"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), (row["step"], name)
    for part in ("model.safetensors", "llm/model.safetensors"):
        after, other = (read_weights(tmp_path / name / part) for name in ("one", "two"))
        for name, value in after.items():
            torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-4)
