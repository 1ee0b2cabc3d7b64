"""Two runs that make the same folder: the second is refused, and a killed one never stands in the way."""

import os
import signal
import subprocess
import sys

import pytest

from nim4.config import RecipeError
from nim4.stage import ROOT, StageOutput

# begins a stage, leaves a worker behind that was forked while it worked, and waits
RUN = """
import os, sys, time
from pathlib import Path
from nim4.stage import StageOutput
output = StageOutput(Path(sys.argv[1]), config={})
output.begin()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that works on tmp_path/model, and its worker's id."""
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, other_run):
    output = StageOutput(tmp_path / "model", config={})
    for _ in range(2):
        with pytest.raises(RecipeError, match=rf"model: expected one run at a time that makes it, found process {other_run.pid} on .*--tag"):
            output.begin()
    StageOutput(tmp_path / "model2", config={}).begin()
    other_run.kill()
    other_run.wait()
    (output.begin(resume=True) / "weights").touch()
    output.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model2.lock", "model2.tmp"]


def test_a_file_system_without_locks_only_warns(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    output = StageOutput(tmp_path / "model", config={})
    output.begin()
    output.finish()
    assert "a second run would not be noticed" in caplog.text
    assert (tmp_path / "model" / "done.json").is_file()
