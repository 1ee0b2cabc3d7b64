"""Our features against kaldifeat's (kaldifeat_golden.safetensors), and kaldifeat itself where it is installed."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nim4.config import RecipeError
from nim4.corpus import kaldifeat_fbank
from nim4.corpus.feats import Fbank
from nim4.corpus.kaldifeat_fbank import KaldifeatFbank
from utils import check_env

MADE = load_file(Path(__file__).with_name("kaldifeat_golden.safetensors"))
with_kaldifeat = pytest.mark.skipif(importlib.util.find_spec("kaldifeat") is None, reason="kaldifeat is not installed")


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    if len(expected):
        difference = (found - expected).abs()
        assert difference.max() < 1e-3
        assert difference.mean() < 1e-5


def test_our_features_are_kaldifeats():
    found = Fbank().extract(MADE["samples"].float() / 32768)
    assert len(found) == 38
    assert_equal(found, MADE["frames"])


@with_kaldifeat
def test_kaldifeat_in_a_batch_gives_our_features():
    rng = np.random.default_rng(0)
    recordings = [(0.1 * rng.standard_normal(size)).astype(np.float32) for size in (16_000, 0, 79, 80, 399, 5_001)]
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        batch = KaldifeatFbank(device).extract(recordings)
        for samples, frames in zip(recordings, batch, strict=True):
            assert_equal(frames.cpu(), torch.from_numpy(Fbank().extract(samples)))
    assert KaldifeatFbank().extract([]) == []
    with pytest.raises(ValueError, match="divide 16-bit samples by 32768"):
        KaldifeatFbank().extract([np.zeros(400, np.int16)])


def test_the_environments_list_has_the_line_that_installs_it():
    assert kaldifeat_fbank.INSTALL in {package.install for package in check_env.OPTIONAL if package.name == "kaldifeat"}


def test_no_kaldifeat_is_told(monkeypatch):
    monkeypatch.setattr(kaldifeat_fbank.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"kaldifeat: expected it to be installed, found no such package\. Fix: python -m pip install"):
        KaldifeatFbank()


def test_a_kaldifeat_for_another_torch_is_told(monkeypatch, tmp_path):
    (tmp_path / "torch_version.py").write_text('kaldifeat_torch_version = "1.4.0+cu10"\n', encoding="utf-8")
    monkeypatch.setattr(kaldifeat_fbank.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(RecipeError, match=r"kaldifeat: expected one built for the installed torch .*, found one for torch 1\.4\.0\. Fix: python"):
        KaldifeatFbank()
