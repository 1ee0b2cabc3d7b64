"""The audio of egs/mini's phrases: recordings of one speaker's words, trimmed and joined."""

import io
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_RATE_HZ = 16_000
SILENCE_S = (0.05, 0.25)  # before the first and after the last word
GAP_S = (0.00, 0.12)  # between words


def trim(samples: np.ndarray) -> np.ndarray:
    """The spoken part of a word recording: (N,) float32 -> (M,) float32, with 60 ms kept on either side.

    Ours: without it the long silence around each take would mark the word boundaries, which joined speech does not have.
    Speech is where the 50-ms mean energy is more than 25 % of the way from the quiet to the loud frames, and within 45 dB of the loud:
    some speakers' fricatives are that weak.
    """
    hop = SAMPLE_RATE_HZ // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy_db = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)
    energy_db = np.convolve(np.pad(energy_db, 2, mode="edge"), np.full(5, 0.2), mode="valid")
    quiet, loud = np.percentile(energy_db, [10, 98])
    speech = np.flatnonzero(energy_db > max(quiet + 0.25 * (loud - quiet), loud - 45))
    return samples[max(speech[0] - 6, 0) * hop : (speech[-1] + 7) * hop]


@dataclass(frozen=True)
class Phrase:
    """A phrase before its audio is made: everything that chance decides."""

    speaker: str
    takes: list[Path]  # one recording per word, all of the one speaker
    pauses_s: list[float]  # before, between and after the words
    noise_seed: int


def draw_takes(speaker: str, words: list[str], takes: dict[str, list[Path]], rng: random.Random) -> Phrase:
    """A phrase of `words`, each from one of the speaker's recordings of it."""
    chosen = [rng.choice(takes[word]) for word in words]
    pauses_s = [rng.uniform(*SILENCE_S), *(rng.uniform(*GAP_S) for _ in chosen[1:]), rng.uniform(*SILENCE_S)]
    return Phrase(speaker, chosen, pauses_s, rng.getrandbits(32))


def record(phrases: dict[Path, Phrase]) -> None:
    """Writes each phrase under its path as 16-bit WAV, several speakers at a time; the result does not depend on how many."""
    by_speaker: dict[str, dict[Path, Phrase]] = {}
    for path, phrase in phrases.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        by_speaker.setdefault(phrase.speaker, {})[path] = phrase
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(_record_speaker, by_speaker.values()))


def _record_speaker(phrases: dict[Path, Phrase]) -> None:
    import soundfile  # here, so that texts can be drawn where no audio can be read

    takes: dict[Path, tuple[np.ndarray, float]] = {}  # samples, and the level of the quietest 20 %
    for path, phrase in phrases.items():
        for take in phrase.takes:
            if take not in takes:
                samples = trim(soundfile.read(take, dtype="float32")[0])
                takes[take] = samples, float(np.percentile(np.abs(samples), 20))
        wav = io.BytesIO()  # written in one go: soundfile would wait for the disk after each file
        samples = np.rint(join_audio([takes[take] for take in phrase.takes], phrase) * 32768)
        soundfile.write(wav, np.clip(samples, -32768, 32767).astype(np.int16), SAMPLE_RATE_HZ, format="WAV")
        path.write_bytes(wav.getvalue())


def join_audio(takes: list[tuple[np.ndarray, float]], phrase: Phrase) -> np.ndarray:
    """Word recordings, each (M,) float32 with its level, as one recording (N,) float32.

    The pauses hold noise at the level of the quietest parts of the takes: digital silence would mark the word boundaries.
    """
    level = min(level for _, level in takes)
    noise = np.random.default_rng(phrase.noise_seed)
    pauses = [noise.normal(0, level, int(pause_s * SAMPLE_RATE_HZ)).astype(np.float32) for pause_s in phrase.pauses_s]
    return np.concatenate([piece for pair in zip(pauses, (samples for samples, _ in takes), strict=False) for piece in pair] + [pauses[-1]])
