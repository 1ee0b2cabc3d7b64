"""Manifests: saving, loading, and what validation keeps, mends and leaves out."""

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Features

from nim4.config import RecipeError
from nim4.corpus.manifest import cuts_from_table, load_cuts, report, save_cuts, split_paths, utterances, validate
from nim4.corpus.table import Row, match, need, read_transcripts, spread


def write_wav(path, seconds=0.5, rate_hz=16000, channels=1):
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal((round(seconds * rate_hz), channels))
    soundfile.write(path, samples, rate_hz)
    return path


@pytest.fixture
def wav(tmp_path):
    return write_wav(tmp_path / "a.wav")


def rows_of(wav, *names, text="你好"):
    return [Row(name, wav, text, f"speaker-{name[0]}", "zh") for name in names]


def reasons(problems):
    return [(problem.id, problem.split, problem.reason, problem.left_out) for problem in problems]


def test_save_and_load_keep_everything(tmp_path, wav):
    cuts, problems = cuts_from_table(rows_of(wav, "a1", "b2"))
    assert not problems
    save_cuts(cuts, tmp_path / "m" / "train.jsonl.gz")
    loaded = load_cuts(tmp_path / "m" / "train.jsonl.gz")
    assert list(loaded) == list(cuts)
    assert [(u.id, u.text, u.speaker, u.language, u.duration_s) for u in utterances(loaded)] == [
        ("a1", "你好", "speaker-a", "zh", 0.5),
        ("b2", "你好", "speaker-b", "zh", 0.5),
    ]
    assert split_paths(tmp_path / "m") == {"train": tmp_path / "m" / "train.jsonl.gz"}


def test_the_same_cuts_give_the_same_bytes(tmp_path, wav):
    cuts, _ = cuts_from_table(rows_of(wav, "a", "b"))
    save_cuts(cuts, tmp_path / "one.jsonl.gz")
    os.utime(tmp_path / "one.jsonl.gz", (0, 0))
    save_cuts(cuts, tmp_path / "other.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "other.jsonl.gz").read_bytes()


def test_a_duplicate_id_is_refused_and_the_old_file_stays(tmp_path, wav):
    cuts, _ = cuts_from_table(rows_of(wav, "a"))
    save_cuts(cuts, tmp_path / "train.jsonl.gz")
    before = (tmp_path / "train.jsonl.gz").read_bytes()
    with pytest.raises(RecipeError, match="'a' twice"):
        save_cuts([*cuts, *cuts], tmp_path / "train.jsonl.gz")
    assert (tmp_path / "train.jsonl.gz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "train.jsonl.gz"]


def stored(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_feature_paths_are_relative_and_follow_the_folder(tmp_path, wav, monkeypatch):
    cuts, _ = cuts_from_table(rows_of(wav, "a"))
    features = Features("kaldi-fbank", 50, 80, 0.01, 16000, 0.0, 0.5, "lilcom_chunky", str(tmp_path / "fbank.tmp" / "feats" / "0.lca"), "0,1")
    with_features = [replace(cut, features=features) for cut in cuts]
    save_cuts(with_features, tmp_path / "fbank.tmp" / "train.jsonl.gz")
    item = stored(tmp_path / "fbank.tmp" / "train.jsonl.gz")[0]
    assert item["features"]["storage_path"] == "feats/0.lca"
    assert item["recording"]["sources"][0]["source"] == str(wav)
    (tmp_path / "fbank.tmp").rename(tmp_path / "fbank")
    monkeypatch.chdir(tmp_path)
    loaded = load_cuts(Path("fbank/train.jsonl.gz"))  # a relative path to the manifest gives absolute paths all the same
    assert loaded[0].features.storage_path == str(tmp_path / "fbank" / "feats" / "0.lca")
    save_cuts(loaded, Path("units/train.jsonl.gz"))  # as stage 2 does: another folder, the same features
    assert stored(tmp_path / "units" / "train.jsonl.gz")[0]["features"]["storage_path"] == "../fbank/feats/0.lca"
    assert load_cuts(tmp_path / "units" / "train.jsonl.gz")[0].features.storage_path == loaded[0].features.storage_path


def test_audio_below_the_manifest_moves_with_it(tmp_path):
    (tmp_path / "old" / "audio").mkdir(parents=True)
    cuts, _ = cuts_from_table(rows_of(write_wav(tmp_path / "old" / "audio" / "a.wav"), "a"))
    save_cuts(cuts, tmp_path / "old" / "train.jsonl.gz")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert load_cuts(tmp_path / "new" / "train.jsonl.gz")[0].load_audio().shape == (1, 8000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 1 cut"),
        (gzip.compress(b"", mtime=0), "at least 1 cut"),
        (b"not gzip", "gzipped JSON lines"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-9], "gzipped JSON lines"),
        (gzip.compress(b"{", mtime=0), "line 1"),
        (gzip.compress(b"[1]", mtime=0), "line 1"),
        (gzip.compress(b'{"id": "a", "type": "MonoCut"}', mtime=0), "line 1"),
        (gzip.compress(b'{"id": "a", "type": "Nothing"}', mtime=0), "line 1"),
    ],
)
def test_a_broken_manifest_is_told(tmp_path, content, message):
    (tmp_path / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_cuts(tmp_path / "train.jsonl.gz")


def test_a_missing_manifest_names_the_others(tmp_path, wav):
    save_cuts(cuts_from_table(rows_of(wav, "a"))[0], tmp_path / "dev.jsonl.gz")
    with pytest.raises(RecipeError, match=r"the folder has dev"):
        load_cuts(tmp_path / "train.jsonl.gz")


def test_validate_lists_what_it_leaves_out(tmp_path, wav):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    rows = [
        *rows_of(wav, "a", "b", "c", "d", "e", "f", "a"),
        Row("gone", tmp_path / "gone.wav", "x", "s", "zh"),
        Row("silent", None, "x", "s", "zh"),
        Row("unwritten", wav, None, "s", "zh"),
        Row("broken", tmp_path / "broken.wav", "x", "s", "zh"),
        Row("short", write_wav(tmp_path / "short.wav", 0.05), "x", "s", "zh"),
    ]
    splits, problems = validate({"train": rows})
    assert [cut.id for cut in splits["train"]] == ["a", "b", "c", "d", "e", "f"]
    assert reasons(problems) == [
        ("gone", "train", "missing audio file", True),
        ("silent", "train", "transcript without audio", True),
        ("unwritten", "train", "audio without transcript", True),
        ("broken", "train", "unreadable header", True),
        ("a", "train", "duplicate id", True),
        ("short", "train", "too short", True),
    ]
    counts = report(splits, problems)["splits"]["train"]
    assert (counts["utterances"], counts["left_out"], counts["speakers"]) == (6, 6, 6)
    assert counts["hours"] == pytest.approx(6 * 0.5 / 3600, abs=1e-4)


def test_durations_at_the_limits_stay(tmp_path):
    lengths = {"a": 0.1, "b": 60.0, "c": 60.1, "d": 1599 / 16000}
    rows = [Row(name, write_wav(tmp_path / f"{name}.wav", seconds), "x", "s", "zh") for name, seconds in lengths.items()]
    splits, problems = validate({"train": rows})
    assert [cut.id for cut in splits["train"]] == ["a", "b"]
    assert reasons(problems) == [("c", "train", "too long", True), ("d", "train", "too short", True)]


def test_rate_and_channels_are_mended_when_the_audio_is_read(tmp_path):
    stereo = np.stack([np.full(8000, 0.25), np.full(8000, -0.5)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 16000, subtype="FLOAT")
    splits, problems = validate(
        {"train": [Row("s", tmp_path / "stereo.wav", "x", "s", "zh"), Row("r", write_wav(tmp_path / "r.wav", 1.0, 44100), "x", "s", "zh")]}
    )
    assert reasons(problems) == [("s", "train", "several channels", False), ("r", "train", "resampled", False)]
    save_cuts(splits["train"], tmp_path / "m" / "train.jsonl.gz")
    first, second = load_cuts(tmp_path / "m" / "train.jsonl.gz")
    assert first.load_audio().shape == (1, 8000)
    assert np.all(first.load_audio() == 0.25)
    assert second.sampling_rate == 16000
    assert second.load_audio().shape == (1, 16000)


@pytest.mark.parametrize(("split", "stays"), [("train", False), ("train-clean-100", False), ("dev", True), ("test_joins", True), ("eval", True)])
def test_an_empty_text_stays_in_test_splits_only(wav, split, stays):
    splits, problems = validate({split: rows_of(wav, "a", "b") + rows_of(wav, "c", text="  ")})
    assert reasons(problems) == [("c", split, "empty text", not stays)]
    assert [cut.id for cut in splits[split]] == (["a", "b", "c"] if stays else ["a", "b"])


def test_an_id_in_two_splits_stays_where_it_is_tested(wav):
    splits, problems = validate({"train": rows_of(wav, "a", "b", "c"), "test": rows_of(wav, "c", "d")})
    assert list(splits) == ["train", "test"]
    assert [cut.id for cut in splits["test"]] == ["c", "d"]
    assert [cut.id for cut in splits["train"]] == ["a", "b"]
    assert reasons(problems) == [("c", "train", "id in two splits", True)]


def test_cuts_of_a_recipe_are_checked_too(wav):
    cuts, _ = cuts_from_table(rows_of(wav, "a", "b", "c", "d", "e", "f"))
    cuts = list(cuts)
    cuts[0] = replace(cuts[0], supervisions=[])
    cuts[1] = replace(cuts[1], supervisions=[replace(cuts[1].supervisions[0], text=None)])
    wav_of_c = replace(cuts[2].recording.sources[0], source=str(wav) + ".gone")
    cuts[2] = replace(cuts[2], recording=replace(cuts[2].recording, sources=[wav_of_c]))
    splits, problems = validate({"train": CutSet.from_cuts(cuts)})
    assert [cut.id for cut in splits["train"]] == ["d", "e", "f"]
    assert [problem.reason for problem in problems] == ["not one supervision", "audio without transcript", "missing audio file"]


def test_an_empty_split_or_mostly_problems_is_an_error(wav):
    good, bad = rows_of(wav, "a", "b"), [Row(f"x{number}", None, "x", "s", "zh") for number in range(3)]
    with pytest.raises(RecipeError, match=r"split 'dev'.*at least 1 good utterance, found 0"):
        validate({"train": good, "dev": []})
    with pytest.raises(RecipeError, match=r"found 3 of 5 \(transcript without audio 3; first: x0"):
        validate({"train": good + bad})
    splits, _ = validate({"train": good + bad[:2]})
    assert len(splits["train"]) == 2
    with pytest.raises(RecipeError, match="at least one split"):
        validate({})


def test_spread_is_even_and_always_the_same():
    assert spread("abcdefghij", 3) == spread("abcdefghij", 3) == ["a", "d", "g"]
    assert spread("abcdefghij", 10) == spread("abcdefghij", 99) == list("abcdefghij")


def test_transcripts_and_audio_are_matched_by_id(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeffs1-a 你好 吗\r\ns1-b\n\n s2-c  x  y \ns1-a again\n", encoding="utf-8")
    transcripts = read_transcripts(tmp_path / "t.txt")
    assert transcripts == [("s1-a", "你好 吗"), ("s1-b", ""), ("s2-c", "x  y"), ("s1-a", "again")]
    rows = match(transcripts, [Path("s1-a.wav"), Path("s1-b.wav"), Path("s3-d.wav")], lambda name: name[:2], "zh")
    assert [(row.id, row.audio and row.audio.name, row.text, row.speaker) for row in rows] == [
        ("s1-a", "s1-a.wav", "你好 吗", "s1"),
        ("s1-a", "s1-a.wav", "again", "s1"),
        ("s1-b", "s1-b.wav", "", "s1"),
        ("s3-d", "s3-d.wav", None, "s3"),
        ("s2-c", None, "x  y", "s2"),
    ]


def test_transcripts_that_cannot_be_read(tmp_path):
    (tmp_path / "t.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(RecipeError, match="UTF-8"):
        read_transcripts(tmp_path / "t.txt")
    with pytest.raises(RecipeError, match=r"Fix: fetch it"):
        need(tmp_path / "nothing", "fetch it")
    assert need(tmp_path / "t.txt", "fetch it") == tmp_path / "t.txt"
