"""The encoder on Triton: a repository that says what the graph is, and, where there is a server, values like those of PyTorch for every stream."""

import asyncio
import re
import shutil

import numpy as np
import pytest
import torch
from tiny import INVENTORY, tiny_model
from triton_server import TritonServer, free_port

from nim4.config import RecipeError
from nim4.decode.confusion import slots_of
from nim4.decode.encoder import StreamingEncoder
from nim4.decode.together import alone
from nim4.model.checkpoint import save_model
from nim4.model.conformer import Context
from nim4.serve.limits import Busy
from nim4.serve.service import CHUNKS_MS
from nim4.serve.triton_client import TritonEncoder, model_name, spread

pytest.importorskip("onnx")
from nim4.export.triton import config_text, export_triton, name_of


def noise(seconds, seed):
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).clip(-1, 1).astype(np.float32)


async def frame(work):
    return alone(work)


def expected(acoustic, samples, chunk_ms=640):
    encoder = StreamingEncoder(acoustic, Context(chunk_ms // 40, 2560 // chunk_ms))
    return encoder.accept(samples) + encoder.finish()


def check_chunks(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.frames, other.frames, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.features, other.features)
        best, ids = other.log_probs.topk(4)
        torch.testing.assert_close(one.log_probs.gather(1, ids), best, atol=1e-3, rtol=1e-3)
        assert one.log_probs.argmax(-1).tolist() == other.log_probs.argmax(-1).tolist()


def run(work):
    """Runs `work(encoder)` and closes the encoder."""

    async def main(encoder):
        try:
            return await work(encoder)
        finally:
            await encoder.close()

    return lambda encoder: asyncio.run(main(encoder))


# ---------------------------------------------------------------------------------------------------------------- the repository


def test_gateway_and_export_agree_on_names():
    assert [name_of(chunk_ms) for chunk_ms in CHUNKS_MS] == [model_name(chunk_ms) for chunk_ms in CHUNKS_MS]


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_configuration_says_what_the_graph_says(repository, acoustic, backend):
    onnx = pytest.importorskip("onnx")
    config = config_text(acoustic, Context(16, 4), backend, 4, "0")
    graph = onnx.load(repository / name_of(640) / "1" / "model.onnx").graph
    types = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.INT32: "TYPE_INT32"}
    said = {}
    for name, kind, dims in re.findall(r'put \{ name: "(\w+)" data_type: (\w+) dims: \[([\d, ]+)\]', config):
        said[name] = (kind, [int(size) for size in dims.split(",")])
    for name, new, kind, dims in re.findall(r'input_name: "(\w+)" output_name: "(\w+)" data_type: (\w+) dims: \[([\d, ]+)\]', config):
        said[name] = said[new] = (kind, [int(size) for size in dims.split(",")])
    for tensor in [*graph.input, *graph.output]:
        shape = [size.dim_value for size in tensor.type.tensor_type.shape.dim]
        assert shape[0] == 0, "the batch has any size"
        if backend == "onnxruntime" or tensor.name in ("x", "x_lens", "frames", "top_log_probs", "top_ids"):
            assert said[tensor.name] == (types[tensor.type.tensor_type.elem_type], shape[1:]), tensor.name
    assert ("state {" in config) == (backend == "onnxruntime"), "the Python backend has no implicit state"


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_configuration_is_read_by_tritons_own_parser(acoustic, backend):
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    config = text_format.Parse(config_text(acoustic, Context(16, 4), backend, 4, "0"), messages.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (name_of(640), backend, 128)
    assert config.sequence_batching.oldest.max_candidate_sequences == 2048
    states = {state.input_name: state for state in config.sequence_batching.state}
    assert set(states) == ({"keys", "values", "conv", "filled"} if backend == "onnxruntime" else set())
    for state in states.values():
        assert state.output_name == f"new_{state.input_name}"
        assert [state.initial_state[0].zero_data, list(state.initial_state[0].dims)] == [True, list(state.dims)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"chunks_ms": (600,)}, "multiples of 40 that divide 2560, found 600"), ({"top": 0}, "--top: expected 1 to")],
)
def test_what_cannot_be_exported_is_told(acoustic, tmp_path, options, expected):
    with pytest.raises(RecipeError, match=expected):
        export_triton(acoustic, "0", tmp_path / "repository", "python", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(acoustic, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RecipeError, match="found one that exists"):
        export_triton(acoustic, "0", tmp_path, "python")
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_best_phones_are_enough_for_a_lattice():
    rng = np.random.default_rng(0)
    log_probs = torch.from_numpy(rng.normal(0, 4, (60, 30)).astype(np.float32)).log_softmax(-1)
    values, ids = log_probs.topk(4)
    found = spread(ids.numpy().astype(np.int32), values.numpy(), 30)
    assert found.exp().sum(-1).max() < 1 + 1e-5
    assert found.min() > -1000
    own, other = slots_of(found.numpy()), slots_of(log_probs.numpy())
    for name in ("phones", "counts", "frames", "costs"):
        np.testing.assert_allclose(getattr(own, name), getattr(other, name), atol=1e-6, err_msg=name)


# -------------------------------------------------------------------------------------------------------------------- the server


def test_interleaved_streams_get_what_pytorch_gives_them(triton, talkative, acoustic):
    lengths = (0.3, 1.9, 2.64, 3.5, 4.0, 6.1)
    spoken = [noise(seconds, seed) for seed, seconds in enumerate(lengths)]

    async def work(encoder):
        streams = [encoder.stream(640, frame) for _ in spoken]
        found = [[] for _ in spoken]
        for start in range(0, max(map(len, spoken)), 9_000):  # of different ages in each batch: none ends with another

            async def speak(number, start=start):
                samples = spoken[number]
                if start < len(samples):
                    found[number] += await streams[number].hear(samples[start : start + 9_000], start + 9_000 >= len(samples))

            await asyncio.gather(*map(speak, range(len(spoken))))
        assert [replica.streams for replica in encoder.replicas] == [0]
        return found

    found = run(work)(TritonEncoder(triton.address, talkative))
    for chunks, samples in zip(found, spoken, strict=True):
        check_chunks(chunks, expected(acoustic, samples))
    moved = found[3][0].frames[0, :4] - found[3][1].frames[0, :4]
    assert moved.abs().max() > 1e-2, "state that never moved could not be told"


def test_state_matters(triton, talkative, acoustic):
    """The same chunk gives something else behind another: otherwise none of these tests would see a state that stays as it is."""
    samples = noise(3, 1)

    async def work(encoder):
        whole, late = encoder.stream(640, frame), encoder.stream(640, frame)
        return await whole.hear(samples, True), await late.hear(samples[10_240 * 2 :], True)

    whole, late = run(work)(TritonEncoder(triton.address, talkative))
    assert (whole[-1].frames - late[-1].frames).abs().max() > 1e-2


def test_only_sizes_of_chunks_that_the_server_has_are_offered(triton, talkative):
    encoder = TritonEncoder(triton.address, talkative)
    asyncio.run(encoder.check())
    assert encoder.chunks_ms == [160, 640]


def test_what_a_stream_left_behind_is_seen_by_no_other(triton, talkative, acoustic):
    async def work(encoder):
        for seed in range(3):
            stream = encoder.stream(640, frame)
            await stream.hear(noise(2, seed), False)
            await stream.close()
        assert [replica.streams for replica in encoder.replicas] == [0]
        return await encoder.stream(640, frame).hear(noise(2, 9), True)

    check_chunks(run(work)(TritonEncoder(triton.address, talkative)), expected(acoustic, noise(2, 9)))


def test_a_server_that_forgot_a_stream_gets_it_again(triton, talkative, acoustic):
    samples = noise(3, 7)

    async def work(encoder):
        stream = encoder.stream(640, frame)
        chunks = await stream.hear(samples[:25_000], False)
        stream._number += 1  # the server does not know that one
        chunks += await stream.hear(samples[25_000:], True)
        assert encoder.metrics._counts["chunks_again_total"] == {'{part="encoder"}': 2}
        assert not encoder.metrics._counts["replicas_lost_total"], "it is there"
        return chunks

    check_chunks(run(work)(TritonEncoder(triton.address, talkative)), expected(acoustic, samples))


def test_streams_survive_a_server_that_is_killed(repository, triton, talkative, acoustic, tmp_path):
    spoken = [noise(3 + seed / 3, seed) for seed in range(4)]

    async def work(encoder, other):
        streams = [encoder.stream(640, frame) for _ in spoken]
        found = list(await asyncio.gather(*(stream.hear(samples[:22_000], False) for stream, samples in zip(streams, spoken, strict=True))))
        assert sorted(replica.streams for replica in encoder.replicas) == [2, 2]
        await asyncio.to_thread(other.kill)
        rest = await asyncio.gather(*(stream.hear(samples[22_000:], True) for stream, samples in zip(streams, spoken, strict=True)))
        assert encoder.metrics._counts["replicas_lost_total"]['{part="encoder"}'] >= 1
        assert encoder.metrics._counts["chunks_again_total"]['{part="encoder"}'] >= 2
        return [first + last for first, last in zip(found, rest, strict=True)]

    with TritonServer(repository, tmp_path) as other:
        encoder = TritonEncoder(f"{triton.address}, {other.address}", talkative)
        found = run(lambda encoder: work(encoder, other))(encoder)
    for chunks, samples in zip(found, spoken, strict=True):
        check_chunks(chunks, expected(acoustic, samples))


def test_a_stream_waits_for_its_only_server(repository, talkative, acoustic, tmp_path, monkeypatch):
    monkeypatch.setattr("nim4.serve.triton_client.PATIENCE_S", 60.0)
    samples, port = noise(3, 3), free_port()

    async def work(encoder):
        stream = encoder.stream(640, frame)
        chunks = await stream.hear(samples[:25_000], False)
        await asyncio.to_thread(servers[0].kill)
        rest = asyncio.create_task(stream.hear(samples[25_000:], True))
        await asyncio.sleep(0.3)
        servers.append(await asyncio.to_thread(TritonServer(repository, tmp_path, port).__enter__))
        return chunks + await rest

    servers = [TritonServer(repository, tmp_path, port).__enter__()]
    try:
        check_chunks(run(work)(TritonEncoder(servers[0].address, talkative)), expected(acoustic, samples))
    finally:
        for server in servers:
            server.__exit__()


def test_without_a_server_a_stream_is_told_to_come_back(talkative, monkeypatch):
    pytest.importorskip("tritonclient.grpc")
    monkeypatch.setattr("nim4.serve.triton_client.PATIENCE_S", 0.2)

    async def work(encoder):
        with pytest.raises(Busy, match=r"no server of the encoder is ready: grpc://127\.0\.0\.1:"):
            await encoder.stream(640, frame).hear(noise(1, 0), True)

    run(work)(TritonEncoder(f"grpc://127.0.0.1:{free_port()}", talkative))


# --------------------------------------------------------------------------------------------------------------------- bad input


def test_a_server_that_is_not_ready_is_told(talkative, caplog):
    pytest.importorskip("tritonclient.grpc")
    encoder = TritonEncoder(f"grpc://127.0.0.1:{free_port()}", talkative)
    with pytest.raises(
        RecipeError, match=r"--encoder: expected a Triton server that is ready, found grpc://127.0.0.1:\d+: .*Fix: start tritonserver"
    ):
        asyncio.run(encoder.check())


def test_another_model_in_the_server_is_told(triton, talkative, aligned):
    with pytest.raises(RecipeError, match=r"nim4_encoder_640ms: expected the weights of .*model.safetensors, found others: of the same sizes"):
        asyncio.run(TritonEncoder(triton.address, aligned).check())


def test_a_model_of_another_size_in_the_server_is_told(triton, tmp_path):
    model = tiny_model(dim=8)
    save_model(tmp_path / "model", model.state_dict(), model.config, INVENTORY)
    with pytest.raises(RecipeError, match=r"found others: dim 16 and not 8, .*Fix: export this folder again, or name the folder"):
        asyncio.run(TritonEncoder(triton.address, tmp_path / "model").check())


def test_a_server_without_the_model_is_told(repository, talkative, tmp_path):
    shutil.copytree(repository / name_of(640), tmp_path / "repository" / "other")
    config = tmp_path / "repository" / "other" / "config.pbtxt"
    config.write_text(config.read_text().replace(name_of(640), "other"))
    with TritonServer(tmp_path / "repository", tmp_path) as other, pytest.raises(RecipeError, match="expected a Triton server that is ready"):
        asyncio.run(TritonEncoder(other.address, talkative).check())


@pytest.mark.parametrize("address", ["127.0.0.1:8001", "grpc://", "grpc://host", "grpc://a:1,", "http://a:1"])
def test_an_address_that_is_none_is_told(talkative, address):
    with pytest.raises(RecipeError, match="expected addresses as grpc://HOST:PORT, separated by commas"):
        TritonEncoder(address, talkative)


def test_a_missing_client_is_told(talkative, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tritonclient", None)
    with pytest.raises(RecipeError, match=r"expected the package tritonclient.*pip install --no-deps tritonclient"):
        TritonEncoder("grpc://127.0.0.1:1", talkative)
