"""The audio of the page's clips: a file that browsers play, and the picture of its loudness as a few numbers."""

import io
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile

from nim4.config import RecipeError
from nim4.corpus.feats import UNREADABLE, read_samples
from nim4.corpus.manifest import MonoCut

log = logging.getLogger("nim4")
NUM_PEAKS = 240
HIGHEST = 99  # of a peak, at full scale
WAYS = ("copy", "link")

Key = tuple[str, str]  # test set, utterance


@dataclass(frozen=True)
class ClipAudio:
    """Where the page finds a clip's audio, or why it does not."""

    address: str | None  # relative to the page, as a URL
    peaks: Sequence[int]  # NUM_PEAKS numbers of 0 to HIGHEST
    missing: str | None = None


def clip_audio(cuts: Mapping[Key, MonoCut], ids: Sequence[Key], names: Sequence[str], folder: Path, way: str, num_threads: int) -> list[ClipAudio]:
    """The audio of each id, in order.

    Args:
        cuts: by id; an id without one has no audio.
        names: of the files to be made, without suffix.
        folder: of the page. `copy` writes FLAC of what the recogniser heard (16 kHz, one channel) to audio/ there; `link` names the corpus's files.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda id, name: _one(cuts.get(id), folder, name, way), ids, names))
    missing = [(id, audio.missing) for id, audio in zip(ids, found, strict=True) if audio.missing]
    if missing:
        (test_set, id), why = missing[0]
        log.warning("%d of %d clips have no audio, which the page shows; %s of %s: %s", len(missing), len(found), id, test_set, why)
    return found


def _one(cut: MonoCut | None, folder: Path, name: str, way: str) -> ClipAudio:
    if cut is None:
        return ClipAudio(None, (), "no manifest has this utterance")
    try:
        samples = read_samples(cut)
    except UNREADABLE as error:
        return ClipAudio(None, (), f"it cannot be read ({str(error).partition(chr(10))[0][:120] or type(error).__name__})")
    peaks = peaks_of(samples)
    if way == "copy":
        flac = io.BytesIO()
        soundfile.write(flac, samples, cut.sampling_rate, format="FLAC", subtype="PCM_16")
        (folder / "audio" / f"{name}.flac").write_bytes(flac.getbuffer())  # which tells of a full disk as such; soundfile does not
        return ClipAudio(f"audio/{name}.flac", peaks)
    source = cut.recording.sources[0]
    if source.type != "file":
        raise RecipeError(f"--audio {way}", expected="a corpus of audio files", found=f"{cut.id} in a {source.type}", fix="use --audio copy")
    address = quote(os.path.relpath(source.source, folder))
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-3
    return ClipAudio(address if whole else f"{address}#t={cut.start:.3f},{cut.end:.3f}", peaks)


def peaks_of(samples: np.ndarray) -> list[int]:
    """The largest absolute value in each of NUM_PEAKS equal parts: 0 to HIGHEST, which is full scale."""
    if not len(samples):
        return [0] * NUM_PEAKS
    edges = np.linspace(0, len(samples), NUM_PEAKS + 1).astype(int)
    parts = (np.abs(samples[start : max(end, start + 1)]) for start, end in itertools.pairwise(edges))
    return [min(HIGHEST, round(HIGHEST * float(part.max(initial=0.0)))) for part in parts]
