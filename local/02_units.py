"""Stage 2: what the acoustic model learns to write, one string of phones per utterance.

Reads the text of every utterance aloud, on paper (nim4/corpus/g2p.py), and keeps the phones in `supervision.custom["phones"]`; the text
stays as published. Utterances that would teach nothing right are left out of the training splits, and only there: no text, no phones,
more than 5 % unknown phones, or more phones than CTC can place in the audio. left_out.jsonl lists each with the reason.
With --ngram, words.arpa and phones.arpa are n-grams of the training transcripts, for decode configs that search with one.

    python local/02_units.py --fbank data/aishell/fbank --out data/aishell/units --language zh --train-splits train
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import nim4.stage
from nim4.config import RecipeError, nearest
from nim4.corpus.g2p import LANGUAGES, Lexicon, Reading, read_pronunciations
from nim4.corpus.g2p_en import LEXICON_DIR
from nim4.corpus.manifest import load_cuts, save_cuts, split_paths
from nim4.corpus.ngram import count_ngrams
from nim4.corpus.units import UNKNOWN, PhonemeInventory, ctc_fits, num_encoder_frames

log = logging.getLogger("nim4")
MAX_UNKNOWN_PERCENT = 5.0  # ours
TOP_UNKNOWN = 10  # words shown in the log


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--fbank", type=Path, required=True, help="product folder of stage 1")
    parser.add_argument("--out", type=Path, required=True, help="product folder")
    parser.add_argument(
        "--language", default="zh-en", choices=LANGUAGES, help="how digits are read; zh-en: in Mandarin where the text has Chinese characters"
    )
    parser.add_argument("--train-splits", default="train", help="splits that unfit utterances are left out of, space separated")
    parser.add_argument("--ngram", type=int, default=0, help="words in the longest n-gram of words.arpa and phones.arpa; 0 = no such files")
    parser.add_argument(
        "--pronunciations", type=Path, default=None, help="your own readings, word<TAB>phones per line; they win over every dictionary"
    )
    return parser


def reason_to_leave_out(text: str, phones: list[str], num_feature_frames: int) -> str | None:
    """Why an utterance is unfit for training; None when it is fit."""
    if not text.strip():
        return "empty text"
    if not phones:
        return "no phones"
    if 100.0 * phones.count(UNKNOWN) / len(phones) > MAX_UNKNOWN_PERCENT:
        return f"more than {MAX_UNKNOWN_PERCENT:g} % unknown phones"
    if not ctc_fits(num_encoder_frames(num_feature_frames), phones):
        return "too short for its phones"
    return None


class Transcripts:
    """The training texts, of which n-grams are counted: an utterance counts once, also with copies of it at other speeds."""

    def __init__(self) -> None:
        self._readings: dict[str, tuple[Reading, ...]] = {}

    def add(self, supervision: Any, readings: tuple[Reading, ...]) -> None:
        self._readings[supervision.id] = readings

    def save_ngrams(self, order: int, folder: Path) -> None:
        words = [[UNKNOWN if UNKNOWN in reading.phones else reading.word for reading in text] for text in self._readings.values()]
        phones = [[phone for reading in text for phone in reading.phones] for text in self._readings.values()]
        for name, texts in (("words", words), ("phones", phones)):
            model, names = count_ngrams(texts, order)
            model.save_arpa(folder / f"{name}.arpa", names)
            log.info("%s.arpa: %d-gram of %d texts, %d different %s", name, order, len(texts), len(names) - 2, name)


def add_phones(
    path: Path, out: Path, lexicon: Lexicon, is_train: bool, transcripts: Transcripts | None
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Writes one split with phones. Returns its counts, and the utterances left out of it."""
    kept, left_out = [], []
    num_phones = num_unknown = 0
    reasons: Counter[str] = Counter()
    for cut in load_cuts(path):
        if not cut.has_features or len(cut.supervisions) != 1:
            found = "no features" if not cut.has_features else f"{len(cut.supervisions)} supervisions"
            raise RecipeError(f"{path}, {cut.id}", expected="features and one supervision", found=found, fix="run stage 1 again")
        supervision = cut.supervisions[0]
        text = supervision.text or ""
        readings = lexicon.read(text)
        phones = [phone for reading in readings for phone in reading.phones]
        reason = reason_to_leave_out(text, phones, cut.num_frames) if is_train else None
        if reason is not None:
            reasons[reason] += 1
            facts = {"num_phones": len(phones), "num_unknown": phones.count(UNKNOWN), "num_encoder_frames": num_encoder_frames(cut.num_frames)}
            left_out.append({"id": cut.id, "split": out.name.removesuffix(".jsonl.gz"), "reason": reason, "text": text, **facts})
            continue
        num_phones += len(phones)
        num_unknown += phones.count(UNKNOWN)
        supervision.custom = {**(supervision.custom or {}), "phones": " ".join(phones)}
        kept.append(cut)
        if is_train and transcripts is not None:
            transcripts.add(supervision, readings)
    if not kept:
        raise RecipeError(path, expected="an utterance fit for training", found=f"none: {dict(reasons)}", fix="check the texts and --language")
    save_cuts(kept, out)
    counts: dict[str, object] = {"utterances": len(kept), "phones": num_phones, "unknown_phones": num_unknown}
    counts["unknown_percent"] = round(100.0 * num_unknown / max(num_phones, 1), 3)
    return {**counts, "left_out": dict(sorted(reasons.items()))}, left_out


def log_unknown(lexicon: Lexicon, out: Path) -> None:
    unknown = lexicon.top_unknown()
    if unknown:
        shown = "; ".join(f"{word} x{count} ({how})" for (word, how), count in unknown[:TOP_UNKNOWN])
        log.info("%d words in no dictionary, all in %s; the most frequent: %s", len(unknown), out / "unknown.tsv", shown)


def main() -> None:
    options = build_parser().parse_args()
    manifests = split_paths(options.fbank)
    if not manifests:
        raise RecipeError(options.fbank, expected="manifests of stage 1", found="none", fix="run stage 1, or correct --fbank")
    train_splits = options.train_splits.split()
    for split in train_splits:
        if split not in manifests:
            raise RecipeError("--train-splits", expected="splits of stage 1", found=repr(split), fix=nearest(split, list(manifests)))
    own = read_pronunciations(options.pronunciations) if options.pronunciations else {}
    inputs = [options.fbank, *([options.pronunciations] if options.pronunciations else [])]
    inventory = PhonemeInventory.default()
    dictionaries = {path.name: nim4.stage.file_hash(path) for path in sorted(LEXICON_DIR.iterdir())}
    if options.ngram < 0 or (options.ngram and not train_splits):
        expected, found = "0 or more, and more than 0 only with training splits", f"{options.ngram}, splits {options.train_splits!r}"
        raise RecipeError("--ngram", expected=expected, found=found, fix="for example --ngram 3 --train-splits train")
    config = {"language": options.language, "train_splits": sorted(train_splits), "num_symbols": len(inventory), "dictionaries": dictionaries}
    config |= {"ngram": options.ngram} if options.ngram else {}
    output = nim4.stage.StageOutput(options.out, config=config, inputs=inputs)
    if output.is_done():
        return
    work = output.begin()
    lexicon, transcripts = Lexicon(options.language, own), Transcripts() if options.ngram else None
    report: dict[str, dict[str, object]] = {}
    left_out: list[dict[str, object]] = []
    for split, path in manifests.items():
        report[split], left_out_here = add_phones(path, work / path.name, lexicon, split in train_splits, transcripts)
        left_out += left_out_here
        log.info("%s: %s", split, ", ".join(f"{name} {value}" for name, value in report[split].items()))
    inventory.save(work / "tokens.txt")
    lexicon.save(work / "lexicon.tsv")
    lexicon.save_unknown(work / "unknown.tsv")
    if transcripts is not None:
        transcripts.save_ngrams(options.ngram, work)
    nim4.stage.write_jsonl(work / "left_out.jsonl", left_out)
    nim4.stage.write_json(work / "report.json", {"num_symbols": len(inventory), "splits": report})
    log_unknown(lexicon, options.out)
    output.finish(splits=report, left_out=len(left_out))


if __name__ == "__main__":
    nim4.stage.run(main, "units")
