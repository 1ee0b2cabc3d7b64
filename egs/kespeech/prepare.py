"""KeSpeech as its makers deliver it: Tasks/ASR/{train_phase1,train_phase2,dev_phase1,dev_phase2,test}/{wav.scp, text, utt2spk,
utt2subdialect}; the paths of wav.scp begin in the corpus's own folder (Audio/<speaker>/<phase>/<id>.wav).

`<SPOKEN_NOISE>` is a mark in the text and is taken out, as lhotse's recipe does; that recipe wants all files of a folder in the same order
and drops what differs, this one does not. Those splits that are there are read. Counts (19,723 in test, by one third party) are
unverified, so not checked.
"""

import dataclasses
from pathlib import Path

from nim4.corpus.loaders import kaldi_folder
from nim4.corpus.table import Row, need

SPLITS = ("train_phase1", "train_phase2", "dev_phase1", "dev_phase2", "test")
MARK = "<SPOKEN_NOISE>"
FIX = "give the folder that holds KeSpeech as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each split that is there."""
    root = source / "KeSpeech" if (source / "KeSpeech").is_dir() else source
    tasks = need(root / "Tasks" / "ASR", FIX)
    present = [split for split in SPLITS if (tasks / split).is_dir()]
    need(tasks / (present[0] if present else "test"), FIX)
    return {split: [without_mark(row) for row in kaldi_folder(tasks / split, "zh", [root])] for split in present}


def without_mark(row: Row) -> Row:
    """The row, its text without the mark."""
    return row if row.text is None else dataclasses.replace(row, text=" ".join(row.text.replace(MARK, " ").split()))
