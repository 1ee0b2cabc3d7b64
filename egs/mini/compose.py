"""Phrases for egs/mini: texts drawn from the grammar, and recordings joined from one speaker's words."""

import random
import re
from pathlib import Path

import numpy as np

SAMPLE_RATE_HZ = 16_000
SILENCE_S = (0.05, 0.25)  # before the first and after the last word
GAP_S = (0.00, 0.12)  # between words


def read_grammar(path: Path) -> dict[str, list[str]]:
    """The rules of a grammar file: name -> options. Lines starting with # are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {name.strip(): [option.strip() for option in options.split("|")] for name, options in (line.split("=") for line in lines)}


def draw_phrase(grammar: dict[str, list[str]], rng: random.Random, start: str = "phrase") -> str:
    """One phrase of the grammar, options equally likely, as punctuated text."""
    return re.sub(r"<(\w+)>", lambda name: draw_phrase(grammar, rng, name[1]), rng.choice(grammar[start]))


def words_of(text: str) -> list[str]:
    """The recorded words of a phrase: Latin words, and the two-character Chinese words of egs/mini."""
    return re.findall(r"[a-z]+|[一-鿿]{2}", text)


def join_words(words: list[str]) -> str:
    """Words as written text: a space wherever a Latin word meets another word."""
    text = ""
    for word in words:
        text += " " * bool(text and (text[-1].isascii() or word.isascii())) + word
    return text


def trim(samples: np.ndarray) -> np.ndarray:
    """The spoken part of a word recording: (N,) float32 -> (M,) float32, with 50 ms kept on either side.

    Ours: without it the long silence around each take would mark the word boundaries, which joined speech does not have.
    Speech is where the 50-ms mean energy is above 35 % of the way from the quiet to the loud frames, or within 35 dB of the loud.
    """
    hop = SAMPLE_RATE_HZ // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy_db = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)
    energy_db = np.convolve(np.pad(energy_db, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    quiet, loud = np.percentile(energy_db, [10, 98])
    speech = np.flatnonzero(energy_db > max(quiet + 0.35 * (loud - quiet), loud - 35))
    return samples[max(speech[0] - 5, 0) * hop : (speech[-1] + 6) * hop]


def join_audio(takes: list[np.ndarray], rng: random.Random) -> np.ndarray:
    """Word recordings of one speaker, each (M,) float32, as one recording (N,) float32.

    The pauses hold noise at the level of the quietest parts of the takes: digital silence would mark the word boundaries.
    """
    pauses_s = [rng.uniform(*SILENCE_S), *(rng.uniform(*GAP_S) for _ in takes[1:]), rng.uniform(*SILENCE_S)]
    level = min(float(np.percentile(np.abs(take), 20)) for take in takes)
    noise = np.random.default_rng(rng.getrandbits(32))
    pauses = [noise.normal(0, level, int(pause_s * SAMPLE_RATE_HZ)).astype(np.float32) for pause_s in pauses_s]
    return np.concatenate([piece for pair in zip(pauses, takes, strict=False) for piece in pair] + [pauses[-1]])
