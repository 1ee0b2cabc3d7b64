"""icefall's checkpoints: their shape, their averages, and files that are something else. Frames are compared in model/test_zipformer.py."""

import math
import pathlib

import pytest
import torch

from nim4.config import RecipeError, ZipformerConfig
from nim4.model.zipformer import Zipformer
from nim4.published.icefall import averaged, read_icefall, read_tokens

TINY = {
    "dims": (16, 24, 16),
    "downsampling": (1, 4, 2),
    "num_layers": (1, 2, 1),
    "num_heads": (2, 3, 2),
    "ffn_dims": (32, 48, 32),
    "conv_kernels": (7, 5, 7),
    "unmasked_dims": (16, 24, 16),
    "query_head_dim": 8,
    "value_head_dim": 6,
    "pos_dim": 12,
    "subsampling_channels": (2, 4, 6),
    "pad_value": math.log(1e-10),
}


def tensors(vocab_size=6, seed=0, **shape):
    """A tiny Zipformer's, and a CTC output's, by icefall's names, which are ours."""
    torch.manual_seed(seed)
    encoder = Zipformer(ZipformerConfig(**(TINY | shape)))
    return encoder.state_dict() | {"ctc_output.1.weight": torch.randn(vocab_size, 24), "ctc_output.1.bias": torch.randn(vocab_size)}


def save(path, model, model_avg=None, **more):
    """A file as icefall's save_checkpoint writes it: weights, states of the training, and all of its options."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.Adam([parameter])
    optimizer.step()
    states = {"optimizer": optimizer.state_dict(), "scheduler": {"epoch": 3, "batch": 9}, "grad_scaler": {"scale": 1.0}, "sampler": None}
    options = {"exp_dir": pathlib.PosixPath("zipformer/exp"), "best_train_loss": float("inf"), "env_info": {"k2-version": "1.24"}, "lr_epochs": 3.5}
    averages = {} if model_avg is None else {"model_avg": model_avg}
    torch.save({"model": model, **averages, **states, **options, **more}, path)
    return path


@pytest.mark.parametrize("shape", [{}, {"causal": False}, {"downsampling": (2, 4, 1), "conv_kernels": (3, 5, 3)}])
def test_the_shape_is_found_in_the_tensors(tmp_path, shape):
    model = tensors(**shape)
    found = read_icefall(save(tmp_path / "epoch-3.pt", {f"module.{name}": tensor for name, tensor in model.items()}))
    assert found.config == ZipformerConfig(**(TINY | shape))
    assert all(torch.equal(tensor, model[name]) for name, tensor in found.weights.items())
    assert torch.equal(found.head[0], model["ctc_output.1.weight"])
    assert found.tokens is None
    assert any("cannot stream" in note for note in found.notes) == (shape == {"causal": False})
    assert (float(found.mean.abs().max()), float(found.std.min()), len(found.mean)) == (0.0, 1.0, 80)  # its features are not normalised


def test_half_precision_becomes_whole(tmp_path):
    found = read_icefall(save(tmp_path / "pretrained.pt", {name: tensor.half() for name, tensor in tensors().items()}))
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32}


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Six epochs of 10 batches, `model_avg` the mean over all batches so far; and without it checkpoint-10 to checkpoint-60."""
    folder = tmp_path_factory.mktemp("exp")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, generator=generator)
    for epoch in range(1, 7):
        done = 10 * epoch
        model = {"weight": values[done - 1].clone(), "count": torch.tensor(done)}
        mean = {"weight": values[:done].mean(0), "count": torch.tensor(done)}
        save(folder / f"epoch-{epoch}.pt", model, mean, batch_idx_train=done, average_period=1)
        save(folder / f"checkpoint-{done}.pt", model)
    return folder, values


@pytest.mark.parametrize("avg", [1, 2, 5])
def test_averages_over_a_range_of_the_training(training, avg):
    """With running means, the mean over all batches of the last epochs, which no file holds; without, the mean of the files."""
    folder, values = training
    over_batches, over_files = averaged(folder / "epoch-6.pt", avg), averaged(folder / "checkpoint-60.pt", avg)
    expected = values[-1] if avg == 1 else values[60 - 10 * avg :].mean(0)
    torch.testing.assert_close(over_batches["weight"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(over_files["weight"], values[59 - 10 * (avg - 1) :: 10].mean(0), atol=1e-6, rtol=1e-5)
    assert int(over_files["count"]) == sum(range(60, 60 - 10 * avg, -10)) // avg


def test_the_averages_are_those_of_icefall_where_it_is_installed(training):
    original = pytest.importorskip("icefall.checkpoint")
    folder, _ = training
    with torch.serialization.safe_globals([pathlib.PosixPath]):
        over_batches = original.average_checkpoints_with_averaged_model(str(folder / "epoch-4.pt"), str(folder / "epoch-6.pt"))
        over_files = original.average_checkpoints([folder / f"checkpoint-{number}.pt" for number in (60, 50, 40)])
    torch.testing.assert_close(averaged(folder / "epoch-6.pt", 2)["weight"], over_batches["weight"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(averaged(folder / "checkpoint-60.pt", 3)["weight"], over_files["weight"], atol=1e-6, rtol=1e-5)


def test_an_average_without_its_files_is_told(training, tmp_path):
    folder, _ = training
    for file in ("epoch-6.pt", "epoch-5.pt", "epoch-3.pt"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    cases = [
        (folder / "epoch-6.pt", 6, "expected 7 checkpoints to average over 6, found 6"),
        (folder / "checkpoint-20.pt", 3, "expected 3 checkpoints that end with it, found 2 of them"),
        (tmp_path / "epoch-6.pt", 3, r"found epoch-4\.pt is missing"),
        (save(tmp_path / "pretrained.pt", {"weight": torch.zeros(3)}), 2, r"expected epoch-N\.pt or checkpoint-N\.pt"),
    ]
    for path, avg, message in cases:
        with pytest.raises(RecipeError, match=message):
            averaged(path, avg)
    (tmp_path / "epoch-5.pt").write_bytes((folder / "epoch-6.pt").read_bytes())
    (tmp_path / "epoch-4.pt").write_bytes((folder / "epoch-6.pt").read_bytes())
    with pytest.raises(RecipeError, match=r"epoch-4\.pt: expected average_period, and batch_idx_train before .*, found batches 60 and 60"):
        averaged(tmp_path / "epoch-6.pt", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: {"joiner.output_linear.weight": torch.zeros(2), "ctc_output.1.weight": None},
            r"CTC output, .*, found a transducer without it\.",
        ),
        (lambda model: {"ctc_output.1.weight": None}, "expected a CTC output"),
        (
            lambda model: {"encoder.encoders.1.encoder.layers.1.norm.bias": torch.zeros(9)},
            r"found encoder\.encoders\.1\.encoder\.layers\.1\.norm\.bias \(9,\) not \(24,\)\. Fix: .*--set 'model\.encoder={kind: zipformer, dims",
        ),
        (lambda model: {"encoder.encoders.0.layers.0.self_attn_weights.in_proj.weight": None}, r"with .*in_proj\.weight, found none"),
        (
            lambda model: {"encoder.encoders.0.layers.0.bypass.bypass_scale": None, "encoder.x": torch.zeros(1)},
            "bypass_scale missing; encoder.x unknown",
        ),
        (lambda model: dict.fromkeys(name for name in model if name.startswith("encoder.encoders")), r"zipformer recipe: encoder\.encoders\.\*"),
    ],
)
def test_another_model_is_told(tmp_path, change, message):
    model = tensors()
    model |= change(model)
    path = save(tmp_path / "epoch-1.pt", {name: tensor for name, tensor in model.items() if tensor is not None})
    with pytest.raises(RecipeError, match=message):
        read_icefall(path)


def test_something_else_is_told(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "jit_script.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    for name in ("jit_script.pt", "other.pt", "text.pt", "missing.pt"):
        with pytest.raises(RecipeError, match=rf"{name}: expected a checkpoint of icefall's zipformer recipe.*Fix: give epoch-N\.pt"):
            read_icefall(tmp_path / name)


def test_tokens(tmp_path):
    (tmp_path / "tokens.txt").write_text("<blk> 0\n<sos/eos> 1\nb 3\na 2\n", encoding="utf-8")
    assert read_tokens(tmp_path / "tokens.txt") == ("<blk>", "<sos/eos>", "a", "b")
    assert read_tokens(tmp_path / "none.txt") is None
    (tmp_path / "tokens.txt").write_text("<blk>\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"tokens\.txt: expected `symbol id` lines"):
        read_tokens(tmp_path / "tokens.txt")
