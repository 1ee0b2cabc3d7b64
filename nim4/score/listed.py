"""References and hypotheses of any system, as plain TSV or JSON lines.

TSV: `id<TAB>text` in each line; or a first line of column names, of which `id` and `text` must be two. JSON lines: objects with `id` and `text`.
Optional columns or keys: of references `speaker` (block of the bootstrap) and `set` (macro average over sets); of hypotheses `error`, why there
is no text. Files are UTF-8; a JSON-lines file ends in .jsonl or .json. Stage 11's refs.jsonl and hyps.jsonl are such files.

A reference that cannot be read stops the scoring, since leaving it out would change the rate of every system. A broken line of a hypothesis file
counts as no hypothesis, and is told.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nim4.config import RecipeError
from nim4.score.decoded import Hypothesis, Reference, some

log = logging.getLogger("nim4")
MAX_BROKEN = 0.5  # of the lines of a hypothesis file; more, and it is no such file


@dataclass(frozen=True)
class System:
    """The hypotheses of one system that have a reference, and what was wrong with its file."""

    name: str
    path: Path
    hyps: Mapping[str, Hypothesis]
    unknown: tuple[str, ...] = ()  # ids without a reference
    broken: tuple[int, ...] = ()  # numbers of lines that could not be read


@dataclass
class _Lines:
    path: Path
    rows: list[tuple[int, dict[str, str | None]]] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)


def read_references(path: Path) -> tuple[list[Reference], dict[str, str]]:
    """The references, and the set of each that has one. Raises RecipeError at the first line that is broken or doubles an id."""
    lines = _read(path)
    for number, reason in lines.broken.items():
        raise RecipeError(f"{path}, line {number}", expected="id and text", found=reason, fix="correct that line: nothing is scored without it")
    refs = [Reference(_id(row), "", row["text"] or "", row.get("speaker") or None, 0.0) for _, row in lines.rows]
    _refuse_doubles(lines)
    if not refs:
        raise RecipeError(path, expected="at least 1 reference", found="0", fix="name another --ref")
    return refs, {_id(row): row["set"] for _, row in lines.rows if row.get("set")}


def read_system(path: Path, refs: Mapping[str, Reference], name: str | None = None) -> System:
    """The hypotheses of one system. Raises RecipeError when an id comes twice, no id has a reference, or most lines are broken."""
    lines = _read(path)
    _refuse_doubles(lines)
    num_lines = len(lines.rows) + len(lines.broken)
    if len(lines.broken) > MAX_BROKEN * num_lines:
        number, reason = next(iter(lines.broken.items()))
        found = f"{len(lines.broken)} of {num_lines} broken, line {number} first: {reason}"
        raise RecipeError(path, expected="lines of id and text", found=found, fix="see python -m nim4 score --help for the formats")
    hyps = {_id(row): Hypothesis(_id(row), None, row["text"], 0.0, None, row.get("error") or None) for _, row in lines.rows}
    unknown = tuple(id for id in hyps if id not in refs)
    if len(unknown) == len(hyps):
        found = f"none of {len(hyps)}: {some(unknown)}" if hyps else "no line"
        raise RecipeError(
            path, expected=f"ids of the references, such as {next(iter(refs))}", found=found, fix="a TAB ends the id; correct --hyp or --ref"
        )
    for number, reason in lines.broken.items():
        log.warning("%s, line %d: %s; it counts as no hypothesis", path, number, reason)
    if unknown:
        log.warning("%s: %d ids have no reference and are not scored (%s)", path, len(unknown), some(unknown))
    absent = [id for id in refs if id not in hyps]
    if absent:
        log.warning("%s: %d of %d references have no hypothesis (%s); they count as deletions", path, len(absent), len(refs), some(absent))
    known = {id: hyp for id, hyp in hyps.items() if id in refs}
    return System(name or path.stem, path, known, unknown, tuple(lines.broken))


def _id(row: Mapping[str, str | None]) -> str:
    return row["id"] or ""


def _refuse_doubles(lines: _Lines) -> None:
    first: dict[str, int] = {}
    for number, row in lines.rows:
        if (id := _id(row)) in first:
            found = f"{id} in lines {first[id]} and {number}"
            raise RecipeError(lines.path, expected="one line per id", found=found, fix="remove one of them")
        first[id] = number


def _read(path: Path) -> _Lines:
    """Each line as a row, or why it is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(path, expected="a readable file", found=error, fix="correct --ref or --hyp") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RecipeError(path, expected="UTF-8", found="UTF-16", fix=f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}")
    lines = _Lines(path)
    parse = _from_json if path.suffix in (".jsonl", ".json") else None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.rstrip(b"\r").decode("utf-8")
            if parse is None:
                parse, is_header = _tsv_parser(text)
                if is_header:
                    continue
            lines.rows.append((number, parse(text)))
        except UnicodeDecodeError as error:
            lines.broken[number] = f"not UTF-8 (byte {error.object[error.start]:#04x}), perhaps iconv -f GB18030 -t UTF-8 helps"
        except ValueError as error:
            lines.broken[number] = str(error)
    return lines


def _tsv_parser(first_line: str) -> tuple[Callable[[str], dict[str, str | None]], bool]:
    """What reads a line, and whether the first one holds the names of columns."""
    names = first_line.split("\t")
    if not {"id", "text"} <= set(names):
        return _from_pair, False

    def parse(line: str) -> dict[str, str | None]:
        values = line.split("\t", len(names) - 1)
        if len(values) != len(names) or (names[-1] != "text" and "\t" in values[-1]):
            raise ValueError(f"{line.count(chr(9)) + 1} columns instead of {len(names)}")
        return _checked(dict(zip(names, values, strict=True)))

    return parse, True


def _from_pair(line: str) -> dict[str, str | None]:
    id, _, text = line.partition("\t")
    return _checked({"id": id, "text": text})


def _from_json(line: str) -> dict[str, str | None]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(row, dict) or not {"id", "text"} <= row.keys():
        raise ValueError("no object with 'id' and 'text'")
    return _checked({key: row.get(key) for key in ("id", "text", "speaker", "set", "error")})


def _checked(row: dict[str, str | None]) -> dict[str, str | None]:
    for key in ("id", "text", "speaker", "set", "error"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{key!r} is no text: {row[key]!r:.40}")
    if not (row["id"] or "").strip():
        raise ValueError("no id")
    return row | {"id": row["id"].strip()}
