"""ASCEND as the hub packs it: main/{train,validation,test}-*.parquet (older copies: the same files beside each other), with the columns id,
audio, transcription, language (zh, en or mixed), original_speaker_id and session_id. The audio is written into files of its own.
"""

from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.parquet_audio import unpack_rows
from nim4.corpus.table import Row

COLUMNS = ("id", "transcription", "language", "original_speaker_id", "session_id")
LANGUAGES = {"zh": "zh", "en": "en", "mixed": "zh-en"}
COUNTS = {"train": 9869, "validation": 1130, "test": 1315}  # the dataset card; arXiv 2112.06223 says about 12.3 thousand, 8:1:1
FIX = "give the folder of the dataset repository, which holds main, as --source"


def prepare(source: Path, work: Path, limit: int) -> dict[str, list[Row]]:
    """The utterances of train, validation and test; audio is written for those within `limit` only."""
    root = source / "main" if (source / "main").is_dir() else source
    files = {split: sorted(root.glob(f"{split}-*.parquet")) for split in COUNTS}
    if not any(files.values()):
        raise RecipeError(root, expected="train-*.parquet, validation-*.parquet and test-*.parquet", found="none", fix=FIX)
    return {split: [row_of(found) for found in rows] for split, rows in unpack_rows(files, COLUMNS, work, limit).items()}


def row_of(found: dict) -> Row:
    """Ids are numbers over all splits; speakers are numbered over all sessions."""
    language = LANGUAGES.get(found["language"], "zh-en")
    return Row(f"ascend-{found['id']}", found["audio"], found["transcription"], f"ascend-{found['original_speaker_id']}", language)
