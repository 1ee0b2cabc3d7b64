"""Files in icefall's layout, byte by byte those that icefall's own functions wrote of the same texts."""

import json
from pathlib import Path

import pytest

from nim4.config import RecipeError
from nim4.score.icefall_files import write_icefall_files

LAYOUT = Path(__file__).parent / "icefall_layout"  # by store_transcripts, write_error_stats and save_results (tests/unit/renew_published.py)
REFS = {"utt-b": "打开 空调 hello world", "utt-a": "the cat sat on the mat", "utt-c": "明 天 北 京 的 天 气", "utt-d": "one two", "utt-e": ""}
HYPS = {
    "good": {"utt-b": "打开 空调 hello world", "utt-a": "the cat sat on a mat", "utt-c": "明 天 背 景 天 气", "utt-d": "one two too", "utt-e": ""},
    "bad": {"utt-b": "关 空调 yellow", "utt-a": "a cat that sat the mat", "utt-c": "", "utt-d": "won to two", "utt-e": "uh uh"},
}


def rows(texts, **more):
    return "".join(json.dumps({"id": name, "text": text, **more}) + "\n" for name, text in texts.items())


def test_the_files_are_those_of_icefall(nim4, tmp_path):
    """Of rows as stage 11 leaves them, with more in them than text."""
    (tmp_path / "refs.jsonl").write_text(rows(REFS, set="test", phones="", speaker="s1", audio_s=1.0))
    options = []
    for name, texts in HYPS.items():
        (tmp_path / f"{name}.jsonl").write_text(rows(texts, phones=None, audio_s=1.0, wall_s=0.1, error=None))
        options += ["--hyp", tmp_path / f"{name}.jsonl"]
    measured = ["--metric", "wer", "mer", "--profile", "raw", "--jobs", "1", "--cache", tmp_path / "cache"]
    nim4("score", "--ref", tmp_path / "refs.jsonl", *options, *measured, "--icefall", tmp_path / "icefall")
    made, expected = ({path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} for folder in (tmp_path / "icefall", LAYOUT))
    assert made == expected


def record(*names, units=("a", "a"), of_set=None):
    system = {"units": list(units), "missing": None}
    utterance = {"id": "u", "speaker": None, "set": of_set, "systems": [system for _ in names]}
    return {"systems": [{"name": name} for name in names], "utterances": [utterance]}


def test_names_with_slashes_and_no_sets(tmp_path):
    write_icefall_files(record("exp/a", "b"), tmp_path)
    assert {path.name for path in tmp_path.glob("errs-*")} == {"errs-test-exp-a.txt", "errs-test-b.txt"}


def test_names_that_would_be_one_file_are_told(tmp_path):
    with pytest.raises(RecipeError, match="--name: expected systems whose names differ"):
        write_icefall_files(record("exp/a", "exp-a"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_silence_has_no_rate_and_no_files(tmp_path):
    write_icefall_files(record("a", units=("", "b"), of_set="silence"), tmp_path)
    assert not list(tmp_path.iterdir())
