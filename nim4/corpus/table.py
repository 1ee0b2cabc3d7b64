"""What most corpora share: a file of transcripts, a tree of audio files, and ids that tie the two together. No audio is read here."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nim4.config import RecipeError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One utterance as a recipe finds it. None stands for what the corpus lacks; the gap is then listed, never hidden."""

    id: str
    audio: Path | None  # any file soundfile reads; None: there is a transcript and no audio
    text: str | None  # as published; None: there is audio and no transcript
    speaker: str
    language: str  # zh | en | zh-en; noise where nobody speaks
    start_s: float = 0.0  # where the utterance begins in `audio`
    end_s: float | None = None  # and where it ends; None: with the recording


def need(path: Path, fix: str) -> Path:
    """`path`, once it is sure that it exists. Raises RecipeError with `fix` otherwise."""
    if not path.exists():
        raise RecipeError(path, expected="a file or folder of the corpus", found="nothing", fix=fix)
    return path


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of the corpus, without their ends; a byte order mark is passed over.

    Raises:
        RecipeError: if the file cannot be read, or, with the line's number, if a line is not UTF-8.
    """
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise RecipeError(path, expected="a text file of the corpus", found=error.strerror, fix="unpack the corpus again") from error
    lines = [line.removesuffix(b"\r") for line in raw.removesuffix(b"\n").split(b"\n")] if raw else []  # U+2028 and the like end no line here
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            fix = "convert the file, for example iconv -f GB18030 -t UTF-8; where encodings are mixed, that line alone"
            raise RecipeError(f"{path}, line {number}", expected="UTF-8", found=f"byte {line[error.start]:#04x}", fix=fix) from error
    return decoded


def read_transcripts(path: Path) -> list[tuple[str, str]]:
    """(id, text) of each line `id text`, in order; the text may be empty, and ids may repeat. Raises RecipeError as read_lines does."""
    fields = [line.split(maxsplit=1) for line in read_lines(path) if line.strip()]
    return [(parts[0], parts[1].strip() if len(parts) > 1 else "") for parts in fields]


def match(transcripts: Iterable[tuple[str, str]], audio: Iterable[Path], speaker_of: Callable[[str], str], language: str) -> list[Row]:
    """Rows for audio files named after their ids. A gap on either side, or an id that comes twice, becomes a row that stage 0 lists.

    Args:
        transcripts: (id, text) pairs.
        audio: files whose name without suffix is the id.
        speaker_of: speaker from the id.
        language: zh, en or zh-en.
    """
    texts: dict[str, list[str | None]] = {}
    for utterance_id, text in transcripts:
        texts.setdefault(utterance_id, []).append(text)
    rows, heard = [], set()
    for path in audio:
        heard.add(path.stem)
        rows += [Row(path.stem, path, text, speaker_of(path.stem), language) for text in texts.get(path.stem, [None])]
    silent = [(utterance_id, text) for utterance_id, found in texts.items() for text in found if utterance_id not in heard]
    return rows + [Row(utterance_id, None, text, speaker_of(utterance_id), language) for utterance_id, text in silent]


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, spread evenly, so that many speakers stay; always the same ones."""
    if limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
