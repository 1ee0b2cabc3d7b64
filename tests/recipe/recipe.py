"""Starts run.sh as a user does: another current folder, its own data and experiment folders, a small preset."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 600  # of one run; 40 s on two quiet cores


def environment():
    """The environment of these tests, with their Python as `python` and no other chosen; tiny tensors are quickest on one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def command(*options, script="run.sh"):
    """The command line; the folders lie where the caller stands, and not in the repository, as `data` and `exp` would."""
    return [str(ROOT / script), "--preset", "ci", "--data-dir", "corpora", "--exp-dir", "results", *map(str, options)]


def run(folder, *options, script="run.sh"):
    """Runs it from `folder` to its end."""
    return subprocess.run(
        command(*options, script=script), cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
