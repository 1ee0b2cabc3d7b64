"""Small corpora in the true layouts of AISHELL-1, LibriSpeech and MUSAN, oddities included, and a way to run the programs of local/ on them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent.parent


def load_program(name):
    """A program of local/ as a module, e.g. "00_prepare"."""
    spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / "local" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(monkeypatch, name, *options):
    """Runs a program of local/ in this process, with its options as on a command line."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    load_program(name).main()


def write_audio(path, seconds=0.5, rate_hz=16000, channels=1, seed=0):
    """Noise with a tone, as loud in every file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    count = round(seconds * rate_hz)
    tone = 0.1 * np.sin(2 * np.pi * 440 * np.arange(count) / rate_hz)
    samples = tone[:, None] + 0.05 * rng.standard_normal((count, channels))
    soundfile.write(path, samples.squeeze(), rate_hz, subtype="PCM_16")


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def make_aishell(folder):
    """AISHELL-1 with 2 speakers to train on, 1 for dev, 1 for test, and one of each oddity. Returns what stage 0 should list."""
    root = folder / "data_aishell"
    lines = []

    def add(split, speaker, number, text, **audio):
        name = f"BAC009{speaker}W{number:04d}"
        if text is not None:
            lines.append(f"{name} {text}".strip())
        if audio.pop("write", True):
            write_audio(root / "wav" / split / speaker / f"{name}.wav", seed=number, **audio)
        return name

    for split, speaker in (("train", "S0002"), ("train", "S0003"), ("dev", "S0724"), ("test", "S0764")):
        for number in range(121, 127):
            add(split, speaker, number, "广州 市 房地产 中介 协会 分析")
    listed = {
        add("train", "S0002", 200, "有 文本 没有 音频", write=False): ("train", "transcript without audio"),
        add("train", "S0002", 201, None): ("train", "audio without transcript"),
        add("train", "S0002", 202, "太短", seconds=0.05): ("train", "too short"),
        add("train", "S0002", 203, ""): ("train", "empty text"),
        add("train", "S0003", 204, "立体声", channels=2): ("train", "several channels"),
        add("test", "S0764", 205, "八千赫", rate_hz=8000): ("test", "resampled"),
        add("test", "S0764", 206, ""): ("test", "empty text"),
        add("test", "S9999", 207, "没有 这个 人", write=False): ("train", "transcript without audio"),
    }
    broken = add("dev", "S0724", 208, "坏 文件")
    (root / "wav" / "dev" / "S0724" / f"{broken}.wav").write_bytes(b"this is no audio")
    listed[broken] = ("dev", "unreadable header")
    twice = add("dev", "S0724", 209, "两次")
    write_audio(root / "wav" / "train" / "S0724" / f"{twice}.wav")
    listed[twice] = ("train", "id in two splits")
    repeated = add("dev", "S0724", 210, "一")
    lines.append(f"{repeated} 二")
    listed[repeated] = ("dev", "duplicate id")
    write_lines(root / "transcript" / "aishell_transcript_v0.8.txt", lines)
    return listed


def make_librispeech(folder):
    """LibriSpeech with three subsets. Returns what stage 0 should list."""
    for subset, speaker, chapter in (("train-clean-100", "103", "1240"), ("dev-clean", "84", "121123"), ("test-clean", "61", "70968")):
        chapter_folder = folder / "LibriSpeech" / subset / speaker / chapter
        names = [f"{speaker}-{chapter}-{number:04d}" for number in range(5)]
        for number, name in enumerate(names):
            write_audio(chapter_folder / f"{name}.flac", seed=number)
        write_lines(chapter_folder / f"{speaker}-{chapter}.trans.txt", [f"{name} CHAPTER ONE IT'S MISSUS" for name in names])
    silent = folder / "LibriSpeech" / "dev-clean" / "84" / "121550"
    write_audio(silent / "84-121550-0000.flac")  # a chapter whose .trans.txt is missing
    with open(folder / "LibriSpeech" / "test-clean" / "61" / "70968" / "61-70968.trans.txt", "a", encoding="utf-8") as file:
        file.write("61-70968-0099 NOBODY SAID THIS\n")
    return {"84-121550-0000": ("dev-clean", "audio without transcript"), "61-70968-0099": ("test-clean", "transcript without audio")}


def make_musan(folder):
    """MUSAN with a few short files and one of 65 s. Returns what stage 0 should list."""
    root = folder / "musan"
    write_lines(root / "README", ["This is MUSAN."])
    for part, origin, count in (("noise", "free-sound", 3), ("noise", "sound-bible", 2), ("music", "fma", 3), ("speech", "librivox", 4)):
        names = [f"{part}-{origin}-{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            write_audio(root / part / origin / f"{name}.wav", seed=number)
        write_lines(root / part / origin / "LICENSE", [f"{names[0]}.wav", "public domain"])
        facts = "genre,other Y some_band" if part == "music" else "m english" if part == "speech" else "background_noises"
        write_lines(root / part / origin / "ANNOTATIONS", [f"{name} {facts}" for name in names])
    write_audio(root / "music" / "fma" / "music-fma-0001.wav", seconds=65)
    broken = root / "noise" / "free-sound" / "noise-free-sound-0009.wav"
    broken.write_bytes(b"this is no audio")
    return {broken.stem: ("noise", "unreadable header")}
