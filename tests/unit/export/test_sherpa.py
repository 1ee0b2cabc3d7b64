"""sherpa-onnx itself loads what is written for it, and finds our phones."""

import numpy as np
import onnx
import pytest
import sherpa_onnx
import torch
from tiny import INVENTORY, tiny_model, tiny_zipformer

from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, Fbank
from nim4.decode.ctc import StreamingCtc
from nim4.export.runtime import ExportedEncoder, check_graph
from nim4.export.sherpa import export_sherpa
from nim4.model.conformer import Context

CONTEXT = Context(8, 2)


def noise(num_samples, seed=0):
    """Noise whose loudness changes, with digital silence in the middle."""
    rng = np.random.default_rng(seed)
    samples = 0.1 * (1 + np.sin(np.arange(num_samples) / 1500)) * rng.standard_normal(num_samples)
    samples[num_samples // 2 : num_samples // 2 + 8000] = 0.0
    return samples.clip(-1, 1).astype(np.float32)


def wordy(model):
    """The model, writing many phones: on average none is more likely than another."""
    features = torch.from_numpy(Fbank().extract(noise(48_000)))[None]
    with torch.no_grad():
        frames, _ = model.encoder(model.normalise(features), torch.tensor([features.shape[1]]), CONTEXT)
        model.head.layers[-1].bias.sub_(model.head.layers(frames)[0].mean(0))
    return model


MODELS = {
    "zipformer": tiny_zipformer,
    "conformer": tiny_model,  # conv_expansion 2
    "conformer, as wide as the frames": lambda: tiny_model(conv_expansion=1, conv_kernel=9, num_blocks=3),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return wordy(MODELS[request.param]())


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sherpa") / "model.onnx"
    step = export_sherpa(model, path, CONTEXT)
    assert check_graph(step, path) < 1e-3
    return path


def recogniser(model, path):
    INVENTORY.save(path.with_name("tokens.txt"))
    options = {"tokens": str(path.with_name("tokens.txt")), "model": str(path), "num_threads": 1}
    if model.config.encoder.kind == "zipformer":
        return sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(**options)
    return sherpa_onnx.OnlineRecognizer.from_wenet_ctc(**options, chunk_size=CONTEXT.chunk_frames, num_left_chunks=CONTEXT.left_chunks)


def heard(recogniser, recordings):
    """Phones of streams that are decoded together, as sherpa-onnx sees fit, and the chunks of the longest."""
    streams = [recogniser.create_stream() for _ in recordings]
    for stream, samples in zip(streams, recordings, strict=True):
        stream.accept_waveform(SAMPLING_RATE_HZ, samples)
    steps = 0
    while ready := [stream for stream in streams if recogniser.is_ready(stream)]:
        recogniser.decode_streams(ready)
        steps += 1
    return [recogniser.tokens(stream) for stream in streams], steps


def test_it_finds_our_phones(model, graph):
    recordings = [noise(70_000), noise(50_000, seed=1)]
    ours = []
    for samples in recordings:
        session = StreamingCtc(model, CONTEXT)
        frames = len(session.accept(samples))  # whole chunks only, like sherpa-onnx: no finish
        ours.append((INVENTORY.decode(session.phones), frames // CONTEXT.chunk_frames))
    assert min(len(phones) for phones, _ in ours) > 10
    theirs, steps = heard(recogniser(model, graph), recordings)
    assert theirs == [phones for phones, _ in ours]
    assert steps == ours[0][1]


def test_metadata(model, graph):
    facts = {prop.key: prop.value for prop in onnx.load(graph).metadata_props}
    if model.config.encoder.kind == "zipformer":
        expected = {"model_type": "zipformer2", "T": "45", "decode_chunk_len": "32", "left_context_len": "32,16", "num_heads": "2,2"}
    else:
        expected = {"model_type": "wenet_ctc", "head": "2", "output_size": "16", "right_context": "6", "subsampling_factor": "4"}
    assert expected.items() <= facts.items()
    with pytest.raises(RecipeError, match=f"expected a graph of `nim4 export --format onnx`, found one of {facts['model_type']}"):
        ExportedEncoder(graph)


def test_what_it_cannot_run(tmp_path):
    with pytest.raises(RecipeError, match=r"--left-chunks: expected at least 1 .* found 0"):
        export_sherpa(tiny_model(), tmp_path / "model.onnx", Context(8, 0))
    with pytest.raises(RecipeError, match=r"subsampling_channels: expected at most 128 .* found 129"):
        export_sherpa(tiny_zipformer(subsampling_channels=(2, 2, 129)), tmp_path / "model.onnx", CONTEXT)
