"""Sound as it comes: of a microphone, or of a recording in its place. The only door to sounddevice, which is not needed for anything else."""

import itertools
import logging
import math
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, read_recording

log = logging.getLogger("nim4")
MARGIN = 32  # samples at 16 kHz: scipy's resample_poly looks at 20 to either side


def listen(piece_s: float) -> Iterator[np.ndarray]:
    """Pieces of what the default microphone hears, without end: (N,) float32 in [-1, 1] at 16 kHz, mono.

    It is looked for at once, and hears from the first piece on that is asked for. A device that has no 16 kHz is opened at its own rate, and
    resampled. What comes while nobody takes pieces waits, however long that lasts.

    Args:
        piece_s: seconds of a piece.
    Raises:
        RecipeError: if sounddevice or the library below it is not installed, or there is no microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, PortAudio is not
        fix = "pip install sounddevice, and on Linux apt-get install libportaudio2"
        raise RecipeError("--mic", expected="the package sounddevice", found=error, fix=fix) from error
    try:
        rate_hz = _rate_of(sounddevice)
        heard = queue.SimpleQueue()

        def take(samples: np.ndarray, num_frames: int, times: Any, status: Any) -> None:
            if status:
                log.warning("microphone: %s", status)
            heard.put(samples[:, 0].copy())

        stream = sounddevice.InputStream(samplerate=rate_hz, channels=1, dtype="float32", blocksize=round(piece_s * rate_hz), callback=take)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise RecipeError("--mic", expected="a microphone", found=error, fix="connect one, and make it the default input") from error
    return _pieces(stream, heard, rate_hz)


def play(path: Path, piece_s: float, realtime: bool) -> Iterator[np.ndarray]:
    """The same of a recording, up to its end. It is read at once, and raises as read_recording; in real time a piece comes when it has been said."""
    samples, step = read_recording(path), round(piece_s * SAMPLING_RATE_HZ)

    def pieces() -> Iterator[np.ndarray]:
        started_s = time.monotonic()
        for start in range(0, len(samples), step):
            piece = samples[start : start + step]
            if realtime:
                time.sleep(max((start + len(piece)) / SAMPLING_RATE_HZ - (time.monotonic() - started_s), 0.0))
            yield piece

    return pieces()


def _pieces(stream: Any, heard: Any, rate_hz: int) -> Iterator[np.ndarray]:
    with stream:
        log.info("listening at %d Hz; Ctrl-C ends it", rate_hz)
        pieces = (heard.get() for _ in itertools.count())
        yield from pieces if rate_hz == SAMPLING_RATE_HZ else resampled(pieces, rate_hz)


def _rate_of(sounddevice: Any) -> int:
    """16 kHz, or the rate of the default microphone where it has no such."""
    try:
        sounddevice.check_input_settings(samplerate=SAMPLING_RATE_HZ, channels=1, dtype="float32")
    except sounddevice.PortAudioError:
        return round(sounddevice.query_devices(kind="input")["default_samplerate"])
    return SAMPLING_RATE_HZ


def resampled(pieces: Iterator[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    """A stream brought to 16 kHz: together what resampling the whole would give, but for the last 10 ms, which never come.

    Args:
        pieces: (N,) float32 each, any number of samples.
        rate_hz: of `pieces`.
    """
    from scipy.signal import resample_poly

    common = math.gcd(rate_hz, SAMPLING_RATE_HZ)
    up, down = SAMPLING_RATE_HZ // common, rate_hz // common
    margin = down * math.ceil(MARGIN / up)  # a whole number of output samples, as is everything that is cut off below
    kept, done = np.zeros(0, np.float32), 0  # samples, and how many of them have been resampled
    for piece in pieces:
        kept = np.concatenate([kept, piece])
        whole = (len(kept) - margin) // down * down  # these have enough behind them
        if whole <= done:
            continue
        out = resample_poly(kept, up, down)[done // down * up : whole // down * up]
        drop = max(whole - margin, 0)
        kept, done = kept[drop:], whole - drop
        yield out.clip(-1, 1).astype(np.float32)
