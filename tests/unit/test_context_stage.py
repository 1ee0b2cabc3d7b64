"""Stage 7 as a program: what it makes, that it goes on where it was stopped, and what it says of mistakes."""

import json

import made_snapshots
import pytest
import tiny
import torch
from chat_server import ChatServer

from nim4.corpus import entity_filter
from nim4.corpus.hints import Hints
from nim4.corpus.manifest import load_cuts, save_cuts
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import read_weights
from nim4.stage import read_json, read_jsonl
from nim4.train import loop


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def context(command):
    return command("07_context_sft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`4`, a model folder with a tiny language model, and `units`: utterances of these texts, 4 of each in train."""
    folder = tmp_path_factory.mktemp("context")
    made_snapshots.aligned(folder / "4", made_snapshots.pretrained(folder / "3", 1), tiny.tiny_llm(folder / "llm"))
    units = made_snapshots.write_units(folder / "units")
    for split in ("train", "dev"):
        cuts = list(load_cuts(units / f"{split}.jsonl.gz"))
        for number, cut in enumerate(cuts):
            cut.supervisions[0].text = tiny.TEXTS[number % 3]
        save_cuts(cuts, units / f"{split}.jsonl.gz")
    return folder


@pytest.fixture
def aligned(folders):
    return folders / "4"


@pytest.fixture
def options(folders, tmp_path, aligned):
    (tmp_path / "names.txt").write_text("北京\n背景\n", encoding="utf-8")
    more = {"entities": {"everyday_share": 0.0}, "hints": {"keywords_prob": 0.8}}
    common = tiny.sft_options(folders / "units", tmp_path, "context_sft", aligned, more, max_steps=4, long_weight=2.0)
    return [*common, "--out", tmp_path / "model", "--entities", tmp_path / "names.txt"]


def weights(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors") if path.name != "best.safetensors"}


def test_the_product(context, options, aligned, tmp_path, monkeypatch):
    shown = []
    draw = Hints.__call__
    monkeypatch.setattr(Hints, "__call__", lambda self, text, rng: shown.append((text, draw(self, text, rng))) or shown[-1][1])
    assert context(*options) == (0, [])
    rows = read_jsonl(tmp_path / "model" / "entities.jsonl")
    assert [(row["text"], row["count"]) for row in rows] == [("上海", 4), ("北京", 4), ("背景", 0)]  # 你好 has a function character
    assert rows[1]["phones"] == "b ei3 j ing1"
    assert {hint for text, hints in shown for hint in hints if text == "北京"} >= {"北京", "背景"}
    load_speech_llm(tmp_path / "model", torch.device("cpu"))  # whole
    before, after = (read_weights(folder / "model.safetensors") for folder in (aligned, tmp_path / "model"))
    trained = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert trained == {"encoder", "adaptor"}
    assert weights(aligned)["llm/model.safetensors"] != weights(tmp_path / "model")["llm/model.safetensors"]
    assert read_json(tmp_path / "model" / "settings.json")["hints"]["keywords_prob"] == 0.8
    assert context(*options) == (0, [])
    assert "skipped, same inputs and settings" in context.log
    (tmp_path / "names.txt").write_text("北京\n", encoding="utf-8")
    assert context(*options, "--set", "train.max_steps=1") == (0, [])
    assert "names.txt changed" in context.log


def test_a_stopped_run_goes_on_to_the_same_weights(context, options, tmp_path, monkeypatch):
    assert context(*options) == (0, [])
    whole = weights(tmp_path / "model")
    stopped = [*options, "--out", tmp_path / "stopped"]
    step = loop.Trainer._train_step
    monkeypatch.setattr(loop.Trainer, "_train_step", lambda self, *given: step(self, *given) if self.step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        context(*stopped)
    monkeypatch.setattr(loop.Trainer, "_train_step", step)
    (tmp_path / "stopped.tmp" / "entities.jsonl").touch()
    assert context(*stopped) == (0, [])
    assert "resuming at step 2" in context.log
    assert weights(tmp_path / "stopped") == whole


def test_a_model_chooses_and_its_answers_are_kept(context, options, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with ChatServer("[1]") as server:
        asked = [*options, "--entity-endpoint", server.url, "--entity-model", "qwen"]
        assert context(*asked) == (0, [])
        ((headers, _, _, phrases),) = server.requests
    assert (headers["Authorization"], phrases) == ("Bearer secret", ["上海"])
    assert "secret" not in context.log
    assert [row["text"] for row in read_jsonl(tmp_path / "model" / "entities.jsonl")] == ["上海", "北京", "背景"]
    assert read_jsonl(tmp_path / "entity_cache.jsonl") == [{"model": "qwen", "text": "上海", "name": True}]
    assert context(*asked, "--out", tmp_path / "again") == (0, [])  # nobody listens any more
    assert (tmp_path / "again" / "entities.jsonl").read_bytes() == (tmp_path / "model" / "entities.jsonl").read_bytes()


def test_a_server_that_is_down(context, options, tmp_path, monkeypatch):
    monkeypatch.setattr(entity_filter.time, "sleep", lambda seconds: None)
    kept = json.dumps({"model": "qwen", "text": "丽江", "name": True}, ensure_ascii=False) + "\n"
    (tmp_path / "answers.jsonl").write_text(kept, encoding="utf-8")
    with ChatServer() as server:
        pass
    asked = ["--entity-endpoint", server.url, "--entity-model", "qwen", "--entity-cache", tmp_path / "answers.jsonl"]
    code, errors = context(*options, *asked)
    assert (code, len(errors)) == (2, 1)
    assert "Connection refused" in errors[0]
    assert "Traceback" not in context.log
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == kept
    assert not (tmp_path / "model").exists()


def test_mistakes_are_told_in_one_line(context, options, tmp_path):
    (tmp_path / "marks.txt").write_text("，\n", encoding="utf-8")
    mistakes = {
        ("--entities", tmp_path / "missing.txt"): "missing.txt: expected a UTF-8 file with one word or name per line",
        ("--entities", tmp_path / "marks.txt"): "marks.txt, line 1: expected a word or name",
        ("--entity-endpoint", "http://127.0.0.1:9"): "expected --entity-model with it",
        ("--entity-model", "qwen"): "expected --entity-model with it",
        ("--aligner", "nowhere"): "nowhere: expected the product of an earlier stage",
        ("--set", "train.long_weight=0.5"): "train.long_weight: expected at least 1",
        ("--set", "hints.keywords_prob=2.0"): "hints: expected probabilities",
    }
    for given, told in mistakes.items():
        code, errors = context(*options, *given)
        assert (code, len(errors)) == (2, 1), given
        assert told in errors[0]


def test_no_entity_at_all(context, options, tmp_path):
    without = [option for option in options if option not in ("--entities", tmp_path / "names.txt")]
    code, errors = context(*without, "--set", "entities.min_count=99")
    assert (code, len(errors)) == (2, 1)
    assert "expected at least one entity" in errors[0]


def test_utterances_are_cut_where_the_aligner_finds_word_ends(context, trained, units, folders, tmp_path):
    """On a corpus as stages 1 to 3 leave it: the texts are Chinese, the phonemes real."""
    init = made_snapshots.aligned(tmp_path / "4", trained, folders / "llm")
    (tmp_path / "names.txt").write_text("北京\n", encoding="utf-8")
    options = [*tiny.sft_options(units, tmp_path, "context_sft", init, max_steps=2), "--entities", tmp_path / "names.txt"]
    cut = ["--set", "train.partial_prob=1.0", "--set", "train.partial_chunk_frames=4"]
    assert context(*options, "--out", tmp_path / "whole") == (0, [])
    assert context(*options, *cut, "--out", tmp_path / "by_itself") == (0, [])
    assert context(*options, *cut, "--aligner", trained, "--out", tmp_path / "by_another") == (0, [])
    assert weights(tmp_path / "by_itself") != weights(tmp_path / "whole")
    assert not (tmp_path / "whole" / "word_ends.jsonl").exists()
    own, other = (read_jsonl(tmp_path / name / "word_ends.jsonl") for name in ("by_itself", "by_another"))
    assert [row["id"] for row in own] == [row["id"] for row in other]
    assert all([end for end, _ in row["ends"]] == [1, 2] for row in own + other)
    assert own != other  # the first snapshot, and the end of stage 3
