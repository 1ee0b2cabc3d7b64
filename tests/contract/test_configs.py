"""Every settings file is one that the dataclasses accept; an unknown key or a wrong type is found here, not after an hour."""

import pytest
from repository import ROOT, source_files, stages_of_run

from nim4 import config

FILES = [path for path in source_files() if path.parts[:2] == ("local", "conf") and path.suffix in (".yaml", ".yml")]
SETTINGS = {"model": config.ModelConfig, "decode": config.DecodeConfig}  # by folder
STAGE_SETTINGS = {  # a file of train/ holds one group for each stage that trains
    "pretrain": config.PretrainConfig,
    "align": config.AlignConfig,
    "ia_sft": config.IaSftConfig,
    "joint_sft": config.JointSftConfig,
    "context_sft": config.ContextSftConfig,
    "grpo": config.GrpoConfig,
    "phoneme_head": config.PhonemeHeadConfig,
}


def test_settings_are_where_they_are_looked_for():
    assert FILES
    assert not [str(path) for path in FILES if len(path.parts) != 4 or path.parts[2] not in (*SETTINGS, "train") or path.suffix != ".yaml"]
    presets = {kind: {path.stem for path in FILES if path.parts[2] == kind} for kind in ("model", "train")}
    assert "mini" in presets["model"] & presets["train"]
    assert presets["train"] <= presets["model"], "--preset names a file in both folders"
    assert set(STAGE_SETTINGS) <= set(stages_of_run().values())


@pytest.mark.parametrize("path", FILES, ids=str)
def test_settings_are_accepted(path):
    values = config.read_yaml(ROOT / path)
    if path.parts[2] != "train":
        config.build(SETTINGS[path.parts[2]], values, str(path))
        return
    assert values.keys() <= STAGE_SETTINGS.keys(), f"{path}: a group that no stage reads"
    for stage, settings in values.items():
        config.build(STAGE_SETTINGS[stage], settings, f"{path}: {stage}")
        assert "model" not in settings, "the model's shape has its own folder"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_settings_say_what_they_are_for(path):
    assert (ROOT / path).read_text(encoding="utf-8").startswith("# ")
