"""Fine-tuning by two processes, which hold copies (DDP) or shards (FSDP2), against one process with two micro-batches."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from made_corpora import ROOT
from sft_worker import fine_tune
from tiny import write_features

from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import read_weights

SETTINGS = {"max_steps": 6, "save_every": 2, "valid_every": 3, "log_every": 1, "max_duration_s": 3.0, "average_last": 1, "keep_last": 10}
SETTINGS |= {"augment": {"time_warp_frames": 10}, "encoder_lr_ratio": 0.5}


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    write_features(folder, "dev", [80, 90, 100])
    write_features(folder, "train", [60 + 5 * (i * 7 % 16) for i in range(24)])
    return folder


@pytest.fixture(scope="module")
def alone(units, tmp_path_factory):
    """Gives the folder of a stage's run in one process, made once."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name):
        torch.set_num_threads(1)
        if not (folder / name).exists():
            fine_tune(units, folder / name, name, SETTINGS | {"accum": 2})
        return folder / name

    return run


def in_two_processes(*arguments):
    """Runs the worker in two processes of one group; returns their exit codes and what they wrote to stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        peers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        peers |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, ROOT / "tests/unit/train/sft_worker.py", *map(str, arguments)]
        started.append(subprocess.Popen(command, env=os.environ | peers, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], told


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, two):
    """Losses to 1e-5 in every step, and the same final weights."""
    rows = rows_of(one), rows_of(two)
    assert len(rows[0]) == len(rows[1]) == 8
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"audio_s_per_s", "kind"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=2e-6), (a["step"], name)
    for file in ("model.safetensors", "llm/model.safetensors"):
        first, second = read_weights(one / file), read_weights(two / file)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("name", "parallel"), [("joint_sft", "ddp"), ("align", "fsdp2")])
def test_two_processes_equal_one_with_two_micro_batches(units, alone, tmp_path, name, parallel):
    codes, told = in_two_processes(units, tmp_path / "two", name, json.dumps(SETTINGS | {"parallel": parallel}))
    assert codes == [0, 0], told
    assert_same_run(alone(name), tmp_path / "two")


def test_shards_killed_and_resumed(units, alone, tmp_path):
    """The checkpoint is whole: two processes with shards resume from it, and so does one process without."""
    one, two, later = alone("joint_sft"), tmp_path / "two", tmp_path / "later"
    arguments = units, two, "joint_sft", json.dumps(SETTINGS | {"parallel": "fsdp2"})
    codes, told = in_two_processes(*arguments, 5)
    assert codes == [1, 1], told
    assert all("Killed" in text for text in told), told
    assert {path.name for path in (two / "checkpoints").iterdir()} == {"step-2", "step-4"}
    saved = [read_weights(folder / "checkpoints" / "step-4" / "model.safetensors") for folder in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        torch.testing.assert_close(saved[1][key], value, atol=2e-4, rtol=1e-4)
    shutil.copytree(two, later)
    codes, told = in_two_processes(*arguments)
    assert codes == [0, 0], told
    assert " INFO " not in told[1]  # only the first process logs
    assert "resuming at step 4" in told[0]
    assert_same_run(one, two)
    load_speech_llm(two, torch.device("cpu"))
    fine_tune(units, later, "joint_sft", SETTINGS | {"accum": 2})
    assert_same_run(one, later)
