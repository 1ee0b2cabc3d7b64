"""Stage 0 on AISHELL-1, LibriSpeech and MUSAN as they are published, and on what users get wrong."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
from made_corpora import ROOT, load_program, make_aishell, make_librispeech, make_musan, run_program, write_audio, write_lines

from nim4.config import RecipeError
from nim4.corpus import download
from nim4.corpus.manifest import load_cuts, split_paths, utterances
from nim4.stage import read_json


def prepare(monkeypatch, corpus, source, out, *options):
    run_program(monkeypatch, "00_prepare", "--corpus", corpus, "--source", source, "--out", out, *options)


def listed(out):
    return {problem["id"]: (problem["split"], problem["reason"]) for problem in read_json(out / "report.json")["problems"]}


def test_aishell(tmp_path, monkeypatch, caplog):
    expected = make_aishell(tmp_path / "source")
    caplog.set_level("INFO")
    prepare(monkeypatch, "aishell", tmp_path / "source", tmp_path / "out")
    assert list(split_paths(tmp_path / "out")) == ["dev", "test", "train"]
    assert listed(tmp_path / "out") == expected
    cuts = {split: {cut.id: cut for cut in load_cuts(path)} for split, path in split_paths(tmp_path / "out").items()}
    assert {split: len(found) for split, found in cuts.items()} == {"train": 13, "dev": 8, "test": 8}
    cut = cuts["train"]["BAC009S0002W0121"]
    supervision = cut.supervisions[0]
    assert (supervision.text, supervision.speaker, supervision.language) == ("广州 市 房地产 中介 协会 分析", "S0002", "zh")
    assert cuts["test"]["BAC009S0764W0206"].supervisions[0].text == ""
    assert "BAC009S0002W0203" not in cuts["train"]
    assert "several channels 1" in caplog.text
    for name in ("BAC009S0003W0204", "BAC009S0764W0205"):  # stereo; 8 kHz
        cut = {**cuts["train"], **cuts["test"]}[name]
        assert cut.sampling_rate == 16000
        assert cut.load_audio().shape == (1, 8000)


def test_aishell_source_may_be_the_inner_folder(tmp_path, monkeypatch):
    make_aishell(tmp_path)
    prepare(monkeypatch, "aishell", tmp_path / "data_aishell", tmp_path / "out")
    assert len(load_cuts(tmp_path / "out" / "train.jsonl.gz")) == 13


def test_librispeech(tmp_path, monkeypatch):
    expected = make_librispeech(tmp_path / "source")
    prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "out")
    assert list(split_paths(tmp_path / "out")) == ["dev-clean", "test-clean", "train-clean-100"]
    assert listed(tmp_path / "out") == expected
    cuts = list(load_cuts(tmp_path / "out" / "train-clean-100.jsonl.gz"))
    assert [cut.id for cut in cuts] == [f"103-1240-{number:04d}" for number in range(5)]
    assert (cuts[0].supervisions[0].text, cuts[0].supervisions[0].speaker) == ("CHAPTER ONE IT'S MISSUS", "103")


def test_musan(tmp_path, monkeypatch):
    """Through stages 0 to 2: nothing is transcribed, and nothing is trained on."""
    expected = make_musan(tmp_path / "source")
    prepare(monkeypatch, "musan", tmp_path / "source", tmp_path / "manifests")
    assert listed(tmp_path / "manifests") == expected  # an empty text is no problem there
    run_program(monkeypatch, "01_fbank", "--manifests", tmp_path / "manifests", "--out", tmp_path / "fbank", "--cmvn-splits", "", "--jobs", 1)
    run_program(monkeypatch, "02_units", "--fbank", tmp_path / "fbank", "--out", tmp_path / "units", "--language", "en", "--train-splits", "")
    cuts = {split: list(load_cuts(path)) for split, path in split_paths(tmp_path / "units").items()}
    assert {split: [cut.id for cut in found] for split, found in cuts.items()} == {
        "noise": [f"noise-free-sound-{number:04d}" for number in range(3)] + [f"noise-sound-bible-{number:04d}" for number in range(2)],
        "music": ["music-fma-0000", *(f"music-fma-0001-{number:03d}" for number in range(3)), "music-fma-0002"],
        "babble": [f"speech-librivox-{number:04d}" for number in range(4)],
    }
    assert {cut.supervisions[0].text for found in cuts.values() for cut in found} == {""}
    assert {cut.supervisions[0].speaker for cut in cuts["music"]} == {"some_band"}
    pieces = cuts["music"][1:4]
    assert sum(cut.num_samples for cut in pieces) == 65 * 16_000
    assert [piece.num_frames for piece in pieces] == [len(piece.load_features()) for piece in pieces] == [2167] * 3


def test_the_same_source_gives_the_same_bytes_and_a_second_run_is_skipped(tmp_path, monkeypatch, caplog):
    make_librispeech(tmp_path / "source")
    for out in ("one", "two"):
        prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / out)
    for split, path in split_paths(tmp_path / "one").items():
        assert path.read_bytes() == split_paths(tmp_path / "two")[split].read_bytes()
    caplog.set_level("INFO")
    prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "one")
    assert "skipped" in caplog.text


def test_limit_spreads_over_the_split(tmp_path, monkeypatch):
    make_aishell(tmp_path / "source")
    prepare(monkeypatch, "aishell", tmp_path / "source", tmp_path / "out", "--limit", 2)
    cuts = list(load_cuts(tmp_path / "out" / "train.jsonl.gz"))
    assert [cut.supervisions[0].speaker for cut in cuts] == ["S0002", "S0003"]
    assert read_json(tmp_path / "out" / "report.json")["splits"]["train"]["utterances"] == 2


def test_a_mistake_is_told_in_one_line(tmp_path):
    options = ["--corpus", "aishell", "--source", tmp_path / "nowhere", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, ROOT / "local" / "00_prepare.py", *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in ["nowhere", "no such folder", "--download true", "Fix:"]), done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_options(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"did you mean 'aishell'\?"):
        prepare(monkeypatch, "aishel", tmp_path, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"--limit.*0 or more"):
        prepare(monkeypatch, "aishell", tmp_path, tmp_path / "out", "--limit", -1)


def test_a_source_without_the_corpus(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"aishell_transcript.*--download true"):
        prepare(monkeypatch, "aishell", tmp_path, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"train-clean-100.*LIBRISPEECH_SUBSETS"):
        prepare(monkeypatch, "librispeech", tmp_path, tmp_path / "out")


def test_a_split_without_audio_ends_the_stage_and_keeps_the_earlier_product(tmp_path, monkeypatch):
    make_librispeech(tmp_path / "source")
    prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "out")
    before = read_json(tmp_path / "out" / "done.json")
    for path in (tmp_path / "source" / "LibriSpeech" / "dev-clean").rglob("*.flac"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"dev-clean.*at least 1 good utterance.*transcript without audio"):
        prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "out", "--limit", 3)
    assert read_json(tmp_path / "out" / "done.json") == before


def test_noise_of_mini_to_train_on_is_not_the_noise_it_is_tested_on():
    audio = ROOT / "egs" / "mini" / "audio"
    rows = [line.split("\t") for line in (audio / "noise.tsv").read_text(encoding="utf-8").splitlines()]
    assert rows.pop(0) == ["utt_id", "split", "speaker", "language", "text"]
    recordings = {split: {row[2] for row in rows if row[1] == split} for split in ("train", "test")}
    assert len(recordings["train"]) > 40
    assert len(recordings["test"]) >= 20
    assert not recordings["train"] & recordings["test"]
    assert {row[4] for row in rows} == {""}
    with tarfile.open(audio / "noise.tar") as tar:
        sounds = {name: hashlib.sha256(tar.extractfile(name).read()).hexdigest() for name in tar.getnames()}
    assert sounds.keys() == {f"{row[0]}.opus" for row in rows}
    assert len(set(sounds.values())) == len(rows)
    licences = (audio / "LICENSE.noise").read_text(encoding="utf-8")
    assert not [row[0] for row in rows if row[0].removesuffix("-quiet") not in licences and not row[0].startswith(("am-", "sc-"))]
    assert sum(path.stat().st_size for path in audio.iterdir()) < 25e6


def write_recipe(folder, text):
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(textwrap.dedent(text), encoding="utf-8")


def test_audio_that_a_recipe_makes_travels_with_its_manifest(tmp_path, monkeypatch):
    write_recipe(
        tmp_path / "egs" / "made",
        """
        import shutil
        from nim4.corpus.table import Row

        def prepare(source, work):
            work.mkdir()
            shutil.copy(source / "a.wav", work / "b.wav")
            return {"train": [Row("b", work / "b.wav", "text", "me", "en")]}
        """,
    )
    write_audio(tmp_path / "source" / "a.wav")
    prepare(monkeypatch, "made", tmp_path / "source", tmp_path / "out", "--recipes", tmp_path / "egs")
    (tmp_path / "out").rename(tmp_path / "moved")
    cut = load_cuts(tmp_path / "moved" / "train.jsonl.gz")[0]
    assert Path(cut.recording.sources[0].source) == tmp_path / "moved" / "audio" / "b.wav"
    assert cut.load_audio().shape == (1, 8000)


def test_a_corpus_kept_beside_its_recipe_is_read_again_when_it_changes(tmp_path, monkeypatch, caplog):
    write_recipe(
        tmp_path / "egs" / "kept",
        """
        from nim4.corpus.table import Row

        def prepare(source, work):
            return {"train": [Row("a", source / "a.wav", (source / "a.txt").read_text(), "me", "en")]}
        """,
    )
    source = tmp_path / "egs" / "kept" / "audio"
    write_audio(source / "a.wav")
    caplog.set_level("INFO")
    for text, said in (("one", "done in"), ("one", "skipped"), ("two", "a.txt changed")):
        (source / "a.txt").write_text(text, encoding="utf-8")
        caplog.clear()
        prepare(monkeypatch, "kept", source, tmp_path / "out", "--recipes", tmp_path / "egs")
        assert said in caplog.text
    assert load_cuts(tmp_path / "out" / "train.jsonl.gz")[0].supervisions[0].text == "two"


def test_download_true_needs_a_recipe_that_can(tmp_path, monkeypatch):
    write_recipe(tmp_path / "egs" / "made", "def prepare(source, work):\n    return {}\n")
    with pytest.raises(RecipeError, match="by hand"):
        prepare(monkeypatch, "made", tmp_path, tmp_path / "out", "--recipes", tmp_path / "egs", "--download", "true")
    with pytest.raises(RecipeError, match="at least one split"):
        prepare(monkeypatch, "made", tmp_path, tmp_path / "out", "--recipes", tmp_path / "egs")


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        for entry in sorted(folder.iterdir()):
            tar.add(entry, entry.name)


def test_aishell_is_downloaded_with_the_archives_inside_it(tmp_path, monkeypatch):
    """What the server would send is put in place of the network; unpacking, preparing and the report are the real ones."""
    make_aishell(tmp_path / "made")
    wav = tmp_path / "made" / "data_aishell" / "wav"
    for speaker in [path for path in sorted(wav.glob("*/*")) if path.parent.name != "train" or path.name != "S0724"]:
        with tarfile.open(wav / f"{speaker.name}.tar.gz", "w:gz") as tar:
            tar.add(speaker, f"{speaker.parent.name}/{speaker.name}")
    for split in ("train", "dev", "test"):
        for path in sorted((wav / split).rglob("*.wav")):
            path.unlink()
        subprocess.run(["rm", "-r", str(wav / split)], check=True)
    pack(tmp_path / "made", tmp_path / "data_aishell.tgz")
    asked = []

    def fetch(url, target, **checks):
        asked.append((url, checks))
        target.write_bytes((tmp_path / "data_aishell.tgz").read_bytes())
        return "0" * 64

    monkeypatch.setattr(download, "fetch", fetch)
    prepare(monkeypatch, "aishell", tmp_path / "source", tmp_path / "out", "--download", "true")
    assert asked == [("https://www.openslr.org/resources/33/data_aishell.tgz", {"size": 15_582_913_665})]
    assert len(load_cuts(tmp_path / "out" / "train.jsonl.gz")) == 13
    archives = read_json(tmp_path / "out" / "report.json")["archives"]
    assert [(archive["archive"], archive["sha256"]) for archive in archives] == [("data_aishell.tgz", "0" * 64)]


def test_librispeech_is_downloaded_by_the_published_sums(tmp_path, monkeypatch):
    make_librispeech(tmp_path / "made")
    served = {}
    for subset in ("dev-clean", "test-clean", "train-clean-100"):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            tar.add(tmp_path / "made" / "LibriSpeech" / subset, f"LibriSpeech/{subset}")
        served[f"{subset}.tar.gz"] = archive.getvalue()
    sums = {name: hashlib.md5(content).hexdigest() for name, content in served.items()}
    served["md5sum.txt"] = "".join(f"{md5}  {name}\n" for name, md5 in sums.items()).encode()

    def fetch(url, target, md5=None):
        name = url.rpartition("/")[2]
        assert url == f"https://www.openslr.org/resources/12/{name}"
        assert md5 == sums.get(name)
        target.write_bytes(served[name])
        return "0" * 64

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setenv("LIBRISPEECH_SUBSETS", "dev-clean test-clean train-clean-100")
    prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "out", "--download", "true")
    assert len(split_paths(tmp_path / "out")) == 3
    monkeypatch.setenv("LIBRISPEECH_SUBSETS", "dev-cleen")
    with pytest.raises(RecipeError, match="did you mean 'dev-clean'"):
        prepare(monkeypatch, "librispeech", tmp_path / "source", tmp_path / "other", "--download", "true")


def test_help_shows_defaults():
    text = load_program("00_prepare").build_parser().format_help()
    assert "0 = all (default: 0)" in " ".join(text.split())


@pytest.mark.parametrize("corpus", ["aishell", "librispeech"])
def test_run_sh_is_small_and_executable(corpus):
    path = ROOT / "egs" / corpus / "run.sh"
    assert os.access(path, os.X_OK)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 20


def test_the_corpus_of_contributing_works_as_it_is_printed(tmp_path, monkeypatch):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    python, shell = (re.search(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[1] for language in ("python", "bash"))
    write_recipe(tmp_path / "egs" / "mine", python)
    for split in ("train", "dev", "test"):
        for number in range(3):
            write_audio(tmp_path / "source" / split / f"{split}1-{number}.wav", seed=number)
        write_lines(tmp_path / "source" / split / "transcripts.txt", [f"{split}1-{number} 打开 车窗" for number in range(3)])
    prepare(monkeypatch, "mine", tmp_path / "source", tmp_path / "out", "--recipes", tmp_path / "egs")
    assert listed(tmp_path / "out") == {}
    assert [(fact.id, fact.text, fact.speaker) for fact in utterances(load_cuts(tmp_path / "out" / "dev.jsonl.gz"))] == [
        (f"dev1-{number}", "打开 车窗", "dev1") for number in range(3)
    ]
    (tmp_path / "egs" / "mine" / "run.sh").write_text(shell, encoding="utf-8")
    (tmp_path / "run.sh").write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n', encoding="utf-8")
    (tmp_path / "run.sh").chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "egs" / "mine" / "run.sh", "--stop-stage", "0"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--corpus|mine|--source|data/download/mine|--language|zh|")
    assert done.stdout.endswith("|--stop-stage|0|")
