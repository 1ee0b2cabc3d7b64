"""Voices-in-the-Wild-Bench as the hub packs it: data/*.parquet with the columns audio, text (answer in an older copy), subset and name. A
subset is `<real or sim>-<zh or en>-<condition>`; everything but real- is simulated.

The splits are test_real_zh, test_real_en, test_sim_zh and test_sim_en: a third party reports that the references of simulated clips
hold only part of what is heard, so the two are never pooled. The condition stays in the id.
"""

from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.parquet_audio import column_names, unpack_rows
from nim4.corpus.table import Row

COUNTS = {"test_real_*": 1500, "test_sim_*": 3500}  # arXiv 2605.19833 and the readme of its repository
FIX = "give the folder of the dataset repository, which holds data/*.parquet, as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The clips by origin and language."""
    files = sorted((source / "data" if (source / "data").is_dir() else source).glob("*.parquet"))
    if not files:
        raise RecipeError(source, expected="data/*.parquet", found="none", fix=FIX)
    text = "answer" if "text" not in column_names(files[0]) else "text"
    found = unpack_rows({"all": files}, (text, "subset", "name"), work)["all"]
    rows: dict[str, list[Row]] = {}
    for row in found:
        subset = str(row["subset"])
        language = next((name for name in ("zh", "en") if name in subset.split("-")), None)
        if language is None:
            raise RecipeError(f"{source}, {row['name']}", expected="a subset with zh or en", found=repr(subset), fix="correct prepare.py")
        name = f"{subset}-{row['name']}"
        split = f"test_{'real' if subset.startswith('real-') else 'sim'}_{language}"
        rows.setdefault(split, []).append(Row(name, row["audio"], row[text], name, language))
    return dict(sorted(rows.items()))
