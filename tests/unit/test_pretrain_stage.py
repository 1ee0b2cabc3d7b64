"""Stage 3 as a program: its product, its mistakes, and two processes against one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
import torch
from made_corpora import ROOT

from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import load_model, read_weights, save_model
from nim4.stage import read_json, read_jsonl
from nim4.train.cka import read_registry


@pytest.fixture
def pretrain(command):
    return command("03_pretrain")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_product(trained, units):
    assert {path.name for path in trained.iterdir()} >= {
        "model.safetensors",
        "config.yaml",
        "tokens.txt",
        "metrics.jsonl",
        "registry.jsonl",
        "cka.png",
    }
    assert not (trained / "checkpoints").exists()
    model, inventory = load_model(trained, torch.device("cpu"))
    assert inventory.tokens == PhonemeInventory.load(units / "tokens.txt").tokens
    cmvn = read_json(units.parent / "fbank" / "cmvn.json")
    torch.testing.assert_close(model.mean, torch.tensor(cmvn["sum"]).float() / cmvn["num_frames"], atol=1e-4, rtol=1e-5)
    record = read_json(trained / "done.json")
    assert record["step"] == 6
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    rows = read_registry(trained / "registry.jsonl")
    assert rows[-1].final
    assert rows[-1].step == 6
    assert (trained / rows[-1].path).is_file()
    assert {row["kind"] for row in read_jsonl(trained / "metrics.jsonl")} == {"train", "valid"}
    assert list((trained / "tensorboard").iterdir())


def test_the_same_again_is_skipped_and_a_changed_setting_is_not(pretrain, units, tmp_path, trained):
    options = [*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model", "--set", "train.max_steps=2"]
    assert pretrain(*options) == (0, [])
    before = contents(tmp_path / "model")
    assert pretrain(*options, "--set", "train.log_every=1", "--set", "train.num_workers=1") == (0, [])  # cannot change the result
    assert "skipped, same inputs and settings" in pretrain.log
    assert contents(tmp_path / "model") == before
    assert pretrain(*options, "--set", "train.seed=1") == (0, [])
    assert "rebuilding, train.seed was 0 and is 1" in pretrain.log
    assert contents(tmp_path / "model")["model.safetensors"] != before["model.safetensors"]


def test_training_starts_from_init(pretrain, units, tmp_path, trained):
    options = [*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model", "--init", trained]
    assert pretrain(*options, "--set", "train.max_steps=1", "--set", "train.learning_rate=0.0") == (0, [])
    before, after = (read_weights(folder / "model.safetensors") for folder in (trained, tmp_path / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_noise_changes_the_weights_and_is_recorded(pretrain, units, tmp_path):
    options = [*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model"]
    assert pretrain(*options) == (0, [])
    assert "noise: none (--noise), so train.noise has no effect" in pretrain.log
    before = contents(tmp_path / "model")["model.safetensors"]
    assert pretrain(*options, "--noise", "test", "--set", "train.noise.prob=0.5") == (0, [])
    assert "train.noise.prob was 0.2 and is 0.5" in pretrain.log
    assert 'noise_splits was "" and is "test"' in pretrain.log
    assert "noise: 4 clips of test" in pretrain.log
    assert contents(tmp_path / "model")["model.safetensors"] != before


def other_size(folder, trained):
    model = tiny.tiny_model(vocab_size=len(PhonemeInventory.load(trained / "tokens.txt")), dim=32)
    save_model(folder, model.state_dict(), model.config, PhonemeInventory.load(trained / "tokens.txt"))


def other_symbols(folder, trained):
    model, inventory = load_model(trained, torch.device("cpu"))
    save_model(folder, model.state_dict(), model.config, PhonemeInventory([*inventory.tokens[:2], *reversed(inventory.tokens[2:])]))


def broken(folder, trained):
    other_symbols(folder, trained)
    (folder / "tokens.txt").write_bytes((trained / "tokens.txt").read_bytes())
    (folder / "model.safetensors").write_bytes(b"x" * 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "init: expected the product of an earlier stage, found no such file"),
        (lambda folder, trained: folder.mkdir(), "model.safetensors: expected a readable safetensors file"),
        (other_size, "init: expected the encoder of --model-config, found dim 32, not 16. Fix: --set 'model.encoder={kind: conformer, dim: 32,"),
        (other_symbols, "tokens.txt: expected the symbols of --units, found others"),
        (broken, "init/model.safetensors: expected a readable safetensors file"),
    ],
)
def test_a_wrong_init_is_told(pretrain, units, tmp_path, trained, make, message):
    init = tmp_path / "init"
    if make is not None:
        make(init, trained)
        (init / "done.json").write_text("{}")
    code, errors = pretrain(*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model", "--init", init)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "model").exists()


def replaced(options, name, value):
    """`options` with another value for one of them."""
    place = options.index(name) + 1
    return [*options[:place], str(value), *options[place + 1 :]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--set", "train.learning_rat=1"],
            "train: learning_rat: expected a known setting, found 'learning_rat'. Fix: did you mean 'learning_rate'?",
        ),
        (["--set", "trian.seed=1"], "expected a known setting, found 'trian'. Fix: did you mean 'train'?"),
        (["--set", "train.seed"], "--set train.seed: expected key=value"),
        (["--set", "train.max_steps=many"], "train: max_steps: expected int, found 'many'"),
        (["--set", "train.log_every=0"], "train.log_every: expected at least 1, found 0"),
        (["--set", "train.precision=fp8"], "train.precision: expected fp32 or bf16"),
        (["--set", "model.encoder.conv_kernel=8"], "model.encoder.conv_kernel: expected an odd number, found 8"),
        (["--set", "model.vocab_size=7"], "model.vocab_size: expected 0 or"),
        (["--set", "train.max_duration_s=0.1", "--set", "train.accum=1000"], "training data: expected at least one step per epoch"),
        (["--train", "trian"], "trian.jsonl.gz: expected the product of an earlier stage, found no such file"),
        (["--train", "train=0"], "--train train=0: expected a positive weight"),
        (["--train", ""], "--train: expected at least one split"),
        (["--valid", "dve"], "dve.jsonl.gz: expected the product of an earlier stage"),
        (["--noise", "nosie"], "nosie.jsonl.gz: expected the product of an earlier stage"),
        (["--noise", "musan:"], "--noise musan:: expected split or corpus:split"),
        (["--noise", "train", "--set", "train.noise.prob=2"], "train.noise.prob: expected a probability, found 2.0"),
        (["--valid", "dev=0.5"], "--valid: expected splits without weights"),
        (["--cmvn", "nowhere.json"], "nowhere.json: expected"),
        (["--units", "nowhere"], "nowhere/tokens.txt: expected"),
        (["--model-config", "nowhere.yaml"], "nowhere.yaml: expected a readable YAML file"),
        (["--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
    ],
)
def test_mistakes_in_the_options(pretrain, units, tmp_path, changes, message):
    options = tiny.pretrain_options(units, tmp_path)
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        options = [*options, name, value] if name in ("--set", "--noise") else replaced(options, name, value)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "note.txt").write_text("an earlier product")
    code, errors = pretrain(*options, "--out", tmp_path / "model")
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert ". Fix: " in errors[0]
    assert contents(tmp_path / "model") == {"note.txt": b"an earlier product"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: [1", "expected a readable YAML file"),
        ("- a\n- b", "expected key: value lines, found list"),
        ("pretrain:\n", "pretrain: expected a group of settings, found None"),
        ("pretrian: {train: {seed: 1}}", "pretrain: expected a group of settings, found None"),
        ("pretrain: 3", "pretrain: expected a group of settings, found 3"),
        ("pretrain: {train: 3}", "train: expected a group of settings, found 3"),
        (b"\xff\xfe\x00", "expected a readable YAML file"),
    ],
)
def test_unreadable_configs(pretrain, units, tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    options = replaced(tiny.pretrain_options(units, tmp_path), "--train-config", config)
    code, errors = pretrain(*options, "--out", tmp_path / "model")
    assert code == 2
    assert len(errors) == 1
    assert str(config) in errors[0]
    assert message in errors[0]


@pytest.mark.parametrize("content", [b"", b"not gzip", None])
def test_a_broken_manifest_is_told(pretrain, units, tmp_path, content):
    copy = tmp_path / "units"
    copy.mkdir()
    for name in ("tokens.txt", "train.jsonl.gz", "dev.jsonl.gz"):
        (copy / name).write_bytes((units / name).read_bytes())
    path = copy / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    code, errors = pretrain(*replaced(tiny.pretrain_options(units, tmp_path), "--units", copy), "--out", tmp_path / "model")
    assert (code, len(errors)) == (2, 1)
    assert "train.jsonl.gz" in errors[0]
    assert not (tmp_path / "model").exists()


def test_features_that_are_gone_are_told(pretrain, units, tmp_path):
    """Also from a data worker, which is another process."""
    copy = tmp_path / "units"
    copy.mkdir()
    for name in ("tokens.txt", "train.jsonl.gz", "dev.jsonl.gz"):  # their features lie beside this folder, and so are not found
        (copy / name).write_bytes((units / name).read_bytes())
    for workers in (0, 1):
        options = replaced(tiny.pretrain_options(units, tmp_path, num_workers=workers), "--units", copy)
        code, errors = pretrain(*options, "--out", tmp_path / "model")
        assert (code, len(errors)) == (2, 1)
        assert "expected readable features, found FileNotFoundError" in errors[0]


def test_a_full_disk_is_told_and_the_run_goes_on_afterwards(pretrain, units, tmp_path, monkeypatch):
    options = [*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model"]
    assert pretrain(*options[:-1], tmp_path / "whole") == (0, [])
    saved = torch.save

    def full(state, path):
        if "step-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        saved(state, path)

    monkeypatch.setattr(torch, "save", full)
    code, errors = pretrain(*options)
    assert (code, len(errors)) == (2, 1)
    assert "expected room on the disk, found it full. Fix: free some space and run the same command again" in errors[0]
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(torch, "save", saved)
    assert pretrain(*options) == (0, [])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "model" / "registry.jsonl").read_bytes() == (tmp_path / "whole" / "registry.jsonl").read_bytes()


def test_two_processes_equal_one_with_two_micro_batches(pretrain, units, tmp_path):
    """Chunk draws, masks and warps included: every micro-batch draws for itself, wherever it runs."""
    options = [*tiny.pretrain_options(units, tmp_path, max_duration_s=3, log_every=1, save_every=4, max_steps=5), "--set", "train.accum="]
    options = list(map(str, options))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        peers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, ROOT / "local" / "03_pretrain.py", *options[:-1], "train.accum=1", "--out", tmp_path / "two"]
        processes.append(subprocess.Popen(command, env=os.environ | peers, stderr=subprocess.PIPE, text=True))
    assert pretrain(*options[:-1], "train.accum=2", "--out", tmp_path / "one") == (0, [])
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert " INFO " not in told[1]  # only the first process logs
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) > 5
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"audio_s_per_s", "kind"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4 if name in ("grad_norm", "entropy", "nse") else 1e-5, abs=2e-6), (one["step"], name)
    one, two = (read_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-4)
