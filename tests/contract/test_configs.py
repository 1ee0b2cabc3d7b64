"""Every settings file is one that the dataclasses accept; an unknown key or a wrong type is found here, not after an hour."""

import pytest
from repository import ROOT, source_files

from nim4 import config

FILES = [path for path in source_files() if path.parts[:2] == ("local", "conf") and path.suffix in (".yaml", ".yml")]
SETTINGS = {"model": config.ModelConfig, "train": config.TrainConfig, "decode": config.DecodeConfig}


def test_settings_are_where_they_are_looked_for():
    assert FILES
    assert not [str(path) for path in FILES if len(path.parts) != 4 or path.parts[2] not in SETTINGS or path.suffix != ".yaml"]
    presets = {kind: {path.stem for path in FILES if path.parts[2] == kind} for kind in ("model", "train")}
    assert "mini" in presets["model"] & presets["train"]
    assert presets["train"] <= presets["model"], "--preset names a file in both folders"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_settings_are_accepted(path):
    values = config.read_yaml(ROOT / path)
    groups = set(config.as_dict(config.PretrainConfig()))
    whole = values and set(values) <= groups  # a file may also hold the groups of PretrainConfig
    config.build(config.PretrainConfig if whole else SETTINGS[path.parts[2]], values, str(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_settings_say_what_they_are_for(path):
    assert (ROOT / path).read_text(encoding="utf-8").startswith("# ")
