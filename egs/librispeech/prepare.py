"""LibriSpeech as OpenSLR 12 packs it: LibriSpeech/<subset>/<speaker>/<chapter>/{*.flac, <speaker>-<chapter>.trans.txt}.

Each subset is a split; those that are there are read. The upper-case text stays as published and is normalised in stage 2.
"""

import os
from pathlib import Path

from nim4.config import RecipeError, nearest
from nim4.corpus.download import fetch, unpack
from nim4.corpus.table import Row, match, need, read_transcripts

URL = "https://www.openslr.org/resources/12"
SUBSETS = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other")
COUNTS = {"dev-clean": 2703, "dev-other": 2864, "test-clean": 2620, "test-other": 2939}  # the archives' transcripts; Kaldi counts the same
DEFAULT = "train-clean-100 dev-clean dev-other test-clean test-other"  # 8 GB; all seven are 60 GB
FIX = "give the folder that holds LibriSpeech as --source, or add --download true (LIBRISPEECH_SUBSETS names the subsets to fetch)"


def download(target: Path) -> None:
    """Fetches the subsets named in LIBRISPEECH_SUBSETS, checked by the MD5 sums published next to them."""
    sums = target / "md5sum.txt"
    fetch(f"{URL}/md5sum.txt", sums)
    published = {name: md5 for md5, name in read_transcripts(sums)}  # lines of `md5  archive`
    for subset in os.environ.get("LIBRISPEECH_SUBSETS", DEFAULT).split():
        name = f"{subset}.tar.gz"
        if subset not in SUBSETS or name not in published:
            raise RecipeError("LIBRISPEECH_SUBSETS", expected="a subset of LibriSpeech", found=repr(subset), fix=nearest(subset, SUBSETS))
        unpack(target / name, target, sha256=fetch(f"{URL}/{name}", target / name, md5=published[name]))


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each subset that is there."""
    root = source / "LibriSpeech" if (source / "LibriSpeech").is_dir() else source
    present = [subset for subset in SUBSETS if (root / subset).is_dir()]
    need(root / (present[0] if present else SUBSETS[0]), FIX)
    rows = {}
    for subset in present:
        transcripts = [pair for path in sorted((root / subset).glob("*/*/*.trans.txt")) for pair in read_transcripts(path)]
        rows[subset] = match(transcripts, sorted((root / subset).glob("*/*/*.flac")), speaker_of, "en")
    return rows


def speaker_of(utterance_id: str) -> str:
    """1272-128104-0000 -> 1272."""
    return utterance_id.split("-")[0]
