"""Manifests: which utterances a corpus has, where their audio is, and what is said. The only door to lhotse's manifests.

A manifest is a lhotse CutSet, one JSON object per line, gzipped: one MonoCut per utterance, 16 kHz, one channel, exactly one
supervision with text, speaker and language. A recipe (`egs/<corpus>/prepare.py`) returns, per split, either such cuts or, shorter,
a list of `Row` (nim4/corpus/table.py); `validate` turns both into checked cuts and a list of everything that was wrong.

In a saved manifest a path to features is relative to the manifest's folder; so is a path to audio inside that folder (audio that a
recipe made); other audio is absolute. `load_cuts` makes all of them absolute.
"""

import dataclasses
import gzip
import itertools
import json
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.serialization import deserialize_item

from nim4.config import RecipeError, nearest
from nim4.corpus.progress import Progress
from nim4.corpus.table import Row
from nim4.stage import atomic_write

log = logging.getLogger("nim4")

SAMPLING_RATE_HZ = 16_000
MIN_DURATION_S = 0.1
MAX_DURATION_S = 60.0
MAX_LEFT_OUT = 0.5  # ours: above this share of problems the source folder is wrong rather than the corpus dirty
SUFFIX = ".jsonl.gz"
TEST_PREFIXES = ("dev", "test", "valid", "eval")  # splits that keep an utterance with an empty text: nothing is said there
NOISE_PREFIXES = ("noise", "music", "babble")  # splits of recordings to mix into speech: none has a text, and they may be long
NOISE_PIECE_S = 30.0  # ours: the longest piece of one
MAX_OVERHANG_S = 0.1  # ours: how far the last utterance of a recording may be said to end behind it; it then ends with it
HEADERS_KEPT = 64


@dataclass(frozen=True)
class Problem:
    """Something wrong with an utterance. `left_out` is False where the utterance stays, mended or as it is."""

    id: str
    split: str
    reason: str
    detail: str = ""
    left_out: bool = True


@dataclass(frozen=True)
class Utterance:
    """The facts of one cut, for code that needs no audio."""

    id: str
    text: str
    speaker: str
    language: str
    duration_s: float


@dataclass(frozen=True)
class Source:
    """One training manifest and how much of it an epoch takes: 0.3 = another 30 % each epoch, 2 = everything twice."""

    path: Path
    weight: float = 1.0


# ------------------------------------------------------------------------------------------------------ reading and saving


def check_splits(option: str, names: Sequence[str], folder: Path) -> None:
    """Raises RecipeError, with the nearest name, for the first of `names`, the value of `option`, that is no manifest in `folder`."""
    known = [path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")]
    for name in names:
        if name not in known:
            raise RecipeError(f"{option} {name}", expected=f"a manifest in {folder}", found="none of this name", fix=nearest(name, known))


def load_cuts(path: Path) -> CutSet:
    """All cuts of a manifest, in memory, with absolute paths.

    Raises:
        RecipeError: if the file is missing, broken or empty.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))
    cuts: list[MonoCut] = []

    def absolute(stored: str) -> str:
        return os.path.normpath(folder / stored)

    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                cuts.append(deserialize_item(_with_paths(json.loads(line), absolute, absolute)))
    except FileNotFoundError as error:
        found = f"no such file (the folder has {', '.join(split_paths(path.parent)) or 'no manifest'})"
        raise RecipeError(path, expected="a manifest", found=found, fix="run stage 0, or correct the split") from error
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise RecipeError(
            f"{path}, line {len(cuts) + 1}", expected="gzipped JSON lines of cuts", found=repr(error), fix="run the stage that makes it again"
        ) from error
    if not cuts:
        raise RecipeError(path, expected="at least 1 cut", found=0, fix="run the stage that makes it again")
    return CutSet.from_cuts(cuts)


def save_cuts(cuts: Iterable[MonoCut], path: Path) -> None:
    """Writes a manifest; it appears only when whole, and the same cuts give the same bytes.

    Raises:
        RecipeError: on a duplicate id.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))

    def audio_path(stored: str) -> str:
        absolute = os.path.abspath(stored)
        return os.path.relpath(absolute, folder) if absolute.startswith(str(folder) + os.sep) else absolute

    seen: set[str] = set()
    with atomic_write(path, "wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as zipped:
        for cut in cuts:
            if cut.id in seen:
                raise RecipeError(path, expected="unique ids", found=f"{cut.id!r} twice", fix="give each utterance its own id in prepare.py")
            seen.add(cut.id)
            item = _with_paths(cut.to_dict(), lambda stored: os.path.relpath(os.path.abspath(stored), folder), audio_path)
            zipped.write((json.dumps(item, ensure_ascii=False) + "\n").encode("utf-8"))


def _with_paths(item: dict[str, Any], feature_path: Any, audio_path: Any) -> dict[str, Any]:
    """A cut as a dict, its paths to features and audio files replaced by what the two functions make of them."""
    features = item.get("features")
    if features and features["storage_path"] and not features["storage_type"].startswith("memory"):
        features["storage_path"] = feature_path(features["storage_path"])
    for source in item.get("recording", {}).get("sources", ()):
        if source["type"] == "file":
            source["source"] = audio_path(source["source"])
    for track in item.get("tracks", ()):
        _with_paths(track["cut"], feature_path, audio_path)
    return item


def split_paths(folder: Path) -> dict[str, Path]:
    """The manifests of a folder by split name, sorted: {"train": folder/"train.jsonl.gz", ...}."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(Path(folder).glob("*" + SUFFIX))}


def utterances(cuts: Iterable[MonoCut]) -> list[Utterance]:
    """Id, text, speaker, language and duration of each cut, in order."""
    found = []
    for cut in cuts:
        supervision = cut.supervisions[0]
        found.append(Utterance(cut.id, supervision.text or "", supervision.speaker or "", supervision.language or "", cut.duration))
    return found


# ----------------------------------------------------------------------------------------------------------- from a corpus


def cuts_from_table(rows: Sequence[Row], split: str = "", num_threads: int = 16) -> tuple[CutSet, list[Problem]]:
    """Cuts for a recipe's rows, and the rows for which none can be made. Only the audio files' headers are read.

    Args:
        rows: the utterances of one split.
        split: its name, for the problems.
        num_threads: headers read at the same time; many, because a corpus often lies on a network disk.
    """
    progress = Progress(f"reading audio headers of {split or 'the corpus'}", len(rows), "utterances")
    cuts, problems = [], []
    header_of = lru_cache(HEADERS_KEPT)(soundfile.info)  # the utterances of one recording mostly stand together
    with ThreadPoolExecutor(num_threads) as pool:
        for made in pool.map(lambda row: _cut_or_problem(row, split, header_of), rows):
            (problems if isinstance(made, Problem) else cuts).append(made)
            progress.add()
    return CutSet.from_cuts(cuts), problems


def _cut_or_problem(row: Row, split: str, header_of: Callable[[str], Any]) -> MonoCut | Problem:
    if row.audio is None:
        return Problem(row.id, split, "transcript without audio")
    if row.text is None:
        return Problem(row.id, split, "audio without transcript", str(row.audio))
    path = os.path.abspath(row.audio)
    if not os.path.isfile(path):
        return Problem(row.id, split, "missing audio file", path)
    try:
        header = header_of(path)
    except (soundfile.SoundFileError, OSError) as error:
        return Problem(row.id, split, "unreadable header", f"{path}: {error}")
    if header.frames <= 0:
        return Problem(row.id, split, "too short", f"{path}: no samples")
    duration_s = header.frames / header.samplerate
    end_s = duration_s if row.end_s is None else row.end_s
    if not 0 <= row.start_s < end_s <= duration_s + MAX_OVERHANG_S:  # not a number fails, too
        detail = f"{row.start_s:.2f} to {end_s:.2f} s of {duration_s:.2f} s, {path}"
        return Problem(row.id, split, "outside its recording", detail)
    is_whole = row.start_s == 0 and row.end_s is None
    channels = list(range(header.channels))
    recording = Recording(
        id=row.id if is_whole else Path(path).stem,
        sources=[AudioSource(type="file", channels=channels, source=path)],
        sampling_rate=header.samplerate,
        num_samples=header.frames,
        duration=duration_s,
        channel_ids=channels,
    )
    cut = mono_cut(row.id, recording, row.text, row.speaker, row.language)
    if is_whole:
        return cut
    start, end = (round(min(second, duration_s) * header.samplerate) / header.samplerate for second in (row.start_s, end_s))
    supervision = dataclasses.replace(cut.supervisions[0], duration=end - start)
    return dataclasses.replace(cut, start=start, duration=end - start, supervisions=[supervision])


def mono_cut(utterance_id: str, recording: Recording, text: str, speaker: str, language: str) -> MonoCut:
    """A cut of a whole recording, first channel, with its one supervision."""
    channel = recording.channel_ids[0]
    supervision = SupervisionSegment(
        id=utterance_id,
        recording_id=recording.id,
        start=0.0,
        duration=recording.duration,
        channel=channel,
        text=text.strip(),
        speaker=speaker,
        language=language,
    )
    return MonoCut(id=utterance_id, start=0.0, duration=recording.duration, channel=channel, recording=recording, supervisions=[supervision])


# -------------------------------------------------------------------------------------------------------------- validation


def validate(splits: Mapping[str, CutSet | Sequence[Row]]) -> tuple[dict[str, CutSet], list[Problem]]:
    """What a recipe returned, as checked 16 kHz cuts per split, and every problem met.

    An utterance with a problem is left out of every split, with these exceptions: audio of another rate is resampled and of several
    channels the first is taken, both when the audio is read; an empty text stays in splits named dev*, test*, valid* or eval*; of
    equal ids the first stays, and in two splits the one in such a split, so that a test set never shrinks because of training data.
    In splits named noise*, music* or babble* an empty text is as it should be, and what is longer than 60 s is cut into pieces.

    Raises:
        RecipeError: if there is no split, a split ends up empty, or more than half of its utterances are left out.
    """
    if not splits:
        raise RecipeError("prepare()", expected="at least one split", found="none", fix="check --source, and what the recipe says about its layout")
    kept: dict[str, CutSet] = {}
    problems: list[Problem] = []
    split_of: dict[str, str] = {}  # of each id that is kept
    for split in sorted(splits, key=lambda name: not name.startswith(TEST_PREFIXES)):
        table = splits[split]
        cuts, found = (table, []) if isinstance(table, CutSet) else cuts_from_table(table, split)
        checked = []
        for cut in cuts:
            good, notes = _check(cut, split, split_of)
            found.extend(notes)
            if good is not None:
                checked += _pieces(good) if split.startswith(NOISE_PREFIXES) else [good]
        kept[split] = CutSet.from_cuts(checked)
        problems.extend(found)
        _refuse_bad_split(split, len(checked), found)
    return {split: kept[split] for split in splits}, problems


def _check(cut: MonoCut, split: str, split_of: dict[str, str]) -> tuple[MonoCut | None, list[Problem]]:
    """The cut, mended where that is possible, or None; and what was wrong with it."""
    if isinstance(cut, MultiCut):
        cut = cut.to_mono()[0]
    if not isinstance(cut, MonoCut) or not cut.has_recording:
        return None, [Problem(cut.id, split, "not one recording", type(cut).__name__)]
    if len(cut.supervisions) != 1:
        return None, [Problem(cut.id, split, "not one supervision", f"{len(cut.supervisions)} supervisions")]
    if cut.id in split_of:
        other = split_of[cut.id]
        return None, [Problem(cut.id, split, "duplicate id" if other == split else "id in two splits", f"kept in {other}")]
    text = cut.supervisions[0].text
    if text is None:
        return None, [Problem(cut.id, split, "audio without transcript")]
    if cut.duration < MIN_DURATION_S:
        return None, [Problem(cut.id, split, "too short", f"{cut.duration:.3f} s, at least {MIN_DURATION_S} s")]
    if cut.duration > MAX_DURATION_S and not split.startswith(NOISE_PREFIXES):
        return None, [Problem(cut.id, split, "too long", f"{cut.duration:.1f} s, at most {MAX_DURATION_S:.0f} s")]
    if missing := [source.source for source in cut.recording.sources if source.type == "file" and not os.path.isfile(source.source)]:
        return None, [Problem(cut.id, split, "missing audio file", missing[0])]
    notes = []
    if not text.strip() and not split.startswith(NOISE_PREFIXES):
        stays = split.startswith(TEST_PREFIXES)
        notes.append(Problem(cut.id, split, "empty text", left_out=not stays))
        if not stays:
            return None, notes
    split_of[cut.id] = split
    if cut.recording.num_channels > 1:
        notes.append(Problem(cut.id, split, "several channels", f"{cut.recording.num_channels}, channel {cut.channel} is read", left_out=False))
    if cut.sampling_rate != SAMPLING_RATE_HZ:
        notes.append(Problem(cut.id, split, "resampled", f"from {cut.sampling_rate} Hz", left_out=False))
        cut = cut.resample(SAMPLING_RATE_HZ)
    return cut, notes


def _pieces(cut: MonoCut) -> list[MonoCut]:
    """The cut, or, when it is longer than MAX_DURATION_S, equal pieces of at most NOISE_PIECE_S with ids such as <id>-003."""
    if cut.duration <= MAX_DURATION_S:
        return [cut]
    count = math.ceil(cut.duration / NOISE_PIECE_S)
    bounds = [round(cut.duration * SAMPLING_RATE_HZ * i / count) / SAMPLING_RATE_HZ for i in range(count + 1)]
    pieces = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        name, length = f"{cut.id}-{number:03d}", end - start
        supervision = dataclasses.replace(cut.supervisions[0], id=name, start=0.0, duration=length)
        pieces.append(dataclasses.replace(cut, id=name, start=cut.start + start, duration=length, supervisions=[supervision]))
    return pieces


def _refuse_bad_split(split: str, num_kept: int, problems: Sequence[Problem]) -> None:
    left_out = Counter(problem.reason for problem in problems if problem.left_out)
    first = next((f"; first: {problem.id} {problem.reason} {problem.detail}" for problem in problems if problem.left_out), "")
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common()) or "nothing was found in the source folder"
    fix = "check that --source is the whole, unpacked corpus"
    if num_kept == 0:
        raise RecipeError(f"split {split!r}", expected="at least 1 good utterance", found=f"0 ({reasons}{first})", fix=fix)
    if left_out.total() > MAX_LEFT_OUT * (num_kept + left_out.total()):
        found = f"{left_out.total()} of {num_kept + left_out.total()} ({reasons}{first})"
        raise RecipeError(f"split {split!r}", expected=f"at most {MAX_LEFT_OUT:.0%} of the utterances with problems", found=found, fix=fix)


def report(splits: Mapping[str, Iterable[MonoCut]], problems: Sequence[Problem]) -> dict[str, Any]:
    """Counts per split and reason, and every problem, as report.json keeps them."""
    counts = {}
    for split, cuts in splits.items():
        facts = utterances(cuts)
        counts[split] = {
            "utterances": len(facts),
            "hours": round(sum(fact.duration_s for fact in facts) / 3600, 4),
            "speakers": len({fact.speaker for fact in facts}),
            "left_out": sum(problem.left_out for problem in problems if problem.split == split),
            "reasons": dict(Counter(problem.reason for problem in problems if problem.split == split).most_common()),
        }
    return {"splits": counts, "problems": [asdict(problem) for problem in problems]}
