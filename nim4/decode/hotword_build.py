"""From word lists to the folder of a hotword index."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nim4 import stage
from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.g2p_en import LEXICON_DIR
from nim4.corpus.hotword_list import MAX_PHONES, MIN_PHONES, ListReport, make_keys, read_list
from nim4.corpus.progress import Progress
from nim4.corpus.units import PhonemeInventory
from nim4.decode.hotword import MAX_PER_MILLION, HotwordIndex

log = stage.log


def build_folder(
    lists: Sequence[Path], out: Path, *, units: Path | None = None, tones: str = "toned", ordinary: Path | None = None, jobs: int = 1
) -> None:
    """Makes the folder: hotwords.bin, report.json (counts), skipped.tsv (what was left out), done.json. Same inputs: nothing is done.

    Args:
        lists: word lists, see nim4/corpus/hotword_list.py.
        units: tokens.txt of the model, or the folder that holds it; None = our inventory.
        tones: see HotwordIndex.build.
        ordinary: a text without hotwords, a sentence per line, from which the stop-list is made.
        jobs: processes.
    """
    tokens = units / "tokens.txt" if units is not None and units.is_dir() else units
    inventory = PhonemeInventory.load(tokens) if tokens is not None else PhonemeInventory.default()
    dictionaries = {path.name: stage.file_hash(path) for path in sorted(LEXICON_DIR.iterdir())}
    config = {"tones": tones, "phones": [MIN_PHONES, MAX_PHONES], "max_per_million": MAX_PER_MILLION, "dictionaries": dictionaries}
    for path in lists:
        if not path.is_file():
            raise RecipeError(path, expected="a word list", found="a folder" if path.is_dir() else "no such file", fix="correct the path")
    if jobs < 1:
        raise RecipeError("--jobs", expected="at least 1", found=jobs, fix="leave it out")
    inputs = [*lists, *([tokens] if tokens is not None else []), *([ordinary] if ordinary is not None else [])]
    output = stage.StageOutput(out, config=config, inputs=inputs)
    if output.is_done():
        return
    report = ListReport()
    names = [name for path in lists for name in read_list(path, inventory, report)]
    keyed = make_keys(names, inventory, report, jobs=jobs)
    report.log(", ".join(map(str, lists)))
    if not keyed.names:
        reasons = {reason: len(lines) for reason, lines in report.skipped.items()}
        raise RecipeError(lists[0], expected="at least one name that can be said", found=f"none; left out: {reasons}", fix="correct the list")
    work = output.begin()
    texts = _phones_of(ordinary, inventory) if ordinary is not None else ()
    index = HotwordIndex.build(keyed, inventory, tones=tones, ordinary=texts)
    index.save(work)
    left_out = {reason: len(lines) for reason, lines in sorted(report.skipped.items())}
    facts = {"names": report.names, "keys": report.keys, "merged": report.merged, "left_out": left_out}
    stage.write_json(work / "report.json", facts | {"index": index.stats()})
    with stage.atomic_write(work / "skipped.tsv") as file:
        file.writelines(f"{line}\t{reason}\t{_one_line(text)}\n" for reason, lines in sorted(report.skipped.items()) for line, text in lines)
    output.finish(**facts)


def _phones_of(path: Path, inventory: PhonemeInventory) -> Iterator[list[int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a readable UTF-8 text", found=error, fix="correct --ordinary") from error
    reader, progress = Lexicon(), Progress("ordinary text", len(lines), "lines")
    for line in lines:
        yield [number for number in inventory.encode(reader.phones(line)) if number != inventory.unk_id]
        progress.add()


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
