"""AISHELL-2021-Eval: a folder for each set, whose name ends in its letter (A, B, C, D; the paper's tables have A, C and D), and in it
trans.txt (or text) with lines `<id> <text>` and <id>.wav anywhere below.

The package comes on request and its layout is not described in public: this is the layout of the AISHELL-2 test package by the same
makers, with ids such as A1109CO0001. Unverified, as are the counts: none are checked.
"""

import re
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.table import Row, match, need, read_transcripts

FIX = "give the folder that holds a folder for each set as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each set that is there, as test_a to test_d."""
    rows: dict[str, list[Row]] = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        letter = re.search(r"(?:^|[^A-Za-z])([A-D])$|2021([A-D])", folder.name)
        if letter is None:
            continue
        split = f"test_{(letter[1] or letter[2]).lower()}"
        if split in rows:
            raise RecipeError(source, expected=f"one folder for {split}", found=f"another: {folder.name}", fix="move one of them away")
        texts = next((path for path in (folder / "trans.txt", folder / "text") if path.exists()), folder / "trans.txt")
        rows[split] = match(read_transcripts(need(texts, FIX)), sorted(folder.rglob("*.wav")), speaker_of, "zh")
    if not rows:
        found = ", ".join(sorted(path.name for path in source.iterdir())[:5]) or "nothing"
        raise RecipeError(source, expected="folders whose names end in A, B, C or D", found=found, fix=FIX)
    return rows


def speaker_of(utterance_id: str) -> str:
    """A1109CO0001 -> A1109."""
    return utterance_id[:5]
