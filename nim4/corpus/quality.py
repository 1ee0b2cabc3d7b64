"""What a prepared corpus is like, and what may be wrong with it: lengths, rates, characters that no unit stands for, duplicates, and leaks
between what is trained on and what is tested. Only manifests are read, and the files of utterances that look alike.

Two utterances are the same audio when they are the same place of one file, or have equal text and length and files of equal bytes: a copy
under another name is found, a copy in another format is not.
"""

import hashlib
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.manifest import NOISE_PREFIXES, TEST_PREFIXES, load_cuts, split_paths
from nim4.corpus.text import split_tokens
from nim4.corpus.units import UNKNOWN

MARKS = frozenset("<>[]{}()（）［］【】*@#_\\/|~^=")  # of annotations that a recipe may have left in the text
MAX_UNITS_PER_S = 12.0  # ours: twice the fastest reading; more means a text that does not belong to its audio
NUM_EXAMPLES = 5
SPEAKERS_ARE_TOLD = 0.9  # ours: with more speakers per utterance than this, the corpus does not tell them apart


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split; lengths in seconds, rates in Hz of the files as they are."""

    utterances: int
    hours: float
    speakers: int
    shortest_s: float
    median_s: float
    p99_s: float
    longest_s: float
    rates_hz: dict[int, int]
    channels: dict[int, int]


@dataclass
class Finding:
    """One kind of thing that may be wrong: how often, of how many, and the first places, each as `split id` or as a character."""

    what: str
    count: int = 0
    total: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, count: int = 1) -> None:
        self.count += count
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(example)


@dataclass(frozen=True)
class Quality:
    """Everything found; `splits` is keyed by `split`, or by `corpus:split` where several folders are looked at."""

    splits: dict[str, SplitFacts]
    findings: list[Finding]

    def as_json(self) -> dict[str, Any]:
        return {"splits": {name: asdict(facts) for name, facts in self.splits.items()}, "findings": [asdict(finding) for finding in self.findings]}


@dataclass(frozen=True)
class _Item:
    """What is kept of an utterance."""

    id: str
    text: str
    units: str  # of the text, as they are counted, with spaces between
    speaker: str
    path: str
    start_s: float
    duration_s: float
    rate_hz: int
    channels: int


def check_corpora(folders: Sequence[Path]) -> Quality:
    """The report on the manifests of one or more folders, together. Raises RecipeError when a folder has none, or one is broken."""
    items: dict[str, list[_Item]] = {}
    for folder in folders:
        paths = split_paths(folder)
        if not paths:
            fix = "name data/<corpus>/manifests (or fbank, or units)"
            raise RecipeError(folder, expected="manifests of stage 0", found="none", fix=fix)
        corpus = Path(os.path.abspath(folder)).parent.name + ":" if len(folders) > 1 else ""
        for split, path in paths.items():
            if corpus + split in items:
                raise RecipeError(folder, expected="each corpus once", found=f"{corpus}{split} twice", fix="name each folder once")
            items[corpus + split] = [_item(cut) for cut in load_cuts(path)]
    findings = [*_texts(items), *_files(items), *_duplicates(items), *_leaks(items)]
    return Quality({name: _facts(found) for name, found in items.items()}, findings)


def as_lines(quality: Quality) -> list[str]:
    """The report as a table of the splits, and a line per finding with its first examples."""
    header = (
        f"{'split':24} {'utterances':>10} {'hours':>9} {'speakers':>8} {'shortest':>8} {'median':>7} {'99 %':>7} {'longest':>8}  rates (channels)"
    )
    lines = [header]
    for name, facts in quality.splits.items():
        times = f"{facts.shortest_s:8.2f} {facts.median_s:7.2f} {facts.p99_s:7.2f} {facts.longest_s:8.2f}"
        rates = ", ".join(f"{rate} Hz x{count}" for rate, count in facts.rates_hz.items())
        channels = ", ".join(f"{number} x{count}" for number, count in facts.channels.items())
        lines.append(f"{name:24} {facts.utterances:10d} {facts.hours:9.3f} {facts.speakers:8d} {times}  {rates} ({channels})")
    for finding in quality.findings:
        share = f" of {finding.total} ({100 * finding.count / finding.total:.1f} %)" if finding.total else ""
        lines.append(f"{finding.what}: {finding.count}{share}" + (f": {'; '.join(finding.examples)}" if finding.examples else ""))
    return lines


def _item(cut: Any) -> _Item:
    supervision, recording = cut.supervisions[0], cut.recording
    source = recording.sources[0]
    path = str(source.source) if source.type == "file" else ""
    rate = recording.sampling_rate
    for transform in recording.transforms or ():  # the first resampling knows the rate of the file
        facts = transform if isinstance(transform, dict) else transform.to_dict()
        if facts["name"] == "Resample":
            rate = facts["kwargs"]["source_sampling_rate"]
            break
    channels = len(source.channels)
    text = supervision.text or ""
    units, speaker = " ".join(split_tokens(text)), supervision.speaker or ""
    return _Item(cut.id, text, units, speaker, path, round(cut.start, 4), round(cut.duration, 4), rate, channels)


def _facts(items: Sequence[_Item]) -> SplitFacts:
    lengths = sorted(item.duration_s for item in items)
    return SplitFacts(
        utterances=len(items),
        hours=round(sum(lengths) / 3600, 4),
        speakers=len({item.speaker for item in items}),
        shortest_s=lengths[0],
        median_s=statistics.median(lengths),
        p99_s=lengths[(len(lengths) - 1) * 99 // 100],
        longest_s=lengths[-1],
        rates_hz=dict(Counter(item.rate_hz for item in items).most_common()),
        channels=dict(Counter(item.channels for item in items).most_common()),
    )


def _texts(items: Mapping[str, Sequence[_Item]]) -> list[Finding]:
    """Of splits in which somebody speaks: what is empty, too long for its audio, outside the units, or looks like an annotation."""
    spoken = {name: found for name, found in items.items() if not _split_of(name).startswith(NOISE_PREFIXES)}
    total = sum(map(len, spoken.values()))
    empty, fast = Finding("empty texts", total=total), Finding(f"texts of more than {MAX_UNITS_PER_S:g} characters or words a second", total=total)
    chars: Counter[str] = Counter()
    for name, found in spoken.items():
        for item in found:
            chars.update(item.text)
            if not item.units:
                empty.add(f"{name} {item.id}")
            elif item.units.count(" ") + 1 > MAX_UNITS_PER_S * item.duration_s:
                fast.add(f"{name} {item.id}")
    lexicon, outside, marks = Lexicon(), Finding("characters outside the units"), Finding("marks that may be annotations")
    for char, count in chars.most_common():
        if char in MARKS:
            marks.add(f"{char!r} x{count}", count)
        elif not char.isspace() and UNKNOWN in lexicon.phones(char):
            outside.add(f"{char!r} U+{ord(char):04X} x{count}", count)
    return [empty, fast, outside, marks]


def _files(items: Mapping[str, Sequence[_Item]]) -> list[Finding]:
    paths = {item.path: f"{name} {item.id}" for name, found in reversed(items.items()) for item in reversed(found) if item.path}
    gone = Finding("audio files that are gone", total=len(paths))
    for path, place in paths.items():
        if not os.path.isfile(path):
            gone.add(f"{place} ({path})")
    return [gone]


def _duplicates(items: Mapping[str, Sequence[_Item]]) -> list[Finding]:
    """Within a split: the same audio, and the same text by the same speaker."""
    total = sum(map(len, items.values()))
    audio = Finding("same audio as another utterance of the split", total=total)
    text = Finding("same text by the same speaker, within a split", total=total)
    for name, found in items.items():
        first: dict[Any, str] = {}
        for item, key in zip(found, _audio_keys(found), strict=True):
            if first.setdefault(key, item.id) != item.id:
                audio.add(f"{name} {item.id} = {first[key]}")
        said: dict[tuple[str, str], str] = {}
        for item in found:
            key = (item.units, item.speaker)
            if key[0] and said.setdefault(key, item.id) != item.id:
                text.add(f"{name} {item.id} = {said[key]}")
    return [audio, text]


def _leaks(items: Mapping[str, Sequence[_Item]]) -> list[Finding]:
    """For each pair of a split to test on and one to train on: ids, audio, speakers and texts that are in both; pairs without any are silent."""
    tests = [name for name in items if _split_of(name).startswith(TEST_PREFIXES)]
    trains = [name for name in items if name not in tests and not _split_of(name).startswith(NOISE_PREFIXES)]
    if not tests or not trains:
        return []
    names = [*tests, *trains]
    keys = iter(_audio_keys([item for name in names for item in items[name]]))
    audio_of = {name: [next(keys) for _ in items[name]] for name in names}
    told = {name: len({item.speaker for item in items[name]}) <= SPEAKERS_ARE_TOLD * len(items[name]) for name in names}
    findings = []
    for test in tests:
        for train in trains:
            same_corpus = test.rpartition(":")[0] == train.rpartition(":")[0]
            kinds = {
                "ids": ([item.id for item in items[test]], {item.id for item in items[train]}),
                "audio": (audio_of[test], set(audio_of[train])),
                "texts": ([item.units for item in items[test]], {item.units for item in items[train]} - {""}),
            }
            if same_corpus and (told[test] or told[train]):  # names of speakers mean something within a corpus alone
                kinds["speakers"] = ([item.speaker for item in items[test]], {item.speaker for item in items[train]} - {""})
            for kind, (own, others) in kinds.items():
                finding = Finding(f"leak, {kind} of {test} that are in {train}", total=len(own))
                for item, key in zip(items[test], own, strict=True):
                    if key in others:
                        finding.add(item.id)
                if finding.count:
                    findings.append(finding)
    return findings or [Finding("leaks between splits to train on and to test on")]


def _audio_keys(items: Sequence[_Item]) -> list[Any]:
    """A key per utterance, equal for the same audio; files are read only where text and length are equal and paths are not."""
    alike: dict[tuple[str, float], set[str]] = defaultdict(set)
    for item in items:
        alike[item.units, item.duration_s].add(item.path)
    hashes: dict[str, str] = {}
    keys: list[Any] = []
    for item in items:
        content = item.path
        if len(alike[item.units, item.duration_s]) > 1:
            if item.path not in hashes:
                hashes[item.path] = _hash(item.path)
            content = hashes[item.path]
        keys.append((content, item.start_s, item.duration_s))
    return keys


def _hash(path: str) -> str:
    """SHA-256 of the file; its path where it is gone, which is told elsewhere."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path


def _split_of(name: str) -> str:
    return name.rpartition(":")[2]
