"""WSC-Eval-ASR, the test set of WenetSpeech-Chuan: WSC-Eval-ASR/{Easy,Hard}/{text, wav.scp, key.txt, wav/<id>.wav}. Short and Long beside
them are the same speech cut another way, and are not read.

References are as its readme says they are to be compared: `*` (what could not be heard) goes, and so do brackets around what others say,
while what stands in them stays. Counts (6,981 easy and 1,392 hard, by one third party) are unverified, so not checked.
"""

from pathlib import Path

from nim4.corpus.table import Row, match, need, read_transcripts

MARKS = str.maketrans("", "", "*()（）")
FIX = "give the folder that holds WSC-Eval-ASR as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of test_easy and test_hard."""
    root = source / "WSC-Eval-ASR" if (source / "WSC-Eval-ASR").is_dir() else source
    rows = {}
    for name in ("Easy", "Hard"):
        folder = need(root / name, FIX)
        transcripts = [(utterance_id, text.translate(MARKS).strip()) for utterance_id, text in read_transcripts(need(folder / "text", FIX))]
        rows[f"test_{name.lower()}"] = match(transcripts, sorted(need(folder / "wav", FIX).glob("*.wav")), lambda name: name, "zh")
    return rows
