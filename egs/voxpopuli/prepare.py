"""VoxPopuli's transcribed English: asr_{train,dev,test}.tsv with the columns id, raw_text, normalized_text, speaker_id and more, and a file
<id>.ogg or <id>.wav per utterance. Two packings have it: transcribed_data/en as the corpus's own get_asr_data.py cuts it out, with folders of
years; and data/en on the Hugging Face hub, with <split>/<split>_part_<n>.tar.gz. Audio is looked for anywhere beside the tables.

The reference is normalized_text (lower case, no punctuation). Splits that are there are read; --download true fetches dev and test.
"""

import json
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.download import fetch, unpack
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row, match, need

URL = "https://huggingface.co/datasets/facebook/voxpopuli/resolve/4ca6fb6d6bb37af66991d05974e6abcadd4b181e/data"  # a fixed revision
SPLITS = ("train", "dev", "test")
# the hub's viewer shows 1.75k and 1.84k rows; with LibriSpeech's these are the 14,721 utterances that the paper's English rates fit
COUNTS = {"dev": 1753, "test": 1842}
FIX = "give the folder of asr_test.tsv, or the one that holds transcribed_data/en or data/en, as --source, or add --download true"


def download(target: Path) -> None:
    """Fetches the tables and archives of dev and test, about 1 GB; how many archives there are stands in a file beside them."""
    counts = target / "n_files.json"
    fetch(f"{URL}/n_files.json", counts)
    for split in ("dev", "test"):
        fetch(f"{URL}/en/asr_{split}.tsv", target / f"asr_{split}.tsv")
        try:
            number = int(json.loads(counts.read_bytes())["en"][split])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(counts, expected=f"the number of archives of en, {split}", found=repr(error), fix="delete it and try again") from error
        for part in range(number):
            name = f"{split}_part_{part}.tar.gz"
            unpack(target / name, target, sha256=fetch(f"{URL}/en/{split}/{name}", target / name))


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The utterances of each split that is there."""
    places = [source, source / "transcribed_data" / "en", source / "data" / "en", source / "en"]
    root = next((place for place in places if any(place.glob("asr_*.tsv"))), source)
    present = [split for split in SPLITS if (root / f"asr_{split}.tsv").exists()]
    need(root / f"asr_{present[0] if present else 'test'}.tsv", FIX)
    audio = {path.stem: path for path in sorted(root.rglob("*")) if path.suffix in (".ogg", ".wav")}
    rows = {}
    for split in present:
        table = read_table(root / f"asr_{split}.tsv", ["id", "normalized_text", "speaker_id"])
        speakers = {row["id"]: row["speaker_id"] for row in table if row["speaker_id"] not in ("", "None")}
        here = [audio[row["id"]] for row in table if row["id"] in audio]
        rows[split] = match(
            [(row["id"], row["normalized_text"]) for row in table], dict.fromkeys(here), lambda name, known=speakers: known.get(name, name), "en"
        )
    return rows
