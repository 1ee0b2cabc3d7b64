#!/usr/bin/env python3
"""Hotword search: speed and memory beside plain pyahocorasick and a linear scan, and which names survive the errors of a phoneme head.

Thread CPU time of single queries: 100 phones of running text with one name in them; caches are warm. `stream` is a chunk of 8 phones.
`lattice` reads slots with 6 % substituted, 1 % deleted and 1 % inserted phones. The linear scan compares the query with every key by
edit distance, measured on at most 20,000 keys and scaled.
Memory is what a fresh process holds more after loading and 200 queries. Names: --names FILE, or made ones: 2 to 6 syllables, each as frequent
as in the running text. That is the transcripts of egs/mini's Mandarin speaker. The second table is of names of at least 6 phones, alone in
an index; `short` is all others, in an index of everything. `add 1000` is until names that were never seen are found, `remove 1000` until they
are not, with none and with 9,000 other added names there (the index of all names only: its size has no part in it), 10 batches a round, p50 and
p99 over these; `first 1000` loads dictionaries, grammars and compiled code, once in a process. `unseen word`: one that no dictionary has.
Errors are assumptions, see benchmarks/hotword_errors.py.
"""

import argparse
import csv
import gc
import itertools
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import numpy as np
from common import SEED, parser_for, publish
from hotword_errors import ErrorModel, planted

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.g2p_en import dictionary
from nim4.corpus.hotword_list import KeyedNames, ListReport, Name, default_jobs, make_keys, read_list
from nim4.corpus.units import PhonemeInventory
from nim4.decode.confusion import Slots
from nim4.decode.hotword import HotwordIndex
from nim4.decode.hotword_names import NameTable, Rows
from nim4.decode.hotword_search import Automaton, Hit
from nim4.score.error_rate import edit_distance
from nim4.stage import ROOT

INVENTORY = PhonemeInventory.default()
ERRORS = ((0.0, 0.0, 0.0), (0.03, 0.005, 0.005), (0.06, 0.01, 0.01), (0.10, 0.02, 0.02))
NUM_PHONES, CHUNK = 100, 8
LONG = 6  # phones of a name whose errors are forgiven
BATCHES = 10  # of names that are added, in each round
SYLLABLES = ["".join(pair) for pair in itertools.product([*"bdfgklmnprstvwz", "ch", "sh", "st", "tr"], [*"aeiou", "ai", "ee", "oo"])]
IDENTITY = np.arange(256, dtype=np.uint8)
STREETS = [
    "".join(parts)
    for parts in itertools.product("惠新西东南北", "街路桥门城湖", "甲乙丙丁戊己庚辛", "一二三四五六七八九十百千万亿上下左右前后里外山水田林")
]


def one_of(items: Sequence[str], rng: np.random.Generator) -> str:
    """One of the items; rng.choice() would make an array of all of them first, each time."""
    return items[int(rng.integers(len(items)))]


NEW_NAMES: dict[str, Callable[[np.random.Generator], str]] = {
    "Chinese": lambda rng: one_of(STREETS, rng) + one_of("楼院厅店馆", rng) + one_of("东西南北中甲乙丙丁", rng),
    "one number": lambda rng: (
        one_of(STREETS, rng)[:3] + str(rng.integers(1, 3000)) + one_of(["号", "号院", "层", "社区", "中学", "路", "年", "%"], rng)
    ),
    "two numbers": lambda rng: f"{one_of(STREETS, rng)[:3]}{rng.integers(1, 99_999)}号院{rng.integers(1, 99)}号楼",
    "Latin": lambda rng: f"{one_of(WORDS, rng)} {one_of(WORDS, rng)} {one_of(WORDS, rng)}",
    "Latin, unseen word": lambda rng: f"{unseen_word(rng)} {one_of(WORDS, rng)}",
    "Latin and number": lambda rng: f"{one_of(WORDS, rng)} {one_of(WORDS, rng)} {rng.integers(1, 1000)}",
    "digits": lambda rng: str(rng.integers(100, 10**7)),
}
WORDS = [word for word in dictionary() if word.isalpha() and 3 < len(word) < 9][::20]


def unseen_word(rng: np.random.Generator) -> str:
    """A word of two or three made syllables that the dictionary lacks."""
    while True:
        word = "".join(one_of(SYLLABLES, rng) for _ in range(rng.integers(2, 4))) + one_of(["", "n", "s", "ton", "ley", "x"], rng)
        if word not in dictionary():
            return word


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--names", type=Path, help="word list to use instead of made names")
    parser.add_argument("--num-names", type=int, default=1_450_000, help="made names; of a list at most so many")
    parser.add_argument("--queries", type=int, default=1000, help="of each kind and round")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes that turn a list into phones")
    return parser


def running_phones() -> np.ndarray:
    """(P,) uint8 phones of read Mandarin sentences, whole syllables only."""
    with open(ROOT / "egs/mini/audio/aishell1_s0150.tsv", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file, delimiter="\t")]
    reader = Lexicon("zh")
    syllables = [phones for text in texts for phones in [INVENTORY.encode(reader.phones(text))] if len(phones) % 2 == 0 and max(phones) < 204]
    return np.array([phone for phones in syllables for phone in phones], np.uint8)


def made_names(num_names: int, carrier: np.ndarray, rng: np.random.Generator) -> KeyedNames:
    """Names of 2 to 6 syllables as frequent as in the running text; no two with the same key."""
    syllables = carrier.reshape(-1, 2)
    counts = rng.choice([2, 3, 4, 5, 6], 2 * num_names, p=[0.15, 0.35, 0.3, 0.12, 0.08])
    drawn = syllables[rng.integers(len(syllables), size=counts.sum())]
    ends = np.cumsum(counts)
    keys = {drawn[end - count : end].tobytes() for end, count in zip(ends.tolist(), counts.tolist(), strict=True)}
    kept = sorted(keys)
    kept = [kept[number] for number in rng.permutation(len(kept))[:num_names]]
    if len(kept) < num_names:
        raise RecipeError("--num-names", expected=f"at most {len(kept)}: there are no more made names", found=num_names, fix="name a smaller number")
    lens = np.fromiter(map(len, kept), np.int64, len(kept))
    return KeyedNames([Name(f"n{number}") for number in range(len(kept))], np.frombuffer(b"".join(kept), np.uint8), lens, np.arange(len(kept)))


def some_of(names: KeyedNames, keep: np.ndarray) -> KeyedNames:
    """The names for which (N,) `keep` is true."""
    rows = keep[names.owners]
    numbers = np.cumsum(keep) - 1
    chosen = [name for name, kept in zip(names.names, keep.tolist(), strict=True) if kept]
    return KeyedNames(chosen, names.phones[np.repeat(rows, names.key_lens)], names.key_lens[rows], numbers[names.owners[rows]])


def timed_us(queries: Sequence[Any], search: Callable[[Any], object]) -> np.ndarray:
    """Thread CPU microseconds of each query."""
    times = []
    for query in queries:
        started_ns = time.thread_time_ns()
        search(query)
        times.append(time.thread_time_ns() - started_ns)
    return np.array(times) / 1000


def cpu_s(work: Callable[[], object]) -> float:
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def in_fresh_process(small: Path, folder: Path, queries: list[np.ndarray]) -> tuple[float, float]:
    """Milliseconds of loading, and MB that are resident more after it and the queries; machine code is made before the clock starts."""
    before = _resident_mb()
    HotwordIndex.load(small).search(queries[0])
    started_s = time.perf_counter()
    index = HotwordIndex.load(folder)
    load_ms = 1000 * (time.perf_counter() - started_s)
    for query in queries:
        _ = [hit.names for hit in index.search(query)]
    return load_ms, _resident_mb() - before


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def streamed(index: HotwordIndex, utterances: Sequence[np.ndarray]) -> np.ndarray:
    """CPU microseconds of each chunk of 8 phones of streams of 300 phones."""
    times = []
    for utterance in utterances:
        stream = index.stream()
        chunks = [utterance[start : start + CHUNK].tolist() for start in range(0, len(utterance), CHUNK)]
        times.append(timed_us(chunks, stream.push))
    return np.concatenate(times)


class Bench:
    """The measurements over one list of names."""

    def __init__(self, names: KeyedNames, carrier: np.ndarray, args: argparse.Namespace, folder: Path):
        self.names, self.args, self.folder = names, args, folder
        self._carrier = carrier
        self._firsts = np.searchsorted(names.owners, np.arange(len(names.names)))  # the likeliest key of each name
        self._starts = np.cumsum(names.key_lens) - names.key_lens

    def queries(
        self, rng: np.random.Generator, count: int, num_phones: int = NUM_PHONES, chosen: np.ndarray | None = None
    ) -> list[tuple[str, np.ndarray]]:
        """(name, utterance) pairs; the names are drawn from all, or the chosen ones."""
        drawn = rng.choice(len(self.names.names) if chosen is None else chosen, count)
        rows = [(self.names.names[name].text, int(self._firsts[name])) for name in drawn.tolist()]
        phones = [self.names.phones[self._starts[row] : self._starts[row] + self.names.key_lens[row]] for _, row in rows]
        return [(text, planted(self._carrier, key, num_phones, rng)) for (text, _), key in zip(rows, phones, strict=True)]

    def speed(self, num_names: int) -> list[dict[str, Any]]:
        """Rows of the first table for so many of the names."""
        rng = np.random.default_rng(SEED)
        keep = np.zeros(len(self.names.names), bool)
        keep[rng.permutation(len(keep))[:num_names]] = True
        names = some_of(self.names, keep) if num_names < len(keep) else self.names
        built: list[HotwordIndex] = []
        build_s = cpu_s(lambda: built.append(HotwordIndex.build(names, INVENTORY)))
        index = built.pop()
        save_s = cpu_s(partial(index.save, self.folder / str(num_names)))
        chosen = np.flatnonzero(keep)
        utterances = [own for _, own in self.queries(rng, self.args.queries, chosen=chosen)]
        long = [own for _, own in self.queries(rng, max(self.args.queries // 20, 2), 300, chosen=chosen)]
        errors = ErrorModel(INVENTORY, rng)
        networks = [errors.slots(own.tolist(), *ERRORS[2]) for own in utterances]
        small = self.folder / "small"
        if not small.exists():
            HotwordIndex.build(some_of(names, np.arange(len(names.names)) < 10), INVENTORY).save(small)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            load_ms, resident_mb = pool.submit(in_fresh_process, small, self.folder / str(num_names), utterances[:200]).result()
        index = HotwordIndex.load(self.folder / str(num_names))
        index.search_lattice(networks[0])
        rounds: dict[str, list[np.ndarray]] = {"exact": [], "lattice": [], "stream": []}
        for _ in range(self.args.rounds):
            rounds["exact"].append(timed_us(utterances, index.search))
            rounds["lattice"].append(timed_us(networks, index.search_lattice))
            rounds["stream"].append(streamed(index, long))
        changes = self.changes(index) if num_names == len(keep) else {}
        rows = [self._row(num_names, "trie", way, times, build_s + save_s, load_ms, resident_mb) for way, times in rounds.items()]
        rows += [self._row(num_names, "trie", way, times, None, None, None) for way, times in changes.items()]
        return rows + self.others(names, num_names, utterances)

    def changes(self, index: HotwordIndex) -> dict[str, list[np.ndarray]]:
        """Thread CPU time until 1,000 names of a kind that were never seen are found, and until they are gone; batches of each in every round."""
        rng = np.random.default_rng(SEED)
        gc.collect()
        gc.freeze()  # or Python's collector walks through millions of names that only this benchmark holds as objects; the index maps them
        there = [f"{text}{end}" for text in STREETS[:4500] for end in "甲乙"]
        times: dict[str, list[np.ndarray]] = {}
        for kind, named in NEW_NAMES.items():  # dictionaries and grammars are loaded
            times[f"first 1000: {kind}"] = [np.array([self._added_us(index, named, rng)[0]])]
        for num_there, _, (kind, named) in itertools.product((0, len(there)), range(self.args.rounds), NEW_NAMES.items()):
            if num_there and there[0] not in index:
                index.add(there)
            added, removed = zip(*(self._added_us(index, named, rng) for _ in range(BATCHES)), strict=True)
            times.setdefault(f"add 1000 to {num_there:,}: {kind}", []).append(np.array(added))
            times.setdefault(f"remove 1000 of {num_there + 1000:,}", []).append(np.array(removed))
        gc.unfreeze()
        return times

    @staticmethod
    def _added_us(index: HotwordIndex, named: Callable[[np.random.Generator], str], rng: np.random.Generator) -> tuple[float, float]:
        """CPU microseconds until 1,000 new names are found, and until they are not."""
        new = list(dict.fromkeys(named(rng) for _ in range(1200)))[:1000]
        started_s = time.thread_time()
        index.add(new)
        added_s = time.thread_time()
        assert new[0] in index
        index.remove(new)
        return 1e6 * (added_s - started_s), 1e6 * (time.thread_time() - added_s)

    def delta(self) -> list[dict[str, Any]]:
        """Rows of the third table: 10,000 names as a delta, which every change makes anew, and what it takes to find them."""
        keep = np.zeros(len(self.names.names), bool)
        keep[np.random.default_rng(SEED).permutation(len(keep))[:10_000]] = True
        names, chosen = some_of(self.names, keep), np.flatnonzero(keep)
        table = HotwordIndex.build(names, INVENTORY).state.base
        rng = np.random.default_rng(SEED)
        utterances = [own for _, own in self.queries(rng, self.args.queries, chosen=chosen)]
        errors = ErrorModel(INVENTORY, rng)
        networks = [errors.slots(own.tolist(), *ERRORS[2]) for own in utterances]
        rows = []
        for engine, make in (("trie", lambda: NameTable.build(Rows.of(names, IDENTITY))), ("pyahocorasick", lambda: Automaton(table))):
            index = HotwordIndex.build(names, INVENTORY, engine="trie" if engine == "trie" else "ahocorasick")
            index.search(utterances[0])
            index.search_lattice(networks[0])
            made = [1000 * cpu_s(make) for _ in range(5 * self.args.rounds)]
            row: dict[str, Any] = {"engine": engine, "made_ms": statistics.median(made)}
            searches = {"exact": (index.search, utterances)} | ({"lattice": (index.search_lattice, networks)} if engine == "trie" else {})
            for way in ("exact", "lattice"):
                times = [timed_us(searches[way][1], searches[way][0]) for _ in range(self.args.rounds)] if way in searches else None
                for share in (50, 99):
                    row[f"{way}_p{share}_us"] = "-" if times is None else statistics.median(float(np.percentile(own, share)) for own in times)
            rows.append(row)
        ours = rows[0]
        return [
            {**row, "made_to_trie": row["made_ms"] / ours["made_ms"], "exact_p50_to_trie": row["exact_p50_us"] / ours["exact_p50_us"]} for row in rows
        ]

    def others(self, names: KeyedNames, num_names: int, utterances: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Plain pyahocorasick, whose longest-match filter is ours, and the linear scan."""
        built: list[HotwordIndex] = []
        before = _resident_mb()
        build_s = cpu_s(lambda: built.append(HotwordIndex.build(names, INVENTORY, engine="ahocorasick")))
        automaton = built.pop()
        resident_mb = _resident_mb() - before
        times = [timed_us(utterances, automaton.search) for _ in range(self.args.rounds)]
        rows = [self._row(num_names, "pyahocorasick", "exact", times, build_s, None, resident_mb)]
        table: NameTable = automaton.state.base
        keys = [table.key(number).tolist() for number in range(min(table.num_keys, 20_000))]
        scan = timed_us([own.tolist() for own in utterances[:2]], lambda own: min(edit_distance(key, own) for key in keys))
        return [*rows, self._row(num_names, "linear scan", "edit distance", [scan * table.num_keys / len(keys)], None, None, None)]

    def _row(
        self, num_names: int, engine: str, way: str, rounds: list[np.ndarray], build_s: float | None, load_ms: float | None, resident_mb: float | None
    ) -> dict[str, Any]:
        p50, p99 = (statistics.median(float(np.percentile(times, share)) for times in rounds) for share in (50, 99))
        facts = {"build_s": build_s, "load_ms": load_ms, "resident_mb": resident_mb}
        shown = {key: "-" if value is None else value for key, value in facts.items()}
        return {"names": num_names, "engine": engine, "way": way, "p50_us": p50, "p99_us": p99, **shown}

    def recall(self) -> list[dict[str, Any]]:
        """Rows of the second table."""
        shortest = np.minimum.reduceat(self.names.key_lens, self._firsts)
        rows = []
        for kind, keep in (("long", shortest >= LONG), ("short", shortest < LONG)):
            if not keep.any():
                continue
            index = HotwordIndex.build(some_of(self.names, keep) if kind == "long" else self.names, INVENTORY)
            rng = np.random.default_rng(SEED)
            errors, chosen = ErrorModel(INVENTORY, rng), np.flatnonzero(keep)
            for rates in ERRORS:
                queries = [(text, errors.slots(own.tolist(), *rates)) for text, own in self.queries(rng, self.args.queries, chosen=chosen)]
                row: dict[str, Any] = {"phone_errors_%": 100 * sum(rates), "names": kind}
                for way, search in (("exact", partial(_search_best, index)), ("lattice", index.search_lattice)):
                    found, spans, names, times = 0, 0, 0, []
                    for text, slots in queries:
                        started_ns = time.thread_time_ns()
                        hits = search(slots)
                        times.append((time.thread_time_ns() - started_ns) / 1000)
                        texts = {name.text for hit in hits for name in hit.names}
                        found, spans, names = found + (text in texts), spans + len({hit.span for hit in hits}), names + len(texts)
                    row |= {f"{way}_recall_%": 100 * found / len(queries), f"{way}_spans": spans / len(queries), f"{way}_names": names / len(queries)}
                    row |= {f"{way}_p99_us": float(np.percentile(times, 99))}
                rows.append(row)
        return rows


def _search_best(index: HotwordIndex, slots: Slots) -> list[Hit]:
    best = slots.phones[:, 0]
    return index.search(best[best > 0])


def main() -> None:
    args = build_parser().parse_args()
    if args.rounds < 1 or args.queries < 20 or args.num_names < 1000:
        raise RecipeError("--rounds, --queries, --num-names", expected="at least 1, 20 and 1000", found=vars(args), fix="name larger numbers")
    carrier, rng = running_phones(), np.random.default_rng(SEED)
    if args.names is None:
        names, source = made_names(args.num_names, carrier, rng), "made names"
    else:
        report = ListReport()
        listed = read_list(args.names, INVENTORY, report)
        chosen = sorted(rng.permutation(len(listed))[: args.num_names].tolist())
        names, source = make_keys([listed[number] for number in chosen], INVENTORY, report, jobs=args.jobs), args.names.name
    folder = Path(tempfile.mkdtemp(prefix="nim4-hotwords-"))
    try:
        bench = Bench(names, carrier, args, folder)
        sizes = [size for size in (10_000, 100_000) if size < len(names.names)] + [len(names.names)]
        rows = [row for size in sizes for row in bench.speed(size)]
        delta = bench.delta()
        recall = bench.recall()
    finally:
        shutil.rmtree(folder)
    ratio = {row["names"]: row["p50_us"] for row in rows if row["engine"] == "pyahocorasick"}
    rows = [{**row, "p50_to_pyahocorasick": row["p50_us"] / ratio[row["names"]]} for row in rows]
    size = f"{len(names.names):,} {source}, {len(names.key_lens):,} keys; {args.queries} queries"
    publish(args, __doc__.split("\n")[0], size, rows)
    publish(args, "10,000 names as what was added: a trie, as here, beside pyahocorasick, which finds no names in a confusion network", size, delta)
    publish(args, "names that survive errors: share found, and candidates per query of 100 phones", size, recall)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
