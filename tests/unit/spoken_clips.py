"""Real speech for tests: clips of the corpus that lies in this repository."""

import io
import tarfile

import numpy as np
import soundfile

from nim4.stage import ROOT


def read_clips(count, archive="an4"):
    """The first `count` clips of egs/mini/audio/an4.tar, or of another archive there, (N,) float32 at 16 kHz each."""
    clips = []
    with tarfile.open(ROOT / "egs" / "mini" / "audio" / f"{archive}.tar") as tar:
        for member in [member for member in tar.getmembers() if member.isfile()][:count]:
            samples, rate_hz = soundfile.read(io.BytesIO(tar.extractfile(member).read()), dtype="float32")
            assert rate_hz == 16_000
            clips.append(samples)
    return clips


def join(clips, pause_s):
    """Clips behind each other, with a digital silence after each."""
    return np.concatenate([part for clip in clips for part in (clip, np.zeros(round(16_000 * pause_s), np.float32))])
