"""Word lists of hotwords: read, checked, and turned into keys by several processes.

A list is a text file with one name per line, or a table with tabs: `name`, then optionally `weight`, `tags` (separated by commas) and
`pronunciation`, in this order or as a first line that begins with `name` says. `.gz` and `.xz` are unpacked. What cannot be used is left
out and counted, with its line and the reason; a file that is no such list at all is an error.
"""

import gzip
import io
import logging
import lzma
import multiprocessing
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from nim4.config import RecipeError, nearest
from nim4.corpus.g2p_en import Phones
from nim4.corpus.hotword_keys import KeyMaker, parse_pronunciations
from nim4.corpus.progress import Progress
from nim4.corpus.text import HAN, split_tokens
from nim4.corpus.units import PhonemeInventory

log = logging.getLogger("nim4")

COLUMNS = ("name", "weight", "tags", "pronunciation")
MAX_NAME_CHARS = 100
MAX_LINE_BYTES = 4096
MIN_PHONES = 3  # ours: two Mandarin syllables, or a short English word; less is found everywhere
MAX_PHONES = 96
NAMES_AT_ONCE = 5000
_PLAIN = re.compile(f"[{HAN}]+")
NUM_EXAMPLES = 3  # of each reason, in the log


@dataclass(frozen=True)
class Name:
    """One hotword. `pronunciations` replace what the G2P would say; `weight` ranks names that sound alike, the highest first."""

    text: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    pronunciations: tuple[Phones, ...] = ()


@dataclass
class ListReport:
    """What became of a list: names kept, and the others by reason, with (line, what stood there)."""

    names: int = 0
    keys: int = 0
    merged: int = 0  # lines that repeat a name
    skipped: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def skip(self, reason: str, line: int, text: str) -> None:
        self.skipped.setdefault(reason, []).append((line, text[:MAX_NAME_CHARS]))

    def log(self, where: object) -> None:
        log.info("%s: %d names, %d keys; %d lines repeat a name", where, self.names, self.keys, self.merged)
        for reason, lines in sorted(self.skipped.items()):
            shown = "; ".join(f"line {number} {text!r}" for number, text in lines[:NUM_EXAMPLES])
            log.warning("%s: %d left out, %s: %s", where, len(lines), reason, shown)


@dataclass(frozen=True)
class KeyedNames:
    """Names and the phone ids under which they are filed.

    Attributes:
        names: N of them, no text twice.
        phones: (P,) uint8, the ids of all keys one after the other.
        key_lens: (K,) int64.
        owners: (K,) int64, the name that each key belongs to, rising.
    """

    names: list[Name]
    phones: np.ndarray
    key_lens: np.ndarray
    owners: np.ndarray


def read_list(path: Path, inventory: PhonemeInventory, report: ListReport) -> list[tuple[int, Name]]:
    """(line, name) of every usable line; the others are in the report.

    Raises:
        RecipeError: if the file cannot be read, is not UTF-8, or names a column that does not exist.
    """
    names: list[tuple[int, Name]] = []
    columns: Sequence[str] = COLUMNS
    for number, line in _lines(path):
        if number == 1 and "\t" in line and line.split("\t")[0].strip().lower() == "name":
            columns = _header(path, line)
            continue
        if not line.strip() or line.startswith("#"):
            continue
        try:
            names.append((number, _name_of(line, columns, inventory)))
        except ValueError as error:
            report.skip(str(error), number, line)
    return names


def merge_names(names: Iterable[tuple[int, Name]], report: ListReport) -> dict[str, tuple[int, Name]]:
    """The names by text; of lines that repeat one, the highest weight, all tags and all pronunciations count."""
    merged: dict[str, tuple[int, Name]] = {}
    for number, name in names:
        if name.text in merged:
            first, other = merged[name.text]
            tags, spoken = (tuple(dict.fromkeys(pair)) for pair in ((*other.tags, *name.tags), (*other.pronunciations, *name.pronunciations)))
            merged[name.text] = first, Name(name.text, max(name.weight, other.weight), tags, spoken)
            report.merged += 1
        else:
            merged[name.text] = number, name
    return merged


def make_keys(names: Iterable[tuple[int, Name]], inventory: PhonemeInventory, report: ListReport, *, jobs: int = 1) -> KeyedNames:
    """The names that can be said, with their keys; the result does not depend on `jobs`.

    Args:
        names: (line, name) pairs; the same text twice is one name.
        inventory: of the phoneme head; at most 255 symbols.
        report: takes the counts, and what was left out.
        jobs: processes.
    """
    if len(inventory) > 255:
        raise RecipeError("tokens.txt", expected="at most 255 symbols", found=len(inventory), fix="use the model's own tokens.txt")
    merged = list(merge_names(names, report).values())
    pieces = [merged[start : start + NAMES_AT_ONCE] for start in range(0, len(merged), NAMES_AT_ONCE)]
    progress = Progress("names to phones", len(merged), "names")
    kept: list[Name] = []
    all_phones, all_lens, counts = [], [], []
    for piece, (phones, key_lens, keys_per_name, reasons) in zip(pieces, _convert_all(pieces, inventory, jobs), strict=True):
        for (line, name), num_keys, reason in zip(piece, keys_per_name.tolist(), reasons, strict=True):
            if num_keys:
                kept.append(name)
            else:
                report.skip(reason, line, name.text)
        all_phones.append(phones)
        all_lens.append(key_lens)
        counts.append(keys_per_name[keys_per_name > 0])
        progress.add(len(piece))
    none = [np.zeros(0, np.int64)]
    key_lens, owners = np.concatenate(all_lens or none), np.repeat(np.arange(len(kept)), np.concatenate(counts or none))
    report.names, report.keys = len(kept), len(key_lens)
    return KeyedNames(kept, np.concatenate(all_phones or [np.zeros(0, np.uint8)]), key_lens, owners)


Converted = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]  # phones, key lengths, keys per name, why a name has none


def _convert_all(pieces: Sequence[list[tuple[int, Name]]], inventory: PhonemeInventory, jobs: int) -> Iterator[Converted]:
    if jobs <= 1 or len(pieces) <= 1:
        for piece in pieces:
            yield _convert([name for _, name in piece], inventory.tokens)
        return
    KeyMaker().keys("长江1一")  # loads the dictionaries once: the processes that are forked share them
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting = [pool.submit(_convert, [name for _, name in piece], inventory.tokens) for piece in pieces]
        try:
            for future in waiting:
                yield future.result()
        except BrokenProcessPool as error:
            fix = "use fewer --jobs"
            raise RecipeError("names to phones", expected="all processes to live", found="one was killed, perhaps for memory", fix=fix) from error
        finally:
            pool.shutdown(cancel_futures=True)


_maker: KeyMaker | None = None  # of this process: its readings serve all pieces


def _convert(names: Sequence[Name], tokens: Sequence[str]) -> Converted:
    global _maker
    _maker = _maker or KeyMaker()
    ids = {token: number for number, token in enumerate(tokens) if not token.startswith("<")}
    own_ids = bytes(ids.get(token, 0) for token in PhonemeInventory.default().tokens).ljust(256, b"\0")
    keys, counts, reasons = [], [], []
    for name in names:
        if name.pronunciations:
            known = [bytes(map(ids.__getitem__, reading)) for reading in name.pronunciations if ids.keys() >= set(reading)]
        else:
            known = [key for key in (key.translate(own_ids) for key in _maker.keys(name.text)) if 0 not in key]
        fitting = [key for key in known if MIN_PHONES <= len(key) <= MAX_PHONES]
        keys += fitting
        counts.append(len(fitting))
        wrong_length = f"has fewer than {MIN_PHONES} or more than {MAX_PHONES} phones"
        reasons.append("" if fitting else wrong_length if known else "cannot be pronounced")
    key_lens = np.fromiter(map(len, keys), np.int64, len(keys))
    return np.frombuffer(b"".join(keys), np.uint8), key_lens, np.array(counts, np.int64), reasons


def _name_of(line: str, columns: Sequence[str], inventory: PhonemeInventory) -> Name:
    """Raises ValueError with the reason when the line is no name."""
    cells = dict(zip(columns, (cell.strip() for cell in line.split("\t")), strict=False))
    if line.count("\t") >= len(columns):
        raise ValueError(f"more than {len(columns)} columns")
    text = cells["name"]
    if len(text) > MAX_NAME_CHARS:
        raise ValueError(f"longer than {MAX_NAME_CHARS} characters")
    if not _PLAIN.fullmatch(text):
        if any(unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") for char in text):
            raise ValueError("control or private characters")
        if not split_tokens(text):
            raise ValueError("neither a letter nor a digit")
    try:
        weight = float(cells.get("weight") or 1.0)
    except ValueError:
        raise ValueError("the weight is not a number") from None
    if not 0 <= weight < float("inf"):
        raise ValueError("the weight is not a number from 0 on")
    tags = tuple(dict.fromkeys(tag.strip() for tag in cells.get("tags", "").split(",") if tag.strip()))
    try:
        spoken = tuple(parse_pronunciations(cells["pronunciation"], inventory)) if cells.get("pronunciation") else ()
    except ValueError:
        raise ValueError("the pronunciation is neither phones of tokens.txt nor pinyin with tones") from None
    return Name(text, weight, tags, spoken)


def _header(path: Path, line: str) -> list[str]:
    columns = [cell.strip().lower() for cell in line.split("\t")]
    unused = [column for column in columns if column not in COLUMNS]
    if len(set(columns)) < len(columns):
        raise RecipeError(f"{path}, line 1", expected="each column once", found=repr(line), fix="correct the first line")
    if unused:
        log.warning("%s: columns %s are not used; %s", path, ", ".join(unused), nearest(unused[0], COLUMNS))
    return columns


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) without its end. A line beyond MAX_LINE_BYTES comes shortened, still too long for a name."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, raw in _raw_lines(file):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="strict" if len(raw) < MAX_LINE_BYTES else "ignore")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        fix = "convert it, for example iconv -f GB18030 -t UTF-8"
        raise RecipeError(f"{path}, line {number}", expected="UTF-8", found=error, fix=fix) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise RecipeError(path, expected="a readable word list", found=error, fix="correct the path or the file") from error


def _raw_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of one that is too long the beginning, so that it is never held as a whole."""
    buffered = io.BufferedReader(file) if not isinstance(file, io.BufferedReader) else file  # type: ignore[type-var]
    number = 0
    while line := buffered.readline(MAX_LINE_BYTES):
        number += 1
        yield number, line
        while line and not line.endswith(b"\n"):
            line = buffered.readline(MAX_LINE_BYTES)


def default_jobs() -> int:
    """One process per core, at most 8."""
    return min(os.cpu_count() or 1, 8)
