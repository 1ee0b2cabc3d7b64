"""The training loop: schedule, skipped steps, frozen parts, final weights, and resuming to the last digit."""

import json
import logging
import math

import pytest
import torch
from tiny import INVENTORY, TRAIN, tiny_model, tiny_zipformer, write_features

from nim4.config import AugmentConfig, NoiseConfig, OptimConfig, RecipeError, TrainConfig
from nim4.corpus.batch import Source, TrainBatches, phone_batches
from nim4.corpus.noise import Noise
from nim4.model.checkpoint import read_weights
from nim4.train.cr_ctc import cr_ctc
from nim4.train.distributed import Processes
from nim4.train.loop import Draw, Trainer, learning_rate, make_optimizer

ALONE = Processes(0, 1, torch.device("cpu"))
SETTINGS = TRAIN | {"max_steps": 9, "save_every": 3, "log_every": 2, "valid_every": 4, "max_duration_s": 4.0}
SETTINGS["augment"] = AugmentConfig(time_warp_frames=10)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features"), "train", [60 + 5 * (i * 7 % 16) for i in range(16)])


class Killed(Exception):
    pass


def train(
    manifest,
    work,
    *,
    loss=None,
    kill_at=None,
    evaluate=None,
    model=None,
    after_step=lambda step: None,
    before_step=lambda step: False,
    noise=None,
    **settings,
):
    """A training run with dropout, both views and all augmentation; `kill_at` ends it inside that step's after_step."""
    config = TrainConfig(**(SETTINGS | settings))
    model = model or tiny_model(dropout=0.1)
    batches = TrainBatches([Source(manifest)], phone_batches(INVENTORY, noise), config, noise=noise)

    def stop(step):
        after_step(step)
        if step == kill_at:
            raise Killed

    evaluate = evaluate or (lambda: {"score": float(next(model.parameters()).abs().sum())})
    work.mkdir(exist_ok=True)
    hooks = {"evaluate": evaluate, "after_step": stop, "before_step": before_step}
    trainer = Trainer(model, loss or cr_ctc(model.mean, config), batches, config, work, ALONE, **hooks)
    trainer.run()
    return trainer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def rows_of(work, kind=None):
    """The rows of metrics.jsonl without the speed."""
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "audio_s_per_s"} for row in rows if kind in (None, row["kind"])]


# --------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def uninterrupted(manifest, tmp_path_factory):
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("whole")
    return train(manifest, work).model.state_dict(), rows_of(work)


@pytest.mark.parametrize(("kill_at", "num_workers"), [(1, 0), (3, 0), (4, 0), (5, 2), (6, 0), (8, 2), (9, 0)])
def test_a_killed_run_resumes_to_the_last_digit(manifest, tmp_path, uninterrupted, kill_at, num_workers):
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", kill_at=kill_at, num_workers=num_workers)
    trainer = train(manifest, tmp_path / "work", num_workers=num_workers)
    weights, rows = uninterrupted
    assert same(trainer.model.state_dict(), weights)
    assert rows_of(tmp_path / "work") == rows


@pytest.mark.parametrize(("kill_at", "num_workers"), [(4, 0), (5, 2)])
def test_a_killed_run_with_noise_resumes_to_the_last_digit(manifest, tmp_path, uninterrupted, kill_at, num_workers):
    clips = write_features(tmp_path / "features", "noise", [30, 200])
    runs = []
    for work, kill in ((tmp_path / "whole", None), (tmp_path / "killed", kill_at), (tmp_path / "killed", None)):
        settings = {"kill_at": kill, "num_workers": num_workers if work.name == "killed" else 0, "max_steps": 7}
        noise = Noise([Source(clips)], NoiseConfig(prob=0.5, empty_prob=0.2), 0)
        if kill is None:
            runs.append((train(manifest, work, noise=noise, **settings).model.state_dict(), rows_of(work)))
        else:
            with pytest.raises(Killed):
                train(manifest, work, noise=noise, **settings)
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert rows_of(tmp_path / "whole", "train")[0] != uninterrupted[1][0]  # and noise does something


def test_a_run_killed_again_and_again(manifest, tmp_path, uninterrupted):
    for kill_at in (4, 5, 7, 8):
        with pytest.raises(Killed):
            train(manifest, tmp_path / "work", kill_at=kill_at)
    trainer = train(manifest, tmp_path / "work")
    assert same(trainer.model.state_dict(), uninterrupted[0])
    assert rows_of(tmp_path / "work") == uninterrupted[1]


def test_a_run_killed_after_its_last_checkpoint(manifest, tmp_path, uninterrupted):
    calls = []

    def evaluate():
        calls.append(None)
        if len(calls) == 4:  # of the averaged weights, after the validations at 4, 8 and 9
            raise Killed
        return {"score": float(next(model.parameters()).abs().sum())}

    model = tiny_model(dropout=0.1)
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", evaluate=evaluate, model=model)
    assert same(train(manifest, tmp_path / "work").model.state_dict(), uninterrupted[0])
    assert rows_of(tmp_path / "work") == uninterrupted[1]


def test_a_torn_last_line_of_the_metrics_is_dropped(manifest, tmp_path, uninterrupted):
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", kill_at=5)
    with open(tmp_path / "work" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ki')
    train(manifest, tmp_path / "work")
    assert rows_of(tmp_path / "work") == uninterrupted[1]


def test_another_seed_is_another_run(manifest, tmp_path, uninterrupted):
    assert not same(train(manifest, tmp_path / "work", seed=1).model.state_dict(), uninterrupted[0])


def test_a_half_written_checkpoint_is_not_taken_for_one(manifest, tmp_path, uninterrupted):
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", kill_at=5)
    (tmp_path / "work" / "checkpoints" / "step-6.tmp").mkdir()
    assert same(train(manifest, tmp_path / "work").model.state_dict(), uninterrupted[0])


# ------------------------------------------------------------------------------------------------------------- one step


def test_learning_rate():
    config = OptimConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    assert [learning_rate(step, config) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == learning_rate(500, config) == pytest.approx(0.1)
    assert learning_rate(35, config) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(0, OptimConfig(warmup_steps=0, learning_rate=1.0)) == 1.0
    constant = OptimConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, schedule="constant")
    assert [learning_rate(step, constant) for step in (4, 10, 109)] == pytest.approx([0.5, 1.0, 1.0])


def test_optimizer_leaves_biases_and_norms_undecayed():
    model = tiny_model()
    model.encoder.requires_grad_(False)
    decayed, plain = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for name, p in model.head.named_parameters() if name.endswith("weight")}
    assert {id(p) for p in plain["params"]} == {id(p) for name, p in model.head.named_parameters() if name.endswith("bias")}


def test_a_killed_run_with_muon_resumes_to_the_last_digit(manifest, tmp_path):
    whole = train(manifest, tmp_path / "whole", optimizer="muon").model.state_dict()
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", optimizer="muon", kill_at=5)
    assert same(train(manifest, tmp_path / "work", optimizer="muon").model.state_dict(), whole)


def test_a_killed_zipformer_resumes_to_the_last_digit(manifest, tmp_path):
    """Its regularisers draw at every step, and their schedules go on where they were."""
    settings = {"optimizer": "muon", "clip_norm": 1.0}

    def weights(work, **kill):
        model = tiny_zipformer()
        paced = {"before_step": lambda step: model.at_step(step) is not None}
        return train(manifest, work, model=model, **paced, **kill, **settings).model.state_dict()

    whole = weights(tmp_path / "whole")
    with pytest.raises(Killed):
        weights(tmp_path / "work", kill_at=5)
    assert same(weights(tmp_path / "work"), whole)
    relaxed = train(manifest, tmp_path / "relaxed", model=tiny_zipformer(), **settings).model.state_dict()
    assert not same(relaxed, whole), "at the end of its schedules from the start, it is another training"


def test_muon_steps_the_matrices_between_hidden_layers():
    model = tiny_model()
    optimizer = make_optimizer(model, OptimConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert {"encoder.blocks.0.ffn1.up.weight", "encoder.blocks.0.attention.query.weight", "head.layers.0.weight"} <= chosen
    assert not any(name.startswith(("encoder.subsampling", "head.layers.6")) or "norm" in name or "depthwise" in name for name in chosen)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_frozen_parameters_stay_as_they_are(manifest, tmp_path):
    model = tiny_model()
    model.encoder.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = train(manifest, tmp_path / "work", model=model).model.state_dict()  # the averaging at the end included
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("head.")), name


def test_two_micro_batches_weigh_by_frames(manifest, tmp_path):
    """The gradient of a step is that of the sum of the losses over the sum of the frames, however long each micro-batch is."""
    seen = []

    def loss(model, batch, draw):
        seen.append((float(batch.x_lens.sum()), draw.own.initial_seed()))
        return {"loss": sum(p.sum() for p in model.parameters()) * batch.x_lens.sum()}

    model = tiny_model()
    train(manifest, tmp_path / "work", loss=loss, model=model, max_steps=1, accum=2, clip_norm=1e9)
    assert len({frames for frames, _ in seen}) == 2
    assert len({seed for _, seed in seen}) == 2  # each micro-batch draws for itself
    (row,) = rows_of(tmp_path / "work", "train")
    assert row["grad_norm"] == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-4)


def test_draws_depend_on_step_and_micro_batch(manifest, tmp_path):
    draws: list[Draw] = []
    numbers = []

    def loss(model, batch, draw):
        draws.append(draw)
        numbers.append((torch.rand(1, generator=draw.shared).item(), torch.rand(1, generator=draw.own).item(), torch.rand(1).item()))
        return {"loss": sum(p.sum() for p in model.parameters())}

    train(manifest, tmp_path / "work", loss=loss, max_steps=3, accum=2)
    assert [draw.step for draw in draws] == [0, 0, 1, 1, 2, 2]
    shared, own, dropout = zip(*numbers, strict=True)
    assert shared[::2] == shared[1::2]
    assert len(set(shared)) == 3
    assert len(set(own)) == len(set(dropout)) == 6


def test_gradients_are_clipped(manifest, tmp_path):
    moved = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        before = model.weight.detach().clone()

        def loss(model, batch, draw, scale=scale):
            return {"loss": scale * model.weight.sum() * batch.x_lens.sum()}

        train(manifest, tmp_path / f"{scale}", loss=loss, model=model, max_steps=1, clip_norm=1e-9)
        moved.append(model.weight.detach() - before)
    # Adam's step is nearly free of scale; a gradient of 1e-9 is below its epsilon, and only then the step shrinks.
    torch.testing.assert_close(moved[0], moved[1])
    assert moved[0].abs().max() < 0.2 * 1e-3


# ---------------------------------------------------------------------------------------------------------- bad losses


def sometimes(bad_steps, value):
    """The sum of the head's weights as loss; `value` instead in some steps."""

    def loss(model, batch, draw):
        return {"loss": sum(p.sum() for p in model.parameters()) * (value if draw.step in bad_steps else 1.0)}

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_is_skipped_and_its_utterances_are_logged(manifest, tmp_path, caplog, value):
    caplog.set_level(logging.INFO, "nim4")
    model, weights = tiny_model(), {}

    def keep(step):
        weights[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    train(manifest, tmp_path / "work", loss=sometimes({1, 3, 4}, value), model=model, max_steps=6, max_nonfinite_in_row=3, after_step=keep)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [message.split(":")[0] for message in errors] == [f"step {step} skipped" for step in (1, 3, 4)]
    assert all("utterances: u0" in message for message in errors)
    assert [same(weights[step], weights[step + 1]) for step in range(1, 6)] == [True, False, True, True, False]
    assert [row["skipped"] for row in rows_of(tmp_path / "work", "train")] == [1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights[6].values())


def test_training_stops_after_too_many_in_a_row(manifest, tmp_path, caplog):
    with pytest.raises(RecipeError, match=r"training step 4: expected a finite loss, found 3 steps in a row"):
        train(manifest, tmp_path / "work", loss=sometimes({0, 2, 3, 4}, float("nan")), max_nonfinite_in_row=3)


def test_the_count_of_bad_steps_survives_a_kill(manifest, tmp_path):
    loss = sometimes({1, 2, 3}, float("nan"))
    with pytest.raises(Killed):
        train(manifest, tmp_path / "work", loss=loss, kill_at=3, max_nonfinite_in_row=3, save_every=2)
    with pytest.raises(RecipeError, match="training step 3: expected a finite loss, found 3 steps in a row"):
        train(manifest, tmp_path / "work", loss=loss, max_nonfinite_in_row=3, save_every=2)


def test_an_utterance_too_short_for_its_phonemes_is_named(tmp_path, caplog):
    manifest = write_features(tmp_path, "train", [60, 60, 8, 60])  # 2 encoder frames for 3 phonemes
    train(manifest, tmp_path / "work", max_steps=4, max_duration_s=0.15)
    named = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert named
    assert all(message.endswith("utterances: u002") for message in named)


# ------------------------------------------------------------------------------------------------------- final weights


def scores(*values):
    """An evaluation that gives these scores, then goes on with the last."""
    left = list(values)
    return lambda: {"score": left.pop(0) if len(left) > 1 else left[0]}


def test_the_mean_of_the_last_checkpoints_is_final_when_it_is_best(manifest, tmp_path):
    at = {}
    model = tiny_model()

    def keep(step):
        at[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    trainer = train(manifest, tmp_path / "work", model=model, evaluate=scores(9, 8, 7, 5), after_step=keep, average_last=2)
    mean = {name: ((at[6][name].double() + at[9][name].double()) / 2).float() for name in at[9]}
    assert same(trainer.model.state_dict(), mean)
    final = json.loads((tmp_path / "work" / "final.json").read_text())
    assert final["chosen"] == "mean of the checkpoints at steps 6, 9"
    assert final["valid"] == {"score": 5}


def test_the_best_checkpoint_is_final_when_it_is_better(manifest, tmp_path):
    at = {}
    model = tiny_model()

    def keep(step):
        at[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    trainer = train(manifest, tmp_path / "work", model=model, evaluate=scores(9, 2, 7, 5, 2), after_step=keep)
    assert same(trainer.model.state_dict(), at[8])  # validated at 4, 8, 9
    assert same(read_weights(tmp_path / "work" / "best.safetensors"), at[8])
    assert json.loads((tmp_path / "work" / "final.json").read_text()) == {
        "chosen": "best single checkpoint",
        "step": 9,
        "mean": {"score": 5},
        "valid": {"score": 2},
    }


def test_evaluation_runs_without_dropout_and_leaves_the_model_training(manifest, tmp_path):
    modes = []
    model = tiny_model(dropout=0.5)
    train(
        manifest,
        tmp_path / "work",
        model=model,
        evaluate=lambda: modes.append(model.training) or {"score": 1.0},
        after_step=lambda step: modes.append(model.training),
    )
    assert modes == [True] * 4 + [False] + [True] * 4 + [False, True, False] + [False]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("name", ["log_every", "valid_every", "save_every", "average_last", "accum", "max_steps", "keep_last"])
def test_counts_of_nothing_are_refused(manifest, tmp_path, name):
    with pytest.raises(RecipeError, match=f"train.{name}: expected at least 1, found 0"):
        train(manifest, tmp_path / "work", **{name: 0})


def test_precision_and_schedule(manifest, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.precision: expected fp32 or bf16, found fp16"):
        train(manifest, tmp_path / "work", precision="fp16")
    with pytest.raises(RecipeError, match=r"train\.schedule: expected cosine or constant, found linear"):
        train(manifest, tmp_path / "work", schedule="linear")
    trainer = train(manifest, tmp_path / "bf16", precision="bf16", max_steps=2)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trainer.model.parameters())
