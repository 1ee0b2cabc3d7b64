"""Encoder swaps: the schedule, what a swap changes and what it keeps, resuming across one, and a stage 3 that is still running."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from made_corpora import run_program
from made_snapshots import aligned, options, pretrained, write_registry, write_units
from tiny import tiny_llm, tiny_model

from nim4.config import RecipeError, SwapConfig
from nim4.model.checkpoint import read_weights
from nim4.stage import read_jsonl
from nim4.train import fine_tuning, ia_sft
from nim4.train.cka import Snapshot
from nim4.train.ia_sft import EncoderSwaps, Timeline
from nim4.train.loop import Trainer
from nim4.train.optim import learning_rate


def snapshots(*steps, final=100):
    """Triggers at `steps`, and the final snapshot."""
    found = [Snapshot(step, 0.9, 0.9, True, False, f"{step}", "") for step in steps]
    return [*found, Snapshot(final, 0.99, 0.99, False, True, f"{final}", "")]


@pytest.mark.parametrize(
    ("triggers", "expected"),
    [
        ([], []),  # aligned on the final snapshot: nothing comes after it
        ([10], [(2_000_000, 100)]),
        ([10, 20], [(1_000_000, 20), (2_000_000, 100)]),  # the paper's 1 M + 1 M + 2 M
        ([10, 20, 30], [(1_000_000, 20), (2_000_000, 100)]),  # the third would not stay long enough
    ],
)
def test_the_schedule_is_the_papers(triggers, expected):
    swaps = Timeline.of(SwapConfig(), 4_000_000).swaps(snapshots(*triggers))
    assert [(step, snapshot.step) for step, snapshot in swaps] == expected


def test_the_schedule_follows_the_settings():
    swaps = Timeline.of(SwapConfig(min_dwell=0.1, final=0.35), 100).swaps(snapshots(10, 20, 30, 40, 50, 60, 70, 80))
    assert [(step, snapshot.step) for step, snapshot in swaps] == [(10, 20), (20, 30), (30, 40), (40, 50), (50, 60), (65, 100)]
    assert Timeline.of(SwapConfig(final=1.0), 100).swaps(snapshots(10, 20))[0][0] == 0


@pytest.mark.parametrize("settings", [{"min_dwell": 0.0}, {"final": 0.0}, {"final": 1.5}, {"rewarm": -0.1}])
def test_shares_that_are_none(settings):
    with pytest.raises(RecipeError, match=f"swaps.{next(iter(settings))}: expected a share"):
        Timeline.of(SwapConfig(**settings), 100)


def test_live_takes_what_there_is():
    timeline = Timeline.of(SwapConfig(), 100)  # an encoder stays for 25 steps; the last swap is at 50
    first, second, final = snapshots(10, 20)
    assert timeline.next_swap(first, 0, 0, [first]) is None
    assert timeline.next_swap(first, 0, 20, [first, second]) == (25, second)
    assert timeline.next_swap(first, 0, 26, [first, second]) is None  # too late to stay for 25 steps
    assert timeline.next_swap(first, 0, 26, [first, second, final]) == (50, final)
    assert timeline.next_swap(second, 25, 60, [first, second, final]) == (60, final)
    assert timeline.next_swap(final, 60, 61, [first, second, final]) is None


# -------------------------------------------------------------------------------------------------------------- whole runs
# Of 8 steps an encoder stays for 2; the last swap is at 4. The rate is warmed up anew over 2 steps. Checkpoints at 4 and 8: that of
# step 4 holds the encoder before the swap at step 4.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`3` with two triggers, `4` aligned on the first, `units`."""
    folder = tmp_path_factory.mktemp("swaps")
    pretrained(folder / "3", 2)
    aligned(folder / "4", folder / "3", tiny_llm(folder / "llm"))
    write_units(folder / "units")
    return folder


@pytest.fixture
def ia_sft_run(command, folders, tmp_path):
    """Runs stage 5 into tmp_path / out."""
    program = command("05_ia_sft")

    def run(out, *more, snapshots=folders / "3", **train):
        shared = options(folders / "units", tmp_path, **train)
        ended = program(*shared, "--init", folders / "4", "--snapshots", snapshots, "--out", tmp_path / out, *more)
        run.log = program.log
        return ended

    return run


def product(folder):
    """Everything that must be the same after a resume."""
    metrics = [{name: value for name, value in row.items() if name != "audio_s_per_s"} for row in read_jsonl(folder / "metrics.jsonl")]
    return metrics, read_jsonl(folder / "swaps.jsonl"), *((folder / name).read_bytes() for name in ("model.safetensors", "llm/model.safetensors"))


def acoustic(folder):
    return {name: tensor for name, tensor in read_weights(folder / "model.safetensors").items() if not name.startswith("adaptor.")}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The product of a run that was never killed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shared = options(folders / "units", folder)
        run_program(patch, "05_ia_sft", *shared, "--init", folders / "4", "--snapshots", folders / "3", "--out", folder / "5")
    return folder / "5"


def test_the_product(whole, folders):
    assert same(acoustic(whole), read_weights(folders / "3" / "snapshots" / "step-100.safetensors"))
    before, after = read_weights(folders / "4" / "model.safetensors"), read_weights(whole / "model.safetensors")
    assert not torch.equal(before["adaptor.up.weight"], after["adaptor.up.weight"])
    assert (whole / "llm/model.safetensors").read_bytes() != (folders / "4" / "llm/model.safetensors").read_bytes()
    rows = read_jsonl(whole / "swaps.jsonl")
    assert [(row["step"], row["snapshot_step"], row["final"]) for row in rows] == [(2, 30, False), (4, 100, True)]
    losses = [row["loss"] for row in read_jsonl(whole / "metrics.jsonl") if row["kind"] == "train"]  # of steps 1-2, 3-4, 5-6, 7-8
    assert [(row["train_loss_before"], row["train_loss_after"]) for row in rows] == [tuple(losses[0:2]), tuple(losses[1:3])]
    for row in rows:
        assert row["valid_loss_before"] != row["valid_loss_after"]
        assert abs(row["valid_loss_streaming_before"] - row["valid_loss_before"]) < 1


@pytest.mark.parametrize(("direction", "chosen"), [(1, "best single checkpoint"), (-1, "mean of the checkpoints at steps 8")])
def test_final_weights_are_of_the_last_encoder(ia_sft_run, tmp_path, monkeypatch, direction, chosen):
    """The best weights before a swap, and checkpoints from before it, hold another encoder: scores get worse, or better, all the time."""
    calls = itertools.count(1)
    monkeypatch.setattr(fine_tuning, "validate_sft", lambda *args: {"score": direction * next(calls), "loss": 1.0, "loss_streaming": 1.0})
    assert ia_sft_run("out", average_last=3, keep_last=3) == (0, [])
    assert json.loads((tmp_path / "out" / "final.json").read_text())["chosen"] == chosen
    assert same(acoustic(tmp_path / "out"), tiny_model(seed=100).state_dict())


def test_a_swap_keeps_the_optimiser_and_warms_up_the_rate(ia_sft_run, tmp_path, monkeypatch):
    trainers, swaps = [], []

    class Seen(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    def swap(self, step, snapshot):
        before = copy.deepcopy((trainers[0].optimizer.state_dict(), trainers[0].model.state_dict()))
        original(self, step, snapshot)
        swaps.append((before, copy.deepcopy((trainers[0].optimizer.state_dict(), trainers[0].model.state_dict()))))

    original = EncoderSwaps._swap
    monkeypatch.setattr(fine_tuning, "Trainer", Seen)
    monkeypatch.setattr(EncoderSwaps, "_swap", swap)
    assert ia_sft_run("out", log_every=1) == (0, [])
    assert len(swaps) == 2
    for (before, old), (after, new) in swaps:
        assert before["state"]
        for number, state in before["state"].items():
            assert all(torch.equal(value, after["state"][number][name]) for name, value in state.items())
        changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
        assert changed == {"acoustic"}
    config = trainers[0].config
    rates = {row["step"]: row["lr"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if row["kind"] == "train"}
    shares = {step: rates[step] / learning_rate(step - 1, config) for step in rates}
    assert shares == pytest.approx({1: 1, 2: 1, 3: 0.5, 4: 1, 5: 0.5, 6: 1, 7: 1, 8: 1}, rel=2e-2)


class Killed(Exception):
    pass


def kill(monkeypatch, name, at):
    """Ends the run behind the call of `name` for step `at`, once."""
    original, left = getattr(EncoderSwaps, name), [at]

    def call(self, step, *rest):
        result = original(self, step, *rest)
        if left == [step]:
            left.clear()
            raise Killed
        return result

    monkeypatch.setattr(EncoderSwaps, name, call)


@pytest.mark.parametrize(("name", "at"), [("_swap", 2), ("before_step", 4), ("_swap", 4), ("after_step", 5), ("before_step", 7)])
def test_a_killed_run_resumes_to_the_last_digit(ia_sft_run, tmp_path, monkeypatch, whole, name, at):
    kill(monkeypatch, name, at)
    with pytest.raises(Killed):
        ia_sft_run("out")
    assert ia_sft_run("out") == (0, [])
    assert product(tmp_path / "out") == product(whole)


def test_one_snapshot_is_never_swapped(command, folders, tmp_path):
    stage3 = pretrained(tmp_path / "3", 0)
    init = aligned(tmp_path / "4", stage3, folders / "llm")
    program = command("05_ia_sft")
    shared = [*options(folders / "units", tmp_path, max_steps=4), "--init", init, "--out", tmp_path / "out"]
    assert program(*shared, "--snapshots", stage3) == (0, [])
    assert "no later snapshot" in program.log
    assert read_jsonl(tmp_path / "out" / "swaps.jsonl") == []
    assert same(acoustic(tmp_path / "out"), read_weights(stage3 / "snapshots" / "step-100.safetensors"))


# -------------------------------------------------------------------------------------------------------------------- live


def running_stage3(folders, tmp_path, monkeypatch, *, second_at, final_at):
    """A stage 3 whose registry grows when stage 5 has done so many steps; it ends while stage 5 waits when `final_at` is None."""
    folder = tmp_path / "3.tmp"
    folder.mkdir()
    write_registry(folder, 1, final=False)

    def finish():
        if folder.exists():
            write_registry(folder, 2)
            folder.rename(tmp_path / "3")

    def before_step(self, step):
        if step == second_at and folder.exists():
            write_registry(folder, 2, final=False)
        if step == final_at:
            finish()
        return original(self, step)

    original = EncoderSwaps.before_step
    monkeypatch.setattr(EncoderSwaps, "before_step", before_step)
    monkeypatch.setattr(ia_sft.time, "sleep", lambda seconds: finish())
    return tmp_path / "3"


@pytest.mark.parametrize(
    ("second_at", "final_at", "expected"),
    [
        (0, 0, [(2, 30), (4, 100)]),  # all there from the start: as in a replay
        (1, 3, [(2, 30), (4, 100)]),
        (3, 3, [(4, 100)]),  # the second comes too late
        (1, None, [(2, 30), (4, 100)]),  # stage 5 waits for the last one
        (5, None, [(4, 100)]),
    ],
)
def test_live_follows_a_registry_that_grows(ia_sft_run, folders, tmp_path, monkeypatch, whole, second_at, final_at, expected):
    folder = running_stage3(folders, tmp_path, monkeypatch, second_at=second_at, final_at=final_at)
    assert ia_sft_run("out", "--live", "true", snapshots=folder) == (0, [])
    assert [(row["step"], row["snapshot_step"]) for row in read_jsonl(tmp_path / "out" / "swaps.jsonl")] == expected
    assert same(acoustic(tmp_path / "out"), acoustic(whole))
    if len(expected) == 2:
        assert product(tmp_path / "out") == product(whole)


def test_live_swaps_where_it_did_before_it_was_killed(ia_sft_run, folders, tmp_path, monkeypatch):
    """At the second run all snapshots are there from the start, and still the second is taken up at step 3."""
    folder = running_stage3(folders, tmp_path, monkeypatch, second_at=3, final_at=4)
    live = ("--live", "true", "--set", "swaps.min_dwell=0.17")  # of 12 steps an encoder stays for 2; the last swap is at 6
    kill(monkeypatch, "after_step", 5)
    with pytest.raises(Killed):
        ia_sft_run("out", *live, snapshots=folder, save_every=20, max_steps=12)
    assert [row["step"] for row in read_jsonl(tmp_path / "out.tmp" / "swaps.jsonl")] == [3]
    assert ia_sft_run("out", *live, snapshots=folder, save_every=20, max_steps=12) == (0, [])
    assert [row["step"] for row in read_jsonl(tmp_path / "out" / "swaps.jsonl")] == [3, 6]


def test_live_does_not_wait_for_ever(ia_sft_run, folders, tmp_path, monkeypatch):
    folder = running_stage3(folders, tmp_path, monkeypatch, second_at=0, final_at=None)
    monkeypatch.setattr(ia_sft.time, "sleep", lambda seconds: None)
    code, errors = ia_sft_run("out", "--live", "true", "--max-wait-s", "0.01", snapshots=folder)
    assert (code, len(errors)) == (2, 1)
    assert "expected the final snapshot of stage 3, found none after 0 s" in errors[0]


# ---------------------------------------------------------------------------------------------------------------- mistakes


def missing(folder):
    (folder / "snapshots" / "step-30.safetensors").unlink()


def altered(folder):
    with open(folder / "snapshots" / "step-100.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")


def no_registry(folder):
    (folder / "registry.jsonl").unlink()


def only_a_reference(folder):
    write_registry(folder, 0, final=False)


def not_complete(folder):
    write_registry(folder, 2, final=False)


def of_another_run(folder):
    rows = read_jsonl(folder / "registry.jsonl")
    (folder / "registry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "step-30.safetensors: expected the snapshot that registry.jsonl names, found no such file"),
        (altered, "step-100.safetensors: expected the snapshot that registry.jsonl names, found another file"),
        (no_registry, "registry.jsonl: expected the snapshots of stage 3, found none"),
        (only_a_reference, "registry.jsonl: expected a trigger or a final snapshot, found neither"),
        (not_complete, "expected a final snapshot, found none in its registry"),
        (of_another_run, "--init: expected the encoder of step 30 in"),
    ],
)
def test_wrong_snapshots_are_told_before_training(ia_sft_run, folders, tmp_path, change, message):
    shutil.copytree(folders / "3", tmp_path / "3")
    change(tmp_path / "3")
    code, errors = ia_sft_run("out", snapshots=tmp_path / "3")
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert ". Fix: " in errors[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp" / "metrics.jsonl").exists()
