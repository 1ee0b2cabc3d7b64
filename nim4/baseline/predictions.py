"""A baseline's texts of a whole manifest, as `python -m nim4 score --hyp` reads them.

A row has `id`, `text` (to score; null beside `error`), `raw` (as the model wrote it), `error` (why there is no text, else null), `language` (that the
model was told), `seconds` (of its work), `audio_s`, `model`, `settings` (hash of settings, code and packages), and what else the adapter tells.

Rows are kept in OUT.partial as they come, and a run goes on from there; OUT appears when all wanted clips have one, in the manifest's order.
"""

import errno
import fcntl
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nim4 import stage
from nim4.baseline.adapters import Baseline
from nim4.baseline.clips import Clip, as_wav
from nim4.baseline.process import Limits, Lost, Process
from nim4.config import RecipeError
from nim4.corpus.progress import Progress
from nim4.corpus.table import spread

log = logging.getLogger("nim4")
FRESH_AFTER = 5  # errors in a row after which the process is started anew: some leave a GPU in a state in which all that follows fails
GIVE_UP_AFTER = 20  # errors in a row after which the run stops: nothing works, and going on would mark every clip

Row = dict[str, Any]


def predict(baseline: Baseline, python: Path, clips: Sequence[Clip], out: Path, limits: Limits, most: int = 0, again: bool = False) -> list[Row]:
    """Writes `out`, and returns its rows. A clip that fails has `error`; the run goes on.

    Args:
        python: interpreter of the baseline's environment.
        most: how many clips are wanted, spread over all; what more has a row already stays. 0 = all.
        again: whether clips with an error are tried once more.
    Raises:
        RecipeError: if the model cannot be loaded, nothing works, or what is there was made otherwise or by a run that still goes on.
    """
    partial = out.with_name(out.name + ".partial")
    with _kept(partial, out) as file:
        done = _read(file, out, baseline.identity(), {clip.id for clip in clips})
        if file.tell() == 0:  # nothing was left half done: what is finished comes along
            file.writelines(_line(row) for row in done.values())
        left = [clip for clip in spread(clips, most or len(clips)) if clip.id not in done or (again and done[clip.id]["error"])]
        if left:
            _run(baseline, python, left, file, done, out, limits)
        rows = [done[clip.id] for clip in clips if clip.id in done]
        stage.write_jsonl(out, rows)
        partial.unlink()
    _tell(rows, out, len(left))
    return rows


@contextmanager
def _kept(partial: Path, out: Path) -> Iterator[IO[bytes]]:
    """The file of rows that are not finished, open and ours alone; an empty one does not stay."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RecipeError(out, expected="a file that can be written", found=error, fix="correct --out") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RecipeError(out, expected="one run at a time that makes it", found="another", fix="wait for it, or name another --out") from error
        try:
            yield file
        finally:
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()


def _read(file: IO[bytes], out: Path, identity: str, ids: set[str]) -> dict[str, Row]:
    """The rows that are there, the last of each clip: of the unfinished file, else of the finished one. A line that was left half is removed."""
    file.seek(0)
    whole, newline, half = file.read().rpartition(b"\n")
    if half:
        file.truncate(len(whole + newline))
    file.seek(0, 2)
    if not whole and out.is_file():
        whole = out.read_bytes().removesuffix(b"\n")
    done: dict[str, Row] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            row = json.loads(line)
            id, made_by, _ = row["id"], row["settings"], row["error"]
        except (ValueError, KeyError, TypeError) as error:
            fix = "remove that line, or the file"
            raise RecipeError(f"{out} or its .partial, line {number}", expected="a row of predictions", found=repr(error), fix=fix) from error
        if made_by != identity:
            found, fix = f"rows made with {made_by}", "name another --out, or remove it and its .partial"
            raise RecipeError(out, expected=f"rows made with these settings ({identity})", found=found, fix=fix)
        if id not in ids:
            raise RecipeError(out, expected="rows of this manifest", found=f"one of {id!r}", fix="name another --out for each manifest")
        done[id] = row
    if done:
        log.info("%s: goes on, %d clips have a row", out, len(done))
    return done


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _run(baseline: Baseline, python: Path, clips: Sequence[Clip], file: IO[bytes], done: dict[str, Row], out: Path, limits: Limits) -> None:
    """Adds a row for each clip to the file and to `done`."""
    printed = out.with_name(out.name + ".log")
    workers = [Process(baseline, python, printed) for _ in range(min(limits.jobs, len(clips)))]
    try:
        workers[0].load(limits.load_s)
    except Lost as error:
        raise RecipeError(f"baseline {baseline.name}", expected="a model that loads", found=error, fix=f"see {printed}") from error
    free: queue.SimpleQueue[Process] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    stop = threading.Event()

    def work(clip: Clip) -> Row | None:
        if stop.is_set():
            return None
        worker = free.get()
        try:
            return _row(baseline, worker, clip, limits)
        finally:
            free.put(worker)

    progress = Progress(f"{baseline.name}", len(clips), "clips")
    in_a_row = 0
    pool = ThreadPoolExecutor(len(workers))
    try:
        for row in _as_they_come(pool, work, clips, 2 * len(workers)):
            if row is None:
                continue
            file.write(_line(row))
            file.flush()
            done[row["id"]] = row
            progress.add()
            if row["audio_s"] is not None:  # a missing file says nothing about the model
                in_a_row = in_a_row + 1 if row["error"] else 0
            if row["error"]:
                log.warning("%s: %s", row["id"], row["error"])
            if in_a_row >= GIVE_UP_AFTER:
                fix = f"see {printed}; then the same command with --again"
                raise RecipeError(f"baseline {baseline.name}", expected="some texts", found=f"{in_a_row} errors in a row", fix=fix)
    finally:
        stop.set()
        for worker in workers:
            worker.stop()
        pool.shutdown()
        for worker in workers:
            worker.end()


def _as_they_come(pool: ThreadPoolExecutor, work: Any, clips: Sequence[Clip], ahead: int) -> Iterator[Row | None]:
    """Results in the order in which they are ready; few clips wait at a time, so that a stop is quick."""
    waiting: set[Future[Row | None]] = set()
    for clip in clips:
        waiting.add(pool.submit(work, clip))
        if len(waiting) >= ahead:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in ready)


def _row(baseline: Baseline, worker: Process, clip: Clip, limits: Limits) -> Row:
    """One clip, whatever happens to it."""
    language = baseline.language(clip.language)
    answer: dict[str, Any] = {}
    audio_s = None
    try:
        with as_wav(clip) as (path, audio_s):
            worker.load(limits.load_s)
            answer = worker.transcribe(path, language, limits.clip_s)
        worker.errors_in_a_row = worker.errors_in_a_row + 1 if "error" in answer else 0
        if worker.errors_in_a_row >= FRESH_AFTER:
            worker.end()
            worker.errors_in_a_row = 0
    except ValueError as error:
        answer = {"error": f"no audio: {error}"}
    except Lost as error:
        answer = {"error": f"the baseline was lost: {error}"}
    said = {"id": clip.id, "text": answer.pop("text", None), "raw": answer.pop("raw", None), "error": answer.pop("error", None)}
    told = {"language": language, "seconds": answer.pop("seconds", None), "audio_s": None if audio_s is None else round(audio_s, 3)}
    return {**answer, **said, **told, "model": baseline.settings["model"], "settings": baseline.identity()}


def _tell(rows: Sequence[Row], out: Path, fresh: int) -> None:
    """The end of a run in the log."""
    failed = Counter(row["error"].partition(":")[0] for row in rows if row["error"])
    timed = [row for row in rows if row["seconds"] is not None and row["audio_s"]]
    seconds, audio_s = sum(row["seconds"] for row in timed), sum(row["audio_s"] for row in timed)
    rate = f", {seconds:.0f} s of work for {audio_s:.0f} s of audio (RTF {seconds / audio_s:.3f})" if audio_s else ""
    errors = f", {sum(failed.values())} without a text ({', '.join(f'{count} {reason}' for reason, count in failed.most_common())})" if failed else ""
    log.info("%s: %d clips, %d of them now%s%s", out, len(rows), fresh, errors, rate)
