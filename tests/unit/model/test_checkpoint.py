"""Model folders: whole, self-contained, and refused with one line when anything does not fit."""

from dataclasses import replace

import pytest
import torch
from tiny import INVENTORY, noise_batch, tiny_model

from nim4.config import ModelConfig, RecipeError
from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import average_weights, count_parameters, load_into, load_model, read_weights, save_model, save_weights, with_vocab_size

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(seed=5)
    save_model(tmp_path / "model", model.state_dict(), model.config, INVENTORY)
    return tmp_path / "model"


@torch.inference_mode()
def test_a_folder_gives_the_same_model_back(folder):
    model, inventory = load_model(folder, CPU)
    expected, batch = tiny_model(seed=5), noise_batch([50])
    assert not model.training
    assert inventory.tokens == INVENTORY.tokens
    assert model.config == expected.config
    assert torch.equal(model(batch.x, batch.x_lens)[0], expected(batch.x, batch.x_lens)[0])
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.safetensors", "tokens.txt"]


def break_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])


def swap_weights(folder):
    save_weights(folder / "model.safetensors", tiny_model(dim=32).state_dict())


def drop_a_weight(folder):
    weights = read_weights(folder / "model.safetensors")
    weights["head.layers.9.bias"] = weights.pop("head.layers.0.bias")
    save_weights(folder / "model.safetensors", weights)


def misspell_a_key(folder):
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace("num_blocks", "num_block"), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "expected a model folder, found no model.safetensors in it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "expected a readable safetensors file"),
        (break_weights, "expected a readable safetensors file"),
        (swap_weights, r"out.weight is \(32, 76\), must be \(16, 76\) and \d+ more"),
        (drop_a_weight, "head.layers.0.bias is missing and 1 more"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml: expected a readable YAML file"),
        (lambda folder: (folder / "config.yaml").write_bytes(b"encoder: [\xff"), "config.yaml: expected a readable YAML file"),
        (lambda folder: (folder / "config.yaml").write_text("encoder: 3"), "encoder: expected a group of settings"),
        (misspell_a_key, "expected a known setting, found 'num_block'. Fix: did you mean 'num_blocks'"),
        (lambda folder: (folder / "tokens.txt").unlink(), "tokens.txt: expected `symbol id` lines"),
        (lambda folder: PhonemeInventory(["<blk>", "<unk>", "a"]).save(folder / "tokens.txt"), "tokens.txt: expected 6 symbols, found 3"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(RecipeError, match=message):
        load_model(folder, CPU)


def test_no_folder(tmp_path):
    with pytest.raises(RecipeError, match="none: expected a model folder, found no such folder"):
        load_model(tmp_path / "none", CPU)


def test_a_refused_load_changes_nothing():
    model, weights = tiny_model(), tiny_model(seed=1).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match="mean is missing"):
        load_into(model, {name: tensor for name, tensor in weights.items() if name != "mean"}, "here")
    with pytest.raises(RecipeError, match="more is not part of this model"):
        load_into(model, weights | {"more": torch.zeros(1)}, "here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.ones(2)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_weights(path, {"a": torch.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


def test_average(tmp_path):
    kept = torch.randn(50, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_weights(path, {"moves": torch.tensor([float(i), 10.0 * i]), "stays": kept})
    mean = average_weights(paths)
    assert mean["moves"].tolist() == [1.0, 10.0]
    assert mean["moves"].dtype == torch.float32
    assert torch.equal(mean["stays"], kept)  # to the last bit, or a frozen part would move


def test_vocab_size():
    assert with_vocab_size(ModelConfig(), INVENTORY).vocab_size == 6
    assert with_vocab_size(replace(ModelConfig(), vocab_size=6), INVENTORY).vocab_size == 6
    with pytest.raises(RecipeError, match=r"model.vocab_size: expected 0 or 6, the size of tokens.txt, found 7"):
        with_vocab_size(replace(ModelConfig(), vocab_size=7), INVENTORY)


def test_count_parameters():
    assert count_parameters([torch.zeros(1000, 621), torch.zeros(900, 1000)]) == "1.5 M"
