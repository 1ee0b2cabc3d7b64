"""The report on prepared corpora: each thing that may be wrong is found, and a clean corpus has none."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from made_corpora import write_audio

from nim4.config import RecipeError
from nim4.corpus.manifest import save_cuts, validate
from nim4.corpus.quality import as_lines, check_corpora
from nim4.corpus.table import Row
from nim4.stage import read_json


def write_corpus(folder, **splits):
    """Manifests of splits of (id, text, speaker) or (id, text, speaker, audio)."""
    rows = {}
    for split, found in splits.items():
        rows[split] = []
        for number, (name, text, speaker, *audio) in enumerate(found):
            path = audio[0] if audio else folder / "audio" / f"{split}-{name}.wav"
            if not audio:
                write_audio(path, seconds=2.0, seed=hash((split, number)) % 1000)
            rows[split].append(Row(name, path, text, speaker, "zh-en"))
    for split, cuts in validate(rows)[0].items():
        save_cuts(cuts, folder / "manifests" / f"{split}.jsonl.gz")
    return folder / "manifests"


def found_in(quality):
    return {finding.what: (finding.count, finding.examples) for finding in quality.findings if finding.count}


CLEAN = {
    "train": [("t0", "今天天气", "anna"), ("t1", "打开车窗", "anna"), ("t2", "open the window", "bo"), ("t3", "播放音乐", "bo")],
    "test": [("e0", "明天下雨", "carl"), ("e1", "关上车门", "carl")],
}


def test_a_clean_corpus(tmp_path):
    quality = check_corpora([write_corpus(tmp_path / "mine", **CLEAN)])
    assert found_in(quality) == {}
    facts = quality.splits["train"]
    assert (facts.utterances, facts.speakers, facts.shortest_s, facts.longest_s, facts.rates_hz) == (4, 2, 2.0, 2.0, {16000: 4})
    lines = as_lines(quality)
    assert lines[1].split()[:4] == ["test", "2", "0.001", "1"]
    assert "empty texts: 0 of 6 (0.0 %)" in lines


def test_texts_that_are_empty_too_long_unreadable_or_marked(tmp_path):
    texts = ["", "好" * 30, "你好\u1230\u1230", "今天<NOISE>[笑]", "打开"]
    folder = write_corpus(tmp_path / "mine", test=[(f"e{number}", text, "anna") for number, text in enumerate(texts)])
    found = found_in(check_corpora([folder]))
    assert found["empty texts"] == (1, ["test e0"])
    assert found["texts of more than 12 characters or words a second"] == (1, ["test e1"])
    assert found["characters outside the units"] == (2, ["'\u1230' U+1230 x2"])
    assert found["marks that may be annotations"][0] == 4
    assert set(found) == {
        "empty texts",
        "texts of more than 12 characters or words a second",
        "characters outside the units",
        "marks that may be annotations",
    }


def test_rates_and_channels_are_those_of_the_files(tmp_path):
    write_audio(tmp_path / "a.wav", seconds=1.0, rate_hz=48_000, channels=2)
    folder = write_corpus(tmp_path / "mine", test=[("e0", "好", "a", tmp_path / "a.wav"), ("e1", "好的", "a")])
    facts = check_corpora([folder]).splits["test"]
    assert (facts.rates_hz, facts.channels) == ({48_000: 1, 16_000: 1}, {2: 1, 1: 1})


def test_leaks_and_duplicates(tmp_path):
    folder = write_corpus(tmp_path / "mine", **CLEAN)
    audio = tmp_path / "mine" / "audio"
    shutil.copy(audio / "train-t1.wav", tmp_path / "copy.wav")
    splits = {
        "train": [*CLEAN["train"], ("t4", "打开车窗", "anna", tmp_path / "copy.wav")],
        "test": [*CLEAN["test"], ("e2", "打开，车窗！", "anna", tmp_path / "copy.wav"), ("e3", "OPEN the window", "dora")],
    }
    folder = write_corpus(tmp_path / "mine", **splits)
    found = found_in(check_corpora([folder]))
    assert found == {
        "same audio as another utterance of the split": (1, ["train t4 = t1"]),
        "same text by the same speaker, within a split": (1, ["train t4 = t1"]),
        "leak, audio of test that are in train": (1, ["e2"]),
        "leak, texts of test that are in train": (2, ["e2", "e3"]),
        "leak, speakers of test that are in train": (1, ["e2"]),
    }


def test_leaks_between_corpora(tmp_path):
    """Ids and audio count across corpora; names of speakers do not."""
    one = write_corpus(tmp_path / "one", **CLEAN)
    shutil.copy(tmp_path / "one" / "audio" / "test-e0.wav", tmp_path / "elsewhere.wav")
    two = write_corpus(
        tmp_path / "two", train=[("x0", "明天下雨", "carl", tmp_path / "elsewhere.wav"), ("e1", "天空", "carl"), ("x2", "没有别的", "carl")]
    )
    quality = check_corpora([one, two])
    assert set(quality.splits) == {"one:train", "one:test", "two:train"}
    assert found_in(quality) == {
        "leak, ids of one:test that are in two:train": (1, ["e1"]),
        "leak, audio of one:test that are in two:train": (1, ["e0"]),
        "leak, texts of one:test that are in two:train": (1, ["e0"]),
    }


def test_audio_that_is_gone(tmp_path):
    folder = write_corpus(tmp_path / "mine", **CLEAN)
    (tmp_path / "mine" / "audio" / "test-e1.wav").unlink()
    count, examples = found_in(check_corpora([folder]))["audio files that are gone"]
    assert count == 1
    assert examples[0].startswith("test e1 (")


def test_wrong_folders(tmp_path):
    folder = write_corpus(tmp_path / "mine", **CLEAN)
    with pytest.raises(RecipeError, match="each corpus once"):
        check_corpora([folder, folder])
    with pytest.raises(RecipeError, match="expected manifests of stage 0, found none"):
        check_corpora([tmp_path])
    (folder / "test.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RecipeError, match=r"test.jsonl.gz, line 1"):
        check_corpora([folder])


def test_the_command(nim4, tmp_path):
    folder = write_corpus(tmp_path / "mine", **CLEAN)
    code, lines, told = nim4("corpus", "check", folder, "--json", tmp_path / "quality.json")
    assert (code, told) == (0, [])
    assert lines[0].startswith("split ")
    assert read_json(tmp_path / "quality.json")["splits"]["train"]["utterances"] == 4
    code, lines, told = nim4("corpus", "check", tmp_path)
    assert (code, lines, len(told)) == (2, [], 1)
    assert "expected manifests of stage 0, found none. Fix: " in told[0]
