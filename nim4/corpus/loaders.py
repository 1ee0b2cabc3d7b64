"""Layouts that many corpora share: a Kaldi data folder, and a table with a row per utterance.

What is broken beyond doubt (a line with too few columns, a missing column) is told with file and line. What a single utterance lacks
stays in the rows, so that stage 0 lists it.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nim4.config import RecipeError, nearest
from nim4.corpus.table import Row, need, read_lines, read_transcripts


def read_table(path: Path, columns: Sequence[str], header: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a table as {column: text}.

    Args:
        path: `.jsonl` with an object per line, `.json` with a list of objects, or else tab-separated text. Quotes mean nothing.
        columns: those that must be there; of JSON only these are kept, numbers as text, null as an empty text.
        header: names of the columns of tab-separated text whose first line is a row, not names. The last column may hold tabs.
    Raises:
        RecipeError: if the file is missing, not UTF-8, lacks a column, or, with the line's number, if a row is broken.
    """
    need(path, "unpack the corpus again, or correct --source")
    if path.suffix in (".json", ".jsonl"):
        return [_json_row(value, where, columns) for where, value in _json_values(path)]
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if header is None:
        if not lines:
            raise RecipeError(path, expected="a line with the names of the columns", found="an empty file", fix="unpack the corpus again")
        header = [cell.strip() for cell in lines.pop(0)[1].split("\t")]
    _need_columns(path, columns, header)
    rows = []
    for number, line in lines:
        cells = line.split("\t", len(header) - 1)
        if len(cells) < len(header):
            found = f"{len(cells)}: {line[:60]!r}"
            raise RecipeError(f"{path}, line {number}", expected=f"{len(header)} columns between tabs", found=found, fix="correct the line")
        rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    return rows


def _json_values(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, value) of each row."""
    lines = read_lines(path)
    if path.suffix == ".jsonl":
        places = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        return [(where, _parsed(line, where)) for where, line in places]
    values = _parsed("\n".join(lines), str(path))
    if not isinstance(values, list):
        raise RecipeError(path, expected="a list of objects", found=type(values).__name__, fix="unpack the corpus again")
    return [(f"{path}, entry {number}", value) for number, value in enumerate(values, 1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(where, expected="JSON", found=error, fix="correct it, or unpack the corpus again") from error


def _json_row(value: Any, where: str, columns: Sequence[str]) -> dict[str, str]:
    if not isinstance(value, dict):
        raise RecipeError(where, expected="an object", found=type(value).__name__, fix="correct it, or unpack the corpus again")
    _need_columns(where, columns, list(value))
    for column in columns:
        if isinstance(value[column], list | dict):
            raise RecipeError(where, expected=f"text or a number as {column!r}", found=type(value[column]).__name__, fix="correct it")
    return {column: "" if value[column] is None else str(value[column]).strip() for column in columns}


def _need_columns(where: object, columns: Sequence[str], header: Sequence[str]) -> None:
    for column in columns:
        if column not in header:
            found = ", ".join(header)[:200] or "none"
            raise RecipeError(where, expected=f"a column {column!r}", found=found, fix=nearest(column, list(header)))


def kaldi_folder(
    folder: Path, language: str, roots: Sequence[Path], speaker_of: Callable[[str], str] = lambda utterance_id: utterance_id
) -> list[Row]:
    """The utterances of a Kaldi data folder: `wav.scp`, `text`, and where they are there `utt2spk` and `segments`.

    Args:
        folder: the data folder.
        language: zh, en or zh-en.
        roots: where relative paths of wav.scp begin; the first under which a file exists.
        speaker_of: speaker from an id, for ids that utt2spk lacks.
    Raises:
        RecipeError: if wav.scp or text is missing or not UTF-8, or, with the line's number, if a line is no path or no segment.
    """
    fix = "unpack the corpus again, or correct --source"
    audio = _audio_paths(need(folder / "wav.scp", fix), roots)
    texts: dict[str, list[str]] = {}
    for utterance_id, text in read_transcripts(need(folder / "text", fix)):
        texts.setdefault(utterance_id, []).append(text)
    speakers = dict(read_transcripts(folder / "utt2spk")) if (folder / "utt2spk").exists() else {}
    if (folder / "segments").exists():
        places = [(name, audio.get(recording, [None])[0], start, end) for name, recording, start, end in _segments(folder / "segments")]
    else:
        places = [(name, path, 0.0, None) for name, paths in audio.items() for path in paths]
    rows = []
    for name, path, start, end in places:
        speaker = speakers.get(name) or speaker_of(name)
        rows += [Row(name, path, text, speaker, language, start, end) for text in texts.get(name, [None])]
    heard = {name for name, *_ in places}
    silent = [(name, text) for name, found in texts.items() if name not in heard for text in found]
    return rows + [Row(name, None, text, speakers.get(name) or speaker_of(name), language) for name, text in silent]


def _audio_paths(scp: Path, roots: Sequence[Path]) -> dict[str, list[Path]]:
    """id -> its files, in the order of wav.scp; more than one where an id is repeated."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(read_lines(scp), 1):
        name, _, value = line.strip().replace("\t", " ", 1).partition(" ")
        value = value.strip()
        if not name:
            continue
        if not value or value.endswith("|"):
            found_here = "a command" if value else "no path"
            fix = "write its output to a file and name that: nothing of a corpus is run" if value else "correct the line"
            raise RecipeError(f"{scp}, line {number}", expected="an id and the path of an audio file", found=found_here, fix=fix)
        candidates = [root / value for root in roots] or [scp.parent / value]  # an absolute path replaces the root
        found.setdefault(name, []).append(next((path for path in candidates if path.is_file()), candidates[0]))
    return found


def _segments(path: Path) -> list[tuple[str, str, float, float]]:
    """(utterance, recording, start, end) of each line."""
    segments = []
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split()
        if not cells:
            continue
        try:
            name, recording, start, end = cells
            times = float(start), float(end)
            if not all(map(math.isfinite, times)):
                raise ValueError(line)
        except ValueError:
            expected = "utterance, recording, start and end in seconds"
            raise RecipeError(f"{path}, line {number}", expected=expected, found=repr(line[:60]), fix="correct the line") from None
        segments.append((name, recording, *times))
    return segments
