"""AISHELL6-Whisper as the hub packs it, archives unpacked: {train,valid,test}/audio/hfm/{whisper,normal}/<speaker>/<id>.wav, 48 kHz, and
text_sentence with lines `<id> <text>` for all of it. The same sentences are whispered and spoken.

Ids are `whisper_S0189_M-0189-2_014060-014592`: kind, speaker, recording, times. Each split is read in both kinds, test_whisper and
test_normal; those that are there are read. Counts per split are unverified, so not checked.
"""

from pathlib import Path

from nim4.corpus.table import Row, match, need, read_transcripts

KINDS = ("whisper", "normal")
FIX = "give the folder that holds text_sentence and the unpacked train, valid and test as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each split and kind that is there; a text without audio is listed in the split of its speaker, else in the first."""
    transcripts = read_transcripts(need(source / "text_sentence", FIX))
    folders = {f"{split}_{kind}": source / split / "audio" / "hfm" / kind for split in ("train", "valid", "test") for kind in KINDS}
    audio = {name: sorted(folder.glob("*/*.wav")) for name, folder in folders.items() if folder.is_dir()}
    need(folders["test_whisper"] if not audio else source, FIX)
    heard = {path.stem for paths in audio.values() for path in paths}
    split_of = {(path.parent.name, name.rpartition("_")[2]): name for name, paths in audio.items() for path in paths}
    first, rows = next(iter(audio)), {}
    for name, paths in audio.items():
        here = {path.stem for path in paths}
        silent = {
            found for found, _ in transcripts if found not in heard and split_of.get((speaker_of(found), found.partition("_")[0]), first) == name
        }
        rows[name] = match([pair for pair in transcripts if pair[0] in here | silent], paths, speaker_of, "zh")
    return rows


def speaker_of(utterance_id: str) -> str:
    """whisper_S0189_M-0189-2_014060-014592 -> S0189."""
    return utterance_id.split("_")[1] if "_" in utterance_id else utterance_id
