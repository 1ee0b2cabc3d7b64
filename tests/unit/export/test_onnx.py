"""Exported graphs give what the model gives, chunk by chunk, for streams of any length and age."""

import numpy as np
import onnx
import pytest
import torch
from tiny import tiny_model, tiny_zipformer

from nim4.config import RecipeError
from nim4.corpus.feats import Fbank, mirrored
from nim4.decode.ctc import StreamingCtc
from nim4.export import onnx as export
from nim4.export.fbank import GraphFbank
from nim4.export.onnx import StreamingStep, export_streaming
from nim4.export.runtime import ExportedEncoder, check_graph, open_graph, quantise
from nim4.model.conformer import Context

CONTEXT = Context(8, 2)
MODELS = {"conformer": tiny_model, "zipformer": tiny_zipformer}


def noise(num_samples, seed=0):
    """Noise whose loudness changes, with digital silence in the middle."""
    rng = np.random.default_rng(seed)
    samples = 0.05 * (1 + np.sin(np.arange(num_samples) / 1500)) * rng.standard_normal(num_samples)
    samples[num_samples // 2 : num_samples // 2 + 2000] = 0.0
    return samples.clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    """Graphs of the model by where their features are."""
    folder = tmp_path_factory.mktemp("graphs")
    for fbank in (False, True):
        export_streaming(model, folder / f"{fbank}.onnx", CONTEXT, fbank=fbank)
    return {fbank: folder / f"{fbank}.onnx" for fbank in (False, True)}


@pytest.fixture(scope="module")
def conformer(tmp_path_factory):
    """A Conformer with dropout, its weights before it was exported, and the graph."""
    model, path = tiny_model(dropout=0.5), tmp_path_factory.mktemp("conformer") / "model.onnx"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_streaming(model, path, CONTEXT)
    return model, before, path


def streamed(model, samples):
    session = StreamingCtc(model, CONTEXT)
    return torch.cat([session.accept(samples), session.finish()]).numpy()


@torch.inference_mode()
@pytest.mark.parametrize("fbank", [False, True])
def test_a_graph_gives_what_the_model_gives(model, graphs, fbank):
    encoder = ExportedEncoder(graphs[fbank])
    assert (encoder.context, encoder.fbank) == (CONTEXT, fbank)
    for num_samples in (150, 3000, 10_240 * 2, 33_333):
        samples = noise(num_samples)
        chunks = list(encoder.chunks(samples))
        expected = streamed(model, samples)
        assert [len(chunk["frames"]) for chunk in chunks[:-1]] == [8] * (len(chunks) - 1)
        np.testing.assert_allclose(np.concatenate([chunk["log_probs"] for chunk in chunks]), expected, atol=1e-3)
        features = torch.from_numpy(Fbank().extract(samples))[None]
        whole, _ = model.encoder(model.normalise(features), torch.tensor([features.shape[1]]), CONTEXT)
        np.testing.assert_allclose(np.concatenate([chunk["frames"] for chunk in chunks]), whole[0].numpy(), atol=1e-3)


def test_streams_of_different_age_in_one_batch_are_as_alone(model, graphs):
    encoder, rng = ExportedEncoder(graphs[False]), np.random.default_rng(0)
    width = 4 * 8 + model.encoder.lookahead_frames
    x, lens = rng.standard_normal((6, width, 80)).astype(np.float32) * 4 - 8, np.full(1, width)
    old, alone = encoder.initial_state(1), []
    for chunk in x[:3]:
        _, old = encoder.step(chunk[None], lens, old)
    states, last = [old, encoder.initial_state(1), encoder.initial_state(1)], [width, width, 9]  # the third has 3 frames and ends
    for chunk, state, length in zip(x[3:], states, last, strict=True):
        alone.append(encoder.step(chunk[None], np.array([length]), state)[0])
    joined = {name: np.concatenate([state[name] for state in states]) for name in old}
    together, after = encoder.step(x[3:], np.array(last), joined)
    for row, (own, real) in enumerate(zip(alone, (8, 8, 3), strict=True)):
        np.testing.assert_allclose(together["log_probs"][row, :real], own["log_probs"][0, :real], atol=1e-4)
    assert all(after[name].shape == joined[name].shape for name in joined)
    assert not np.allclose(alone[1]["log_probs"], encoder.step(x[4:5], lens, old)[0]["log_probs"], atol=1e-3)  # the state counts


def test_the_best_phones_alone(conformer, tmp_path):
    model, _, path = conformer
    export_streaming(model, tmp_path / "top.onnx", CONTEXT, top=3)
    samples = noise(9000)
    every, top = (list(ExportedEncoder(graph).chunks(samples)) for graph in (path, tmp_path / "top.onnx"))
    for whole, best in zip(every, top, strict=True):
        assert "log_probs" not in best
        assert best["top_ids"].dtype == np.int32
        order = np.argsort(-whole["log_probs"], axis=-1, kind="stable")[:, :3]
        np.testing.assert_array_equal(best["top_ids"], order)
        np.testing.assert_allclose(best["top_log_probs"], np.take_along_axis(whole["log_probs"], order, -1), atol=1e-5)


def test_only_the_batch_may_have_any_size_and_the_metadata_says_the_rest(model, graphs):
    graph = onnx.load(graphs[False])
    for part in [*graph.graph.input, *graph.graph.output]:
        first, *rest = part.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert rest
        assert all(size.dim_value > 0 for size in rest)
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    assert facts["encoder"] == model.config.encoder.kind
    assert (facts["chunk_frames"], facts["left_chunks"], facts["vocab_size"], facts["fbank"]) == ("8", "2", "6", "outside")
    assert int(facts["lookahead_frames"]) == model.encoder.lookahead_frames


def test_features_of_a_graph_are_ours():
    rng = np.random.default_rng(0)
    for samples in (noise(20_000), rng.uniform(-1, 1, 8000).astype(np.float32), np.full(4000, 0.5, np.float32), np.zeros(1000, np.float32)):
        padded = mirrored(torch.from_numpy(samples))
        np.testing.assert_allclose(GraphFbank()(padded[None])[0].numpy(), Fbank().extract(samples), atol=1e-3)


def test_exporting_leaves_the_model_as_it_was(conformer):
    model, before, _ = conformer
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_graph_of_another_model_is_found_out(conformer):
    _, _, path = conformer
    assert check_graph(StreamingStep(tiny_model(), CONTEXT), path) < 1e-4
    with pytest.raises(RuntimeError, match="differs from the model by"):
        check_graph(StreamingStep(tiny_model(seed=1), CONTEXT), path)


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    model, path = tiny_model(), tmp_path / "model.onnx"
    export_streaming(model, path, CONTEXT)
    quantise(path, tmp_path / "small.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "small.onnx", "small.onnx.data"]
    assert check_graph(StreamingStep(model, CONTEXT), path) < 1e-4
    assert len(list(ExportedEncoder(tmp_path / "small.onnx").chunks(noise(9000)))) == 2


def test_weights_in_8_bits(graphs, model, tmp_path):
    path = tmp_path / "small.onnx"
    quantise(graphs[True], path)
    graph = onnx.load(path)
    weights = {tensor.name for tensor in graph.graph.initializer}
    assert [node.name for node in graph.graph.node if node.op_type == "MatMul" and weights & set(node.input)] == ["/fbank/MatMul"]
    assert sum(node.op_type == "MatMulInteger" for node in graph.graph.node) > 10
    samples = noise(33_333)
    frames = [np.concatenate([chunk["frames"] for chunk in ExportedEncoder(file).chunks(samples)]) for file in (path, graphs[True])]
    difference = np.linalg.norm(frames[0] - frames[1]) / np.linalg.norm(frames[1])
    assert 0 < difference < 0.2  # of frames that are 16 wide


def test_an_opset_that_cannot_be_written(tmp_path):
    for opset in (16, 21):
        with pytest.raises(RecipeError, match=f"--opset: expected 17 to 20, .* found {opset}"):
            export_streaming(tiny_model(), tmp_path / "model.onnx", CONTEXT, opset=opset)
    export_streaming(tiny_model(), tmp_path / "model.onnx", CONTEXT, opset=20)
    assert check_graph(StreamingStep(tiny_model(), CONTEXT), tmp_path / "model.onnx") < 1e-4


def test_a_graph_that_the_runtime_cannot_run(graphs, tmp_path):
    graph = onnx.load(graphs[False])
    graph.opset_import[0].version = 99
    path = tmp_path / "new.onnx"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(RecipeError, match=r"new\.onnx: expected a graph that onnxruntime .* runs, found .*Opset 99"):
        open_graph(path)
    path.write_bytes(graphs[False].read_bytes()[:1000])
    with pytest.raises(RecipeError, match=r"new\.onnx: expected a graph"):
        ExportedEncoder(path)
    with pytest.raises(RecipeError, match="found no such file"):
        ExportedEncoder(tmp_path / "none.onnx")
