"""Baselines: folders with `adapter.py`, `settings.yaml` and `requirements.txt`, each with an environment of its own.

`adapter.py` is a plain Python file that runs in that environment and imports nothing of nim4:
- `load(settings)` gives an object whose `transcribe(path, language)` takes a 16 kHz, one-channel, 16-bit WAV file and the name of its language, or
  None, and gives a dict with `raw`, the text as the model wrote it, and what else is worth a record, such as `finish`;
- `clean(raw, settings)` gives the text to score, on any machine, without the model.
Both raise an exception where they fail: a clip without text is then told, never an empty text.

`settings.yaml` has what the authors publish, with its source: `title`, `model`, `python` (version of the environment), `languages` (what the model is
told for a language of the manifest; None, and what is not listed, is left to the model), and what the adapter itself reads.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nim4.config import RecipeError, apply_overrides, nearest, read_yaml
from nim4.stage import ROOT, log

FOLDER = ROOT / "baselines"
SERVER = "openai"  # the baseline whose model is behind a server
FREE = ("languages.", "decoding.", "decoder.", "server.extra.")  # groups whose keys are the model's
COMPLETE = ".complete"  # in an environment that was installed to its end


@dataclass(frozen=True)
class Baseline:
    """One of them, with its settings.

    Attributes:
        backend: another adapter that loads and transcribes, when the model is behind a server.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    backend: Path | None = None

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.py"

    @property
    def environment(self) -> Path:
        return self.folder / ".venv"

    def identity(self) -> str:
        """Short hash of all that decides the texts: settings, code and packages; where the server is does not."""
        settings = {key: value for key, value in self.settings.items() if key != "url"}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        shared = (FOLDER / "asking.py", FOLDER / "transformers.txt") if "prompt" in settings else ()
        for path in (self.adapter, self.backend or self.folder / "requirements.txt", *shared):
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()[:12]

    def language(self, of_clip: str) -> str | None:
        """What the model is told about a clip of this language."""
        return self.settings["languages"].get(of_clip)


def names() -> list[str]:
    """Those of this repository."""
    return sorted(path.parent.name for path in FOLDER.glob("*/adapter.py"))


def read_baseline(name: str, overrides: Sequence[str] = (), server: str | None = None) -> Baseline:
    """A baseline of this repository, or, where `name` has a slash, of that folder.

    Args:
        overrides: `key=value` settings on top of its file.
        server: URL of an OpenAI-like server that has the model; None = the model is loaded here.
    Raises:
        RecipeError: on an unknown name or setting, or a broken folder.
    """
    folder = Path(name).absolute() if "/" in name else FOLDER / name
    if not (folder / "adapter.py").is_file():
        fix = "see baselines/README.md" if "/" in name else nearest(name, names())
        raise RecipeError(f"baseline {name}", expected="a folder with adapter.py", found="none", fix=fix)
    path = folder / "settings.yaml"
    own = read_yaml(path)
    backend = FOLDER / SERVER / "adapter.py" if server and folder != FOLDER / SERVER else None
    shared = read_yaml(FOLDER / SERVER / "settings.yaml") if backend else {}
    settings = {**shared, **own, **({"url": server} if server else {})}
    known = _keys(settings)
    settings = apply_overrides(settings, overrides)
    for key in sorted(_keys(settings) - known):
        if not key.startswith(FREE):
            raise RecipeError(f"--set {key}", expected=f"a setting of {path}", found=repr(key), fix=nearest(key, sorted(known)))
    for key, kind in (("title", str), ("model", str), ("languages", dict)):
        if not isinstance(settings.get(key), kind):
            raise RecipeError(f"{path}: {key}", expected=f"a {kind.__name__}", found=repr(settings.get(key)), fix="see baselines/README.md")
    return Baseline(folder.name, folder, settings, backend)


def _keys(settings: Mapping[str, Any], above: str = "") -> set[str]:
    found = set()
    for key, value in settings.items():
        found |= {f"{above}{key}"} | (_keys(value, f"{above}{key}.") if isinstance(value, dict) else set())
    return found


def python_of(baseline: Baseline, given: Path | None) -> Path:
    """The interpreter that the adapter runs in: the given one, that of its environment, or this one where it needs no package."""
    if given is not None:
        if not given.is_file():
            raise RecipeError("--python", expected="a Python interpreter", found=f"no file {given}", fix="correct the path")
        return given
    if baseline.backend is not None or not _needs_packages(baseline):
        return Path(sys.executable)
    if not (baseline.environment / COMPLETE).is_file():
        fix = f"python -m nim4 baseline install {baseline.name}, or --python PATH of one that has its packages"
        raise RecipeError(f"baseline {baseline.name}", expected=f"its environment, {baseline.environment}", found="none", fix=fix)
    return baseline.environment / "bin" / "python"


def is_installed(baseline: Baseline) -> bool:
    return not _needs_packages(baseline) or (baseline.environment / COMPLETE).is_file()


def _needs_packages(baseline: Baseline) -> bool:
    path = baseline.folder / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return "code" in baseline.settings or any(line.split("#")[0].strip() for line in lines)


def install(baseline: Baseline, python: Path) -> None:
    """Makes the environment from the lock file, with the authors' code at its commit where that is no package.

    Raises RecipeError when the Python is another one than the lock file was made for, or a step fails.
    """
    environment, wanted = baseline.environment, str(baseline.settings.get("python", ""))
    version = _output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    if wanted and version != wanted:
        raise RecipeError("--python", expected=f"Python {wanted}, which {baseline.name}'s packages need", found=version, fix="--python PATH of one")
    if environment.exists():
        shutil.rmtree(environment)
    log.info("%s: making %s", baseline.name, environment)
    _step([python, "-m", "venv", environment], "room for an environment")
    locks = [baseline.folder / "requirements.txt"]
    if code := baseline.settings.get("code"):
        target = environment / "code"
        _step(["git", "clone", "--quiet", code["git"], target], "the authors' code")
        _step(["git", "-C", target, "checkout", "--quiet", "--detach", code["commit"]], "that commit of the authors' code")
        locks.append(target / "requirements.txt")
    for lock in locks:
        if lock.is_file():
            _step([environment / "bin" / "python", "-m", "pip", "install", "--no-input", "-r", lock], "packages that can be installed")
    (environment / COMPLETE).touch()
    log.info("%s: installed", baseline.name)


def _output(command: Sequence[object]) -> str:
    try:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RecipeError("--python", expected="a Python interpreter", found=error, fix="name another") from error


def _step(command: Sequence[object], expected: str) -> None:
    words = [str(word) for word in command]
    try:
        code = subprocess.run(words, check=False, stdout=2).returncode  # texts alone go to stdout
    except OSError as error:
        raise RecipeError(words[0], expected="a program that runs", found=error, fix="install it") from error
    if code:
        raise RecipeError(" ".join(words[:4]), expected=expected, found=f"exit code {code}", fix="see the lines above, and run it again")
