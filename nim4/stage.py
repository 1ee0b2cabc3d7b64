"""What every program in local/ shares: one log format, errors in one line, and outputs that are whole or absent.

A stage writes into `OUT.tmp`; when all is done it leaves `done.json` there and renames the folder to `OUT`. A matching record
means the stage is skipped; one that differs says what changed. A killed stage leaves no record, only an `OUT.tmp`, from which a
training stage resumes. While one run works there, a second one is refused: the two would write into each other's files.
"""

import errno
import fcntl
import gzip
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nim4.config import RecipeError

log = logging.getLogger("nim4")
ROOT = Path(__file__).resolve().parent.parent


def run(main: Callable[[], None], stage: str) -> None:
    """Runs a program's `main`: logs as `time stage level message`, and ends with exit code 2 on a mistake of the user's.

    A full disk counts as such; a bug keeps its traceback. Under torchrun only rank 0 logs below the level of an error.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(stream=sys.stderr, level=level, format=f"%(asctime)s {stage} %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.captureWarnings(True)
    try:
        main()
    except RecipeError as error:
        log.error("%s", " ".join(str(error).split()))
        sys.exit(2)
    except Exception as error:
        full = _disk_error(error)
        if full is None:
            raise
        where, found = full.filename or "output", "files limited in size" if full.errno == errno.EFBIG else "it full"
        log.error("%s: expected room on the disk, found %s. Fix: free some space and run the same command again", where, found)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("interrupted: run the same command again to go on")
        sys.exit(130)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The full disk, quota or file size limit behind an error; libraries wrap it in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def git_commit() -> str:
    """Short commit of this checkout, with `+` when tracked files differ from it; `unknown` outside a checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears under its name only when it is complete; on an error nothing is left behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file. Raises RecipeError when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(path, expected="a readable JSON file", found=error, fix="run the stage that makes it again") from error


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line, written atomically."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises RecipeError, with the line number, when it is missing or broken."""
    rows: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            rows.extend(json.loads(line) for line in file)
    except (OSError, ValueError) as error:
        where = f"{path}, line {len(rows) + 1}"
        raise RecipeError(where, expected="one JSON object per line", found=error, fix="run the stage that makes it again") from error
    return rows


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content; of what is inside when it is gzipped, since gzip stores the time of writing."""
    digest = hashlib.sha256()
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class StageOutput:
    """The product folder of one stage, with the record of what made it.

    Args:
        out: the folder; `OUT.tmp` beside it is where the work is done.
        config: settings that decide the content, JSON-able.
        inputs: files that decide the content; a folder stands for its done.json.
    """

    def __init__(self, out: Path, *, config: Mapping[str, Any], inputs: Sequence[Path] = ()):
        self.out = Path(out)
        self.work = self.out.with_name(self.out.name + ".tmp")
        self._lock_path = self.out.with_name(self.out.name + ".lock")
        self._lock: IO[str] | None = None
        self._started_s = time.time()
        files = [Path(path) / "done.json" if Path(path).is_dir() else Path(path) for path in inputs]
        for path in files:
            if not path.is_file():
                raise RecipeError(
                    path, expected="the product of an earlier stage", found="no such file", fix="run the earlier stages first, e.g. --stage 0"
                )
        self._made_from = {
            "config": json.loads(json.dumps(config, sort_keys=True)),
            "inputs": {str(path): _input_hash(path) for path in files},
        }

    def is_done(self) -> bool:
        """True when the folder was made from the same settings and inputs; logs that, or what changed."""
        record = _read_record(self.out / "done.json")
        if record is None:
            return False
        changes = _changes(record.get("made_from", {}), self._made_from)
        if changes:
            log.info("%s: rebuilding, %s", self.out, "; ".join(changes))
            return False
        log.info("%s: skipped, same inputs and settings (made in %.0f s at %s)", self.out, record["seconds"], record["commit"])
        return True

    def begin(self, resume: bool = False, despite: Sequence[str] = ()) -> Path:
        """The folder to work in; empty, unless `resume` and it was left by a killed run with the same settings and inputs.

        Settings in `despite` may differ: the run goes on with the new ones, and only these are in its record.
        Of several processes only the main one may call it. Raises RecipeError while another run works there.
        """
        self._lock = _lock(self._lock_path)
        left_by = _read_record(self.work / "made_from.json")
        if resume and left_by is not None:
            changes = _changes(left_by, self._made_from)
            if all(change.startswith(tuple(f"{name} was " for name in despite)) for change in changes):
                if changes:
                    log.warning("%s: resumed, though %s", self.work, "; ".join(changes))
                    write_json(self.work / "made_from.json", self._made_from)
                return self.work
            log.info("%s: not resumed, %s", self.work, "; ".join(changes))
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        write_json(self.work / "made_from.json", self._made_from)
        return self.work

    def finish(self, **facts: Any) -> None:
        """Records the work as done and renames it into place; an older product is removed only then."""
        record = {"made_from": self._made_from, "commit": git_commit(), "seconds": round(time.time() - self._started_s, 1), **facts}
        write_json(self.work / "done.json", record)
        (self.work / "made_from.json").unlink()
        old = self.out.with_name(self.out.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if self.out.exists():
            self.out.rename(old)
        self.work.rename(self.out)
        if old.exists():
            shutil.rmtree(old)
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
        log.info("%s: done in %.0f s", self.out, record["seconds"])


def _lock(path: Path) -> IO[str]:
    """A file that this process alone holds until it is closed or the process ends, however it ends; it names the process.

    The lock is the process's own (POSIX): a worker that outlives a killed run does not keep it, as it would keep one of flock.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed at the end of the stage
        except OSError as error:
            raise RecipeError(path.with_suffix(""), expected="a folder that can be made", found=error, fix="name another") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("%s: this file system has no locks, so a second run would not be noticed (%s)", path.parent, error)
                return file
            holder = path.read_text(encoding="utf-8").strip() if path.exists() else ""
            fix = "wait until it ends, or give this run another --tag or folder"
            found = holder or "another one"
            raise RecipeError(path.with_suffix(""), expected="one run at a time that makes it", found=found, fix=fix) from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the run before has ended, and removed it, since it was opened
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _input_hash(path: Path) -> str:
    """Content hash; of a done.json, what made it, so that a rebuild from the same inputs counts as the same."""
    record = _read_record(path) if path.name == "done.json" else None
    if record is None:
        try:
            return file_hash(path)
        except (OSError, EOFError, zlib.error) as error:
            raise RecipeError(path, expected="a readable file", found=error, fix="run the stage that makes it again") from error
    return hashlib.sha256(json.dumps(record.get("made_from"), sort_keys=True).encode()).hexdigest()


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two records, as readable phrases."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [change for key in keys for change in _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    if old == new:
        return []
    if name.startswith("inputs."):
        return [f"{name.removeprefix('inputs.')} changed"]
    return [f"{name.removeprefix('config.')} was {json.dumps(old)} and is {json.dumps(new)}"]
