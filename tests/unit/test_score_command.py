"""`python -m nim4 score` from files to tables and the record, as a user starts it, and what it says to files that are wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REFS = "id\tset\ttext\na\tone\t打开二十二度\nb\tone\thello world\nc\ttwo\t好的of course\nd\ttwo\t\n"


@pytest.fixture
def score(tmp_path):
    """Runs the command on files of the given contents; returns the process and the record."""

    def run(ref, *hyps, options=(), names=None):
        files = []
        for number, (content, default) in enumerate([(ref, "ref.tsv"), *((hyp, f"h{i}.tsv") for i, hyp in enumerate(hyps))]):
            path = tmp_path / (names[number] if names else default)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            files.append(str(path))
        arguments = ["--ref", files[0], *(word for file in files[1:] for word in ("--hyp", file)), "--jobs", "1"]
        out = tmp_path / "out.json"
        command = [sys.executable, "-m", "nim4", "score", *arguments, "--out", str(out), "--cache", str(tmp_path / "cache"), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (0 if out.exists() else 2), done.stderr
        return done, json.loads(out.read_text(encoding="utf-8")) if out.exists() else None

    return run


def rate(record, system, metric="MER"):
    return record["systems"][system]["rates"][metric]


def test_two_systems_side_by_side(score):
    first = "a\t打开22度\nb\tHello, world!\nc\t好的of course\nd\t\n"
    second = "a\t打开二十度\nc\thad that of course\nd\t啦啦啦\nx\twho\n"
    done, record = score(REFS, first, second, options=["--metric", "mer", "cer", "--name", "good", "--name", "bad"])
    assert rate(record, 0)["errors"] == 0
    bad = rate(record, 1)
    # 二 deleted and 二十 -> 十... : 打开二十二度 -> 打开二十度 is one deletion; hello world is missing; 好的 -> had that; 啦啦啦 is made up
    assert (bad["insertions"], bad["deletions"], bad["substitutions"]) == (3, 3, 2)
    assert (bad["missing"], bad["missing_absent"], bad["ref_units"]) == (1, 1, 12)
    assert bad["versus_first"]["points"] == pytest.approx(100 * 8 / 12, abs=1e-3)
    assert bad["macro"]["over"] == "set"
    assert bad["macro"]["rates"] == {"one": 37.5, "two": 125.0}
    assert record["systems"][1]["unknown"] == ["x"]
    shares = record["systems"][1]["made_up"]
    assert (shares["non_speech_text"]["k"], shares["non_speech_text"]["n"]) == (1, 1)
    assert record["systems"][0]["attribution"]["number"] > 0
    assert record["systems"][0]["attribution"]["punctuation"] == 2
    assert record["systems"][1]["attribution"]["missing"] == 2
    assert record["utterances"][1]["systems"][1] == {
        "hyp": None,
        "missing": "absent",
        "error": None,
        "errors": {"MER": 2, "CER": 10},
        "ref_units": {"MER": 2, "CER": 10},
        "units": ["hello world", ""],
    }
    for shown in (
        f"profile fair {record['profile_hash']}, wetext",
        "MER %",
        "CER %",
        "vs good",
        "1 (1/0/0)",
        "hallucination: more than 1.5",
        "lexical",
    ):
        assert shown in done.stdout
    assert "1 ids have no reference and are not scored (x)" in done.stderr
    assert "1 of 4 references have no hypothesis (b)" in done.stderr


def test_the_second_run_takes_normalised_texts_from_the_cache(score, tmp_path):
    _, first = score(REFS, "a\t打开22度\n", options=["--profile", "page"])
    assert (tmp_path / "cache" / "normalised.sqlite").is_file()
    (tmp_path / "out.json").unlink()
    _, second = score(REFS, "a\t打开22度\n", options=["--profile", "page"])
    assert first["systems"] == second["systems"]
    (tmp_path / "out.json").unlink()
    (tmp_path / "cache" / "normalised.sqlite").write_bytes(b"not a database" * 100)
    done, record = score(REFS, "a\t打开22度\n", options=["--profile", "page"])
    assert record is None
    assert "expected a cache that can be read and written" in done.stderr


def test_json_lines_of_stage_11_are_read(score):
    refs = [{"id": "a", "phones": "x", "text": "打开", "speaker": "s", "audio_s": 1.0}, {"id": "b", "phones": "", "text": "好", "speaker": None}]
    hyps = [{"id": "a", "phones": None, "text": "打开", "error": None}, {"id": "b", "phones": None, "text": None, "error": "out of memory"}]
    files = ["".join(json.dumps(row) + "\n" for row in rows) for rows in (refs, hyps)]
    _, record = score(*files, names=["refs.jsonl", "hyps.jsonl"])
    assert rate(record, 0)["missing_failed"] == 1
    assert rate(record, 0)["errors"] == 1
    assert record["utterances"][1]["systems"][0]["error"] == "out of memory"


def test_a_broken_line_of_hypotheses_is_told_and_counts_as_missing(score):
    hyps = '{"id": "a", "text": "打开二十二度"}\n{"id": "b", "text": \n{"id": "c", "text": "好的of course"}\n'.encode()
    done, record = score(REFS, hyps, names=["ref.tsv", "h.jsonl"])
    assert record["systems"][0]["broken"] == [2]
    assert rate(record, 0)["missing_absent"] == 2  # b, and d, of which there is nothing to miss
    assert "h.jsonl, line 2: no JSON" in done.stderr
    done, record = score(REFS, "a\t打开\n".encode() + "b\t好的\n".encode("gb18030") + "c\t好的\n".encode())
    assert record["systems"][0]["broken"] == [2]
    assert "line 2: not UTF-8" in done.stderr


def test_tabs_marks_of_direction_and_line_ends_are_no_words(score):
    hyps = "\ufeffa\t打开\t二十二度\r\nb\t\u202bhello\u202c \u200fworld\r\nc\t好的of\tcourse\r\n"
    _, record = score(REFS, hyps)
    assert rate(record, 0)["errors"] == 0


@pytest.mark.parametrize(
    ("ref", "hyp", "options", "message"),
    [
        ("a\tx\na\ty\n", "a\tx\n", [], "ref.tsv: expected one line per id, found a in lines 1 and 2. Fix: remove one of them"),
        ("a\tx\n", "a\tx\na\ty\n", [], "h0.tsv: expected one line per id, found a in lines 1 and 2"),
        (b"a\tx\nb\t\xff\xfe\n", "a\tx\n", [], "ref.tsv, line 2: expected id and text, found not UTF-8 (byte 0xff)"),
        ("a\tx\n".encode("utf-16"), "a\tx\n", [], "ref.tsv: expected UTF-8, found UTF-16. Fix: iconv"),
        ("a\tx\n", "a x\nb y\n", [], "h0.tsv: expected ids of the references, such as a, found none of 2: a x, b y. Fix: a TAB ends the id"),
        ("a\tx\n", "", [], "h0.tsv: expected ids of the references, such as a, found no line"),
        ("", "a\tx\n", [], "ref.tsv: expected at least 1 reference, found 0"),
        ("a\t\nb\t。\n", "a\tx\n", [], "h0.tsv: expected references with at least 1 unit for MER, found none"),
        ("id\ttext\tspeaker\na\tx\n", "a\tx\n", [], "ref.tsv, line 2: expected id and text, found 2 columns instead of 3"),
        ("\tx\n", "a\tx\n", [], "ref.tsv, line 1: expected id and text, found no id"),
        ("a\tx\n", "好\n".encode("gb18030") * 3, [], "h0.tsv: expected lines of id and text, found 3 of 3 broken, line 1 first: not UTF-8"),
        ("a\tx\n", "a\tx\n", ["--engine", "WeTextProcessing"], "--engine WeTextProcessing: expected profile page or speechio, found profile fair"),
        ("a\tx\n", "a\tx\n", ["--overlap", "2"], "--overlap: expected a share, 0 to 1, found 2.0"),
        ("a\tx\n", "a\tx\n", ["--name", "a", "--name", "b"], "--name: expected one for each --hyp, 1, found 2"),
    ],
)
def test_what_cannot_be_scored_is_told_in_one_line(score, ref, hyp, options, message):
    done, record = score(ref, hyp, options=options)
    assert record is None
    assert message in done.stderr.splitlines()[-1]


def test_a_megabyte_of_hypothesis_is_scored(score):
    long = "那" * 349_000 + "第2个"
    _, record = score("a\t打开二十二度\nb\t好\n", f"a\t{long}\nb\t好\n")
    assert rate(record, 0)["insertions"] == 349_003 - 6
    assert record["systems"][0]["made_up"]["hallucination"]["k"] == record["systems"][0]["made_up"]["repetition"]["k"] == 1
