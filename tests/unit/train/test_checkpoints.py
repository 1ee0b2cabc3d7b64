"""Checkpoints a run resumes from."""

import pytest
import torch

from nim4.config import RecipeError
from nim4.stage import read_json
from nim4.train.checkpoints import Checkpoints

CPU = torch.device("cpu")


def optimizer_of(size=3):
    parameter = torch.nn.Parameter(torch.ones(size))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer


def test_only_the_newest_stay_in_the_order_of_their_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.last() is None
    for step in (8, 9, 10, 100):
        checkpoints.save(step, {"w": torch.full((2,), float(step))}, optimizer_of().state_dict(), {"step": step})
    assert [path.name for path in checkpoints.all()] == ["step-10", "step-100"]
    assert checkpoints.last().name == "step-100"
    assert read_json(checkpoints.last() / "trainer.json") == {"step": 100}


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for note in ("old", "new"):
        checkpoints.save(5, {"w": torch.ones(1)}, optimizer_of().state_dict(), {"note": note})
    assert [read_json(path / "trainer.json")["note"] for path in checkpoints.all()] == ["new"]


def test_a_failed_save_is_no_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, {"w": torch.ones(1)}, optimizer_of().state_dict(), {})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, {"w": torch.ones(1)}, optimizer_of().state_dict(), {})
    assert checkpoints.last().name == "step-1"
    monkeypatch.undo()
    checkpoints.save(2, {"w": torch.ones(1)}, optimizer_of().state_dict(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_the_optimiser_comes_back(tmp_path):
    checkpoints, saved, fresh = Checkpoints(tmp_path, 1), optimizer_of(), optimizer_of()
    saved.param_groups[0]["params"][0].sum().backward()
    saved.step()
    checkpoints.save(1, {}, saved.state_dict(), {})
    checkpoints.load_optimizer(checkpoints.last(), fresh.load_state_dict, CPU)
    state, restored = (optimizer.state_dict()["state"][0] for optimizer in (saved, fresh))
    assert all(torch.equal(state[name], restored[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_broken_optimiser_is_told(tmp_path, content):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {}, optimizer_of().state_dict(), {})
    path = tmp_path / "step-1" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(RecipeError, match=r"optimizer\.pt: expected the optimiser state of this run"):
        checkpoints.load_optimizer(checkpoints.last(), optimizer_of().load_state_dict, CPU)


def test_the_optimiser_of_another_model_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {}, torch.optim.AdamW([torch.nn.Parameter(torch.ones(1)) for _ in range(3)]).state_dict(), {})
    with pytest.raises(RecipeError, match="expected the optimiser state of this run"):
        checkpoints.load_optimizer(checkpoints.last(), optimizer_of().load_state_dict, CPU)
