"""AISHELL-2 as its makers deliver it: AISHELL-2/iOS/data/{trans.txt, wav/<speaker>/<id>.wav} to train on, and the separate package
AISHELL-DEV-TEST-SET/{iOS,Android,Mic}/{dev,test}/{trans.txt, wav/<speaker>/<id>.wav}, of which copies also lie in AISHELL-2/iOS/{dev,test}.

Splits: train, and dev, test (iOS), dev_android, test_android, dev_mic, test_mic; those that are there are read. Some texts hold a stray
apostrophe or an English word in capitals; they stay as published.
Counts (2,500 in dev and 5,000 in test of each channel) are unverified, so not checked.
"""

from pathlib import Path

from nim4.corpus.table import Row, match, need, read_transcripts

CHANNELS = {"iOS": "", "Android": "_android", "Mic": "_mic"}  # folder: ending of the split's name
FIX = "give the folder that holds AISHELL-2 and AISHELL-DEV-TEST-SET as --source; both are unpacked to their wav files"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each split that is there."""
    folders = {"train": [source / "AISHELL-2" / "iOS" / "data", source / "iOS" / "data"]}
    for channel, ending in CHANNELS.items():
        for split in ("dev", "test"):
            places = ("AISHELL-DEV-TEST-SET", "AISHELL-2/AISHELL-DEV-TEST-SET", "AISHELL-2", "")
            folders[f"{split}{ending}"] = [source / place / channel / split for place in places]
    present = {split: next((folder for folder in places if folder.is_dir()), None) for split, places in folders.items()}
    if not any(present.values()):
        need(folders["test"][0], FIX)
    rows = {}
    for split, folder in present.items():
        if folder is not None:
            transcripts = read_transcripts(need(folder / "trans.txt", FIX))
            rows[split] = match(transcripts, sorted(need(folder / "wav", FIX).glob("*/*.wav")), speaker_of, "zh")
    return rows


def speaker_of(utterance_id: str) -> str:
    """IC0001W0063 -> C0001: the first letter is the channel's."""
    return utterance_id[1:6]
