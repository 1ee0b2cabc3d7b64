"""Stage 11 as a program: hypotheses, events, errors, and mistakes."""

import importlib.util
import itertools
import shutil

import pytest
import soundfile
import tiny
import torch
from made_corpora import run_program

from local import decode_config
from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.manifest import cuts_from_table, load_cuts, save_cuts
from nim4.corpus.ngram import count_ngrams
from nim4.corpus.table import Row
from nim4.stage import read_json, read_jsonl


@pytest.fixture
def decode(command):
    return command("11_decode")


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(text + "\n" for text in tiny.TEXTS), encoding="utf-8")
    return path


def options_for(trained, units, out):
    return ["--model", str(trained), "--units", str(units), "--test", "test", "--device", "cpu", "--out", str(out)]


def test_products(decode, trained, units, words, tmp_path):
    options = options_for(trained, units, tmp_path / "out")
    assert decode(*options, "--closed", "test dev", "--lexicon", words) == (0, [])
    cuts = {cut.id: cut for cut in load_cuts(units / "test.jsonl.gz")}
    found = {}
    for config in ("ctc_greedy", "ctc_streaming"):
        folder = tmp_path / "out" / config / "test"
        refs, hyps = read_jsonl(folder / "refs.jsonl"), read_jsonl(folder / "hyps.jsonl")
        assert {row["id"] for row in refs} == {row["id"] for row in hyps} == set(cuts)
        for row in refs:
            assert row["phones"] == cuts[row["id"]].supervisions[0].custom["phones"] != ""
            assert row["text"] == cuts[row["id"]].supervisions[0].text
        for row in hyps:
            assert set(row) == {"id", "phones", "text", "audio_s", "wall_s", "error"}
            assert row["error"] is None
            assert row["wall_s"] > 0
            assert row["audio_s"] == pytest.approx(cuts[row["id"]].duration, abs=1e-3)
            assert isinstance(row["text"], str)
        found[config] = {row["id"]: row["phones"] for row in hyps}
        record = read_json(folder / "done.json")
        assert record["failed"] == 0
        assert record["model_step"] == 6
    assert not (tmp_path / "out" / "ctc_greedy" / "test" / "events.jsonl").exists()
    events = read_jsonl(tmp_path / "out" / "ctc_streaming" / "test" / "events.jsonl")
    for name, cut in cuts.items():
        own = [row for row in events if row["id"] == name]
        assert [row["is_final"] for row in own] == [False] * (len(own) - 1) + [True]
        assert own[-1]["text"] == found["ctc_streaming"][name]
        assert own[-1]["t_audio_s"] == pytest.approx(cut.duration, abs=1e-3)
        assert [row["t_audio_s"] for row in own] == sorted(row["t_audio_s"] for row in own)
        assert all(later["t_wall_s"] >= earlier["t_wall_s"] for earlier, later in itertools.pairwise(own))
        assert all(row["t_wall_s"] >= row["t_audio_s"] for row in own)


def test_a_set_that_is_not_closed_has_no_words(decode, trained, units, tmp_path):
    assert decode(*options_for(trained, units, tmp_path / "out"), "--configs", "ctc_greedy", "--closed", "dev") == (0, [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ctc_greedy"]
    assert {row["text"] for row in read_jsonl(tmp_path / "out" / "ctc_greedy" / "test" / "hyps.jsonl")} == {None}


def test_words_and_phonemes_of_ngrams(decode, trained, units, tmp_path):
    inputs = shutil.copytree(units, tmp_path / "units")
    for name, texts in (("words", [["你好"], ["北京", "上海"]]), ("phones", [["n", "i3", "h", "ao3"], ["sh", "ang4"]])):
        model, names = count_ngrams(texts, 2)
        model.save_arpa(inputs / f"{name}.arpa", names)
    options = [*options_for(trained, inputs, tmp_path / "out"), "--configs", "ctc_beam ctc_beam_phones"]
    assert decode(*options) == (0, [])
    words, phones = (read_jsonl(tmp_path / "out" / name / "test" / "hyps.jsonl") for name in ("ctc_beam", "ctc_beam_phones"))
    assert len(words) == len(phones) == 4
    for row in words:
        assert set(row["text"]) <= set("你好北京上海")
        assert row["phones"].split() == Lexicon().phones(row["text"])
    assert {row["text"] for row in phones} == {None}
    assert {phone for row in phones for phone in row["phones"].split()} <= set(["n", "i3", "h", "ao3", "sh", "ang4"])
    other = tmp_path / "other.arpa"
    other.write_text((inputs / "words.arpa").read_text(encoding="utf-8").replace("ngram 2=", "ngram 2=1"), encoding="utf-8")
    mistakes = [("ctc_beam", other, "as the header says"), ("ctc_beam_phones", inputs / "words.arpa", "phonemes of the model's tokens.txt")]
    if importlib.util.find_spec("k2") is None:
        mistakes += [("ctc_graph", inputs / "words.arpa", "k2: expected it to be installed, found no such package")]
    for config, arpa, message in [*mistakes, ("ctc_beam", tmp_path / "none", "no such file")]:
        code, errors = decode(*options[:-1], config, "--arpa", arpa)
        assert (code, len(errors)) == (2, 1)
        assert message in errors[0]


def test_the_same_again_is_skipped(decode, trained, units, words, tmp_path):
    options = [*options_for(trained, units, tmp_path / "out"), "--configs", "ctc_greedy"]
    assert decode(*options) == (0, [])
    assert decode(*options) == (0, [])
    assert "skipped, same inputs and settings" in decode.log
    assert decode(*options, "--closed", "test", "--lexicon", words) == (0, [])
    assert "rebuilding, words was false and is true" in decode.log


def test_audio_that_cannot_be_read_becomes_an_error_and_is_scored_as_deletions(decode, trained, units, words, tmp_path, monkeypatch):
    audio = tmp_path / "audio"
    audio.mkdir()
    source = units.parent / "audio"
    rows = []
    for number in range(4):
        shutil.copy(source / f"test{number}.wav", audio)
        rows.append(Row(f"test{number}", audio / f"test{number}.wav", "你好", "s", "zh"))
    cuts = list(cuts_from_table(rows)[0])
    for cut in cuts:
        cut.supervisions[0].custom = {"phones": "n i3 h ao3"}
    (tmp_path / "units").mkdir()
    save_cuts(cuts, tmp_path / "units" / "test.jsonl.gz")
    (audio / "test0.wav").unlink()
    (audio / "test1.wav").write_bytes(b"no audio")
    samples, rate_hz = soundfile.read(audio / "test2.wav")
    soundfile.write(audio / "test2.wav", samples[: len(samples) // 3], rate_hz)  # cut short after the manifest was written
    options = options_for(trained, tmp_path / "units", tmp_path / "out")
    assert decode(*options, "--closed", "test", "--lexicon", words) == (0, [])
    for config in ("ctc_greedy", "ctc_streaming"):
        hyps = {row["id"]: row for row in read_jsonl(tmp_path / "out" / config / "test" / "hyps.jsonl")}
        assert [hyps[f"test{number}"]["error"] is None for number in range(4)] == [False, False, False, True]
        assert [(hyps[f"test{number}"]["phones"], hyps[f"test{number}"]["text"]) for number in range(3)] == [("", "")] * 3
        assert len(read_jsonl(tmp_path / "out" / config / "test" / "refs.jsonl")) == 4
        assert read_json(tmp_path / "out" / config / "test" / "done.json")["failed"] == 3
    run_program(monkeypatch, "12_score", "--decode", tmp_path / "out", "--out", tmp_path / "score")
    records = [row for row in read_jsonl(tmp_path / "score" / "records.jsonl") if row["metric"] == "PER"]
    assert len(records) == 2
    for record in records:
        assert record["ref_units"] == 16
        assert record["deletions"] >= 12


def test_processes_change_nothing_but_the_times(decode, trained, units, tmp_path):
    def without_times(rows):
        return [{name: value for name, value in row.items() if name not in ("wall_s", "t_wall_s")} for row in rows]

    products = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        out = tmp_path / str(num_threads)
        assert decode(*options_for(trained, units, out), "--configs", "ctc_streaming") == (0, [])
        assert read_json(out / "ctc_streaming" / "test" / "done.json")["hardware"].endswith(", 1 thread, 4 speakers at once")
        files = sorted((out / "ctc_streaming" / "test").glob("*.jsonl"))
        products.append({path.name: without_times(read_jsonl(path)) for path in files})
    assert products[0] == products[1]
    assert len(products[0]["hyps.jsonl"]) == 4


def test_streams_of_the_speech_llm(decode, talkative, units, tmp_path, monkeypatch):
    texts = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        out = tmp_path / str(num_threads)
        assert decode(*options_for(talkative, units, out), "--configs", "offline streaming", "--hotwords", "北京") == (0, [])
        hyps = {row["id"]: row for row in read_jsonl(out / "streaming" / "test" / "hyps.jsonl")}
        events = read_jsonl(out / "streaming" / "test" / "events.jsonl")
        for name, hyp in hyps.items():
            own = [row for row in events if row["id"] == name]
            assert [row["is_final"] for row in own] == [False] * (len(own) - 1) + [True]
            assert (own[-1]["text"], own[-1]["settled_chars"], hyp["phones"]) == (hyp["text"], len(hyp["text"]), None)
            assert own[-1]["t_audio_s"] == pytest.approx(hyp["audio_s"], abs=1e-3)
            assert own[-1]["t_wall_s"] > hyp["audio_s"]
        texts.append([hyp["text"] for hyp in hyps.values()])
    assert len(set(texts[0])) == 4
    assert texts[0] == texts[1]
    run_program(monkeypatch, "12_score", "--decode", out, "--out", tmp_path / "score")
    records = {row["config"]: row for row in read_jsonl(tmp_path / "score" / "records.jsonl")}
    assert records["streaming"]["final_p99_ms"] >= records["streaming"]["final_p50_ms"] > 0
    assert records["streaming"]["second_pass_change"] is not None
    assert records["offline"]["second_pass_change"] is None


def damaged(trained, folder, damage):
    shutil.copytree(trained, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: expected a model folder, found no such folder"),
        ({"--units": "nowhere"}, "nowhere/test.jsonl.gz: expected the product of an earlier stage, found no such file"),
        ({"--test": "tset"}, "tset.jsonl.gz: expected the product of an earlier stage, found no such file"),
        ({"--test": " "}, "--test: expected at least one test set"),
        (
            {"--configs": "ctc_gredy"},
            "--configs ctc_gredy: expected a file in local/conf/decode/, found none of this name. Fix: did you mean 'ctc_greedy'?",
        ),
        ({"--configs": ""}, "--configs: expected at least one decode config"),
        ({"--closed": "dev tset", "--lexicon": "nowhere.txt"}, "--closed tset: expected a manifest in "),
        ({"--closed": "dev tset", "--lexicon": "nowhere.txt"}, "found none of this name. Fix: did you mean 'test'?"),
        ({"--closed": "test"}, "--lexicon: expected the word list of the closed sets, found none"),
        ({"--closed": "test", "--lexicon": "nowhere.txt"}, "nowhere.txt: expected a readable word list"),
        ({"--device": "tpu"}, "--device tpu: expected auto, cpu or cuda"),
    ],
)
def test_mistakes(decode, trained, units, tmp_path, changes, message):
    options = options_for(trained, units, tmp_path / "out")
    assert decode(*options, "--configs", "ctc_greedy") == (0, [])
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name, value in changes.items():
        if name in options:
            options[options.index(name) + 1] = value
        else:
            options += [name, value]
    code, errors = decode(*options)
    assert code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert ". Fix: " in errors[0]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_streams_whose_second_pass_hears_the_whole_end_as_whole_recordings(decode, talkative, units, tmp_path, heard_anew, monkeypatch):
    options, texts = [*options_for(talkative, units, tmp_path / "out"), "--hotwords", "北京"], {}
    configs = shutil.copytree(decode_config.CONFIGS, tmp_path / "configs")
    with (configs / "offline_rescored.yaml").open("a", encoding="utf-8") as file:
        file.write("batch_s: 0.1\n")  # each alone: random weights write on to the limit, which beams of one batch share
    monkeypatch.setattr(decode_config, "CONFIGS", configs)
    for config, num_anew in (("offline", 0), ("streaming_chunks", 0), ("streaming", 4), ("offline_rescored", 4), ("streaming_rescored", 8)):
        assert decode(*options, "--configs", config) == (0, [])
        texts[config] = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "out" / config / "test" / "hyps.jsonl")}
        assert len(heard_anew) == num_anew
    assert texts["streaming"] == texts["offline"]
    assert texts["streaming_rescored"] == texts["offline_rescored"]
    assert len(set(texts["offline"].values())) == 4
    events = [read_jsonl(tmp_path / "out" / config / "test" / "events.jsonl") for config in ("streaming_chunks", "streaming")]
    shown, shown_again = ([(row["id"], row["text"]) for row in rows if not row["is_final"]] for rows in events)
    assert shown == shown_again


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 64), "model.safetensors: expected a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected a model folder, found no model.safetensors in it"),
        (lambda folder: (folder / "config.yaml").write_text("encoder: [", encoding="utf-8"), "config.yaml: expected a readable YAML file"),
        (lambda folder: (folder / "tokens.txt").write_text("a 0\n", encoding="utf-8"), "tokens.txt: expected"),
    ],
)
def test_a_damaged_model_is_told(decode, trained, units, tmp_path, damage, message):
    model = damaged(trained, tmp_path / "model", damage)
    code, errors = decode(*options_for(model, units, tmp_path / "out"))
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not gzip"])
def test_an_empty_or_broken_manifest_is_told(decode, trained, tmp_path, content):
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "test.jsonl.gz").write_bytes(content)
    code, errors = decode(*options_for(trained, tmp_path / "units", tmp_path / "out"))
    assert (code, len(errors)) == (2, 1)
    assert "test.jsonl.gz" in errors[0]
    assert not (tmp_path / "out" / "ctc_greedy" / "test").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: ctc_gredy", "method: expected ctc_greedy or ctc_beam or ctc_graph or llm, found ctc_gredy. Fix: did you mean 'ctc_greedy'?"),
        ("chunk_ms: 650\nstreaming: true", "chunk_ms: expected a multiple of 40, found 650"),
        ("chunk_ms: 0\nstreaming: true", "chunk_ms: expected a multiple of 40, found 0"),
        ("left_context_chunks: -1\nstreaming: true", "left_context_chunks: expected 0 or more, found -1"),
        ("speakers: 4", "speakers: expected 1, or more with streaming, found 4"),
        ("method: llm\nctc_weight: 0.3", "ctc_weight: expected 0, or up to 1 with method llm and num_beams of at least 2, found 0.3"),
        ("method: llm\nnum_beams: 2\nctc_weight: 1.5", "ctc_weight: expected 0, or up to 1 with method llm and num_beams of at least 2, found 1.5"),
        ("method: llm\nstreaming: true\nnum_beams: 2", "in streams those of final_context whole, found 2"),
        ("method: llm\nfinal_context: whole", "final_context: expected chunks, or whole with method llm and streaming, found whole"),
        ("streaming: true\nfinal_context: whole", "final_context: expected chunks, or whole with method llm and streaming, found whole"),
        ("method: llm\nstreaming: true\nfinal_context: half", "final_context: expected chunks, or whole with method llm and streaming, found half"),
        ("hotwords: fuzzy", "hotwords: expected none, or exact or lattice with method llm and max_hints of at least 1, found fuzzy, 10"),
        ("hotwords: exact", "hotwords: expected none, or exact or lattice with method llm"),
        ("method: llm\nhotwords: exact\nmax_hints: 0", "found exact, 0"),
        ("ngram: words", "ngram: expected none with method ctc_greedy, found words"),
        ("method: ctc_beam", "ngram: expected words or phones with method ctc_beam, found none"),
        ("method: ctc_beam\nngram: words\nstreaming: true", "streaming: expected false with method ctc_beam, found true"),
        ("chunks: 3", "expected a known setting, found 'chunks'"),
        ("streaming: [", "expected a readable YAML file"),
    ],
)
def test_wrong_decode_configs(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(decode_config, "CONFIGS", tmp_path)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        decode_config.read_decode_config("mine")
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["\n \n", b"\xff\xfe"])
def test_a_word_list_without_words_is_told(decode, trained, units, tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, errors = decode(*options_for(trained, units, tmp_path / "out"), "--closed", "test", "--lexicon", path)
    assert (code, len(errors)) == (2, 1)
    assert "expected words with a pronunciation" in errors[0] or "words.txt: expected a readable word list" in errors[0]
