"""The English part of Multilingual LibriSpeech as OpenSLR 94 packs it: mls_english[_opus]/{train,dev,test}/{transcripts.txt,
audio/<speaker>/<book>/<id>.{flac,opus}}. Ids are <speaker>_<book>_<number>; transcripts.txt has `<id><TAB><text>`.

MLS_ENGLISH_SPLITS names the splits that are read (dev test): train has 10.8 million utterances, of which manifests take tens of GB.
"""

import os
from pathlib import Path

from nim4.config import RecipeError, nearest
from nim4.corpus.table import Row, match, need, read_transcripts

SPLITS = ("train", "dev", "test")
COUNTS = {"dev": 3807, "test": 3769}  # as published results count them; the hub's viewer shows 3.81k and 3.77k rows
SETTINGS = ("MLS_ENGLISH_SPLITS",)  # of the environment, that decide what is read
FIX = "give the folder that holds mls_english or mls_english_opus as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of the splits that MLS_ENGLISH_SPLITS names."""
    root = next((source / name for name in ("mls_english", "mls_english_opus") if (source / name).is_dir()), source)
    rows = {}
    for split in os.environ.get("MLS_ENGLISH_SPLITS", "dev test").split():
        if split not in SPLITS:
            raise RecipeError("MLS_ENGLISH_SPLITS", expected="train, dev or test", found=repr(split), fix=nearest(split, SPLITS))
        folder = need(root / split, FIX)
        audio = sorted(path for path in need(folder / "audio", FIX).glob("*/*/*") if path.suffix in (".flac", ".opus"))
        rows[split] = match(read_transcripts(need(folder / "transcripts.txt", FIX)), audio, speaker_of, "en")
    return rows


def speaker_of(utterance_id: str) -> str:
    """10226_10111_000000 -> 10226."""
    return utterance_id.split("_")[0]
