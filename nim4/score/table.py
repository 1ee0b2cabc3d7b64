"""Score records as tables: one block per test set and metric, each row against the block's first.

A row that does not say what it was made of does not print, and rows whose profiles differ do not share a block: their numbers
cannot be compared.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.config import RecipeError, nearest
from nim4.score.bootstrap import NUM_DRAWS, SEED, Difference, paired_difference
from nim4.score.record import Utterance, read_utterances, utterances_path
from nim4.stage import atomic_write, read_jsonl

SURE = 0.95  # a gain is set in bold where P reaches this
RIGHT_ALIGNED = {1, 3, 4, 5, 6}
PUNCTUATION = "punctuation: F1 of all marks and of each, with how many the references have"
STREAMS = "streams of the speech LLM: what is shown, and how much of it changes"
_TEXT = ("config", "test_set", "metric", "commit", "profile", "profile_hash", "block", "model", "hardware")
_NUMBERS = ("rate", "ci_low", "ci_high", "errors", "insertions", "deletions", "substitutions", "missing", "num_utts", "num_blocks")
_WAITS = {
    "first text": ("p50", "p95"),
    "first text audio": ("p50", "p95"),
    "partial lag": ("p50", "p95"),
    "final": ("p50", "p90", "p99"),
}  # of the table of streams
_SHARES = ("flicker", "upwr", "second_pass_change", "second_pass_gain")
_OPTIONAL_NUMBERS = ("rtf", *_SHARES)
_OPTIONAL_NUMBERS += tuple(f"{name.replace(' ', '_')}_{point}_ms" for name, points in _WAITS.items() for point in points)


@dataclass(frozen=True)
class Row:
    """One record, and the name under which it is printed."""

    label: str  # the decode config, as `tag:config` where several folders are compared
    folder: Path  # the 12_score folder it lies in
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """The rows of one test set and metric; differences are against the first."""

    test_set: str
    metric: str
    rows: tuple[Row, ...]
    differences: tuple[Difference | None, ...]  # None for the first row

    @property
    def title(self) -> str:
        return f"{self.test_set}, {self.metric} %"


def score_folder(path: Path) -> Path:
    """The folder with `records.jsonl`, from that file, its folder, or the exp/<corpus>/<tag> above. Raises RecipeError."""
    path = Path(path)
    if path.is_file() and path.name == "records.jsonl":
        return path.parent
    for folder in (path, path / "12_score"):
        if (folder / "records.jsonl").is_file():
            return folder
    raise RecipeError(path, expected="records.jsonl, or 12_score/records.jsonl below", found="neither", fix="run stage 12, or name another folder")


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The records of all folders, in order. Raises RecipeError on a record that lacks what a row must say."""
    folders = list(dict.fromkeys(score_folder(path) for path in paths))
    tags = _tags(folders)
    rows = []
    for folder, tag in zip(folders, tags, strict=True):
        records = read_jsonl(folder / "records.jsonl")
        if not records:
            raise RecipeError(folder / "records.jsonl", expected="at least 1 record", found="0", fix="run stage 12 again")
        for number, record in enumerate(records, 1):
            _check(record, f"{folder / 'records.jsonl'}, row {number}")
            rows.append(Row(f"{tag}:{record['config']}" if len(folders) > 1 else record["config"], folder, record))
    return rows


def make_blocks(rows: Sequence[Row], first: str | None = None) -> list[Block]:
    """Rows grouped by test set and metric, with the paired difference of each to the first.

    Args:
        first: label of the row that the others are compared with; default: the first record. Blocks without it keep their own first row.
    Raises:
        RecipeError: when a block's rows differ in profile or in utterances, or no row is called `first`.
    """
    if first is not None:
        labels = list(dict.fromkeys(row.label for row in rows))
        if first not in labels:
            raise RecipeError("--first", expected="a row of the table", found=first, fix=nearest(first, labels))
        rows = sorted(rows, key=lambda row: row.label != first)
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.record["test_set"], row.record["metric"]), []).append(row)
    return [_block(test_set, metric, members) for (test_set, metric), members in grouped.items()]


def difference(a: Sequence[Utterance], b: Sequence[Utterance], where: str) -> Difference:
    """Paired difference of two scored sets. Raises RecipeError when they are not about the same utterances and references."""
    b_by_id = {utt.id: utt for utt in b}
    if len(a) != len(b_by_id) or any(utt.id not in b_by_id or utt.ref != b_by_id[utt.id].ref for utt in a):
        raise RecipeError(where, expected="the same utterances and references in both", found="others", fix="score both on the same test set")
    other_errors = [b_by_id[utt.id].errors for utt in a]
    return paired_difference([utt.errors for utt in a], other_errors, [utt.ref_units for utt in a], [utt.speaker for utt in a])


def as_text(blocks: Sequence[Block]) -> str:
    """All blocks as aligned columns, for a terminal."""
    parts = ["\n".join([block.title, *aligned([_header(block), *_cells(block)], RIGHT_ALIGNED), _footer(block)]) for block in blocks]
    for title, lines in ((STREAMS, _streams(blocks)), (PUNCTUATION, _punctuation(blocks))):
        if lines:
            parts.append("\n".join([title, *aligned(lines, set(range(2, len(lines[0]))))]))
    return "\n\n".join([*parts, "\n".join(_provenance(blocks))])


def as_markdown(blocks: Sequence[Block]) -> str:
    """All blocks as GitHub tables; a gain that is sure (P at least 0.95) is in bold."""
    parts = []
    for block in blocks:
        cells = _cells(block)
        for line, change in zip(cells, block.differences, strict=True):
            if change is not None and change.p_better >= SURE:
                line[2] = f"**{line[2]}**"
        parts.append(f"**{block.title}**\n\n{_piped([_header(block), *cells], RIGHT_ALIGNED)}\n\n{_footer(block)}")
    for title, lines in ((STREAMS, _streams(blocks)), (PUNCTUATION, _punctuation(blocks))):
        if lines:
            parts.append(f"**{title}**\n\n{_piped(lines, set(range(2, len(lines[0]))))}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in _provenance(blocks))])


def aligned(lines: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Cells as lines of columns, those of `right` flush right."""
    widths = [max(display_width(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(pad(cell, widths[column], column in right) for column, cell in enumerate(line)).rstrip() for line in lines]


def _piped(lines: Sequence[Sequence[str]], right: Collection[int]) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def replace_block(path: Path, name: str, text: str) -> None:
    """Puts `text` between `<!-- name:begin -->` and `<!-- name:end -->`, atomically.

    Raises RecipeError unless each stands there once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    try:
        old = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a readable text file", found=error, fix="correct --write") from error
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        found = f"{old.count(begin)} and {old.count(end)} of them"
        raise RecipeError(path, expected=f"{begin} and below it {end}, once each", found=found, fix="put in both markers, or correct --block")
    before, after = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    with atomic_write(path) as file:
        file.write(f"{before}\n{text.strip()}\n{after}")


def display_width(text: str) -> int:
    """Columns a terminal needs: two for East Asian wide characters, none for combining ones (Unicode annex 11)."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def pad(text: str, width: int, right: bool = False) -> str:
    """`text` filled with blanks to `width` columns."""
    fill = " " * (width - display_width(text))
    return fill + text if right else text + fill


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise RecipeError(where, expected="a score record", found=type(record).__name__, fix="run stage 12 again")
    missing = [key for key in _TEXT if not isinstance(record.get(key), str) or not record[key]]
    missing += [key for key in _NUMBERS if not _is_number(record.get(key))]
    missing += [key for key in _OPTIONAL_NUMBERS if record.get(key) is not None and not _is_number(record[key])]
    if missing:
        raise RecipeError(where, expected="a record that says what it was made of", found=f"no valid {', '.join(missing)}", fix="run stage 12 again")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tags(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart: `base`, or `mini/base` when the tags are the same."""
    parts = [(folder.resolve().parent if folder.name == "12_score" else folder.resolve()).parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        tags = ["/".join(part[-length:]) for part in parts]
        if len(set(tags)) == len(tags):
            return tags
    return [str(folder) for folder in folders]


def _block(test_set: str, metric: str, rows: Sequence[Row]) -> Block:
    where = f"{test_set} {metric}"
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise RecipeError(where, expected="one record per decode config", found=f"several called {labels[0]}", fix="run stage 12 again")
    hashes = {f"{row.record['profile']} {row.record['profile_hash']}": row.label for row in rows}
    if len(hashes) > 1:
        found = "; ".join(f"{label} with {name}" for name, label in hashes.items())
        raise RecipeError(where, expected="rows of one profile and hash", found=found, fix="score all of them again with the same checkout")
    changes: list[Difference | None] = [None]
    if len(rows) > 1:
        first, *others = [read_utterances(utterances_path(row.folder, row.record["config"], test_set, metric)) for row in rows]
        changes += [difference(first, other, f"{where}, {labels[0]} and {label}") for other, label in zip(others, labels[1:], strict=True)]
    return Block(test_set, metric, tuple(rows), tuple(changes))


def _header(block: Block) -> list[str]:
    versus = f"vs {block.rows[0].label} (95 % CI, P better)"
    return ["decode config", f"{block.metric} % (95 % CI)", versus, "ins/del/sub", "missing", "RTF", "first text p50/p95 ms"]


def _cells(block: Block) -> list[list[str]]:
    cells = []
    for row, change in zip(block.rows, block.differences, strict=True):
        record = row.record
        versus = "-" if change is None else f"{change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}] P {change.p_better:.2f}"
        wait = [record.get(f"first_text_{point}_ms") for point in ("p50", "p95")]
        cells.append(
            [
                row.label,
                f"{record['rate']:.2f} [{record['ci_low']:.2f}, {record['ci_high']:.2f}]",
                versus,
                f"{record['insertions']}/{record['deletions']}/{record['substitutions']}",
                str(record["missing"]),
                "-" if record.get("rtf") is None else f"{record['rtf']:.3f}",
                "-" if None in wait else f"{wait[0]:.0f} / {wait[1]:.0f}",
            ]
        )
    return cells


def _streams(blocks: Sequence[Block]) -> list[list[str]]:
    """Header and one line for each config and test set whose texts change while they are shown; empty when there is none."""
    records = {(row.label, block.test_set): row.record for block in blocks for row in block.rows}
    records = {name: record for name, record in records.items() if any(record.get(share) is not None for share in _SHARES)}
    if not records:
        return []
    waited = [f"{name} {'/'.join(points)} ms" for name, points in _WAITS.items()]
    lines = [["decode config", "test set", *waited, "flicker %", "UPWR %", "second pass changes %", "second pass gains points"]]
    for (label, test_set), record in records.items():
        waits = [[record.get(f"{name.replace(' ', '_')}_{point}_ms") for point in points] for name, points in _WAITS.items()]
        shares = [record.get(name) for name in _SHARES]
        cells = ["-" if None in wait else " / ".join(f"{value:.0f}" for value in wait) for wait in waits]
        lines.append([label, test_set, *cells, *("-" if share is None else f"{share:.1f}" for share in shares)])
    return lines


def _punctuation(blocks: Sequence[Block]) -> list[list[str]]:
    """Header and one line for each config and test set with marks in references and hypotheses (CTC writes none); empty when there is none."""
    rows = [(row.label, block.test_set, row.record.get("punctuation")) for block in blocks for row in block.rows]
    scored = [(label, test_set, scores) for label, test_set, scores in rows if scores and scores["all"]["in_hyps"]]
    marks = list(dict.fromkeys(mark for _, _, scores in scored for mark in scores))
    if not marks:
        return []
    lines = [["decode config", "test set", *marks]]
    for label, test_set, scores in scored:
        cells = [f"{scores[mark]['f1']:.1f} ({scores[mark]['in_refs']})" if mark in scores else "-" for mark in marks]
        lines.append([label, test_set, *cells])
    return lines


def _footer(block: Block) -> str:
    record = block.rows[0].record
    blocks = f"{record['num_blocks']} {record['block']}s"
    return f"profile {record['profile']} {record['profile_hash']}, {record['num_utts']} utterances, intervals over {blocks}"


def _provenance(blocks: Sequence[Block]) -> list[str]:
    """Model, commit and hardware once for all rows that share them, then how the intervals were made."""
    made: dict[str, list[tuple[str, str]]] = {}
    for block in blocks:
        for row in block.rows:
            step = row.record.get("model_step")
            model = row.record["model"] + (f" step {step}" if step is not None else "")
            made.setdefault(f"model {model}, commit {row.record['commit']}, {row.record['hardware']}", []).append((row.label, block.test_set))
    lines = [source if len(made) == 1 else f"{_named(source, made)}: {source}" for source in made]
    return [*lines, f"paired bootstrap, {NUM_DRAWS} draws, seed {SEED}; first text is counted from the start of the audio, compute time included"]


def _named(source: str, made: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The rows of one source: their labels, with the test set where a label has other sources too."""
    elsewhere = {label for other, rows in made.items() if other != source for label, _ in rows}
    return ", ".join(dict.fromkeys(f"{label} on {test_set}" if label in elsewhere else label for label, test_set in made[source]))
