#!/usr/bin/env python3
"""What a growing list of names does to real test sets: retrieval, transcripts, leaks. One command, one table, one picture.

For each list size the index holds the names that are said in the test sets (--spoken, and with size 0 nothing) and names of --names beside
them, the same ones first in every larger list. Each test set is searched exactly and in the confusion network; with a speech LLM it is also
decoded with these hints. Where nothing is said (--silent, and ten minutes of silence: digital, and room-like noise 60 dB below full scale) leaks
are counted: hints that are written though nobody said them. --silent takes sets of --units, folders of audio files and lists of them (.txt, a
path per line), of any length; each is decoded whole, in pieces of 20 s, and once more as users' audio is, in the segments that the detector of
speech finds; `written` counts texts that are not empty, `led by hints` leaks that are not written without hints too. OUT gets stress.jsonl (every
count with its interval), leaks.txt with the place of each leak, and stress.png.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import numpy as np
import torch
from common import SEED, parser_for, publish
from hotwords import some_of

import nim4.stage
from nim4.config import RecipeError, VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ, WINDOW_SAMPLES, read_recording, read_samples
from nim4.corpus.hotword_list import KeyedNames, ListReport, default_jobs, make_keys, read_list
from nim4.corpus.keywords import Keywords, contains
from nim4.corpus.manifest import load_cuts
from nim4.corpus.table import spread
from nim4.corpus.text import split_tokens
from nim4.decode.ctc import offline_log_probs
from nim4.decode.hotword import HotwordIndex
from nim4.decode.hotword_hints import Hints
from nim4.decode.hotword_lattice import DEFAULT_LIMITS
from nim4.decode.offline import transcripts
from nim4.decode.rescoring import CtcRescorer
from nim4.decode.vad import segments
from nim4.model.asr import LLM_FOLDER, SpeechLlm, load_speech_llm
from nim4.model.checkpoint import load_model
from nim4.score.hotword import HotwordUtterance, Share, pair_rates, score_hotwords
from nim4.score.plot import picture
from nim4.stage import write_jsonl
from nim4.train.distributed import pick_device

log = nim4.stage.log
SIZES = (0, 10, 1_000, 100_000, 1_000_000)
BATCH = 16
SILENCE_S, CLIP_S = 600, 10
PIECE_SAMPLES = round(VadConfig.max_segment_s * SAMPLING_RATE_HZ)
AUDIO = {".wav", ".flac", ".opus", ".ogg", ".mp3", ".m4a"}

Row = tuple[str, np.ndarray, str, str | None]  # id, samples, what is said, speaker


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=None)
    parser.add_argument("--model", type=Path, required=True, help="model folder of stage 3 or 9; with llm/ in it transcripts are looked at too")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2")
    parser.add_argument("--test", required=True, help="test sets with speech, separated by blanks; '' for none")
    silent = "sets, folders of audio files or lists of them (.txt) in which nothing is said, separated by blanks"
    parser.add_argument("--silent", default="", help=silent)
    parser.add_argument("--spoken", type=Path, required=True, help="word list of names that are said in the test sets")
    parser.add_argument("--names", type=Path, required=True, help="word list of names that hardly are")
    parser.add_argument("--sizes", default=" ".join(map(str, SIZES)), help="names in the index, separated by blanks")
    parser.add_argument("--pairs", default="", help="names that sound alike, e.g. '北京/背景 语音/语言': how often each is written as the other")
    parser.add_argument("--num-beams", type=int, default=1, help="of the speech LLM; 1 = greedy")
    parser.add_argument("--ctc-weight", type=float, default=0.0, help="of the phoneme head's say among the beams, see offline_rescored_hotwords.yaml")
    parser.add_argument("--limit", type=int, default=0, help="utterances per set, spread evenly; 0 = all")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes that turn lists into phones")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    return parser


@dataclasses.dataclass
class Heard:
    """One utterance, as the phoneme head heard it."""

    id: str
    samples: np.ndarray
    text: str
    speaker: str | None
    log_probs: np.ndarray

    @property
    def audio_s(self) -> float:
        return len(self.samples) / SAMPLING_RATE_HZ


class Stress:
    """A model, its test sets, and the lists that are put beside them."""

    def __init__(self, args: argparse.Namespace):
        device = pick_device(args.device)
        acoustic, self.inventory = load_model(args.model, device)
        self._beams = args.num_beams, CtcRescorer(self.inventory, args.ctc_weight) if args.ctc_weight else None
        self.llm: SpeechLlm | None = load_speech_llm(args.model, device)[0] if (args.model / LLM_FOLDER).is_dir() else None
        self.sets = {name: self._hear(acoustic, _read(args.units / f"{name}.jsonl.gz", args.limit)) for name in args.test.split()}
        self.silent = {}
        for name in args.silent.split():
            paths = _files(name)
            if paths is None:
                self.silent[name] = self._hear(acoustic, _read(args.units / f"{name}.jsonl.gz", args.limit))
                continue
            paths = spread(paths, args.limit) if args.limit else paths
            for way, cut in (("whole", _whole), ("segments", segments)):
                heard = self._hear(acoustic, list(_pieces(paths, cut)))
                log.info("%s: %d files, %d pieces %s", name, len(paths), len(heard), way)
                if heard:
                    self.silent[f"{Path(name).stem} {way}"] = heard
        self.silent["silence"] = self._hear(acoustic, list(_silence()))
        reports = ListReport(), ListReport()
        self.spoken = make_keys(read_list(args.spoken, self.inventory, reports[0]), self.inventory, reports[0])
        others = make_keys(read_list(args.names, self.inventory, reports[1]), self.inventory, reports[1], jobs=args.jobs)
        own = {name.text for name in self.spoken.names}
        rng = np.random.default_rng(SEED)
        self._rank = rng.permutation(len(others.names))
        self._rank[[number for number, name in enumerate(others.names) if name.text in own]] = len(others.names)
        self.others: KeyedNames = others
        self._plain: dict[str, list[str | None]] = {}  # texts without hints, of the sets in which nothing is said

    @staticmethod
    def _hear(acoustic: Any, rows: Sequence[Row]) -> list[Heard]:
        heard = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for row, log_probs in zip(batch, offline_log_probs(acoustic, [samples for _, samples, _, _ in batch]), strict=True):
                heard.append(Heard(*row, log_probs))
        return heard

    def index(self, size: int) -> HotwordIndex | None:
        """The index with so many names; None for 0."""
        if size == 0:
            return None
        others, spoken = some_of(self.others, self._rank < max(size - len(self.spoken.names), 0)), self.spoken
        arrays = [np.concatenate([getattr(spoken, name), getattr(others, name)]) for name in ("phones", "key_lens")]
        owners = np.concatenate([spoken.owners, others.owners + len(spoken.names)])
        return HotwordIndex.build(KeyedNames([*spoken.names, *others.names], *arrays, owners), self.inventory)

    def rows(self, size: int, pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """One record for each set and kind of search."""
        index = self.index(size)
        keywords = Keywords(name.text for name in self.spoken.names) if index is None else Keywords(_texts(index))
        for search, limits in (("exact", None), ("lattice", DEFAULT_LIMITS)) if index is not None else (("none", None),):
            for name, heard in {**self.sets, **self.silent}.items():
                times, hints = [], []
                for own in heard:
                    started_s = time.thread_time()
                    hits = [] if index is None else index.search_log_probs(own.log_probs, limits)
                    hints.append(Hints().update(hits))
                    times.append(1e6 * (time.thread_time() - started_s))
                texts = self._write(heard, hints)
                utterances = [HotwordUtterance(o.text, t, h, o.audio_s, o.speaker, o.id) for o, t, h in zip(heard, texts, hints, strict=True)]
                scores = score_hotwords(utterances, keywords)
                p50, p99 = np.percentile(times, [50, 99])
                row = {"names": 0 if index is None else len(index), "search": search, "set": name, "p50_us": float(p50), "p99_us": float(p99)}
                row["wrote"] = None if self.llm is None else sum(bool(text) for text in texts)
                row["led"] = self._led(name, heard, scores.leaked)
                row |= {"pairs": pair_rates([o.text for o in heard], texts, pairs)} if self.llm is not None and name in self.sets else {}
                yield row | dataclasses.asdict(scores)

    def _led(self, name: str, heard: Sequence[Heard], leaked: Sequence[tuple[str, str, str]]) -> int | None:
        """How many of the leaks stand in no text that is written without hints: those that hints led to."""
        if name not in self.silent or self.llm is None:
            return None
        if name not in self._plain:
            self._plain[name] = self._write(heard, [[]] * len(heard))
        plain = {own.id: text or "" for own, text in zip(heard, self._plain[name], strict=True)}
        return sum(not contains(split_tokens(plain[place]), split_tokens(hint)) for place, _, hint in leaked)

    def _write(self, heard: Sequence[Heard], hints: Sequence[list[str]]) -> list[str | None]:
        if self.llm is None:
            return [None] * len(heard)
        texts: list[str | None] = []
        for start in range(0, len(heard), BATCH):
            batch = slice(start, start + BATCH)
            num_beams, rescorer = self._beams
            texts += transcripts(self.llm, [own.samples for own in heard[batch]], hints=hints[batch], num_beams=num_beams, rescorer=rescorer)
        return texts


def _texts(index: HotwordIndex) -> list[str]:
    base = index.state.base
    return [base.text(number) for number in range(base.num_names)]


def _read(manifest: Path, limit: int) -> list[Row]:
    cuts = sorted(load_cuts(manifest), key=lambda cut: (-cut.duration, cut.id))
    kept = spread(cuts, limit) if limit else cuts
    return [(cut.id, read_samples(cut), cut.supervisions[0].text or "", cut.supervisions[0].speaker) for cut in kept]


def _files(name: str) -> list[Path] | None:
    """The audio files of a folder or a list; None when `name` is neither, and so a set of --units."""
    path = Path(name)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO)
    elif path.suffix == ".txt" and path.is_file():
        found = [Path(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        return None
    if not found:
        raise RecipeError(f"--silent {name}", expected="audio files", found="none", fix="name another folder or list")
    return found


def _pieces(paths: Iterable[Path], cut: Callable[[np.ndarray], list[tuple[int, int]]]) -> Iterator[Row]:
    for path in paths:
        samples = read_recording(path)
        for start, end in cut(samples):
            if end - start >= WINDOW_SAMPLES:
                yield f"{path.name} {start / SAMPLING_RATE_HZ:.1f}-{end / SAMPLING_RATE_HZ:.1f} s", samples[start:end], "", None


def _whole(samples: np.ndarray) -> list[tuple[int, int]]:
    return [(start, min(start + PIECE_SAMPLES, len(samples))) for start in range(0, len(samples), PIECE_SAMPLES)]


def _silence() -> Iterator[Row]:
    rng = np.random.default_rng(SEED)
    for number in range(SILENCE_S // CLIP_S):
        samples = np.zeros(CLIP_S * SAMPLING_RATE_HZ, np.float32)
        kind, sound = ("digital", samples) if number % 2 else ("room", samples + 1e-3 * rng.standard_normal(len(samples), dtype=np.float32))
        yield f"{kind} silence {number}", sound, "", None


def _percent(share: dict[str, Any]) -> str:
    known = Share(**share)
    return "-" if known.percent is None else f"{known.percent:.1f} [{known.low:.1f}, {known.high:.1f}] ({known.count}/{known.total})"


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A record as a row of the table."""
    cells = {"names": row["names"], "search": row["search"], "set": row["set"]}
    cells |= {f"{key}_%": _percent(row[key]) for key in ("recall", "precision", "adopted", "wrongly_adopted", "leaks")}
    low, high = row["false_alarms_interval"] or (0.0, 0.0)
    cells["false alarms/h"] = "-" if row["false_alarms_per_hour"] is None else f"{row['false_alarms_per_hour']:.0f} [{low:.0f}, {high:.0f}]"
    cells["written"] = "-" if row["wrote"] is None else f"{row['wrote']}/{row['leaks']['total']}"
    cells["led by hints"] = "-" if row["led"] is None else str(row["led"])
    numbers = {"b_wer": "B-WER %", "u_wer": "U-WER %"}
    return cells | {label: "-" if row[key] is None else f"{row[key]:.1f}" for key, label in numbers.items()} | {"p99_us": row["p99_us"]}


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Recall, precision, leaks and time of search over the size of the list; one line for each set and search."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["search"] != "none":
            curves.setdefault(f"{row['set']}, {row['search']}", []).append(row)
    with picture(out, 4) as axes:
        for label, points in curves.items():
            sizes = [row["names"] for row in points]
            for axis, key in zip(axes, ("recall", "precision", "leaks"), strict=False):
                if all(row[key]["percent"] is not None for row in points):
                    axis.plot(sizes, [row[key]["percent"] for row in points], marker="o", label=label)
            axes[3].plot(sizes, [row["p99_us"] for row in points], marker="o")
        for axis, name in zip(axes, ("recall, %", "precision, %", "leaks, %", "p99, us"), strict=True):
            axis.set_xscale("log")
            axis.set_ylabel(name)
        axes[0].legend(fontsize=6)
        axes[3].set_xlabel("names in the index")


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    try:
        sizes = sorted({int(size) for size in args.sizes.split()})
        pairs = [tuple(pair.split("/")) for pair in args.pairs.split()]
    except ValueError as error:
        raise RecipeError("--sizes", expected="numbers separated by blanks", found=error, fix="for example --sizes '0 10 1000'") from error
    if not sizes or sizes[0] < 0 or any(len(pair) != 2 for pair in pairs):
        raise RecipeError("--sizes, --pairs", expected="sizes from 0 on, pairs A/B", found=f"{args.sizes}, {args.pairs}", fix="correct them")
    if args.num_beams < 1 or not 0 <= args.ctc_weight <= 1 or (args.ctc_weight and args.num_beams < 2):
        expected = "at least 1 beam, a weight from 0 to 1, and at least 2 beams where it is not 0"
        raise RecipeError("--num-beams, --ctc-weight", expected=expected, found=f"{args.num_beams}, {args.ctc_weight}", fix="correct them")
    stress = Stress(args)
    rows = []
    for size in sizes:
        for row in stress.rows(size, pairs):
            rows.append(row)
            print(f"{row['names']} names, {row['search']}, {row['set']}", file=sys.stderr, flush=True)
    write_jsonl(args.out / "stress.jsonl", rows)
    with nim4.stage.atomic_write(args.out / "leaks.txt") as file:
        file.writelines(
            f"{row['names']}\t{row['search']}\t{row['set']}\t{place}\t{said}\t{hint}\n" for row in rows for place, said, hint in row["leaked"]
        )
    plot(rows, args.out / "stress.png")
    size = f"{args.names.name}, {args.test} {args.silent}"
    publish(args, __doc__.split("\n")[0], size, [shown(row) for row in rows])
    if pairs:
        ends = [row for row in rows if row["names"] in (rows[0]["names"], rows[-1]["names"]) and row["search"] != "exact"]
        told = [{**{key: row[key] for key in ("names", "search", "set")}, **pair} for row in ends for pair in row.get("pairs", [])]
        publish(args, "names that sound alike, with the fewest and the most names: how often each is written, and as the other", size, told)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
