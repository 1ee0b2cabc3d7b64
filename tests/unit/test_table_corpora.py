"""Stage 0 on every corpus of the paper's tables as it is published, and the recipes that make test sets and mixtures."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import made_table_corpora as made
import pytest
from lhotse import recipes
from lhotse.recipes.aishell2 import prepare_aishell2
from made_corpora import ROOT, make_aishell, make_librispeech, run_program, write_audio, write_lines

from nim4.config import RecipeError
from nim4.corpus import download
from nim4.corpus.manifest import load_cuts, split_paths, utterances
from nim4.corpus.text import normalise
from nim4.stage import read_json

# corpus: (utterances per split, (split, id, text, speaker, language) of one of them)
EXPECTED = {
    "aishell2": ({"train": 3, "dev": 3, "test": 3, "test_android": 3}, ("dev", "ID0001W0002", "听YESTERDAY ONCE MORE", "D0001", "zh")),
    "aishell2021eval": ({"test_a": 2, "test_c": 2, "test_d": 2}, ("test_c", "C1109CO0001", "打开车窗", "C1109", "zh")),
    "wenetspeech": ({"train_m": 3, "test_net": 3, "test_meeting": 3}, ("test_net", "N1_S00001", "你 好", "N1", "zh")),
    "speechio": (
        {"test_zh00001": 3, "test_zh00002": 3},
        ("test_zh00002", "00002-IUVyA-lEs2w_00001", '他说"你好', "00002-IUVyA-lEs2w", "zh"),
    ),
    "wenetspeech_chuan": ({"test_easy": 3, "test_hard": 2}, ("test_hard", "hard_1", "莫得问题要得", "hard_1", "zh")),
    "wenetspeech_yue": ({"test_short": 3, "test_long": 1}, ("test_long", "xq01", '佢哋話"係" OK 啦', "xq01", "zh-en")),
    "kespeech": ({"train_phase1": 4, "dev_phase1": 2, "test": 3}, ("test", "1002_test2", "今天 天气", "10002", "zh")),
    "voxpopuli": (
        {"dev": 3, "test": 3},
        ("test", "20180206-0900-PLENARY-15-en_20180206-20:56:40_test", "mr president", "28165", "en"),
    ),
    "mls_english": ({"dev": 2, "test": 2}, ("test", "10226_10111_test1", "by far the greatest", "10226", "en")),
    "cs_dialogue": (
        {"train": 2, "dev": 2, "test": 2},
        ("dev", "ZH-CN_U0018_S0_dev0", "我觉得 machine learning 很难", "ZH-CN_U0018_S0", "zh-en"),
    ),
    "ascend": ({"train": 6, "validation": 3, "test": 3}, ("validation", "ascend-00007", "我觉得 ok", "ascend-1", "zh-en")),
    "m4singer": ({"test": 3}, ("test", "Alto-1#一千年以后#0001", "因为在一千年", "Alto-1", "zh")),
    "aishell6_whisper": (
        {f"{split}_{kind}": 1 for split in ("train", "valid", "test") for kind in ("whisper", "normal")},
        ("test_whisper", "whisper_S0189_M-0189-2_014060-014592", "床前明月光", "S0189", "zh"),
    ),
    "vitw_bench": (
        {f"test_{kind}_{language}": 2 for kind in ("real", "sim") for language in ("zh", "en")},
        ("test_sim_en", "sim-en-dropout-sample7", "你好", "sim-en-dropout-sample7", "en"),
    ),
}


def prepare(monkeypatch, corpus, source, out, *options):
    run_program(monkeypatch, "00_prepare", "--corpus", corpus, "--source", source, "--out", out, *options)


def listed(out):
    return {problem["id"]: (problem["split"], problem["reason"]) for problem in read_json(out / "report.json")["problems"]}


def facts_of(out):
    return {split: {fact.id: fact for fact in utterances(load_cuts(path))} for split, path in split_paths(out).items()}


@pytest.fixture
def quiet_environment(monkeypatch):
    for name in ("WENETSPEECH_TRAIN", "MLS_ENGLISH_SPLITS", "MULTI_ZH_EN_TRAIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("quiet_environment")
@pytest.mark.parametrize("corpus", EXPECTED)
def test_a_corpus_in_its_published_layout(corpus, tmp_path, monkeypatch):
    problems = getattr(made, f"make_{corpus}")(tmp_path / "source")
    prepare(monkeypatch, corpus, tmp_path / "source", tmp_path / "out")
    counts, (split, utterance_id, *facts) = EXPECTED[corpus]
    found = facts_of(tmp_path / "out")
    assert {name: len(facts) for name, facts in found.items()} == counts
    assert (
        listed(tmp_path / "out") == problems
        or {name: place for name, place in listed(tmp_path / "out").items() if place[1] != "resampled"} == problems
    )  # Opus is at 48 kHz for this reader
    fact = found[split][utterance_id]
    assert [fact.text, fact.speaker, fact.language] == facts
    for path in split_paths(tmp_path / "out").values():
        for cut in load_cuts(path):
            assert cut.load_audio().shape == (1, cut.num_samples)


@pytest.mark.usefixtures("quiet_environment")
@pytest.mark.parametrize("corpus", EXPECTED)
def test_another_folder_is_told_where_and_what_to_do(corpus, tmp_path, monkeypatch):
    write_lines(tmp_path / "source" / "readme", ["nothing else"])
    with pytest.raises(RecipeError) as caught:
        prepare(monkeypatch, corpus, tmp_path / "source", tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / "source"))
    assert "--source" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quiet_environment")
@pytest.mark.parametrize("corpus", ["wenetspeech", "mls_english", "kespeech", "aishell2"])
def test_what_lhotse_finds_is_found(corpus, tmp_path, monkeypatch):
    """lhotse's own recipes read the same folders: so the layouts are the published ones, and nothing that they find is lost."""
    source = tmp_path / "source"
    make = getattr(made, f"make_{corpus}")
    make(source, one_order=True) if corpus == "kespeech" else make(source)
    if corpus == "wenetspeech":
        theirs = recipes.prepare_wenet_speech(source, ["M", "TEST_NET", "TEST_MEETING"])
        names = {"M": "train_m", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}
    elif corpus == "mls_english":
        theirs = recipes.prepare_mls(source)["english"]
        names = {"dev": "dev", "test": "test"}
    elif corpus == "kespeech":
        names = {name: name for name in ("train_phase1", "dev_phase1", "test")}
        theirs = recipes.prepare_kespeech(source / "KeSpeech", None, list(names))
    else:
        for split in ("dev", "test"):
            shutil.copytree(source / "AISHELL-DEV-TEST-SET" / "iOS" / split, source / "AISHELL-2" / "iOS" / split)
        theirs = prepare_aishell2(source)
        names = {name: name for name in ("train", "dev", "test")}
    prepare(monkeypatch, corpus, source, tmp_path / "out")
    found = facts_of(tmp_path / "out")
    for part, split in names.items():
        ours = {fact.id: normalise(fact.text) for fact in found[split].values()}
        assert ours
        listed_here = {name for name, (where, _) in listed(tmp_path / "out").items() if where == split}
        other = {segment.id: normalise(segment.text) for segment in theirs[part]["supervisions"]}
        assert ours == {name: text for name, text in other.items() if name in ours}
        assert set(other) <= set(ours) | listed_here


def test_tables_run_over_every_corpus_that_has_a_recipe():
    rest = {"aishell", "librispeech", "musan", "mini", "entities", "multi_zh_en"}
    assert {path.parent.name for path in (ROOT / "egs").glob("*/prepare.py")} == set(EXPECTED) | rest


@pytest.mark.usefixtures("quiet_environment")
def test_segments_are_read_where_they_are(tmp_path, monkeypatch):
    made.make_wenetspeech(tmp_path / "source")
    prepare(monkeypatch, "wenetspeech", tmp_path / "source", tmp_path / "out")
    levels = [float(cut.load_audio()[0, 4000:12000].std()) for cut in load_cuts(tmp_path / "out" / "train_m.jsonl.gz")]
    assert levels == pytest.approx([0.1, 0.2, 0.3], abs=0.05)
    last = list(load_cuts(tmp_path / "out" / "test_net.jsonl.gz"))[-1]
    assert last.end <= last.recording.duration


def test_a_variable_that_decides_what_is_read_makes_stage_0_run_again(tmp_path, monkeypatch, caplog):
    made.make_wenetspeech(tmp_path / "source")
    caplog.set_level("INFO")
    for subset, said in (("m", "done in"), ("m", "skipped"), ("s", "WENETSPEECH_TRAIN")):
        monkeypatch.setenv("WENETSPEECH_TRAIN", subset)
        caplog.clear()
        prepare(monkeypatch, "wenetspeech", tmp_path / "source", tmp_path / "out")
        assert said in caplog.text
    assert facts_of(tmp_path / "out").keys() == {"train_s", "test_net", "test_meeting"}
    monkeypatch.setenv("WENETSPEECH_TRAIN", "xl")
    with pytest.raises(RecipeError, match=r"WENETSPEECH_TRAIN.*s, m or l"):
        prepare(monkeypatch, "wenetspeech", tmp_path / "source", tmp_path / "out")


def test_a_count_that_is_not_the_published_one_is_told(tmp_path, monkeypatch, caplog):
    made.make_vitw_bench(tmp_path / "source")
    prepare(monkeypatch, "vitw_bench", tmp_path / "source", tmp_path / "out")
    assert "test_real_*: 4 utterances kept, but 1500 are published" in caplog.text
    assert read_json(tmp_path / "out" / "report.json")["published"]["test_sim_*"] == {"expected": 3500, "kept": 4}
    caplog.clear()
    prepare(monkeypatch, "vitw_bench", tmp_path / "source", tmp_path / "out", "--limit", 1)
    assert "published" not in caplog.text


@pytest.mark.parametrize(
    ("corpus", "path", "content", "told"),
    [
        ("kespeech", "KeSpeech/Tasks/ASR/test/text", "1000_test0 今天\n1001_test1 天气\n".encode("gb18030"), "text, line 1: expected UTF-8"),
        ("kespeech", "KeSpeech/Tasks/ASR/test/wav.scp", b"1000_test0\n", "wav.scp, line 1: expected an id and the path"),
        ("speechio", "SPEECHIO_ASR_ZH00001/metadata.tsv", b"ID\tAUDIO\tTEXT\na\tb\n", "metadata.tsv, line 2: expected 3 columns"),
        ("speechio", "SPEECHIO_ASR_ZH00001/metadata.tsv", b"ID\tWAV\tTEXT\na\tb\tc\n", "expected a column 'AUDIO'"),
        ("m4singer", "m4singer/meta.json", b'[{"item_name": "a#b", "txt": "x"}]', "item_name as singer#song#number"),
        ("wenetspeech", "WenetSpeech.json", b'{"audios": [{"aid": "x"}]}', "expected audios with segments"),
        ("wenetspeech", "WenetSpeech.json", b'{"audios": [', "expected audios with segments"),
        ("wenetspeech_yue", "Long/TextGrid/xq01.TextGrid", b"no grid", "expected a TextGrid file"),
        ("ascend", "main/test-00000-of-00001.parquet", b"PAR1", "expected a parquet file"),
        ("entities", "script.tsv", b"id\ttag\ttext\na\t../x\tb\n", "tags of letters"),
    ],
)
@pytest.mark.usefixtures("quiet_environment")
def test_a_broken_file_is_told_in_one_line_and_the_earlier_product_stays(corpus, path, content, told, tmp_path, command):
    source, out = tmp_path / "source", tmp_path / "out"
    getattr(made, f"make_{corpus}")(source)
    if corpus == "entities":
        write_lines(source / "script.tsv", ["id\ttag\ttext", "a\tpoi\t去西湖"])
        write_audio(source / "recordings" / "bo" / "a.wav")
    program = command("00_prepare")
    assert program("--corpus", corpus, "--source", source, "--out", out) == (0, [])
    before = {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    (source / path).write_bytes(content)
    code, (line,) = program("--corpus", corpus, "--source", source, "--out", out, "--limit", 1)
    assert code == 2
    assert told in line
    assert "Fix: " in line
    assert {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()} == before


def test_only_what_is_kept_is_unpacked(tmp_path, monkeypatch):
    made.make_ascend(tmp_path / "source")
    prepare(monkeypatch, "ascend", tmp_path / "source", tmp_path / "out", "--limit", 2)
    assert {split: len(facts) for split, facts in facts_of(tmp_path / "out").items()} == {"train": 2, "validation": 2, "test": 2}
    assert len(list((tmp_path / "out" / "audio").rglob("*.wav"))) == 6


def pack(folder, names, archive):
    archive.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-czf", archive, "-C", folder, *names], check=True)


def test_wenetspeech_yue_is_downloaded(tmp_path, monkeypatch):
    """What the hub would send is put in place of the network."""
    made.make_wenetspeech_yue(tmp_path / "made")
    for part, names in (("Short/wav", ["wav_"]), ("Long/wav", ["wav"]), ("Long/TextGrid", ["TextGrid"])):
        pack(tmp_path / "made" / part.split("/")[0], names, tmp_path / "served" / f"{part}.tar.gz")
    (tmp_path / "served" / "Short" / "content.txt").write_bytes((tmp_path / "made" / "Short" / "content.txt").read_bytes())

    def fetch(url, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "served" / url.partition("/resolve/main/")[2]).read_bytes())
        return "0" * 64

    monkeypatch.setattr(download, "fetch", fetch)
    prepare(monkeypatch, "wenetspeech_yue", tmp_path / "source", tmp_path / "out", "--download", "true")
    assert {split: len(facts) for split, facts in facts_of(tmp_path / "out").items()} == {"test_short": 3, "test_long": 1}


def test_voxpopuli_is_downloaded_with_as_many_archives_as_there_are(tmp_path, monkeypatch):
    made.make_voxpopuli(tmp_path / "made")
    root = tmp_path / "made" / "transcribed_data" / "en"
    served = {"n_files.json": json.dumps({"en": {"train": 3, "dev": 1, "test": 2}}).encode()}
    for split in ("dev", "test"):
        served[f"en/asr_{split}.tsv"] = (root / f"asr_{split}.tsv").read_bytes()
        files = sorted(path.name for path in (root / "2018").glob(f"*_{split}.ogg"))
        for part, names in enumerate([files] if split == "dev" else [files[:1], files[1:]]):
            pack(root / "2018", [f"./{name}" for name in names], tmp_path / "part.tar.gz")
            served[f"en/{split}/{split}_part_{part}.tar.gz"] = (tmp_path / "part.tar.gz").read_bytes()

    def fetch(url, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(served[url.partition("/data/")[2]])
        return "0" * 64

    monkeypatch.setattr(download, "fetch", fetch)
    prepare(monkeypatch, "voxpopuli", tmp_path / "source", tmp_path / "out", "--download", "true")
    assert {split: len(facts) for split, facts in facts_of(tmp_path / "out").items()} == {"dev": 3, "test": 3}
    archives = [archive["archive"] for archive in read_json(tmp_path / "out" / "report.json")["archives"]]
    assert archives == ["dev_part_0.tar.gz", "test_part_0.tar.gz", "test_part_1.tar.gz"]


def test_a_mixture_of_prepared_corpora(tmp_path, monkeypatch):
    """Stages 0 to 2 of the mixture on two prepared corpora: mean and variance come from both."""
    make_aishell(tmp_path / "a")
    make_librispeech(tmp_path / "l")
    prepare(monkeypatch, "aishell", tmp_path / "a", tmp_path / "data" / "aishell" / "manifests")
    prepare(monkeypatch, "librispeech", tmp_path / "l", tmp_path / "data" / "librispeech" / "manifests")
    monkeypatch.setenv("MULTI_ZH_EN_TRAIN", "aishell:train librispeech:train-clean-100=0.5")
    data = tmp_path / "data" / "multi_zh_en"
    prepare(monkeypatch, "multi_zh_en", tmp_path / "data", data / "manifests")
    assert len(facts_of(data / "manifests")["sample"]) == 13 + 5
    run_program(monkeypatch, "01_fbank", "--manifests", data / "manifests", "--out", data / "fbank", "--cmvn-splits", "sample", "--jobs", 1)
    assert read_json(data / "fbank" / "cmvn.json")
    monkeypatch.setenv("MULTI_ZH_EN_TRAIN", "aishell:train ascend:train")
    with pytest.raises(RecipeError, match=r"ascend.*egs/ascend/run.sh --stop-stage 2"):
        prepare(monkeypatch, "multi_zh_en", tmp_path / "data", data / "manifests")


def test_run_sh_of_the_mixture_hands_its_parts_to_stage_0_and_to_training(tmp_path):
    (tmp_path / "egs" / "multi_zh_en").mkdir(parents=True)
    (tmp_path / "run.sh").write_text('#!/usr/bin/env bash\necho "$MULTI_ZH_EN_TRAIN"\nprintf "%s|" "$@"\n', encoding="utf-8")
    (tmp_path / "run.sh").chmod(0o755)
    script = (ROOT / "egs" / "multi_zh_en" / "run.sh").read_text(encoding="utf-8")
    (tmp_path / "egs" / "multi_zh_en" / "run.sh").write_text(script, encoding="utf-8")
    environment = os.environ | {"MULTI_ZH_EN_TRAIN": "aishell:train=2"}
    done = subprocess.run(
        ["bash", tmp_path / "egs" / "multi_zh_en" / "run.sh", "--tag", "x"], env=environment, capture_output=True, text=True, check=True
    )
    parts, options = done.stdout.splitlines()
    assert parts == "aishell:train=2"
    assert "--train|aishell:train=2 sample=0.001|" in options
    assert options.endswith("--tag|x|")


def load_make_script():
    spec = importlib.util.spec_from_file_location("make_script", ROOT / "egs" / "entities" / "make_script.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_test_set_of_names_from_a_list_and_recordings(tmp_path, monkeypatch):
    made.make_entities(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_script", str(tmp_path)])
    load_make_script().main()
    script = [line.split("\t") for line in (tmp_path / "script.tsv").read_text(encoding="utf-8").splitlines()]
    assert script[0] == ["id", "tag", "text"]
    assert [(row[0], row[1]) for row in script[1:]] == [("poi-0000", "poi"), ("poi-0001", "poi"), ("media-0000", "media"), ("device-0000", "device")]
    assert ["西湖" in script[1][2], "天空之城" in script[2][2], "天空之城" in script[3][2], "氛围灯" in script[4][2]] == [True] * 4
    with pytest.raises(RecipeError, match="move it away"):
        load_make_script().main()
    for speaker in ("anna", "bo"):
        for row in script[1:4]:
            write_audio(tmp_path / "recordings" / speaker / f"{row[0]}.wav")
    write_audio(tmp_path / "recordings" / "bo" / "poi-0077.wav")
    prepare(monkeypatch, "entities", tmp_path, tmp_path / "out")
    found = facts_of(tmp_path / "out")
    assert {split: sorted(facts) for split, facts in found.items()} == {
        "test_media": ["anna-media-0000", "bo-media-0000"],
        "test_poi": ["anna-poi-0000", "anna-poi-0001", "bo-poi-0000", "bo-poi-0001"],
    }
    assert (found["test_poi"]["bo-poi-0001"].text, found["test_poi"]["bo-poi-0001"].speaker) == (script[2][2], "bo")
    assert [reason for _, reason in listed(tmp_path / "out").values()] == ["audio without transcript"]


def test_a_list_of_names_that_fits_no_sentence(tmp_path, monkeypatch):
    write_lines(tmp_path / "names.tsv", ["西湖\t1\tlake"])
    monkeypatch.setattr(sys, "argv", ["make_script", str(tmp_path)])
    with pytest.raises(RecipeError, match="a sentence with the tag 'lake'"):
        load_make_script().main()
    write_lines(tmp_path / "names.tsv", ["西湖"])
    with pytest.raises(RecipeError, match="names with tags"):
        load_make_script().main()


def test_the_sentences_around_names_have_one_place_each():
    carriers = load_make_script().read_carriers(ROOT / "egs" / "entities" / "carriers.tsv")
    assert set(carriers) == {"poi", "media", "device"}
    assert min(map(len, carriers.values())) >= 4
    assert not [sentence for found in carriers.values() for sentence in found if not re.fullmatch(r"[^{}]*\{\}[^{}]*", sentence)]
