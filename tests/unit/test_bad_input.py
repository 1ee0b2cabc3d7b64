"""Bad input to the programs, as a user meets it: exit code 2, one line that says what to do, and earlier outputs left as they were.

What only one program can meet is tested beside that program (test_prepare_corpora.py to test_decode_stage.py, score/test_score_stage.py).
"""

import errno
import gzip
import logging
import resource
import shutil
import sys

import pytest
import tiny
from made_corpora import load_program, make_aishell, run_program

from nim4 import stage
from nim4.config import RecipeError

FILE_SIZES = (0, 1_500, 40_000)  # bytes that a file may have: a disk that fills at once, in the middle, near the end


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program as a command would; returns its exit code and what it wrote to stderr."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        handlers, code = logging.root.handlers[:], 0
        try:
            stage.run(load_program(name).main, "test")
        except SystemExit as end:
            code = end.code
        finally:
            logging.root.handlers[:] = handlers
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def all_made(units, trained, tmp_path_factory):
    """One product of each stage; `source` is a corpus that stage 0 reads."""
    folder = tmp_path_factory.mktemp("all") / "all"
    shutil.copytree(units.parent, folder)
    shutil.copytree(trained, folder / "model")
    make_aishell(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("00_prepare", "11_decode", "12_score", "13_report"):
            run_program(patch, name, *options_of(name, folder))
    return folder


@pytest.fixture
def made(all_made, tmp_path):
    return shutil.copytree(all_made, tmp_path / "all")


def options_of(name, folder, changed=False):
    """A program's options, as they made its product in `folder`, or with one of them changed so that it is made again."""
    if name == "03_pretrain":
        return [*tiny.pretrain_options(folder / "units", folder, max_steps=5 if changed else 6), "--out", folder / "model"]
    options, change = {
        "00_prepare": (["--corpus", "aishell", "--source", folder / "source", "--out", folder / "aishell"], ["--limit", 5]),
        "01_fbank": (
            ["--manifests", folder / "manifests", "--out", folder / "fbank", "--cmvn-splits", "train", "--jobs", 1],
            ["--speed-perturb", "true"],
        ),
        "02_units": (["--fbank", folder / "fbank", "--out", folder / "units"], ["--language", "zh"]),
        "11_decode": (
            ["--model", folder / "model", "--units", folder / "units", "--test", "test", "--out", folder / "decode", "--device", "cpu"],
            ["--closed", "test", "--lexicon", folder / "words.txt"],
        ),
        "12_score": (["--decode", folder / "decode", "--out", folder / "score"], ["--metric", "cer"]),
        "13_report": (
            ["--decode", folder / "decode", "--score", folder / "score", "--units", folder / "units", "--out", folder / "report", "--jobs", 1],
            ["--audio", "link"],
        ),
    }[name]
    return [*options, *(change if changed else [])]


PRODUCTS = {
    "00_prepare": "aishell",
    "01_fbank": "fbank",
    "02_units": "units",
    "03_pretrain": "model",
    "11_decode": "decode/ctc_streaming/test",
    "12_score": "score",
    "13_report": "report",
}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_told(code, stderr, *parts):
    """One line says what was expected and found, where, and what to do; there is no traceback."""
    errors = [line for line in stderr.splitlines() if " ERROR " in line]
    assert (code, len(errors)) == (2, 1), stderr
    assert "Traceback" not in stderr
    for part in ("expected ", ", found ", ". Fix: ", *map(str, parts)):
        assert part in errors[0]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_full_disk(made, program, name):
    (made / "words.txt").write_text("北京\n", encoding="utf-8")
    product = made / PRODUCTS[name]
    before = contents(product)
    assert before
    options, outcomes = options_of(name, made, changed=True), []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in FILE_SIZES:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            code, stderr = program(name, *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        outcomes.append(code)
        if code != 0:
            assert_told(code, stderr, "expected room on the disk")
            assert contents(product) == before
    assert outcomes[0] == 2
    assert program(name, *options)[0] == 0
    assert contents(product) != before


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_behind_the_error_of_a_library(monkeypatch, program, error):
    def fail():
        try:
            raise OSError(error, "no room", "here.bin")
        except OSError:
            raise RuntimeError("writing failed") from None

    monkeypatch.setattr(f"{__name__}.load_program", lambda name: type("Program", (), {"main": staticmethod(fail)}))
    code, stderr = program("any")
    assert_told(code, stderr, "here.bin: expected room on the disk, found it full")


def test_a_bug_keeps_its_traceback(monkeypatch, program):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(f"{__name__}.load_program", lambda name: type("Program", (), {"main": staticmethod(fail)}))
    with pytest.raises(RuntimeError, match="a bug"):
        program("any")


@pytest.mark.parametrize(
    ("name", "manifest", "damage", "parts"),
    [
        ("01_fbank", "manifests/dev.jsonl.gz", "empty", ("dev.jsonl.gz", "at least 1 cut, found 0")),
        ("01_fbank", "manifests/train.jsonl.gz", "missing", ("--cmvn-splits train", "a manifest in ")),
        ("01_fbank", "manifests/done.json", "missing", ("done.json", "run the earlier stages first")),
        ("02_units", "fbank/test.jsonl.gz", "empty", ("test.jsonl.gz", "at least 1 cut, found 0")),
        ("02_units", "fbank/test.jsonl.gz", "cut off", ("test.jsonl.gz", "gzipped JSON lines of cuts")),
        ("02_units", "fbank/train.jsonl.gz", "missing", ("--train-splits", "splits of stage 1, found 'train'")),
        ("02_units", "fbank/done.json", "missing", ("done.json", "run the earlier stages first")),
    ],
)
def test_a_damaged_manifest(made, program, name, manifest, damage, parts):
    before = contents(made / PRODUCTS[name])
    path = made / manifest
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(gzip.compress(b"") if damage == "empty" else path.read_bytes()[:-30])
    code, stderr = program(name, *options_of(name, made, changed=True))
    assert_told(code, stderr, *parts)
    assert contents(made / PRODUCTS[name]) == before


def test_the_folder_of_egs_mini_without_its_tables(tmp_path, program):
    (tmp_path / "empty").mkdir()
    code, stderr = program("00_prepare", "--corpus", "mini", "--source", tmp_path / "empty", "--out", tmp_path / "out")
    assert_told(code, stderr, "dspspeech20.tsv", "give the folder egs/mini/audio as --source")
    assert not (tmp_path / "out").exists()


def test_a_message_of_several_lines_is_told_in_one(monkeypatch, program):
    def fail():
        raise RecipeError("config.yaml", expected="a readable file", found="line 1\n  line 2", fix="correct\nit")

    monkeypatch.setattr(f"{__name__}.load_program", lambda name: type("Program", (), {"main": staticmethod(fail)}))
    code, stderr = program("any")
    assert_told(code, stderr, "config.yaml: expected a readable file, found line 1 line 2. Fix: correct it")
