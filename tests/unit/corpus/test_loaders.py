"""Kaldi folders and tables, whole and broken."""

import json

import pytest

from nim4.config import RecipeError
from nim4.corpus.loaders import kaldi_folder, read_table
from nim4.corpus.table import read_lines, read_transcripts


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "audio" / f"{name}.wav", "x")
    write(tmp_path / "kaldi" / "wav.scp", "a audio/a.wav\nb\taudio/b.wav\n")
    write(tmp_path / "kaldi" / "text", "b 你 好\na hello there\n")
    return tmp_path / "kaldi"


def test_a_kaldi_folder(folder):
    rows = kaldi_folder(folder, "zh-en", [folder / "nowhere", folder.parent])
    assert [(row.id, row.audio, row.text, row.speaker, row.end_s) for row in rows] == [
        ("a", folder.parent / "audio" / "a.wav", "hello there", "a", None),
        ("b", folder.parent / "audio" / "b.wav", "你 好", "b", None),
    ]


def test_speakers_and_segments(folder):
    write(folder / "segments", "a-1 a 0.5 1.25\na-2 a 1.25 2\nc-1 c 0 1\n")
    write(folder / "text", "a-1 one\na-2 two\nc-1 three\n")
    write(folder / "utt2spk", "a-1 anna\n")
    rows = kaldi_folder(folder, "en", [folder.parent], lambda name: name.split("-")[0])
    assert [(row.id, row.text, row.speaker, row.start_s, row.end_s) for row in rows] == [
        ("a-1", "one", "anna", 0.5, 1.25),
        ("a-2", "two", "a", 1.25, 2.0),
        ("c-1", "three", "c", 0.0, 1.0),
    ]
    assert rows[2].audio is None  # its recording is not in wav.scp: stage 0 lists it


def test_gaps_and_repeats_stay_in_the_rows(folder):
    write(folder / "wav.scp", "a audio/a.wav\na audio/b.wav\nc audio/c.wav\n")
    write(folder / "text", "a one\na two\nd four\n")
    rows = kaldi_folder(folder, "en", [folder.parent])
    assert [(row.id, row.audio and row.audio.name, row.text) for row in rows] == [
        ("a", "a.wav", "one"),
        ("a", "a.wav", "two"),
        ("a", "b.wav", "one"),
        ("a", "b.wav", "two"),
        ("c", "c.wav", None),
        ("d", None, "four"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("wav.scp", "a audio/a.wav\nb sox b.flac -t wav - |\n", r"wav.scp, line 2.*found a command"),
        ("wav.scp", "a\n", r"wav.scp, line 1.*found no path"),
        ("segments", "a-1 a 0.5\n", r"segments, line 1.*utterance, recording, start and end"),
        ("segments", "a-1 a 0 nan\n", r"segments, line 1"),
        ("text", b"a hello\nb \xc4\xe3\xba\xc3\n", r"text, line 2: expected UTF-8, found byte 0xc4.*GB18030"),
    ],
)
def test_a_broken_line_is_told_with_its_number(folder, name, content, told):
    write(folder / name, content)
    with pytest.raises(RecipeError, match=told):
        kaldi_folder(folder, "en", [folder.parent])


def test_a_kaldi_folder_without_text(folder):
    (folder / "text").unlink()
    with pytest.raises(RecipeError, match=r"text: expected a file or folder of the corpus"):
        kaldi_folder(folder, "en", [folder.parent])


def test_a_table_with_names_and_one_without(tmp_path):
    path = write(tmp_path / "a.tsv", '\ufeffID\tTEXT\tAGE\r\n1\t他说"你\u2028好\t30\r\n\r\n2\t\t\r\n')
    assert read_table(path, ["ID", "TEXT"]) == [{"ID": "1", "TEXT": '他说"你\u2028好', "AGE": "30"}, {"ID": "2", "TEXT": "", "AGE": ""}]
    path = write(tmp_path / "b.txt", "a.wav\tyouth\tone\ttwo\n")
    assert read_table(path, ["file", "text"], ["file", "age", "text"]) == [{"file": "a.wav", "age": "youth", "text": "one\ttwo"}]


def test_json_tables(tmp_path):
    rows = [{"id": 1, "text": "你好", "more": [1]}, {"id": "2", "text": None}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read_table(path, ["id", "text"]) == [{"id": "1", "text": "你好"}, {"id": "2", "text": ""}]
    assert read_table(write(tmp_path / "a.json", json.dumps(rows, indent=1)), ["id"]) == [{"id": "1"}, {"id": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.tsv", "id\ttext\n1\tone\n2\n", r"a.tsv, line 3: expected 2 columns.*found 1: '2'"),
        ("a.tsv", "id\ttxt\n1\tone\n", r"expected a column 'text', found id, txt.*did you mean 'txt'"),
        ("a.tsv", "", r"found an empty file"),
        ("a.tsv", b"id\ttext\n1\t\xff\n", r"a.tsv, line 2: expected UTF-8"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 1\n', r"a.jsonl, line 2: expected JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1: expected an object, found list"),
        ("a.jsonl", '{"id": 1, "text": {"a": 1}}\n', r"expected text or a number as 'text', found dict"),
        ("a.json", '{"id": 1}', r"expected a list of objects, found dict"),
        ("a.json", '[{"id": 1}]', r"a.json, entry 1: expected a column 'text'"),
    ],
)
def test_a_broken_table_is_told_with_its_place(tmp_path, name, content, told):
    with pytest.raises(RecipeError, match=told):
        read_table(write(tmp_path / name, content), ["id", "text"])


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="found nothing"):
        read_table(tmp_path / "a.tsv", ["id"])


def test_lines_end_at_line_ends_only(tmp_path):
    path = write(tmp_path / "text", "a one\u2028two\x0b\r\nb \n\nc three")
    assert read_lines(path) == ["a one\u2028two\x0b", "b ", "", "c three"]
    assert read_transcripts(path) == [("a", "one\u2028two"), ("b", ""), ("c", "three")]
    assert read_lines(write(tmp_path / "empty", "")) == []
    with pytest.raises(RecipeError, match="unpack the corpus again"):
        read_lines(tmp_path)
