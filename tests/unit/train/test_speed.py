"""Compiled blocks give what they give uncompiled, whatever is compiled; a GPU without room is a mistake of the user's, and nothing is lost."""

import functools
import json

import pytest
import tiny
import torch

from nim4.config import AugmentConfig, RecipeError, TrainConfig
from nim4.corpus.batch import Source, TrainBatches, phone_batches
from nim4.model.conformer import Context, valid_mask
from nim4.stage import read_json
from nim4.train import loop
from nim4.train.cr_ctc import cr_ctc
from nim4.train.distributed import Processes, shard
from nim4.train.loop import Trainer
from nim4.train.speed import as_written, blocks_of, compile_blocks, read_parts

CONTEXTS = (Context(), Context(4, 2), Context(16, 4), Context(8, -1), Context(24, 1))


@pytest.fixture
def traced_only(monkeypatch):
    """Compiles without making kernels: what is traced is what a GPU would run, and tracing takes seconds instead of minutes."""
    monkeypatch.setattr(loop, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    yield
    torch.compiler.reset()


def test_blocks_are_found(tmp_path):
    model = tiny.tiny_speech_llm(tiny.tiny_llm(tmp_path))
    assert blocks_of(model) == [*model.acoustic.encoder.blocks, *model.llm.model.layers]


def test_compiled_encoder_equals_the_written_one_under_every_context():
    written, compiled = tiny.tiny_model().train(), tiny.tiny_model().train()
    compile_blocks(compiled, backend="eager")
    assert compiled.state_dict().keys() == written.state_dict().keys()
    for lens in ([200, 150, 90], [333, 60]):
        batch = tiny.noise_batch(lens)
        for context in CONTEXTS:
            seen = []
            for model in (written, compiled):
                model.zero_grad()
                log_probs, out_lens = model(batch.x, batch.x_lens, context)
                log_probs = log_probs[valid_mask(out_lens, log_probs.shape[1])]
                log_probs.square().mean().backward()
                seen.append([log_probs, *(parameter.grad for parameter in model.parameters())])
            for one, other in zip(*seen, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_validation_runs_blocks_as_they_are_written():
    model, seen = tiny.tiny_model(), []
    gate = type(model.encoder.blocks[0].conv).gate

    def note(self, x):
        seen.append(torch.compiler.is_compiling())
        return gate(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.encoder.blocks[0].conv), "gate", note)
        batch = tiny.noise_batch([80])
        compile_blocks(model, backend="eager")
        with as_written(model):
            model(batch.x, batch.x_lens)
    assert seen == [False] * 2
    torch.compiler.reset()


def train(folder, manifest, model=None, loss=None, **settings):
    config = TrainConfig(**(tiny.TRAIN | {"augment": AugmentConfig(time_warp_frames=10), "log_every": 1} | settings))
    model = model or tiny.tiny_model()
    folder.mkdir(exist_ok=True)
    batches = TrainBatches([Source(manifest)], phone_batches(tiny.INVENTORY), config)
    alone = Processes(0, 1, torch.device("cpu"))
    trainer = Trainer(model, loss or cr_ctc(model.mean, config), batches, config, folder, alone, evaluate=lambda: {"score": 1.0})
    trainer.run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_with_compiled_blocks_is_the_same_training(tmp_path, traced_only):
    manifest = tiny.write_features(tmp_path, "train", [60 + 5 * (i * 7 % 16) for i in range(16)])
    written, compiled = train(tmp_path / "a", manifest), train(tmp_path / "b", manifest, compile=True)
    assert len(written) == len(compiled) > 6
    for one, other in zip(written, compiled, strict=True):
        assert {name: other[name] for name in other if name not in ("audio_s_per_s", "kind")} == pytest.approx(
            {name: one[name] for name in one if name not in ("audio_s_per_s", "kind")}, rel=1e-4, abs=1e-5
        )


def test_shards_are_not_compiled(tmp_path):
    manifest = tiny.write_features(tmp_path, "train", [60] * 8)
    with pytest.raises(RecipeError, match=r"train\.compile: expected False with train\.parallel=fsdp2, found True"):
        train(tmp_path / "a", manifest, compile=True, parallel="fsdp2")


def test_layers_of_a_zipformer_are_blocks_that_are_neither_compiled_nor_sharded():
    model = tiny.tiny_zipformer()
    layers = [layer for stack in model.encoder.encoder.encoders for layer in stack.layers]
    assert blocks_of(model) == layers
    compile_blocks(model, backend="eager")
    assert all(layer._compiled_call_impl is None for layer in layers)
    with pytest.raises(RecipeError, match=r"train\.parallel: expected ddp"):
        shard(model)


def test_numbers_of_a_step():
    parts = [{"loss": torch.tensor(1.5), "n": torch.tensor(3)}, {"loss": torch.tensor(2.0), "n": torch.tensor(4)}]
    assert read_parts(parts, torch.tensor(0.5)) == ({"loss": 3.5, "n": 7.0}, 0.5, True)
    assert not read_parts([*parts, {"loss": torch.tensor(float("inf"))}], torch.tensor(0.5))[2]
    assert not read_parts(parts, torch.tensor(float("nan")))[2]
    assert read_parts([parts[0] | {"n": torch.tensor(float("nan"))}], torch.tensor(0.5))[2]  # only what is minimised counts


def test_a_gpu_without_room_is_told_and_the_run_goes_on_with_smaller_batches(command, units, tmp_path, monkeypatch):
    """On a GPU torch raises it; here the loss does."""
    options = [*tiny.pretrain_options(units, tmp_path), "--out", tmp_path / "model"]
    pretrain, step_of = command("03_pretrain"), Trainer._train_step

    def exhausted(self, parallel, micro_batches):
        if self.step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB")
        return step_of(self, parallel, micro_batches)

    monkeypatch.setattr(Trainer, "_train_step", exhausted)
    code, errors = pretrain(*options)
    assert (code, len(errors)) == (2, 1)
    assert "training step 5: expected a batch that fits into the memory of the GPU (train.max_duration_s=5)" in errors[0]
    assert "found CUDA out of memory. Tried to allocate 2.00 GiB. Fix:" in errors[0]
    assert "run the same command again with --set train.max_duration_s=2.5 --set train.accum=2; it resumes" in errors[0]
    assert (tmp_path / "model.tmp" / "checkpoints" / "step-4").is_dir()
    monkeypatch.setattr(Trainer, "_train_step", step_of)
    assert pretrain(*options, "--set", "train.max_duration_s=2.5", "--set", "train.accum=2") == (0, [])
    assert "resumed, though train.accum was 1 and is 2; train.max_duration_s was 5.0 and is 2.5" in pretrain.log
    assert "resuming at step 4" in pretrain.log
    assert read_json(tmp_path / "model" / "done.json")["made_from"]["config"]["train"]["max_duration_s"] == 2.5
