"""FireRedASR's encoder: the frames that the original code gives, its normalisation, and files that are something else."""

import argparse
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nim4.config import RecipeError
from nim4.model.conformer import Conformer, Context
from nim4.published.firered import read_cmvn, read_firered


@pytest.fixture(scope="module")
def golden():
    """Weights, input and output of the original ConformerEncoder, 2 blocks of width 16, random weights (tests/unit/renew_published.py)."""
    return load_file(Path(__file__).parent / "firered.safetensors")


def kaldi_matrix(rows, kind="<f8"):
    """Bytes of a binary Kaldi matrix."""
    rows = np.asarray(rows, dtype=kind)
    return b"\0B" + {"<f8": b"DM ", "<f4": b"FM "}[kind] + struct.pack("<bibi", 4, rows.shape[0], 4, rows.shape[1]) + rows.tobytes()


def sums(mean, std, count=10.0):
    return [[*(count * mean), count], [*(count * (std**2 + mean**2)), 0.0]]


def publish(folder, golden, name="model.pth.tar", **changes):
    """A folder as FireRedASR-AED is published: options of its training, encoder and decoder, and normalisation."""
    folder.mkdir(exist_ok=True)
    weights = {name: tensor for name, tensor in golden.items() if name.startswith("encoder.")} | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    weights |= {"encoder.positional_encoding.pe": torch.zeros(1, 9, 16), "decoder.tgt_word_emb.weight": torch.zeros(4, 16)}
    torch.save({"args": argparse.Namespace(idim=80, n_layers_enc=2), "model_state_dict": weights}, folder / name)
    (folder / "cmvn.ark").write_bytes(kaldi_matrix(sums(np.full(80, 12.0), np.full(80, 3.0))))
    return folder


@torch.inference_mode()
def test_the_frames_of_the_original(golden, tmp_path):
    found = read_firered(publish(tmp_path / "aed", golden))
    encoder = Conformer(found.config).eval()
    encoder.load_state_dict(found.weights)
    frames, lens = encoder(golden["x"], golden["x_lens"])
    assert lens.tolist() == golden["y_lens"].tolist() == [16, 10]
    assert float(golden["y"].abs().mean()) > 0.5
    for row, length in enumerate(lens):
        torch.testing.assert_close(frames[row, :length], golden["y"][row, :length], atol=1e-5, rtol=1e-4)
    streamed, _ = encoder(golden["x"], golden["x_lens"], Context(4, 1))
    assert float((streamed - frames)[0].abs().max()) > 1e-2  # under chunks it is another function, see the module


def test_its_normalisation_is_of_our_features(golden, tmp_path):
    """They are 16-bit counts, so their log-Mel energies are 2 ln 32768 above ours."""
    found = read_firered(publish(tmp_path / "aed", golden))
    torch.testing.assert_close(found.mean, torch.full((80,), 12.0 - 2 * math.log(32768)))
    torch.testing.assert_close(found.std, torch.full((80,), 3.0))
    assert found.head is None


@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_cmvn_in_both_precisions(tmp_path, kind):
    mean, std = np.linspace(8, 14, 80), np.linspace(2, 4, 80)
    (tmp_path / "cmvn.ark").write_bytes(kaldi_matrix(sums(mean, std), kind))
    found = read_cmvn(tmp_path / "cmvn.ark")
    for tensor, expected in zip(found, (mean, std), strict=True):
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4)


def test_the_encoder_of_firered_llm_is_in_a_file_of_its_own(golden, tmp_path):
    publish(tmp_path / "llm", golden, "asr_encoder.pth.tar")
    torch.save({"model_state_dict": {"encoder_projector.linear1.weight": torch.zeros(2, 2)}}, tmp_path / "llm" / "model.pth.tar")
    assert read_firered(tmp_path / "llm").config.num_blocks == 2


def other_kernel(golden):
    return {"encoder.layer_stack.1.conv.depthwise_conv.weight": torch.zeros(32, 1, 9)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            other_kernel,
            r"found blocks\.1\.conv\.depthwise\.weight \(32, 1, 9\) not \(32, 1, 5\)\. Fix: .*--set 'model\.encoder={kind: conformer, dim: 16",
        ),
        (lambda golden: {"encoder.layer_stack.1.mhsa.fc.weight": None}, r"found blocks\.1\.attention\.out\.weight missing\."),
        (lambda golden: {"encoder.layer_stack.0.adapter.weight": torch.zeros(3)}, r"found blocks\.0\.adapter\.weight unknown\."),
        (lambda golden: {"encoder.layer_stack.0.layer_norm.weight": None}, r"with blocks\.0\.norm\.weight, found none\."),
    ],
)
def test_another_encoder_is_told_with_its_first_differences(golden, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        read_firered(publish(tmp_path / "aed", golden, **changes(golden)))


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"no checkpoint", r"no file of torch\.save"),
        ([1, 2], "a list"),
        ({"model": {}}, "entries model"),
        ({"model_state_dict": {"a": 1}}, r"no encoder\.layer_stack in it"),
        ({"model_state_dict": Evil()}, r"an object of print in it, which could run code"),
    ],
)
def test_something_else_is_told(tmp_path, capsys, content, found):
    path = tmp_path / "model.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(RecipeError, match=rf"model\.pth\.tar: expected model\.pth\.tar of FireRedASR-AED, found .*{found}"):
        read_firered(tmp_path)
    assert "run\n" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"\0BFM ", b"text [ 1 2 ]", kaldi_matrix([[1.0, 2.0]]), kaldi_matrix([[1.0, 0.0], [1.0, 0.0]])])
def test_a_missing_or_broken_normalisation_is_told(golden, tmp_path, content):
    folder = publish(tmp_path / "aed", golden)
    (folder / "cmvn.ark").unlink() if content is None else (folder / "cmvn.ark").write_bytes(content)
    with pytest.raises(RecipeError, match=r"cmvn\.ark: expected a binary Kaldi matrix of sums and squares, found"):
        read_firered(folder)
