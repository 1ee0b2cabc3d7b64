"""Corpora as the Hugging Face hub packs them: parquet files whose rows hold the bytes of an audio file. The only door to pyarrow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nim4.config import RecipeError
from nim4.corpus.progress import Progress
from nim4.corpus.table import spread

ROWS_AT_ONCE = 64  # bounds the memory: a row may hold a minute of audio
MAGIC = ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"ID3", ".mp3"), (b"\xff\xfb", ".mp3"))


def column_names(path: Path) -> list[str]:
    """The columns of a parquet file. Raises RecipeError when it is none."""
    return list(_open(path, ()).schema_arrow.names)


def unpack_rows(
    files: Mapping[str, Sequence[Path]], columns: Sequence[str], work: Path, limit: int = 0, audio: str = "audio"
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, their audio written to files of its own.

    Args:
        files: split -> its parquet files, in order.
        columns: what is kept beside the audio.
        work: folder for the audio files, `work/<split>/<number of the row>.<ending>`; names inside the corpus are not trusted with paths.
        limit: rows per split, spread as stage 0 spreads them, whose audio is written; 0 = all.
        audio: the column {bytes, path} of the audio.
    Returns:
        split -> rows as {column: value}, under the name `audio` the file that was written, None where the corpus has no bytes.
    Raises:
        RecipeError: if a split has no file, or a file is no parquet or lacks a column.
    """
    unpacked: dict[str, list[dict[str, Any]]] = {}
    for split, paths in files.items():
        if not paths:
            raise RecipeError(f"split {split!r}", expected="parquet files", found="none", fix="fetch the whole corpus, or correct --source")
        tables = [_open(path, [*columns, audio]) for path in paths]
        count = sum(table.metadata.num_rows for table in tables)
        wanted = set(spread(range(count), limit)) if limit else None
        rows, progress = [], Progress(f"unpacking audio of {split}", count, "rows")
        for number, row in enumerate(_rows(tables, paths, [*columns, audio])):
            progress.add()
            if wanted is None or number in wanted:
                path = _write(row[audio], work / split / f"{number:07d}")
                rows.append({column: row[column] for column in columns} | {"audio": path})
        unpacked[split] = rows
    return unpacked


def _open(path: Path, columns: Sequence[str]) -> Any:
    """The file, once it is sure that it has the columns; its rows are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(path, expected="a parquet file", found=_short(error), fix="fetch it again") from error
    for column in columns:
        if column not in table.schema_arrow.names:
            found = ", ".join(table.schema_arrow.names)
            raise RecipeError(path, expected=f"a column {column!r}", found=found, fix="fetch the version that the recipe names")
    return table


def _rows(tables: Sequence[Any], paths: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow

    for path, table in zip(paths, tables, strict=True):
        try:
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise RecipeError(path, expected="a whole parquet file", found=_short(error), fix="fetch it again") from error


def _write(audio: Any, stem: Path) -> Path | None:
    """Writes the bytes of {bytes, path} to `stem` with the ending of what they are; None where there are none."""
    content = audio.get("bytes") if isinstance(audio, dict) else audio if isinstance(audio, bytes) else None
    if not content:
        return None
    named = PurePosixPath(str(audio.get("path") or "")).suffix.lower() if isinstance(audio, dict) else ""
    known = next((ending for start, ending in MAGIC if content.startswith(start)), None)
    path = stem.with_suffix(known or (named if named.removeprefix(".").isalnum() else ".bin"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
