"""Grammars of written numbers, dates and units: wetext's, or by name those of WeTextProcessing. The only door to both.

wetext carries WeTextProcessing's grammars ready-made. WeTextProcessing itself is optional; it is compiled with the flags asked for into a folder
of ours, since the grammars in its package ignore flags without saying so.
"""

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nim4.config import RecipeError

ENGINES = ("wetext", "WeTextProcessing")
INSTALL = {"wetext": "pip install wetext==0.1.8", "WeTextProcessing": "pip install WeTextProcessing==1.2.0"}
MAX_CHARS = 300  # of a piece that a grammar sees: its time grows with the square of the length


def cache_folder() -> Path:
    """Where this program may keep what takes long to make: $XDG_CACHE_HOME/nim4, else ~/.cache/nim4."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nim4"


def version(engine: str) -> str:
    """The installed version of an engine. Raises RecipeError when there is none."""
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError as error:
        raise RecipeError(f"--engine {engine}", expected=f"the package {engine}", found="none", fix=INSTALL[engine]) from error


@functools.cache
def reader(language: str, engine: str = "wetext", **flags: bool) -> Callable[[str], str]:
    """A function that writes the numbers of a text as words.

    Args:
        language: zh | en | auto, which is en for texts without a Chinese character that are not digits alone.
        engine: one of ENGINES.
        flags: of the Chinese grammar: remove_erhua, remove_interjections, traditional_to_simple, full_to_half, remove_puncts; default all False.
    Raises:
        RecipeError: when the engine's package is missing. The function raises ValueError where the grammar has no path for a text.
    """
    read = (_wetext if engine == "wetext" else _wetextprocessing)(language, flags)

    def checked(text: str) -> str:
        try:
            return read(text)
        except Exception as error:  # an AssertionError of wetext, an error of OpenFst's own: all mean the same
            raise ValueError(f"no grammar reads {text!r}") from error

    return checked


def in_pieces(text: str, read: Callable[[str], str]) -> str:
    """`read` of a text of any length: it sees at most MAX_CHARS at once, cut behind a blank or mark, else a character, and in no number if it can."""
    done, start = "", 0
    while len(text) - start > MAX_CHARS:
        late = range(start + MAX_CHARS, start + MAX_CHARS // 2, -1)  # places of the next piece's first character
        free = [i for i in late if not text[i].isdigit() and not text[i - 1].isdigit()]
        end = next((i for i in free if not text[i - 1].isalnum()), next(iter(free), start + MAX_CHARS))
        done += read(text[start:end]) + (" " if text[end - 1].isspace() else "")
        start = end
    return done + read(text[start:])


def _wetext(language: str, flags: dict[str, bool]) -> Callable[[str], str]:
    try:
        from wetext import Normalizer
    except ImportError as error:
        raise RecipeError("numbers in text", expected="the package wetext", found=error, fix=INSTALL["wetext"]) from error
    return Normalizer(lang=language, operator="tn", **flags).normalize


def _wetextprocessing(language: str, flags: dict[str, bool]) -> Callable[[str], str]:
    known = version("WeTextProcessing")
    asked = {name: flags.get(name, False) for name in _COMPILED}
    folder = cache_folder() / f"WeTextProcessing-{known}-{hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:12]}"
    if language == "auto":
        chinese, english = (_wetextprocessing(name, flags) for name in ("zh", "en"))
        return lambda text: chinese(text) if text.isdigit() or any("\u4e00" <= char <= "\u9fff" for char in text) else english(text)
    if language == "en":
        from tn.english.normalizer import Normalizer as English

        return English().normalize  # it has no flags, so the grammar in the package will do
    from tn.chinese.normalizer import Normalizer as Chinese

    if not (folder / "complete").is_file():
        Chinese(cache_dir=str(folder), overwrite_cache=True, **asked)
        (folder / "complete").touch()
    return Chinese(cache_dir=str(folder), **asked).normalize


_COMPILED: tuple[str, ...] = ("remove_erhua", "remove_interjections", "traditional_to_simple", "full_to_half", "remove_puncts")


def described(engine: str, flags: dict[str, bool]) -> dict[str, Any]:
    """What decides an engine's readings, for records and hashes."""
    return {"engine": engine, "version": version(engine), "flags": flags}
