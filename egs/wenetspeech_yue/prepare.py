"""WSYue-ASR-eval, the test set of WenetSpeech-Yue: Short/{content.txt, wav.tar.gz} and Long/{TextGrid.tar.gz, wav.tar.gz}.

content.txt has no names above its columns: file, age, emotion, gender, text. In Long the text of a recording is all of the tier 文本 of its
TextGrid. References are in traditional script with English words, and stay so. Speakers are not told apart, so each recording is its own.
Counts (7,060 short and 370 long, by one third party) are unverified, so not checked.
"""

from pathlib import Path

from nim4.corpus.download import fetch, unpack
from nim4.corpus.loaders import read_table
from nim4.corpus.table import Row, match, need
from nim4.corpus.text import joined
from nim4.corpus.textgrid import read_intervals

URL = "https://huggingface.co/datasets/ASLP-lab/WSYue-ASR-eval/resolve/main"
CONTENT = ("file", "age", "emotion", "gender", "text")
TIER = "文本"
FIX = "give the folder that holds Short and Long, their archives unpacked, as --source, or add --download true (1.2 GB)"


def download(target: Path) -> None:
    """Fetches the four files and unpacks the archives beside them."""
    fetch(f"{URL}/Short/content.txt", target / "Short" / "content.txt")
    for name in ("Short/wav.tar.gz", "Long/wav.tar.gz", "Long/TextGrid.tar.gz"):
        unpack(target / name, (target / name).parent, sha256=fetch(f"{URL}/{name}", target / name))


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The recordings of test_short and test_long."""
    short, long = need(source / "Short", FIX), need(source / "Long", FIX)
    table = read_table(short / "content.txt", CONTENT, CONTENT)
    texts = {
        "test_short": [(Path(row["file"]).stem, row["text"]) for row in table],
        "test_long": [
            (path.stem, joined([text for _, _, text in read_intervals(path, TIER)]))
            for path in sorted(long.rglob("*.TextGrid"))
            if not path.name.startswith(".")
        ],
    }
    audio = {"test_short": short, "test_long": long}
    return {
        split: match(texts[split], sorted(path for path in folder.rglob("*.wav") if not path.name.startswith(".")), lambda name: name, "zh-en")
        for split, folder in audio.items()
    }
