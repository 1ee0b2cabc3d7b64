"""CS-Dialogue's short recordings as the hub packs them: data/index/short_wav/{train,dev,test}/{text, wav.scp}, and data/short_wav/*.tar.gz*,
parts of one archive, joined and unpacked beside them; the paths of wav.scp begin in that folder.

Speakers are the first part of the ids (ZH-CN_U0018_S0_32 -> ZH-CN_U0018_S0). Counts per split are unverified, so not checked.
"""

from pathlib import Path

from nim4.corpus.loaders import kaldi_folder
from nim4.corpus.table import Row, need

FIX = "give the folder that holds data/index and the unpacked data/short_wav as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of train, dev and test."""
    data = source / "data" if (source / "data").is_dir() else source
    index = need(data / "index" / "short_wav", FIX)
    roots = [data / "short_wav", data, source]
    return {split: kaldi_folder(need(index / split, FIX), "zh-en", roots, speaker_of) for split in ("train", "dev", "test")}


def speaker_of(utterance_id: str) -> str:
    """The id without its last part, the number of the utterance."""
    return utterance_id.rpartition("_")[0] or utterance_id
