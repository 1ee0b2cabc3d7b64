"""Utterances on which two systems differ, worst first, with reference and both hypotheses aligned in columns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nim4.config import RecipeError, nearest
from nim4.score.error_rate import GAP, METRICS, align
from nim4.score.record import Utterance, read_utterances, utterances_path
from nim4.score.table import difference, display_width, pad, score_folder

SHOWN_GAP = "*"
COLOURS = {"substitution": "33", "deletion": "31", "insertion": "36", "worse": "31", "better": "32", "id": "1"}  # ANSI
LEGEND = f"columns: {SHOWN_GAP} no unit here; last row: - only A is right, + only B is right, ~ both are wrong, in different ways"

Column = tuple[str, str, str]


@dataclass(frozen=True)
class Side:
    """One of the two systems: a decode config on a test set, in a 12_score folder."""

    folder: Path
    config: str
    test_set: str

    @property
    def metrics(self) -> set[str]:
        return {path.stem.removeprefix("utts-") for path in (self.folder / self.config / self.test_set).glob("utts-*.jsonl")}


def parse_side(spec: str, folders: Sequence[Path]) -> Side:
    """A Side from `CONFIG/SET`, looked for in the one folder given, or from `DIR:CONFIG/SET`. Raises RecipeError."""
    directory, colon, name = spec.rpartition(":")
    config, slash, test_set = name.partition("/")
    if not (config and slash and test_set):
        raise RecipeError(f"--diff {spec}", expected="CONFIG/SET or DIR:CONFIG/SET", found=spec, fix="for example --diff offline/test streaming/test")
    if not colon and len(folders) != 1:
        raise RecipeError(f"--diff {spec}", expected="one DIR to look into", found=len(folders), fix=f"write DIR:{spec}")
    folder = score_folder(Path(directory)) if colon else score_folder(folders[0])
    known = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in folder.glob("*/*/utts-PER.jsonl"))
    if name not in known:
        raise RecipeError(f"--diff {spec}", expected=f"a scored config and set of {folder}", found=name, fix=nearest(name, known))
    return Side(folder, config, test_set)


def choose_metric(a: Side, b: Side, wanted: str | None) -> str:
    """`wanted`, or the word metric if both sides have one, else PER. Raises RecipeError when a side lacks it."""
    both = a.metrics & b.metrics
    if wanted is not None and wanted.upper() not in both:
        raise RecipeError("--metric", expected=f"a metric of both sides ({', '.join(sorted(both))})", found=wanted, fix="choose one of them")
    return wanted.upper() if wanted else max(both, key=METRICS.index)


def diff_lines(a: Side, b: Side, metric: str, *, colour: bool, width: int, limit: int) -> Iterator[str]:
    """The lines of a report: totals, then each utterance whose hypotheses differ, those that B made worse first.

    Args:
        colour: ANSI colours.
        width: columns of the terminal; longer alignments are folded.
        limit: utterances shown at most.
    Raises:
        RecipeError: when both sides are not scored on the same utterances.
    """
    utts_a, utts_b = (read_utterances(utterances_path(side.folder, side.config, side.test_set, metric)) for side in (a, b))
    change = difference(utts_a, utts_b, f"--diff {a.config}/{a.test_set} {b.config}/{b.test_set}")
    b_by_id = {utt.id: utt for utt in utts_b}
    pairs = [(utt, b_by_id[utt.id]) for utt in utts_a]
    changed = [pair for pair in pairs if pair[0].hyp != pair[1].hyp]
    changed.sort(key=lambda pair: (-_errors_added(*pair), pair[0].id))
    num_worse = sum(_errors_added(*pair) > 0 for pair in changed)
    num_better = sum(_errors_added(*pair) < 0 for pair in changed)
    for name, side, utts in (("A", a, utts_a), ("B", b, utts_b)):
        rate = 100 * sum(utt.errors for utt in utts) / sum(utt.ref_units for utt in utts)
        yield f"{name}: {side.config} on {side.test_set} in {side.folder}: {rate:.2f} % {metric}"
    yield f"B - A: {change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}] points, P(B better) {change.p_better:.2f}"
    same = len(changed) - num_worse - num_better
    yield f"{len(pairs)} utterances: {len(changed)} changed ({num_worse} worse, {num_better} better, {same} with as many errors)"
    yield LEGEND
    for utt_a, utt_b in changed[:limit]:
        yield ""
        yield from _utterance_lines(utt_a, utt_b, colour=colour, width=width)
    if len(changed) > limit:
        yield from ("", f"{len(changed) - limit} more: --limit {len(changed)} shows all")


def columns(ref: Sequence[str], hyp_a: Sequence[str], hyp_b: Sequence[str]) -> list[Column]:
    """Both alignments on one reference: (ref, A, B) per column, GAP where a side has no unit; insertions share columns."""
    result: list[Column] = []
    slots_a, slots_b = _slots(ref, hyp_a), _slots(ref, hyp_b)
    for position, (slot_a, slot_b) in enumerate(zip(slots_a, slots_b, strict=True)):
        (inserted_a, matched_a), (inserted_b, matched_b) = slot_a, slot_b
        for index in range(max(len(inserted_a), len(inserted_b))):
            result.append((GAP, *(inserted[index] if index < len(inserted) else GAP for inserted in (inserted_a, inserted_b))))
        if position < len(ref):
            result.append((ref[position], matched_a, matched_b))
    return result


def _slots(ref: Sequence[str], hyp: Sequence[str]) -> list[tuple[list[str], str]]:
    """Per reference unit, and once more for the end: what was inserted before it, and what stands against it."""
    slots: list[tuple[list[str], str]] = []
    inserted: list[str] = []
    for ref_unit, hyp_unit in align(ref, hyp):
        if ref_unit == GAP:
            inserted.append(hyp_unit)
        else:
            slots.append((inserted, hyp_unit))
            inserted = []
    return [*slots, (inserted, GAP)]


def _errors_added(a: Utterance, b: Utterance) -> int:
    return b.errors - a.errors


def _utterance_lines(a: Utterance, b: Utterance, *, colour: bool, width: int) -> Iterator[str]:
    paint = _painter(colour)
    added = _errors_added(a, b)
    kind = "worse" if added > 0 else "better" if added < 0 else None
    notes = "".join(f", {name} {utt.missing}" for name, utt in (("A", a), ("B", b)) if utt.missing)
    yield paint(a.id, "id") + "  " + paint(f"errors {a.errors} -> {b.errors} of {a.ref_units}", kind) + notes
    for part in _folded(columns(a.ref.split(), a.hyp.split(), b.hyp.split()), width - 5):
        rows: list[list[str]] = [[], [], [], []]
        for column in part:
            ref, hyp_a, hyp_b = column
            shown = [unit or SHOWN_GAP for unit in column]
            column_width = max(map(display_width, shown))
            kinds = (None, _error_kind(ref, hyp_a), _error_kind(ref, hyp_b))
            for row, unit, error in zip(rows, shown, kinds, strict=False):
                row.append(paint(unit, error) + " " * (column_width - display_width(unit)))
            rows[3].append(pad(_mark(ref, hyp_a, hyp_b), column_width))
        for name, row in zip(("ref", "A", "B", ""), rows, strict=True):
            line = f"{name:<4} {' '.join(row)}".rstrip()
            if line:
                yield line


def _folded(all_columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    part: list[Column] = []
    used = 0
    for column in all_columns:
        needed = 1 + max(display_width(unit or SHOWN_GAP) for unit in column)
        if part and used + needed > width + 1:
            yield part
            part, used = [], 0
        part.append(column)
        used += needed
    if part:
        yield part


def _error_kind(ref: str, hyp: str) -> str | None:
    if ref == hyp:
        return None
    return "insertion" if ref == GAP else "deletion" if hyp == GAP else "substitution"


def _mark(ref: str, hyp_a: str, hyp_b: str) -> str:
    if hyp_a == hyp_b:
        return " "
    return "-" if ref == hyp_a else "+" if ref == hyp_b else "~"


def _painter(colour: bool) -> Callable[[str, str | None], str]:
    """A function that colours a text by its kind, or leaves it as it is."""

    def paint(text: str, kind: str | None) -> str:
        return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m" if colour and kind else text

    return paint
