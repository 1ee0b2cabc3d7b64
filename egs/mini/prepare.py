"""egs/mini: word recordings joined into code-switch phrases, read sentences, and noise; all audio is kept beside this file.

Speakers never cross splits in the phrases: 18 train, 2 are for validation, 6 for test.
"""

import csv
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from nim4.corpus.download import unpack
from nim4.corpus.table import Row, need, spread

sys.path.insert(0, str(Path(__file__).parent))
import phrase_audio
import phrase_texts

PHRASES = {"train": 56, "dev": 40, "test": 40}  # per speaker and kind; the kinds are grammar phrases and random joins
SEED = 20260


def prepare(source: Path, work: Path, limit: int) -> dict[str, list[Row]]:
    """The splits of egs/mini. `source` holds one archive and one table per origin; phrases are joined into `work`, those within `limit` only."""
    for archive in source.glob("*.tar"):
        unpack(archive, work / archive.stem)
    splits, phrases = plan(source, work)
    if limit:
        splits = {split: spread(rows, limit) for split, rows in splits.items()}
    wanted = {row.audio for rows in splits.values() for row in rows}
    phrase_audio.record({path: phrase for path, phrase in phrases.items() if path in wanted})
    return splits


def plan(source: Path, work: Path) -> tuple[dict[str, list[Row]], dict[Path, phrase_audio.Phrase]]:
    """The utterances of every split, and the phrases among them that have to be joined. No audio is touched."""
    splits = {f"{split}_{name}": [] for split, name in itertools.product(("train", "dev", "test"), ("grammar", "joins"))}
    phrases: dict[Path, phrase_audio.Phrase] = {}
    recordings = list(_table(source / "dspspeech20.tsv"))
    grammar = phrase_texts.read_grammar(Path(__file__).parent / "grammar.txt")
    for speaker in sorted({row["speaker"] for row in recordings}):
        own = [row for row in recordings if row["speaker"] == speaker]
        split = own[0]["split"]
        takes: dict[str, list[Path]] = {}
        for row in own:
            takes.setdefault(row["text"], []).append(work / "dspspeech20" / f"{row['utt_id']}.opus")
        if split == "train":
            words = [
                Row(f"{row['utt_id']}-word", work / "dspspeech20" / f"{row['utt_id']}.opus", row["text"], speaker, row["language"]) for row in own
            ]
            splits.setdefault("train_words", []).extend(words)
        for name in ("grammar", "joins"):
            rng = random.Random(f"{SEED} {speaker} {name}")
            for number in range(PHRASES[split]):
                text = phrase_texts.draw_phrase(grammar, rng) if name == "grammar" else phrase_texts.draw_join(sorted(takes), rng)
                path = work / "phrases" / f"{speaker}-{name}-{number:03d}.wav"
                phrases[path] = phrase_audio.draw_takes(speaker, phrase_texts.words_of(text), takes, rng)
                splits[f"{split}_{name}"].append(Row(path.stem, path, text, speaker, "zh-en"))
    splits["train_phrases"] = splits.pop("train_grammar") + splits.pop("train_joins")
    splits["dev"] = splits.pop("dev_grammar") + splits.pop("dev_joins")
    for origin, name in (("aishell1_s0150", "sent"), ("an4", "an4"), ("noise", "noise")):
        for row in _table(source / f"{origin}.tsv"):
            audio = work / origin / f"{row['utt_id']}.opus"
            splits.setdefault(f"{row['split']}_{name}", []).append(Row(row["utt_id"], audio, row["text"], row["speaker"], row["language"]))
    splits["noise"] = splits.pop("train_noise")  # to mix into speech; no recording of it is in test_noise
    return splits, phrases


def _table(path: Path) -> Iterator[dict[str, str]]:
    with open(need(path, "give the folder egs/mini/audio as --source"), encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")
