"""What stage 11 leaves for one (decode config, test set), read and checked before anything is counted.

A folder `<config>/<test set>/` holds `refs.jsonl` (every utterance of the test set), `hyps.jsonl`, for streaming configs
`events.jsonl`, and `done.json`. A row that is broken, double or unknown stops the scoring: it must not change a number quietly.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.stage import read_json, read_jsonl

log = logging.getLogger("nim4")
RERUN = "run stage 11 again for this config and test set"
NUM_IDS_SHOWN = 3


@dataclass(frozen=True)
class Reference:
    """One utterance of a test set."""

    id: str
    phones: str  # separated by blanks
    text: str  # as published
    speaker: str | None  # None = the corpus does not say
    audio_s: float


@dataclass(frozen=True)
class Hypothesis:
    """What a decoder gave for one utterance."""

    id: str
    phones: str | None  # None = no phonemes for this utterance
    text: str | None  # None = no words for this utterance
    audio_s: float
    wall_s: float | None  # seconds spent decoding; None = not measured
    error: str | None  # why decoding failed; None = it did not
    hints: tuple[str, ...] | None = None  # that were looked up for it; None = this decoder looks up none


@dataclass(frozen=True)
class Event:
    """One line of a streaming decoder's log."""

    id: str
    t_audio_s: float  # end of the audio the decoder had received
    t_wall_s: float  # the same moment plus the compute time waited for so far: the clock of a user who speaks in real time
    text: str
    is_final: bool
    settled_chars: int | None = None  # of the text stay in all later partials; None = what this decoder shows never changes


@dataclass(frozen=True)
class DecodedSet:
    """One (decode config, test set) as stage 11 left it; `hyps` is keyed by utterance id and may miss some of `refs`."""

    config: str
    test_set: str
    refs: tuple[Reference, ...]
    hyps: Mapping[str, Hypothesis]
    events: tuple[Event, ...] | None  # None = not a streaming config
    done: Mapping[str, Any]  # stage 11's done.json

    @property
    def has_text(self) -> bool:
        """False when the config gives no words on this set: all its texts are null."""
        return any(hyp.text is not None for hyp in self.hyps.values())

    @property
    def has_phones(self) -> bool:
        """False when the config gives words alone: all its phonemes are null."""
        return any(hyp.phones is not None for hyp in self.hyps.values())


def find_sets(decode: Path) -> list[Path]:
    """The `<config>/<test set>` folders below `decode`, in the order of their names; folders of a killed run are left out, with a warning.

    Raises RecipeError when there is none.
    """
    found = [folder for config in _folders(decode) for folder in _folders(config)]
    if not found:
        raise RecipeError(decode, expected="<config>/<test set>/hyps.jsonl", found="no such folder", fix="run stage 11 first, ./run.sh --stage 11")
    return found


def set_files(folder: Path) -> list[Path]:
    """The files of one set that decide its score."""
    events = folder / "events.jsonl"
    return [folder / "done.json", folder / "refs.jsonl", folder / "hyps.jsonl", *([events] if events.exists() else [])]


def read_set(folder: Path) -> DecodedSet:
    """One decoded set, checked. Raises RecipeError on broken, empty, double or unknown rows; missing hypotheses are only warned of."""
    refs = _unique(_read_references(folder / "refs.jsonl"), folder / "refs.jsonl")
    hyps = _unique(_read_hypotheses(folder / "hyps.jsonl"), folder / "hyps.jsonl")
    _reject_unknown(folder / "hyps.jsonl", hyps, refs)
    events = None
    if (folder / "events.jsonl").exists():
        events = _read_events(folder / "events.jsonl")
        _reject_unknown(folder / "events.jsonl", (event.id for event in events), refs)
    absent = [id for id in refs if id not in hyps]
    if absent:
        log.warning("%s: %d of %d utterances have no hypothesis (%s); they count as deletions", folder, len(absent), len(refs), some(absent))
    done = read_json(folder / "done.json")
    if not isinstance(done, dict) or not isinstance(done.get("model"), str) or not isinstance(done.get("commit"), str):
        raise RecipeError(folder / "done.json", expected="an object with 'model' and 'commit'", found=str(done)[:80], fix=RERUN)
    return DecodedSet(folder.parent.name, folder.name, tuple(refs.values()), hyps, events, done)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    children = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in children:
        if path.suffix == ".tmp":
            log.warning("%s: left by a run that did not finish; not scored", path)
    return [path for path in children if path.suffix not in (".tmp", ".old")]


def _read_references(path: Path) -> list[Reference]:
    rows = checked_rows(path, {"id": str, "phones": str, "text": str, "speaker": str | None, "audio_s": float})
    return [Reference(row["id"], row["phones"], row["text"], row["speaker"] or None, row["audio_s"]) for row in rows]


def _read_hypotheses(path: Path) -> list[Hypothesis]:
    rows = checked_rows(path, {"id": str, "error": str | None, "phones": str | None, "text": str | None, "audio_s": float, "wall_s": float | None})
    for number, row in enumerate(rows, 1):
        if row["phones"] is None and row["text"] is None and row["error"] is None:
            raise RecipeError(f"{path}, row {number}", expected="'phones' or 'text' (\"\" for none) unless 'error' is set", found="null", fix=RERUN)
        found = row.get("hints")
        if found is not None and not (isinstance(found, list) and all(isinstance(hint, str) for hint in found)):
            raise RecipeError(f"{path}, row {number}", expected="'hints' as a list of texts, or none", found=repr(found)[:80], fix=RERUN)
    hints = [None if row.get("hints") is None else tuple(row["hints"]) for row in rows]
    values = [[row[key] for key in ("id", "phones", "text", "audio_s", "wall_s", "error")] for row in rows]
    return [Hypothesis(*own, found) for own, found in zip(values, hints, strict=True)]


def _read_events(path: Path) -> tuple[Event, ...]:
    kinds = {"id": str, "t_audio_s": float, "t_wall_s": float, "text": str, "is_final": bool}
    rows = checked_rows(path, kinds)
    if any("settled_chars" in row for row in rows):
        rows = checked_rows(path, kinds | {"settled_chars": int})
    return tuple(Event(*(row[key] for key in kinds), row.get("settled_chars")) for row in rows)


def checked_rows(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, at least one, each with `fields` of the given types; numbers must be finite and not negative.

    Raises RecipeError with the row's number.
    """
    rows = read_jsonl(path)
    if not rows:
        raise RecipeError(path, expected="at least 1 row", found="0", fix="run the stage that makes it again")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, row {number}", expected="an object", found=type(row).__name__, fix="run the stage that makes it again")
        for key, kind in fields.items():
            allowed = (int, float) if kind is float else kind | int if kind == (float | None) else kind
            value = row.get(key)
            wrong = key not in row or not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)
            if wrong or (isinstance(value, float | int) and not (math.isfinite(value) and value >= 0)):
                name = getattr(kind, "__name__", str(kind))
                found = f"{key}={value!r}" if key in row else f"keys {', '.join(row)}"
                raise RecipeError(f"{path}, row {number}", expected=f"{key!r} as {name}", found=found, fix="run the stage that makes it again")
    return rows


def _unique(rows: list[Any], path: Path) -> dict[str, Any]:
    by_id = {row.id: row for row in rows}
    if len(by_id) < len(rows):
        seen: set[str] = set()
        double = [row.id for row in rows if row.id in seen or seen.add(row.id)]
        raise RecipeError(path, expected="one row per utterance", found=f"more than one of {some(double)}", fix=RERUN)
    return by_id


def _reject_unknown(path: Path, ids: Iterable[str], refs: Mapping[str, Reference]) -> None:
    unknown = [id for id in dict.fromkeys(ids) if id not in refs]
    if unknown:
        found = f"{len(unknown)} others: {some(unknown)}"
        raise RecipeError(path, expected="only utterances of refs.jsonl", found=found, fix=RERUN)


def some(ids: Sequence[str]) -> str:
    """The first few of many ids, for a message."""
    return ", ".join(ids[:NUM_IDS_SHOWN]) + (", ..." if len(ids) > NUM_IDS_SHOWN else "")
