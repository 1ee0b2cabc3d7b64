"""SpeechIO's public test sets: SPEECHIO_ASR_ZH000<00..26>/{metadata.tsv, audio}; metadata.tsv has the columns ID, AUDIO (a path below the
set's folder), DURATION and TEXT.

Each set is a split, test_zh00000 to test_zh00026; those that are there are read. Ids begin with the set's speaker or programme, and are
made unique over the sets by the set's number. Quotes in TEXT are part of it. No counts per set are published, so none are checked.
"""

from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row

PREFIX = "SPEECHIO_ASR_ZH"
FIX = "give the folder that holds SPEECHIO_ASR_ZH00001 and so on as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each set that is there."""
    folders = sorted(path for path in source.glob(f"{PREFIX}*") if path.is_dir())
    if not folders:
        raise RecipeError(source, expected=f"folders {PREFIX}00001 and so on", found="none", fix=FIX)
    rows = {}
    for folder in folders:
        number = folder.name.removeprefix(PREFIX)
        table = read_table(folder / "metadata.tsv", ["ID", "AUDIO", "TEXT"])
        rows[f"test_zh{number}"] = [
            Row(f"{number}-{row['ID']}", folder / row["AUDIO"], row["TEXT"], f"{number}-{speaker_of(row['ID'])}", "zh") for row in table
        ]
    return rows


def speaker_of(utterance_id: str) -> str:
    """IUVyA-lEs2w_00001 -> IUVyA-lEs2w: the recording that the utterance was cut from."""
    return utterance_id.rpartition("_")[0] or utterance_id
