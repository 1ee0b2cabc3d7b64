"""A small decode folder as stage 11 leaves it, and stage 12 as a function."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def write_set(tmp_path):
    """Writes one (config, set) below tmp_path/11_decode; rows may be any JSON values, or text that is written as it is."""

    def write(config, test_set, refs, hyps, events=None, **done):
        folder = tmp_path / "11_decode" / config / test_set
        folder.mkdir(parents=True, exist_ok=True)
        record = {"made_from": {}, "commit": "abc1234", "seconds": 2.5, "model": "exp/mini/base/3_pretrain", "model_step": 400, **done}
        (folder / "done.json").write_text(json.dumps(record), encoding="utf-8")
        for name, rows in (("refs", refs), ("hyps", hyps), ("events", events)):
            if rows is not None:
                lines = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def stage_module():
    spec = importlib.util.spec_from_file_location("score_stage", ROOT / "local" / "12_score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_stage(stage_module, tmp_path, monkeypatch):
    """Runs stage 12 on tmp_path/11_decode; returns the records."""

    def run(*options):
        out = tmp_path / "12_score"
        monkeypatch.setattr(sys, "argv", [str(ROOT / "local" / "12_score.py"), "--decode", str(tmp_path / "11_decode"), "--out", str(out), *options])
        stage_module.main()
        return [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]

    return run


def ref(id, phones, text="", speaker="s1", audio_s=1.0):
    return {"id": id, "phones": phones, "text": text, "speaker": speaker, "audio_s": audio_s}


def hyp(id, phones, text=None, audio_s=1.0, wall_s=0.1, error=None):
    return {"id": id, "phones": phones, "text": text, "audio_s": audio_s, "wall_s": wall_s, "error": error}


@pytest.fixture
def make_ref():
    return ref


@pytest.fixture
def make_hyp():
    return hyp
