"""`python -m nim4 export`: folders that run elsewhere, and what is said when there can be none."""

import copy
import shutil

import numpy as np
import onnx
import pytest
import torch
from tiny import INVENTORY, tiny_zipformer

from nim4.corpus.units import PhonemeInventory
from nim4.decode.ctc import StreamingCtc
from nim4.export import onnx as graphs
from nim4.export.onnx import export_streaming
from nim4.export.runtime import ExportedEncoder
from nim4.model.checkpoint import WEIGHTS, load_model, read_weights, save_model, save_weights
from nim4.model.conformer import Context

SAMPLES = (0.05 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)


def test_a_folder_for_onnxruntime(nim4, trained, tmp_path):
    out = tmp_path / "made" / "graph"
    code, _, told = nim4("export", "--format", "onnx", "--model", trained, "--out", out, "--chunk-ms", 320, "--left-chunks", 2, "--int8")
    assert (code, told) == (0, [])
    assert sorted(path.name for path in out.iterdir()) == ["model.int8.onnx", "model.onnx", "tokens.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["graph"]
    assert PhonemeInventory.load(out / "tokens.txt").tokens == PhonemeInventory.load(trained / "tokens.txt").tokens
    model, _ = load_model(trained, torch.device("cpu"))
    session = StreamingCtc(model, Context(8, 2))
    with torch.inference_mode():
        expected = torch.cat([session.accept(SAMPLES), session.finish()]).numpy()
    chunks = ExportedEncoder(out / "model.onnx").chunks(SAMPLES)
    np.testing.assert_allclose(np.concatenate([chunk["log_probs"] for chunk in chunks]), expected, atol=1e-3)
    code, _, told = nim4("export", "--format", "onnx", "--model", trained, "--out", out)
    assert (code, len(told)) == (2, 1)
    assert f"{out}: expected a new folder, found one that exists" in told[0]


def test_a_folder_for_sherpa_onnx(nim4, trained, tmp_path):
    code, _, told = nim4("export", "--format", "sherpa-onnx", "--model", trained, "--out", tmp_path / "out")
    assert (code, told) == (0, [])
    facts = {prop.key: prop.value for prop in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert (facts["model_type"], facts["chunk_frames"], facts["left_chunks"]) == ("wenet_ctc", "16", "4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk-ms", 650], "--chunk-ms: expected a multiple of 40, found 650"),
        (["--left-chunks", -1], "--left-chunks: expected 0 or more, found -1"),
        (["--opset", 99], "--opset: expected 17 to 20, what this version of torch writes, found 99"),
        (["--format", "sherpa-onnx", "--fbank", "inside"], "--fbank inside: expected outside, found --format sherpa-onnx"),
        (["--format", "sherpa-onnx", "--left-chunks", 0], "--left-chunks: expected at least 1 with --format sherpa-onnx, found 0"),
        (["--model", "none"], "none: expected a model folder, found no such folder"),
    ],
)
def test_options_that_cannot_be(nim4, trained, tmp_path, options, message):
    code, _, told = nim4("export", "--format", "onnx", "--model", trained, "--out", tmp_path / "out", *options)
    assert (code, len(told)) == (2, 1)
    assert message in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_phoneme_head(nim4, trained, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(trained, folder)
    save_weights(folder / WEIGHTS, {name: tensor for name, tensor in read_weights(trained / WEIGHTS).items() if not name.startswith("head.")})
    code, _, told = nim4("export", "--format", "onnx", "--model", folder, "--out", tmp_path / "out")
    assert (code, len(told)) == (2, 1)
    assert "expected an encoder and a phoneme head, found no head.* in it" in told[0]
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_cannot_stream(nim4, tmp_path):
    model = tiny_zipformer(causal=False)
    save_model(tmp_path / "model", model.state_dict(), model.config, INVENTORY)
    for name in ("onnx", "sherpa-onnx"):
        code, _, told = nim4("export", "--format", name, "--model", tmp_path / "model", "--out", tmp_path / "out")
        assert (code, len(told)) == (2, 1)
        assert "model.encoder.causal: expected true for chunks" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_graph_that_is_not_the_model_gets_no_name(nim4, trained, tmp_path, monkeypatch):
    def export_another(model, *args, **options):
        another = copy.deepcopy(model)
        torch.nn.init.zeros_(another.head.layers[0].weight)
        export_streaming(another, *args, **options)

    monkeypatch.setattr(graphs, "export_streaming", export_another)
    with pytest.raises(RuntimeError, match="differs from the model"):
        nim4("export", "--format", "onnx", "--model", trained, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
