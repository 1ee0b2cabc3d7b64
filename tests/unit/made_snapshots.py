"""Folders as stages 3 and 4 leave them, with a registry of as many triggers as a test wants, and options of the stages that follow."""

import json
from dataclasses import asdict

import tiny
import torch

from nim4.config import AdaptorConfig, LlmConfig
from nim4.model.asr import new_speech_llm
from nim4.model.checkpoint import save_model, save_weights
from nim4.stage import file_hash
from nim4.train.cka import Snapshot
from nim4.train.snapshots import first_snapshot, read_snapshot

TRAIN = {name: value for name, value in tiny.TRAIN.items() if name != "cr_warmup_steps"} | {"max_steps": 8, "save_every": 4, "max_duration_s": 4}
SECTIONS = {
    "align": {"adaptor": {"hidden_dim": 16}, "train": TRAIN},
    "ia_sft": {"swaps": {"rewarm": 0.25}, "train": TRAIN},
    "joint_sft": {"drift_alarm": 0.0, "drift_frames": 100, "train": TRAIN},
}


def write_registry(folder, triggers, *, final=True):
    """Snapshots at steps 10 (the first reference), 20, 30 ... (`triggers` of them) and 100 (`final`), each of another random model."""
    rows = []
    for step in [10 * (number + 1) for number in range(triggers + 1)] + [100] * final:
        path = folder / "snapshots" / f"step-{step}.safetensors"
        save_weights(path, tiny.tiny_model(seed=step).state_dict())
        cka = None if step == 10 else 0.9
        rows.append(Snapshot(step, cka, cka, step < 100, step == 100, str(path.relative_to(folder)), file_hash(path)))
    (folder / "registry.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def pretrained(folder, triggers, *, final=True):
    """A stage-3 folder; `snapshots/` and `registry.jsonl` as write_registry makes them."""
    model = tiny.tiny_model(seed=100)
    save_model(folder, model.state_dict(), model.config, tiny.INVENTORY)
    write_registry(folder, triggers, final=final)
    (folder / "done.json").write_text("{}")
    return folder


def aligned(folder, stage3, llm):
    """A stage-4 folder with the first snapshot of `stage3`."""
    torch.manual_seed(0)
    weights = read_snapshot(stage3, first_snapshot(stage3))
    model, inventory = new_speech_llm(stage3, AdaptorConfig(hidden_dim=16), LlmConfig(str(llm)), weights)
    model.save(folder, model.state_dict(), inventory)
    (folder / "done.json").write_text("{}")
    return folder


def write_units(folder):
    """A units folder with features, of the tiny inventory's phonemes."""
    tiny.write_features(folder, "train", [60 + 5 * (i * 7 % 16) for i in range(12)])
    tiny.write_features(folder, "dev", [70, 90], prefix="v")
    tiny.INVENTORY.save(folder / "tokens.txt")
    return folder


def options(units, folder, **changes):
    """Options of stages 4 to 6 without --init and --out; `changes` go to `train` of every section."""
    sections = {name: {**section, "train": section["train"] | changes} for name, section in SECTIONS.items()}
    config = tiny.write_yaml(folder / "tiny_sft.yaml", sections)
    return ["--units", units, "--train", "train", "--valid", "dev", "--train-config", config, "--device", "cpu"]
