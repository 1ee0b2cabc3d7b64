"""`python -m nim4 baseline`: texts of other recognisers, whatever these do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_corpora import write_audio

from nim4.baseline import adapters, predictions
from nim4.corpus.manifest import cuts_from_table, save_cuts
from nim4.corpus.table import Row

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "title: a made one\nmodel: none\nlanguages: {zh: Chinese}\nsuffix: ''\n"
ADAPTER = """
import os, signal, sys, time, wave

def load(settings):
    print("loading")
    return Model()

def clean(raw, settings):
    return raw.lower() + settings["suffix"]

class Model:
    def transcribe(self, path, language):
        with wave.open(path) as file:
            tenths = round(10 * file.getnframes() / file.getframerate())
        print("junk {}" * 10, flush=True)
        BEHAVIOUR
        return {"raw": f"Said {tenths} {language}", "tokens": tenths}
"""


@pytest.fixture
def made(tmp_path):
    """A baseline that does `behaviour` on a clip of `tenths` of a second, as the name that the command takes."""

    def make(behaviour="pass", requirements=""):
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        (folder / "adapter.py").write_text(ADAPTER.replace("BEHAVIOUR", behaviour), encoding="utf-8")
        (folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
        (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
        return f"{folder}"

    return make


@pytest.fixture
def listed(tmp_path):
    """A list of clips of so many tenths of a second, with that as their ids."""

    def make(*tenths):
        rows = []
        for number in tenths:
            write_audio(tmp_path / f"{number}.wav", seconds=number / 10)
            rows.append({"id": str(number), "audio": f"{number}.wav", "language": "zh" if number % 2 else "zh-en"})
        path = tmp_path / "clips.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return make


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_for_each_clip_of_a_manifest_or_a_list(nim4, made, listed, tmp_path):
    clips, out = listed(3, 4), tmp_path / "out" / "made.jsonl"
    assert nim4("baseline", "run", made(), "--manifest", clips, "--out", out)[0] == 0
    first, second = rows_of(out)
    assert (first["id"], first["text"], first["raw"], first["error"]) == ("3", "said 3 chinese", "Said 3 Chinese", None)
    assert (first["language"], first["tokens"], first["audio_s"], first["model"]) == ("Chinese", 3, 0.3, "none")
    assert first["seconds"] >= 0
    assert (second["text"], second["language"]) == ("said 4 none", None)
    printed = out.with_name("made.jsonl.log").read_text(encoding="utf-8")
    assert "loading" in printed
    assert "junk" in printed
    assert not out.with_name("made.jsonl.partial").exists()

    write_audio(tmp_path / "long.flac", seconds=1.0, rate_hz=8000)
    cuts, _ = cuts_from_table([Row("part", tmp_path / "long.flac", "x", "s", "zh", 0.2, 0.7)])
    save_cuts([cut.resample(16_000) for cut in cuts], tmp_path / "m.jsonl.gz")
    assert nim4("baseline", "run", made(), "--manifest", tmp_path / "m.jsonl.gz", "--out", tmp_path / "m.jsonl")[0] == 0
    assert rows_of(tmp_path / "m.jsonl")[0]["text"] == "said 5 chinese"


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("if tenths == 3: raise ValueError('no luck')", "ValueError: no luck"),
        ("if tenths == 3: print('oh no', flush=True); os._exit(7)", "the baseline was lost: it ended with exit code 7, last words: oh no"),
        ("if tenths == 3: os.kill(os.getpid(), signal.SIGSEGV)", "it ended with signal 11"),
        ("if tenths == 3: time.sleep(99)", "no answer in 3 s"),
        ("if tenths == 3: os.fork() or time.sleep(99); os._exit(0)", "it ended with exit code 0"),
        ("if tenths == 3: return {'raw': None}", "gave no text but None"),
        ("if tenths == 3: return 'text'", "ValueError"),
    ],
)
def test_what_goes_wrong_with_a_clip_is_in_its_row_and_the_rest_goes_on(nim4, made, listed, tmp_path, behaviour, words):
    clips, out = listed(2, 3, 4), tmp_path / "made.jsonl"
    code, _, errors = nim4("baseline", "run", made(behaviour), "--manifest", clips, "--out", out, "--timeout", 3)
    assert code == 0
    assert any("3: " in line for line in errors), errors
    rows = rows_of(out)
    assert [row["text"] for row in rows] == ["said 2 none", None, "said 4 none"]
    assert words in rows[1]["error"]


def test_missing_and_broken_audio_is_told(nim4, made, listed, tmp_path):
    clips, out = listed(2, 3, 4), tmp_path / "made.jsonl"
    (tmp_path / "2.wav").unlink()
    (tmp_path / "3.wav").write_bytes(b"RIFFnothing")
    assert nim4("baseline", "run", made(), "--manifest", clips, "--out", out)[0] == 0
    rows = rows_of(out)
    assert [bool(row["error"]) for row in rows] == [True, True, False]
    assert "no audio: missing audio file" in rows[0]["error"]
    refs = tmp_path / "refs.tsv"
    refs.write_text("2\tsaid two\n3\tsaid three\n4\tsaid 4 none\n", encoding="utf-8")
    code, lines, _ = nim4("score", "--ref", refs, "--hyp", out, "--profile", "raw", "--jobs", 1, "--out", tmp_path / "record.json")
    assert code == 0, lines
    (system,) = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["systems"]
    assert (system["rates"]["MER"]["deletions"], system["rates"]["MER"]["errors"]) == (4, 4)


def test_a_run_goes_on_where_it_was_killed(nim4, made, listed, tmp_path):
    clips, out, go = listed(2, 3, 4), tmp_path / "made.jsonl", tmp_path / "go"
    run = ("baseline", "run", made(f"if tenths == 3 and not os.path.exists({str(go)!r}): time.sleep(999)"), "--manifest", clips, "--out", out)
    process = subprocess.Popen([sys.executable, "-m", "nim4", *map(str, run)], cwd=ROOT, stderr=subprocess.DEVNULL)
    partial = out.with_name("made.jsonl.partial")
    until = time.monotonic() + 300
    while not (partial.exists() and partial.read_text(encoding="utf-8").endswith("\n")) and time.monotonic() < until:
        time.sleep(0.1)
    code, _, errors = nim4(*run)
    assert code == 2
    assert "one run at a time" in errors[-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = rows_of(partial)
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"id": "3", "te')
    go.touch()
    assert nim4(*run)[0] == 0
    assert [row["id"] for row in rows_of(out)] == ["2", "3", "4"]
    assert rows_of(out)[0] == first


def test_more_clips_and_another_try(nim4, made, listed, tmp_path):
    clips, out = listed(2, 3, 4, 5), tmp_path / "made.jsonl"
    go = tmp_path / "go"
    name = made(f"if tenths == 4 and not os.path.exists({str(go)!r}): raise ValueError('not yet')")
    run = ("baseline", "run", name, "--manifest", clips, "--out", out)
    assert nim4(*run, "--limit", 2)[0] == 0
    assert [row["id"] for row in rows_of(out)] == ["2", "4"]
    assert nim4(*run, "--jobs", 2)[0] == 0
    assert [(row["id"], bool(row["error"])) for row in rows_of(out)] == [("2", False), ("3", False), ("4", True), ("5", False)]
    go.touch()
    before = [row for row in rows_of(out) if row["id"] != "4"]
    assert nim4(*run, "--again")[0] == 0
    assert [row for row in rows_of(out) if row["id"] != "4"] == before
    assert rows_of(out)[2]["text"] == "said 4 none"


def test_other_settings_or_another_manifest_do_not_mix(nim4, made, listed, tmp_path):
    out, name = tmp_path / "made.jsonl", made()
    assert nim4("baseline", "run", name, "--manifest", listed(2), "--out", out)[0] == 0
    kept = out.read_bytes()
    code, _, errors = nim4("baseline", "run", name, "--manifest", listed(2), "--out", out, "--set", "suffix=!")
    assert code == 2
    assert "rows made with these settings" in errors[-1]
    code, _, errors = nim4("baseline", "run", name, "--manifest", listed(3), "--out", out)
    assert code == 2
    assert "rows of this manifest" in errors[-1]
    assert out.read_bytes() == kept


def test_a_run_in_which_nothing_works_stops(nim4, made, listed, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "GIVE_UP_AFTER", 3)
    monkeypatch.setattr(predictions, "FRESH_AFTER", 2)
    clips, out = listed(*range(2, 10)), tmp_path / "made.jsonl"
    code, _, errors = nim4("baseline", "run", made("raise ValueError('never')"), "--manifest", clips, "--out", out)
    assert code == 2
    assert "3 errors in a row" in errors[-1]
    assert not out.exists()
    assert len(rows_of(out.with_name("made.jsonl.partial"))) == 3
    assert out.with_name("made.jsonl.log").read_text(encoding="utf-8").count("loading") == 2


def test_user_errors_take_one_line(nim4, made, listed, tmp_path):
    clips, out = listed(2), tmp_path / "made.jsonl"
    name = made()
    run = ("baseline", "run", name, "--manifest", clips, "--out", out)
    wrong = [
        (("baseline", "run", "pocketsfinx", "--manifest", clips, "--out", out), "did you mean 'pocketsphinx'?"),
        ((*run[:-1], tmp_path / "x.txt"), "ends in .jsonl"),
        ((*run, "--set", "sufix=1"), "did you mean 'suffix'?"),
        ((*run, "--timeout", "0"), "at least 0.1"),
        ((*run, "--jobs", "0"), "at least 1"),
        ((*run, "--python", tmp_path / "no"), "a Python interpreter"),
        (("baseline", "run", name, "--manifest", tmp_path / "no.jsonl", "--out", out), "no.jsonl"),
    ]
    for command, words in wrong:
        code, _, errors = nim4(*command)
        assert code == 2
        assert len(errors) == 1
        assert words in errors[0]
    (tmp_path / "made" / "adapter.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    code, _, errors = nim4(*run)
    assert code == 2
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in errors[-1]
    name = made(requirements="something==1.0\n")
    code, _, errors = nim4("baseline", "run", name, "--manifest", clips, "--out", out)
    assert code == 2
    assert "baseline install made" in errors[-1]


def test_the_list_and_the_environment(nim4, made):
    code, lines, _ = nim4("baseline", "list")
    assert code == 0
    assert [line.split("\t")[0] for line in lines] == adapters.names()
    assert all(len(line.split("\t")) == 4 for line in lines)
    name = made()
    assert nim4("baseline", "install", name)[0] == 0
    assert os.access(Path(name) / ".venv" / "bin" / "python", os.X_OK)
    settings = Path(name) / "settings.yaml"
    settings.write_text(SETTINGS + "python: '3.2'\n", encoding="utf-8")
    code, _, errors = nim4("baseline", "install", name)
    assert code == 2
    assert "Python 3.2" in errors[-1]
