"""A baseline's process as its parent sees it: started in its own environment, asked with a time limit, and ended with all its children."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.baseline.adapters import FOLDER, Baseline

WORKER = FOLDER / "worker.py"
LOOK_S = 0.5  # between two looks at whether the process still lives: a child of it may hold the pipe open
LAST_WORDS = 200  # characters of the log that an error quotes


@dataclass(frozen=True)
class Limits:
    """How long is waited, and how much is done at the same time."""

    clip_s: float = 300.0
    load_s: float = 1800.0  # of weights from a slow disk
    jobs: int = 1  # processes


class Lost(Exception):
    """The process ended, went silent or said what is no answer; it has been ended, and its next call starts another."""


class Process:
    """One worker.

    Args:
        baseline: what it loads.
        python: interpreter of its environment.
        log: file that what it prints is appended to.
    """

    def __init__(self, baseline: Baseline, python: Path, log: Path):
        self._baseline, self._python, self._log = baseline, python, log
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = -1
        self._read = b""
        self._number = self._log_size = 0
        self._stopped = False
        self.errors_in_a_row = 0  # counted by who asks

    def load(self, timeout_s: float) -> None:
        """Starts it, unless it runs. Raises Lost, which says why, when the model cannot be loaded."""
        if self._stopped:
            raise Lost("the run was stopped")
        if self._process is not None:
            return
        inner_requests, self._requests = os.pipe()
        self._replies, inner_replies = os.pipe()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # our packages are not the baseline's
        try:
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [self._python, WORKER, str(inner_requests), str(inner_replies)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**environment, "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"},
                    pass_fds=(inner_requests, inner_replies),
                    start_new_session=True,  # its children end with it, and Ctrl-C is ours alone
                )
        finally:
            os.close(inner_requests)
            os.close(inner_replies)
            if self._process is None:
                self._close_pipes()
        self._read = b""
        backend = self._baseline.backend
        request = {"adapter": str(self._baseline.adapter), "backend": str(backend) if backend else None, "settings": dict(self._baseline.settings)}
        answer = self._ask(request, timeout_s)
        if "error" in answer:
            self.end()
            raise Lost(answer["error"])

    def transcribe(self, path: Path, language: str | None, timeout_s: float) -> dict[str, Any]:
        """The answer to one clip, see baselines/worker.py. Raises Lost."""
        self._number += 1
        answer = self._ask({"number": self._number, "path": str(path), "language": language}, timeout_s)
        if answer.pop("number", None) != self._number:
            raise self._lost("it answered another question")
        return answer

    def end(self) -> None:
        """Ends it, and whatever it has started."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.wait()
            self._close_pipes()

    def stop(self) -> None:
        """From another thread: whoever waits for it gets Lost, and it is not started again."""
        self._stopped = True
        if (process := self._process) is not None:
            _kill(process)

    def _close_pipes(self) -> None:
        for descriptor in (self._requests, self._replies):
            if descriptor >= 0:
                os.close(descriptor)
        self._requests = self._replies = -1

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self._log_size = self._log.stat().st_size
        try:
            os.write(self._requests, (json.dumps(request) + "\n").encode())
        except OSError:
            raise self._lost("it had ended") from None
        line = self._line(time.monotonic() + timeout_s, timeout_s)
        try:
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError(line)
        except ValueError:
            raise self._lost(f"it answered no JSON object: {line[:80]!r}") from None
        return answer

    def _line(self, until_s: float, timeout_s: float) -> bytes:
        poll = select.poll()
        poll.register(self._replies, select.POLLIN | select.POLLHUP)
        ended = False
        while b"\n" not in self._read:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise self._lost(f"no answer in {timeout_s:g} s")
            if poll.poll(1000 * min(left_s, LOOK_S)):
                block = os.read(self._replies, 1 << 16)
                if not block:
                    raise self._lost("it ended")
                self._read += block
            elif ended:
                raise self._lost("it ended")
            else:
                ended = self._process is None or self._process.poll() is not None  # what it wrote before is read first
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _lost(self, reason: str) -> Lost:
        """Ends the process; the error says how it ended and what it printed last."""
        if self._process is not None and reason.startswith("it "):
            try:
                code = self._process.wait(LOOK_S)
                reason += f" with signal {-code} ({signal.strsignal(-code)})" if code < 0 else f" with exit code {code}"
            except subprocess.TimeoutExpired:
                pass
        self.end()
        with open(self._log, "rb") as log:
            log.seek(max(self._log_size, self._log.stat().st_size - 4096))
            words = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return Lost(f"{reason}, last words: {' '.join(words[-1].split())[:LAST_WORDS]}" if words else reason)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
