"""AISHELL-1 as OpenSLR 33 packs it: data_aishell/wav/{train,dev,test}/<speaker>/<id>.wav, one file of transcripts for all splits.

The transcripts have spaces between words; they stay as published and are normalised in stage 2. Some ids in the transcripts have no
audio in the archive: they are listed, and belong to the split of their speaker.
"""

from pathlib import Path

from nim4.corpus.download import fetch, unpack
from nim4.corpus.table import Row, match, need, read_transcripts

URL = "https://www.openslr.org/resources/33/data_aishell.tgz"
SIZE_BYTES = 15_582_913_665
SPLITS = ("train", "dev", "test")
COUNTS = {"dev": 14_326, "test": 7_176}  # the wav files of the archive, which lhotse and Kaldi count alike
FIX = "give the folder that holds data_aishell as --source, or add --download true (15.6 GB, 50 GB once unpacked)"


def download(target: Path) -> None:
    """Fetches the archive, then unpacks it and the archive of each speaker inside it."""
    archive = target / "data_aishell.tgz"
    unpack(archive, target, sha256=fetch(URL, archive, size=SIZE_BYTES))
    wav = target / "data_aishell" / "wav"
    for speaker in sorted(wav.glob("*.tar.gz")):
        unpack(speaker, wav)


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of train, dev and test."""
    root = source / "data_aishell" if (source / "data_aishell").is_dir() else source
    transcripts = read_transcripts(need(root / "transcript" / "aishell_transcript_v0.8.txt", FIX))
    audio = {split: sorted(need(root / "wav" / split, FIX).glob("*/*.wav")) for split in SPLITS}
    split_of_speaker = {path.parent.name: split for split, paths in audio.items() for path in paths}
    heard = {path.stem for paths in audio.values() for path in paths}
    rows = {}
    for split, paths in audio.items():
        here = {path.stem for path in paths}
        silent = {name for name, _ in transcripts if name not in heard and split_of_speaker.get(speaker_of(name), "train") == split}
        wanted = here | silent
        rows[split] = match([pair for pair in transcripts if pair[0] in wanted], paths, speaker_of, "zh")
    return rows


def speaker_of(utterance_id: str) -> str:
    """BAC009S0002W0122 -> S0002."""
    return utterance_id[6:11]
