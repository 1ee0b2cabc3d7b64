"""Audio that only ffmpeg can read: films, telephone formats, and whatever else."""

import shutil
import subprocess
from pathlib import Path

import numpy as np


def installed() -> bool:
    """Whether there is an ffmpeg on PATH."""
    return shutil.which("ffmpeg") is not None


def read_audio(path: Path, sampling_rate_hz: int) -> np.ndarray:
    """The first audio track of a file, its channels mixed to one: (N,) float32.

    Raises:
        ValueError: if ffmpeg finds none, with its last line. Nothing but files is opened, whatever the file refers to.
    """
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-ac", "1", "-ar", str(sampling_rate_hz), "-f", "f32le", "pipe:1"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode or len(done.stdout) < 4:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg finds no audio in it: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], dtype="<f4").astype(np.float32)
