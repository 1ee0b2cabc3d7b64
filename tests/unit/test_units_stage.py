"""Stage 2 on a few cuts: what it writes, what it leaves out and where, and how it fails."""

import importlib
import json
import sys

import numpy as np
import pytest
from lhotse import CutSet, LilcomChunkyWriter, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from nim4.config import RecipeError
from nim4.corpus.g2p import load_lexicon
from nim4.corpus.manifest import load_cuts, save_cuts
from nim4.corpus.ngram import NgramStates, count_ngrams
from nim4.corpus.units import PhonemeInventory
from nim4.stage import StageOutput, read_json, read_jsonl

units_stage = importlib.import_module("local.02_units")

TRAIN = [("fit", "银行CarPlay", 100), ("short", "打开空调第2名", 40), ("empty", " ", 100), ("silent", "……", 100), ("unknown", "好😀😀", 100)]
TEST = [("t_short", "打开空调第2名", 8), ("t_empty", "", 100), ("t_unknown", "zorblax😀", 100)]


def make_cut(name, text, num_frames, writer):
    duration_s = num_frames / 100
    recording = Recording(name, [AudioSource("file", [0], f"/audio/{name}.wav")], 16_000, num_frames * 160, duration_s)
    supervision = SupervisionSegment(name, name, 0.0, duration_s, text=text, speaker="s1", language="zh-en", custom={"kept": 1})
    cut = MonoCut(name, 0.0, duration_s, 0, [supervision], recording=recording)
    array = np.full((num_frames, 80), float(num_frames), dtype=np.float32)
    features = {"storage_type": writer.name, "storage_path": str(writer.storage_path), "storage_key": writer.write(name, array)}
    cut.features = features_of(features, cut)
    return cut


def features_of(stored, cut):
    from lhotse import Features

    return Features(
        type="fbank",
        num_frames=cut.duration * 100,
        num_features=80,
        frame_shift=0.01,
        sampling_rate=16_000,
        start=0.0,
        duration=cut.duration,
        recording_id=cut.id,
        channels=0,
        **stored,
    )


@pytest.fixture
def fbank(tmp_path):
    output = StageOutput(tmp_path / "fbank", config={})
    work = output.begin()
    (work / "feats").mkdir()
    for split, rows in (("train", TRAIN), ("test", TEST)):
        with LilcomChunkyWriter(work / "feats" / split) as writer:
            save_cuts([make_cut(*row, writer) for row in rows], work / f"{split}.jsonl.gz")
    output.finish()
    return tmp_path / "fbank"


def run_stage(monkeypatch, fbank, *options):
    monkeypatch.setattr(sys, "argv", ["02_units.py", "--fbank", str(fbank), "--out", str(fbank.parent / "units"), *options])
    units_stage.main()
    return fbank.parent / "units"


def phones_of(cuts: CutSet):
    return {cut.id: cut.supervisions[0].custom["phones"] for cut in cuts}


def test_ngrams_of_the_training_texts(monkeypatch, fbank):
    work = fbank / "train.jsonl.gz"
    cuts = list(load_cuts(work))
    fit = next(cut for cut in cuts if cut.id == "fit")
    save_cuts([*cuts, fit.with_id("sp0.9-fit")], work)  # as stage 1 leaves copies at another speed
    out = run_stage(monkeypatch, fbank, "--ngram", "2")
    words, phones = (NgramStates.of_arpa(out / f"{name}.arpa") for name in ("words", "phones"))
    assert words.words == ("carplay", "银行", "</s>")  # of the one text that is fit, and of no test set
    assert sorted(phones.words[:-1]) == sorted(set(["0", "in2", "h", "ang2", "K", "AA", "R", "P", "L", "EY"]))
    counted, names = count_ngrams([["银行", "carplay"]], 2)
    counted.save_arpa(out.parent / "expected.arpa", names)
    assert (out / "words.arpa").read_text(encoding="utf-8") == (out.parent / "expected.arpa").read_text(encoding="utf-8")
    assert not (run_stage(monkeypatch, fbank) / "words.arpa").exists()


@pytest.mark.parametrize("options", [("--ngram", "-1"), ("--ngram", "3", "--train-splits", "")])
def test_an_ngram_of_nothing_is_told(monkeypatch, fbank, options):
    with pytest.raises(RecipeError, match="--ngram: expected 0 or more, and more than 0 only with training splits"):
        run_stage(monkeypatch, fbank, *options)


def test_products(monkeypatch, fbank):
    out = run_stage(monkeypatch, fbank)
    train, test = load_cuts(out / "train.jsonl.gz"), load_cuts(out / "test.jsonl.gz")
    assert phones_of(train) == {"fit": "0 in2 h ang2 K AA R P L EY"}
    assert phones_of(test) == {"t_short": "d a3 k ai1 k ong1 t iao2 d i4 0 er4 m ing2", "t_empty": "", "t_unknown": "Z AO R B L AE K S <unk>"}
    cut = next(iter(train))
    assert cut.supervisions[0].text == "银行CarPlay"
    assert cut.supervisions[0].custom["kept"] == 1
    assert cut.load_features().shape == (100, 80)  # the paths still lead to the features of stage 1
    assert len(PhonemeInventory.load(out / "tokens.txt")) == read_json(out / "report.json")["num_symbols"]
    assert load_lexicon(out / "lexicon.tsv")["carplay"] == [("K", "AA", "R", "P", "L", "EY")]
    assert (out / "unknown.tsv").read_text(encoding="utf-8") == "😀\t3\t<unk>\nzorblax\t1\tletter-to-sound: Z AO R B L AE K S\n"
    reasons = {row["id"]: row["reason"] for row in read_jsonl(out / "left_out.jsonl")}
    assert reasons == {
        "short": "too short for its phones",
        "empty": "empty text",
        "silent": "no phones",
        "unknown": "more than 5 % unknown phones",
    }
    splits = read_json(out / "done.json")["splits"]
    assert splits["train"]["left_out"] == dict.fromkeys(sorted(reasons.values()), 1)
    assert splits["test"] == {"utterances": 3, "phones": 23, "unknown_phones": 1, "unknown_percent": 4.348, "left_out": {}}


def test_skipped_and_rebuilt(monkeypatch, fbank, caplog, tmp_path):
    caplog.set_level("INFO", "nim4")
    out = run_stage(monkeypatch, fbank)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "done.json"}
    caplog.clear()
    run_stage(monkeypatch, fbank)
    assert "skipped" in caplog.text
    own = tmp_path / "own.tsv"
    own.write_text("CarPlay\tK AA\n", encoding="utf-8")
    run_stage(monkeypatch, fbank, "--pronunciations", str(own))
    assert phones_of(load_cuts(out / "train.jsonl.gz")) == {"fit": "0 in2 h ang2 K AA"}
    run_stage(monkeypatch, fbank)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "done.json"} == before


def test_train_splits_may_be_many_or_none(monkeypatch, fbank):
    out = run_stage(monkeypatch, fbank, "--train-splits", "")
    assert len(load_cuts(out / "train.jsonl.gz")) == len(TRAIN)
    out = run_stage(monkeypatch, fbank, "--train-splits", "train", "--language", "en")
    assert phones_of(load_cuts(out / "test.jsonl.gz"))["t_short"].endswith("d i4 T UW m ing2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-splits", "trian"], "expected splits of stage 1, found 'trian'. Fix: did you mean 'train'?"),
        (["--train-splits", "test", "--language", "zh", "--pronunciations", "none.tsv"], "none.tsv: expected a file"),
        (["--fbank", "nowhere"], "nowhere: expected manifests of stage 1"),
    ],
)
def test_mistakes(monkeypatch, fbank, options, message):
    with pytest.raises(RecipeError) as error:
        run_stage(monkeypatch, fbank, *options)
    assert message in str(error.value)
    assert not (fbank.parent / "units").exists()


def test_no_utterance_fit_for_training(monkeypatch, fbank):
    path = fbank / "train.jsonl.gz"
    save_cuts([cut for cut in load_cuts(path) if cut.id != "fit"], path)
    with pytest.raises(RecipeError, match="expected an utterance fit for training, found none"):
        run_stage(monkeypatch, fbank)


def test_cuts_without_features(monkeypatch, fbank):
    path = fbank / "train.jsonl.gz"
    save_cuts([cut.drop_features() for cut in load_cuts(path)], path)
    with pytest.raises(RecipeError, match="fit: expected features and one supervision, found no features"):
        run_stage(monkeypatch, fbank)


def test_report_is_readable_json(monkeypatch, fbank):
    out = run_stage(monkeypatch, fbank)
    assert set(json.loads((out / "report.json").read_text(encoding="utf-8"))["splits"]) == {"train", "test"}
