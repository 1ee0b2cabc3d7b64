"""Test sets dense in names, from a list of names and your own recordings: SOURCE/{names.tsv, script.tsv, recordings/<speaker>/<id>.<ending>}.

names.tsv is a word list as `python -m nim4 hotwords build` reads it, with a tag per name (poi, media, device, or your own). make_script.py
makes script.tsv of it, what is to be read out: columns id, tag, text. Each tag is a split, test_<tag>. A line may be read by any number of
speakers; what nobody has recorded yet is no part of the set, and a recording of no line is listed.
"""

import logging
import re
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row, need

log = logging.getLogger("nim4")
FIX = "give the folder that holds script.tsv and recordings as --source; egs/entities/make_script.py writes script.tsv"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The recordings of each tag."""
    script: dict[str, dict[str, str]] = {}
    for row in read_table(need(source / "script.tsv", FIX), ["id", "tag", "text"]):
        if row["id"] in script:
            raise RecipeError(source / "script.tsv", expected="each id once", found=f"{row['id']!r} twice", fix="give each line its own id")
        if not re.fullmatch(r"[\w-]+", row["tag"]):
            raise RecipeError(source / "script.tsv", expected="tags of letters, digits, _ and -", found=repr(row["tag"]), fix="rename the tag")
        script[row["id"]] = row
    rows: dict[str, list[Row]] = {}
    heard = set()
    for path in sorted(path for path in need(source / "recordings", FIX).glob("*/*") if not path.name.startswith(".")):
        line, speaker = script.get(path.stem), path.parent.name
        heard.add(path.stem)
        split = f"test_{line['tag'] if line else 'unknown'}"
        rows.setdefault(split, []).append(Row(f"{speaker}-{path.stem}", path, line["text"] if line else None, speaker, "zh-en"))
    stray = rows.pop("test_unknown", [])
    if not rows:
        raise RecipeError(source / "recordings", expected="<speaker>/<id of script.tsv>.wav", found=f"{len(stray)} others", fix=FIX)
    rows[next(iter(rows))] += stray
    log.info("%d of %d lines of the script are recorded", len(heard & set(script)), len(script))
    return rows
