"""`python -m nim4 transcribe` and `python -m nim4 stream`: what they print, and what they say to bad input."""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from made_corpora import write_audio

from nim4 import __main__ as nim4_main
from nim4 import stage
from nim4.corpus.feats import read_recording
from nim4.decode.offline import transcripts
from nim4.decode.streaming import Recogniser
from nim4.model.asr import load_speech_llm


@pytest.fixture
def nim4(monkeypatch, capsys):
    """`python -m nim4` in this process: exit code, lines printed, errors."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["nim4", *map(str, options)])
        code = 0
        try:
            stage.run(nim4_main.main, "nim4")
        except SystemExit as end:
            code = end.code
        done = capsys.readouterr()
        return code, done.out.splitlines(), [line for line in done.err.splitlines() if " ERROR " in line]

    return run


@pytest.fixture
def recordings(tmp_path):
    """Two of them: 16 kHz mono, and 44.1 kHz stereo in FLAC."""
    write_audio(tmp_path / "a.wav", seconds=1.5)
    time = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "b.flac", np.stack([np.sin(2000 * time), 0.1 * np.sin(900 * time)], axis=1) / 3, 44_100)
    return tmp_path / "a.wav", tmp_path / "b.flac"


def test_transcribe_prints_what_the_library_gives(nim4, talkative, recordings):
    model, _ = load_speech_llm(talkative, torch.device("cpu"))
    texts = [transcripts(model, [read_recording(path)], hints=[["北京"]])[0] for path in recordings]
    code, lines, errors = nim4("transcribe", "--model", talkative, *recordings, "--hotwords", "北京", "--device", "cpu")
    assert (code, errors) == (0, [])
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == texts
    assert [(row["file"], row["audio_s"], row["hints"]) for row in rows] == [(str(recordings[0]), 1.5, ["北京"]), (str(recordings[1]), 1.0, ["北京"])]
    code, lines, _ = nim4("transcribe", "--model", talkative, recordings[0], "--format", "txt", "--hotwords", "北京", "--device", "cpu")
    assert (code, "\n".join(lines)) == (0, texts[0])


def test_stream_prints_partials_and_the_final_text(nim4, talkative, recordings):
    model, _ = load_speech_llm(talkative, torch.device("cpu"))
    session = Recogniser(model).session()
    session.append(read_recording(recordings[0]))
    final = session.finalize()
    code, lines, errors = nim4("stream", "--model", talkative, "--wav", recordings[0], "--device", "cpu")
    assert (code, errors) == (0, [])
    assert "\n".join(lines).endswith(f"1.50\tfinal\t{final.text}")
    assert all(re.match(r"\d\.\d\d\tpartial\t.*\|", line) for line in lines if "\tpartial\t" in line)


def test_a_terminal_shows_what_can_still_change_dim(nim4, talkative, recordings, monkeypatch, capsys):
    from nim4.decode.streaming import Counts, Hypothesis

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "8")
    for text, settled, is_final in (("打开天窗", 2, False), ("打开天窗", 4, True), ("ab", 0, False)):
        nim4_main.show(Hypothesis(text, (), (), 1.0, 1, settled, is_final, Counts()))
    assert capsys.readouterr().out == "\r\x1b[K开\x1b[2m天窗\x1b[0m\r\x1b[K打开天窗\n\r\x1b[K\x1b[2mab\x1b[0m"


def test_real_time_takes_the_time_it_was_spoken_in(nim4, talkative, recordings, monkeypatch):
    slept = []
    monkeypatch.setattr(nim4_main.time, "sleep", slept.append)
    assert nim4("stream", "--model", talkative, "--wav", recordings[0], "--realtime", "--device", "cpu")[0] == 0
    assert len(slept) == 3
    assert 0.5 < slept[0] < 0.7


def bad_files(folder):
    (folder / "text.wav").write_text("this is no audio", encoding="utf-8")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan] * 500), 16_000, subtype="FLOAT")
    return [folder / name for name in ("text.wav", "empty.wav", "nothing.wav", "nan.wav", "none.wav")]


def test_files_that_cannot_be_read_are_told_one_line_each(nim4, talkative, recordings, tmp_path):
    bad = bad_files(tmp_path)
    code, lines, errors = nim4("transcribe", "--model", talkative, *bad, recordings[0], "--device", "cpu")
    assert (code, len(lines), len(errors)) == (2, 1, len(bad))
    for path, error in zip(bad, errors, strict=True):
        assert f"{path}: expected an audio file that can be read, found " in error
        assert ". Fix: correct the path" in error
        code, lines, own = nim4("stream", "--model", talkative, "--wav", path, "--device", "cpu")
        assert (code, lines, len(own)) == (2, [], 1)


def test_a_recording_that_is_too_long_is_told(nim4, talkative, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(61 * 8000), 8000)
    code, lines, errors = nim4("transcribe", "--model", talkative, tmp_path / "long.wav", "--device", "cpu")
    assert (code, lines) == (2, [])
    assert "long.wav: expected at most 60 s, found 61.0 s. Fix: cut it at a pause" in errors[0]


@pytest.mark.parametrize("name", ["transcribe", "stream"])
def test_mistakes(nim4, talkative, trained, recordings, tmp_path, name):
    what = [recordings[0]] if name == "transcribe" else ["--wav", recordings[0]]
    for options, message in (
        (["--model", tmp_path / "none"], "none: expected a model folder, found no such folder"),
        (["--model", trained], "expected a model folder of stage 4 or later, found no llm/ in it"),
        (["--model", talkative, "--hotword-index", tmp_path], "expected"),
        (["--model", talkative, "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
    ):
        code, lines, errors = nim4(name, *what, *options)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert message in errors[0]
