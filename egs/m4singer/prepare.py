"""M4Singer as its makers deliver it: m4singer/meta.json, a list of objects with item_name `<singer>#<song>#<number>` and txt, and
m4singer/<singer>#<song>/<number>.wav, 48 kHz, a line of a song each.

There is no split for recognition, and the paper does not say which part it tests on: all of it is `test` here, nothing is to train on.
`<AP>` and `<SP>`, breath and silence, are taken out of the text. Counts (about 20.9 thousand) are unverified, so not checked.
"""

import re
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row

META = "meta.json"
MARKS = re.compile("<?(?:AP|SP)>?")
FIX = "give the folder that holds m4singer as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """All lines of all songs."""
    root = source / "m4singer" if (source / "m4singer").is_dir() else source
    rows = []
    for entry in read_table(root / META, ["item_name", "txt"]):
        parts = entry["item_name"].split("#")
        if len(parts) != 3 or not all(parts) or "/" in entry["item_name"]:
            raise RecipeError(root / META, expected="item_name as singer#song#number", found=repr(entry["item_name"]), fix=FIX)
        singer, song, number = parts
        rows.append(Row(entry["item_name"], root / f"{singer}#{song}" / f"{number}.wav", MARKS.sub("", entry["txt"]), singer, "zh"))
    return {"test": rows}
