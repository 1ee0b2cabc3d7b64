"""Scoring under a profile: whole lists are normalised first, in several processes, each text once, and once only for all runs.

Results are kept in a SQLite file, keyed by the profile's hash and the text, so that a change of code, engine or flags never meets old ones.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.text import is_han
from nim4.decode.processes import in_processes
from nim4.score import profiles
from nim4.score.decoded import Hypothesis, Reference
from nim4.score.error_rate import ScoredUtterance, score

log = logging.getLogger("nim4")
AT_ONCE = 500  # texts that a process is given


def normalised(
    refs: Sequence[Reference],
    systems: Sequence[Mapping[str, Hypothesis]],
    profile: str,
    engine: str = "wetext",
    num_processes: int = 1,
    cache: Path | None = None,
) -> tuple[list[Reference], list[dict[str, Hypothesis]]]:
    """References and each system's hypotheses with their texts as `profile` has them; arguments as of normalise_all."""
    chinese = {ref.id: any(map(is_han, ref.text)) for ref in refs}
    keys = [(ref.text, chinese[ref.id]) for ref in refs]
    keys += [(hyp.text, chinese[id]) for hyps in systems for id, hyp in hyps.items() if hyp.text]
    forms = normalise_all(keys, profile, engine, num_processes, cache)
    normal_refs = [replace(ref, text=forms[ref.text, chinese[ref.id]]) for ref in refs]
    return normal_refs, [{id: replace(hyp, text=forms[hyp.text, chinese[id]]) if hyp.text else hyp for id, hyp in hyps.items()} for hyps in systems]


def score_normalised(refs: Sequence[Reference], hyps: Mapping[str, Hypothesis], metric: str, profile: str) -> list[ScoredUtterance]:
    """error_rate.score of what `normalised` gave."""
    units = partial(profiles.units, metric=metric, profile=profile)
    return score(refs, hyps, metric, units, profiles.merges_compounds(profile) and metric in ("MER", "WER"))


def normalise_all(
    texts: Iterable[tuple[str, bool]], profile: str, engine: str, num_processes: int, cache: Path | None
) -> dict[tuple[str, bool], str]:
    """Each (text, chinese) as the profile has it; arguments as of profiles.normalise.

    Args:
        cache: folder with the results of earlier runs, made when it is not there; None = nothing is kept.
    Raises:
        RecipeError: when the cache is there and cannot be read or written.
    """
    wanted = list(dict.fromkeys(texts))
    if profile in ("plain", "raw"):
        return {key: key[0] for key in wanted}
    name = profiles.profile_hash(profile, engine)
    known = _recall(cache, name, wanted) if cache else {}
    missing = [key for key in wanted if key not in known]
    made = dict(zip(missing, _normalise(missing, profile, engine, num_processes), strict=True))
    if cache and made:
        _remember(cache, name, made)
    return known | made


def _normalise(keys: Sequence[tuple[str, bool]], profile: str, engine: str, num_processes: int) -> Iterator[str]:
    jobs = [(keys[start : start + AT_ONCE], profile, engine) for start in range(0, len(keys), AT_ONCE)]
    return (text for part in in_processes(_job, jobs, num_processes) for text in part)


def _job(job: tuple[Sequence[tuple[str, bool]], str, str]) -> list[str]:
    keys, profile, engine = job
    return [profiles.normalise(text, profile, engine=engine, chinese=chinese) for text, chinese in keys]


def _key(name: str, key: tuple[str, bool]) -> bytes:
    return hashlib.blake2b(f"{name} {key[1]} {key[0]}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _open(folder: Path) -> sqlite3.Connection:
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "normalised.sqlite", timeout=60)
    connection.execute("CREATE TABLE IF NOT EXISTS normalised (key BLOB PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")
    return connection


def _failed(folder: Path, error: Exception) -> RecipeError:
    fix = "remove it, or name another folder with --cache"
    return RecipeError(folder / "normalised.sqlite", expected="a cache that can be read and written", found=error, fix=fix)


def _recall(folder: Path, name: str, keys: Sequence[tuple[str, bool]]) -> Mapping[tuple[str, bool], str]:
    found = {}
    try:
        with closing(_open(folder)) as connection:
            for key in keys:
                row = connection.execute("SELECT text FROM normalised WHERE key = ?", (_key(name, key),)).fetchone()
                if row is not None:
                    found[key] = row[0]
    except (OSError, sqlite3.Error) as error:
        raise _failed(folder, error) from error
    return found


def _remember(folder: Path, name: str, made: Mapping[tuple[str, bool], str]) -> None:
    try:
        with closing(_open(folder)) as connection, connection:
            rows = ((_key(name, key), text) for key, text in made.items())
            connection.executemany("INSERT OR REPLACE INTO normalised VALUES (?, ?)", rows)
    except (OSError, sqlite3.Error) as error:
        raise _failed(folder, error) from error
