"""MUSAN as OpenSLR 17 packs it: musan/{noise,music,speech}/<origin>/{*.wav, ANNOTATIONS, LICENSE, README}, files of seconds to minutes.

Nothing is transcribed. The splits are noise, music, and babble: the speech, of which training mixes several voices at once. Stage 0 cuts
long files into pieces. The first word of an ANNOTATIONS line is a file's name; in music the last one is the musician.
"""

from pathlib import Path

from nim4.corpus.download import fetch, unpack
from nim4.corpus.table import Row, need, read_transcripts

URL = "https://www.openslr.org/resources/17/musan.tar.gz"
FOLDERS = {"noise": "noise", "music": "music", "babble": "speech"}  # split: folder
FIX = "give the folder that holds musan as --source, or add --download true (11 GB)"


def download(target: Path) -> None:
    """Fetches the archive and unpacks it."""
    archive = target / "musan.tar.gz"
    unpack(archive, target, sha256=fetch(URL, archive))


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The recordings of noise, music and babble."""
    root = source / "musan" if (source / "musan").is_dir() else source
    rows = {}
    for split, folder in FOLDERS.items():
        paths = sorted(need(root / folder, FIX).glob("*/*.wav"))
        musician = dict(_musicians(root / folder)) if split == "music" else {}
        rows[split] = [Row(path.stem, path, "", musician.get(path.stem, path.stem), "noise") for path in paths]
    return rows


def _musicians(folder: Path) -> list[tuple[str, str]]:
    """(file name, musician) from the ANNOTATIONS of music: `music-fma-0000 genre,genre N musician`."""
    lines = [line for path in sorted(folder.glob("*/ANNOTATIONS")) for line in read_transcripts(path)]
    return [(name, facts.split()[-1]) for name, facts in lines if facts]
