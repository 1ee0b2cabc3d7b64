"""`python -m nim4 transcribe` and `python -m nim4 stream`: what they print, and what they say to bad input."""

import json
import os
import re
import sys
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from made_corpora import write_audio
from running_server import pcm
from scipy.signal import resample_poly
from spoken_clips import join, read_clips

from nim4.config import VadConfig
from nim4.corpus.feats import read_recording
from nim4.corpus.microphone import resampled
from nim4.decode.listening import Update
from nim4.decode.offline import transcripts
from nim4.decode.streaming import Counts, Hypothesis, Recogniser
from nim4.decode.vad import Probe, segments
from nim4.model.asr import load_speech_llm
from nim4.report.live_text import shown

ALL_IS_SPEECH = ["--set", "threshold=0"]


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
    code, lines, errors = nim4("transcribe", "--model", talkative, *recordings, "--hotwords", "北京", "--device", "cpu", *ALL_IS_SPEECH)
    assert (code, errors) == (0, [])
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == texts
    assert [(row["file"], row["audio_s"], row["hints"]) for row in rows] == [(str(recordings[0]), 1.5, ["北京"]), (str(recordings[1]), 1.0, ["北京"])]
    assert [(part["start_s"], part["end_s"], part["text"]) for part in rows[0]["segments"]] == [(0.0, 1.5, texts[0])]
    code, lines, _ = nim4(
        "transcribe", "--model", talkative, recordings[0], "--format", "txt", "--hotwords", "北京", "--device", "cpu", *ALL_IS_SPEECH
    )
    assert (code, "\n".join(lines)) == (0, texts[0])


def test_stream_prints_partials_and_the_final_text(nim4, talkative, recordings):
    model, _ = load_speech_llm(talkative, torch.device("cpu"))
    session = Recogniser(model).session()
    session.append(read_recording(recordings[0]))
    final = session.finalize()
    options = ["--wav", recordings[0], "--device", "cpu", "--final-context", "chunks", *ALL_IS_SPEECH]
    code, lines, errors = nim4("stream", "--model", talkative, *options)
    assert (code, errors) == (0, [])
    assert "\n".join(lines).endswith(f"1.50\tfinal\t{final.text}")
    assert all(re.match(r"\d\.\d\d\tpartial\t.*\|", line) for line in lines if "\tpartial\t" in line)


def test_the_second_pass_of_a_stream_may_hear_the_whole(nim4, talkative, recordings, heard_anew):
    model, _ = load_speech_llm(talkative, torch.device("cpu"))
    (text,) = transcripts(model, [read_recording(recordings[0])])
    options = ["--model", talkative, "--wav", recordings[0], "--device", "cpu", *ALL_IS_SPEECH]
    for more, num_anew in ((("--final-context", "chunks"), 0), (("--final-context", "whole"), 1), ((), 2)):
        code, lines, errors = nim4("stream", *options, *more)
        assert (code, errors, len(heard_anew)) == (0, [], num_anew)
    assert "\n".join(lines).endswith(f"1.50\tfinal\t{text}")
    assert nim4("stream", *options, "--final-context", "half")[0] == 2


def test_another_precision_is_that_of_the_library(nim4, talkative, recordings):
    model, _ = load_speech_llm(talkative, torch.device("cpu"), "bf16")
    session = Recogniser(model).session()
    session.append(read_recording(recordings[0]))
    final = session.finalize()
    assert final.text
    options = ["--model", talkative, "--device", "cpu", "--precision", "bf16", *ALL_IS_SPEECH]
    code, lines, errors = nim4("stream", "--wav", recordings[0], "--final-context", "chunks", *options)
    assert (code, errors) == (0, [])
    assert "\n".join(lines).endswith(f"1.50\tfinal\t{final.text}")
    (text,) = transcripts(model, [read_recording(recordings[0])])
    code, lines, errors = nim4("transcribe", recordings[0], "--format", "txt", *options)
    assert (code, errors, "\n".join(lines)) == (0, [], text)
    assert nim4("transcribe", recordings[0], *options[:4], "--precision", "fp16")[0] == 2


def test_a_terminal_shows_what_can_still_change_dim(monkeypatch):
    monkeypatch.setenv("COLUMNS", "8")
    written = ""
    for text, settled, is_final in (("打开天窗", 2, False), ("打开天窗", 4, True), ("ab", 0, False)):
        written += shown(Update("final" if is_final else "partial", 0, 1.0, Hypothesis(text, (), (), 1.0, 1, settled, is_final, Counts())), True)
    written += shown(Update("speech_started", 1, 2.0), True)
    assert written == "\r\x1b[K开\x1b[2m天窗\x1b[0m\r\x1b[K打开天窗\n\r\x1b[K\x1b[2mab\x1b[0m"


def test_real_time_takes_the_time_it_was_spoken_in(nim4, talkative, recordings, monkeypatch):
    slept = []
    monkeypatch.setattr("nim4.corpus.microphone.time", SimpleNamespace(sleep=slept.append, monotonic=lambda: 7.0))  # a clock that stands
    assert nim4("stream", "--model", talkative, "--wav", recordings[0], "--realtime", "--device", "cpu")[0] == 0
    assert slept == pytest.approx([0.1 * number for number in range(1, 16)])  # pieces of 100 ms, though nobody speaks


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


@pytest.fixture
def long_recording(tmp_path):
    """65 s of clips with pauses between them."""
    clips = join(read_clips(4), 1.0)
    samples = np.tile(clips, -(-65 * 16_000 // len(clips)))[: 65 * 16_000]
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    return tmp_path / "long.wav", samples


def test_a_long_recording_is_cut_where_nobody_speaks(nim4, talkative, long_recording):
    path, samples = long_recording
    places = [[round(place / 16_000, 3) for place in segment] for segment in segments(samples, VadConfig(max_segment_s=4, cut_search_s=2))]
    options = ["--model", talkative, path, "--device", "cpu", "--set", "max_segment_s=4", "--set", "cut_search_s=2"]
    code, lines, errors = nim4("transcribe", *options)
    assert (code, len(lines), errors) == (0, 1, [])
    row = json.loads(lines[0])
    assert [[part["start_s"], part["end_s"]] for part in row["segments"]] == places
    assert len(places) > 20
    texts = [part["text"] for part in row["segments"]]
    assert len(set(texts)) > 3
    code, lines, _ = nim4("transcribe", *options, "--format", "srt")
    assert sum(" --> " in line for line in lines) == sum(map(bool, texts))
    code, lines, _ = nim4("transcribe", *options, "--format", "vtt")
    assert lines[0] == "WEBVTT"


def test_silence_is_an_empty_text(nim4, talkative, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(61 * 8000), 8000)
    code, lines, errors = nim4("transcribe", "--model", talkative, tmp_path / "silence.wav", "--device", "cpu")
    assert (code, errors) == (0, [])
    assert [json.loads(line) for line in lines] == [{"file": str(tmp_path / "silence.wav"), "audio_s": 61.0, "text": "", "hints": [], "segments": []}]
    assert nim4("stream", "--model", talkative, "--wav", tmp_path / "silence.wav", "--device", "cpu") == (0, [], [])


def test_three_hours_of_which_the_end_is_spoken(nim4, talkative, tmp_path, monkeypatch):
    """Silero would take minutes; here what is loud is speech."""

    def together(probes):
        return [([float(window.abs().max() > 0.1) for window in probe.windows], probe.state) for probe in probes]

    monkeypatch.setattr(Probe, "together", staticmethod(together))
    silence, spoken = np.zeros(600 * 16_000, np.int16), pcm(2.0)
    with soundfile.SoundFile(tmp_path / "day.flac", "w", 16_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(18):
            file.write(silence)
        file.write(spoken)
    code, lines, errors = nim4("transcribe", "--model", talkative, tmp_path / "day.flac", "--device", "cpu")
    assert (code, len(lines), errors) == (0, 1, [])
    row = json.loads(lines[0])
    (segment,) = row["segments"]
    assert (row["audio_s"], row["text"]) == (10_802.0, segment["text"])
    assert 10_799 < segment["start_s"] < 10_800 < segment["end_s"] <= 10_802
    assert segment["text"]


def fake_ffmpeg(folder, script):
    (folder / "bin").mkdir()
    (folder / "bin" / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "bin" / "ffmpeg").chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def test_what_soundfile_cannot_read_goes_through_ffmpeg(nim4, talkative, tmp_path, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    np.full(16_000, 0.25, "<f4").tofile(tmp_path / "raw")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", fake_ffmpeg(tmp_path, f'echo "$@" > "{tmp_path}/seen"; cat "{tmp_path}/raw"'))
        assert np.array_equal(read_recording(film), np.full(16_000, 0.25, np.float32))
        assert f"-i file:{film} " in (tmp_path / "seen").read_text(encoding="utf-8")
        (tmp_path / "bin" / "ffmpeg").write_text("#!/bin/sh\necho one >&2; echo moov atom not found >&2; exit 1\n", encoding="utf-8")
        code, lines, errors = nim4("transcribe", "--model", talkative, film, "--device", "cpu")
        assert (code, lines, len(errors)) == (2, [], 1)
        assert "film.mp4: expected an audio file that can be read, found ffmpeg finds no audio in it: moov atom not found. Fix:" in errors[0]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, lines, errors = nim4("transcribe", "--model", talkative, film, "--device", "cpu")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert "or install ffmpeg" in errors[0]


@pytest.mark.parametrize("name", ["transcribe", "stream"])
def test_mistakes(nim4, talkative, trained, recordings, tmp_path, name):
    what = [recordings[0]] if name == "transcribe" else ["--wav", recordings[0]]
    for options, message in (
        (["--model", tmp_path / "none"], "none: expected a model folder, found no such folder"),
        (["--model", trained], "expected a model folder of stage 4 or later, found no llm/ in it"),
        (["--model", talkative, "--hotword-index", tmp_path], "expected"),
        (["--model", talkative, "--set", "threshold=2"], "vad.threshold: expected 0 to 1, found 2"),
        (["--model", talkative, "--set", "treshold=1"], "threshold"),
        (["--model", talkative, "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
    ):
        code, lines, errors = nim4(name, *what, *options)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert message in errors[0]


def test_subtitles_are_of_one_file(nim4, talkative, recordings):
    code, lines, errors = nim4("transcribe", "--model", talkative, *recordings, "--format", "srt", "--device", "cpu")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert "--format srt: expected one file, found 2. Fix: transcribe them one by one" in errors[0]


class FakeMicrophone:
    """sounddevice, as far as it is used: an input that hears `sound`, piece by piece, and then Ctrl-C."""

    class PortAudioError(Exception):
        pass

    def __init__(self, sound, rate_hz=16_000):
        self.sound, self.rate_hz, self.closed = sound, rate_hz, False

    def check_input_settings(self, samplerate, channels, dtype):
        assert (channels, dtype) == (1, "float32")
        if self.sound is None or samplerate != self.rate_hz:
            raise self.PortAudioError("Invalid sample rate")

    def query_devices(self, kind):
        if self.sound is None:
            raise self.PortAudioError("Error querying device -1")
        return {"default_samplerate": float(self.rate_hz)}

    def InputStream(self, samplerate, channels, dtype, blocksize, callback):
        assert (samplerate, channels, dtype, blocksize) == (self.rate_hz, 1, "float32", self.rate_hz // 10)
        self.callback = callback
        return self

    def __enter__(self):
        for start in range(0, len(self.sound), self.rate_hz // 10):
            block = self.sound[start : start + self.rate_hz // 10, None].copy()
            self.callback(block, len(block), None, None)
            block[:] = 9.0  # the library's memory is used again

    def __exit__(self, *_):
        self.closed = True


class UntilCtrlC(deque):
    """A queue at whose end someone presses Ctrl-C."""

    put = deque.append

    def get(self):
        if not self:
            raise KeyboardInterrupt
        return self.popleft()


@pytest.fixture
def microphone(monkeypatch):
    """`microphone(sound)` puts a fake one in place, whose Ctrl-C comes when everything has been heard."""

    def put(sound, rate_hz=16_000):
        fake = FakeMicrophone(sound, rate_hz)
        monkeypatch.setitem(sys.modules, "sounddevice", fake)
        monkeypatch.setattr("nim4.corpus.microphone.queue", SimpleNamespace(SimpleQueue=UntilCtrlC))
        return fake

    return put


@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_a_microphone_is_heard_until_ctrl_c(nim4, talkative, recordings, microphone, rate_hz):
    samples = read_recording(recordings[0])
    fake = microphone(resample_poly(samples, rate_hz // 16_000, 1).astype(np.float32), rate_hz)
    code, lines, errors = nim4("stream", "--model", talkative, "--mic", "--device", "cpu", *ALL_IS_SPEECH)
    assert (code, errors, fake.closed) == (0, [], True)
    assert re.search(r"1\.50\tfinal\t.", "\n".join(lines))
    if rate_hz == 16_000:
        assert lines == nim4("stream", "--model", talkative, "--wav", recordings[0], "--device", "cpu", *ALL_IS_SPEECH)[1]


def test_no_microphone_is_told_in_one_line(nim4, talkative, microphone, monkeypatch):
    microphone(None)
    code, _, errors = nim4("stream", "--model", talkative, "--mic", "--device", "cpu")
    assert code == 2
    assert "--mic: expected a microphone, found Error querying device -1. Fix: connect one" in errors[-1]
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    code, _, errors = nim4("stream", "--model", talkative, "--mic", "--device", "cpu")
    assert code == 2
    assert "Fix: pip install sounddevice" in errors[-1]
    code, _, errors = nim4("stream", "--model", talkative, "--mic", "--realtime", "--device", "cpu")
    assert code == 2
    assert "--realtime: expected --wav" in errors[-1]


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000, 96_000])
def test_resampling_piece_by_piece_is_that_of_the_whole(rate_hz):
    sound = np.random.default_rng(0).normal(0, 0.1, rate_hz).astype(np.float32)
    pieces = np.split(sound, sorted(np.random.default_rng(1).integers(0, rate_hz, 17)))
    found = np.concatenate(list(resampled(iter(pieces), rate_hz)))
    whole = resample_poly(sound, 160, rate_hz // 100)
    assert len(whole) - 200 < len(found) <= len(whole)
    assert np.abs(found - whole[: len(found)]).max() < 1e-6


def test_punctuation_is_left_out_on_request(nim4, talkative, recordings, monkeypatch):
    monkeypatch.setattr("nim4.decode.recordings.SpeechLlm.write", lambda *_, hints: ["总工，open 3.5！"] * len(hints))
    rows = [
        json.loads(nim4("transcribe", "--model", talkative, recordings[0], "--device", "cpu", *ALL_IS_SPEECH, *more)[1][0])
        for more in ([], ["--no-punctuation"])
    ]
    assert [row["text"] for row in rows] == ["总工，open 3.5！", "总工open 3.5"]
    assert rows[1]["segments"][0]["text"] == "总工open 3.5"
    hypothesis = Hypothesis("总工，open！", (), (), 1.0, 1, 4, False, Counts()).unpunctuated()
    assert (hypothesis.text, hypothesis.settled_chars) == ("总工open", 3)
