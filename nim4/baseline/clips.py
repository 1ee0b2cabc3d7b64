"""What a baseline is asked about: the utterances of a manifest, each as the 16-kHz WAV file that every baseline can read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile

from nim4.config import RecipeError
from nim4.corpus import manifest
from nim4.corpus.feats import SAMPLING_RATE_HZ, UNREADABLE, read_samples
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row, spread


@dataclass(frozen=True)
class Clip:
    """One utterance; `cut` is a lhotse cut, None where `problem` says why there is no audio. A plain list has no text and no speaker."""

    id: str
    language: str
    cut: object | None
    problem: str | None = None
    text: str | None = None
    speaker: str | None = None


def read_clips(path: Path) -> list[Clip]:
    """The clips of a manifest of stage 0 or 2 (.jsonl.gz), or of a plain list: JSON lines with `id`, `audio` (a path, seen from the list's folder)
    and `language`. Raises RecipeError when it cannot be read or an id comes twice."""
    if path.name.endswith(manifest.SUFFIX):
        cuts = manifest.load_cuts(path)
        return [Clip(u.id, u.language, cut, text=u.text, speaker=u.speaker or None) for cut, u in zip(cuts, manifest.utterances(cuts), strict=True)]
    if path.suffix != ".jsonl":
        raise RecipeError(path, expected="a manifest, .jsonl.gz, or a list, .jsonl", found=path.name, fix="see python -m nim4 baseline run --help")
    listed = read_table(path, ("id", "audio", "language"))
    rows = [Row(row["id"], path.parent / row["audio"], "", "", row["language"]) for row in listed]
    seen: set[str] = set()
    for row in rows:
        if not row.id or row.id in seen:
            raise RecipeError(path, expected="an id of its own for each clip", found=f"{row.id!r} twice" if row.id else "none", fix="correct it")
        seen.add(row.id)
    if not rows:
        raise RecipeError(path, expected="at least 1 clip", found=0, fix="correct --manifest")
    cuts, problems = manifest.cuts_from_table(rows)
    cut_of = {cut.id: cut.resample(SAMPLING_RATE_HZ) if cut.sampling_rate != SAMPLING_RATE_HZ else cut for cut in cuts}
    problem_of = {problem.id: f"{problem.reason}: {problem.detail}" for problem in problems}
    return [Clip(row.id, row.language, cut_of.get(row.id), problem_of.get(row.id)) for row in rows]


@contextmanager
def as_wav(clip: Clip) -> Iterator[tuple[Path, float]]:
    """A file with the clip's audio, 16 bits, and its seconds, for as long as it is needed. Raises ValueError when the audio cannot be read."""
    if clip.cut is None:
        raise ValueError(clip.problem)
    try:
        samples = read_samples(clip.cut)
    except UNREADABLE as error:
        raise ValueError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    with TemporaryDirectory(prefix="nim4-clip-") as folder:
        path = Path(folder) / "clip.wav"
        soundfile.write(path, samples, SAMPLING_RATE_HZ, subtype="PCM_16")
        yield path, len(samples) / SAMPLING_RATE_HZ


def references(paths: Sequence[Path], most: int = 0) -> list[dict[str, str | None]]:
    """What is said in manifests of stage 0 or 2, as `python -m nim4 score --ref` reads it; the set is the manifest's name.

    Args:
        most: of each manifest, chosen as `predict` does; 0 = all.
    Raises:
        RecipeError: when one cannot be read, or two have the same id.
    """
    rows: dict[str, dict[str, str | None]] = {}
    for path in paths:
        if not path.name.endswith(manifest.SUFFIX):
            raise RecipeError(path, expected=f"a manifest, {manifest.SUFFIX}", found=path.name, fix="a list has no texts: write references by hand")
        clips = read_clips(path)
        for clip in spread(clips, most or len(clips)):
            if clip.id in rows:
                raise RecipeError(path, expected="other ids than in the other manifests", found=repr(clip.id), fix="name each manifest once")
            set_name = path.name.removesuffix(manifest.SUFFIX)
            rows[clip.id] = {"id": clip.id, "text": clip.text, "speaker": clip.speaker, "set": set_name}
    return list(rows.values())
