"""Stage 10, `python -m nim4 hotwords`, and decoding with an index."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import write_audio

from nim4 import stage
from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.hotword_list import ListReport, Name, make_keys
from nim4.corpus.units import PhonemeInventory
from nim4.decode.hotword import FILE, JOURNAL, HotwordIndex
from nim4.decode.hotword_hints import Hints, compatible
from nim4.decode.hotword_search import Hit
from nim4.stage import ROOT, read_json, read_jsonl

INVENTORY = PhonemeInventory.default()


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.tsv"
    path.write_text("北京饭店\t2\tcity\n北京\n惠新西街\n会心西街\t3\n吴㻦\nart\n", encoding="utf-8")
    return path


def test_build_search_add_remove_stats_compact(nim4, names, tmp_path):
    index = tmp_path / "index"
    code, _, messages = nim4("hotwords", "build", names, "--out", index, "--jobs", 1)
    assert code == 0
    assert any("1 left out, cannot be pronounced: line 5 '吴㻦'" in line for line in messages)
    assert read_json(index / "report.json")["left_out"] == {"cannot be pronounced": 1}
    assert (index / "skipped.tsv").read_text(encoding="utf-8") == "5\tcannot be pronounced\t吴㻦\n"
    found = ["2-10\t北京饭店\tweight 2, city", "12-20\t会心西街\tweight 3", "12-20\t惠新西街\tweight 1"]
    assert nim4("hotwords", "search", index, "--text", "去北京饭店和惠新西街")[:2] == (0, found)
    assert nim4("hotwords", "search", index, "--phones", "h ui4 x in1 x i1 j ie1", "--engine", "ahocorasick")[1] == [
        line.replace("12-20", "0-8") for line in found[1:]
    ]
    assert nim4("hotwords", "search", index, "--text", "去北京饭店", "--tags", "city, other")[1] == ["2-10\t北京饭店\tweight 2, city"]
    assert nim4("hotwords", "add", index, "天津", "吴㻦")[0] == 0
    assert nim4("hotwords", "remove", index, "北京")[0] == 0
    assert nim4("hotwords", "search", index, "--text", "北京天津")[1] == ["4-8\t天津\tweight 1"]
    before = nim4("hotwords", "stats", index)[1]
    assert {"names\t5", "added\t1", "removed\t1"} <= set(before)
    assert nim4("hotwords", "compact", index)[0] == 0
    assert not (index / JOURNAL).exists()
    assert {"names\t5", "added\t0", "removed\t0", "base_names\t5"} <= set(nim4("hotwords", "stats", index)[1])
    assert nim4("hotwords", "search", index, "--text", "北京天津")[1] == ["4-8\t天津\tweight 1"]


def test_names_of_a_list_can_be_added(nim4, names, tmp_path):
    nim4("hotwords", "build", names, "--out", tmp_path / "index", "--jobs", 1)
    (tmp_path / "more.tsv").write_text("天津\t7\tport\n\x07\n", encoding="utf-8")
    code, _, messages = nim4("hotwords", "add", tmp_path / "index", "--list", tmp_path / "more.tsv")
    assert code == 0
    assert any("control or private characters: line 2" in line for line in messages)
    assert nim4("hotwords", "search", tmp_path / "index", "--text", "天津")[1] == ["0-4\t天津\tweight 7, port"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected at least one name that can be said, found none"),
        (b"\n# nothing\n", "expected at least one name that can be said, found none"),
        ("。\n吴㻦\n".encode(), "left out: {'neither a letter nor a digit': 1, 'cannot be pronounced': 1}"),
        ("北京\n".encode("gbk"), "line 1: expected UTF-8"),
        (b"\0" * 5000, "left out: {'longer than 100 characters': 1}"),
        ("北京\t1\t\tb ei3 qq\n".encode(), "the pronunciation is neither phones of tokens.txt nor pinyin with tones"),
        (None, "names.tsv: expected a word list, found no such file"),
    ],
)
def test_bad_lists(nim4, tmp_path, content, message):
    path = tmp_path / "names.tsv"
    if content is not None:
        path.write_bytes(content)
    code, _, messages = nim4("hotwords", "build", path, "--out", tmp_path / "index", "--jobs", 1)
    assert code == 2
    assert message in messages[-1]
    assert ". Fix: " in messages[-1]
    assert not (tmp_path / "index").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("search", "nowhere", "--text", "a"), "nowhere/hotwords.bin: expected a hotword index, found"),
        (("search", "index", "--phones", "b ei3 qq"), "expected symbols of the inventory, found 'qq'"),
        (("search", "index", "--wav", "x.wav"), "--model: expected the model folder"),
        (("build", "names.tsv", "--out", "names.tsv/index"), "names.tsv/index: expected a folder that can be made"),
        (("build", ".", "--out", "other"), "expected a word list, found a folder"),
        (("build", "names.tsv", "--out", "other", "--jobs", "0"), "--jobs: expected at least 1, found 0"),
        (("add", "index"), "NAME, --list: expected at least one name"),
        (("add", "index", "吴㻦"), "NAME: expected a name that can be said, found cannot be pronounced"),
        (("remove", "index", "天津"), "NAME: expected names of the index, found 天津"),
        (("search", "index", "--text", "a", "--engine", "trei"), "--engine: expected trie or ahocorasick, found trei"),
    ],
)
def test_mistakes(nim4, names, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    nim4("hotwords", "build", names, "--out", "index", "--jobs", 1)
    code, _, messages = nim4("hotwords", *command)
    assert code == 2
    assert message in messages[-1]


def test_a_full_disk_leaves_the_old_index(nim4, names, tmp_path, monkeypatch):
    index = tmp_path / "index"
    nim4("hotwords", "build", names, "--out", index, "--jobs", 1)
    content = (index / FILE).read_bytes()
    names.write_text("天津\n", encoding="utf-8")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage.os, "fsync", full)
    for command in (("build", names, "--out", index, "--jobs", 1), ("add", index, "天津"), ("compact", index)):
        code, _, messages = nim4("hotwords", *command)
        assert code == 2
        assert "expected room on the disk, found it full" in messages[-1]
    assert (index / FILE).read_bytes() == content
    assert sorted(path.name for path in index.iterdir()) == sorted([FILE, "done.json", "lock", "report.json", "skipped.tsv"])


# ------------------------------------------------------------------------------------------------- while others search


def large_index(folder, num_names=3000):
    rng = np.random.default_rng(0)
    chars = list("北京上海广州深圳天津南京武汉成都西安杭州重庆苏州大连青岛宁波厦门长沙郑州济南合肥福州昆明")
    listed = {"".join(rng.choice(chars, 4)) for _ in range(num_names)}
    keyed = make_keys(enumerate(map(Name, sorted(listed))), INVENTORY, ListReport())
    index = HotwordIndex.build(keyed, INVENTORY)
    index.save(folder)
    return index


def said(text):
    return INVENTORY.encode(Lexicon().phones(text))


def names_in(hits):
    return {name.text for hit in hits for name in hit.names}


def test_compaction_in_a_child_takes_over_and_keeps_later_changes(tmp_path):
    index = large_index(tmp_path / "index")
    index.add(["复旦大学", "惠新西街"])
    index.remove(["复旦大学"])
    stream = index.stream()
    stream.push(said("惠新"))
    thread = threading.Thread(target=index.compact)
    thread.start()
    while index.state.base.num_names == index.stats()["base_names"] and thread.is_alive() and not (tmp_path / "index" / JOURNAL).exists():
        time.sleep(0.001)
    index.add(["清华大学"])  # while the child works
    thread.join()
    assert names_in(index.search(said("惠新西街清华大学复旦大学"))) == {"惠新西街", "清华大学"}
    assert (index.stats()["added"], index.stats()["removed"]) == (1, 0)
    stream.push(said("西街"))
    assert names_in(stream.hits) == {"惠新西街"}, "a stream goes on over the swap"
    index.save()
    assert names_in(HotwordIndex.load(tmp_path / "index").search(said("惠新西街清华大学复旦大学"))) == {"惠新西街", "清华大学"}


def test_a_killed_compaction_leaves_the_old_index(tmp_path):
    index = large_index(tmp_path / "index")
    index.add(["惠新西街"])
    index.save()
    content = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import nim4.stage, os, signal, sys; nim4.stage.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "from nim4.decode.hotword import HotwordIndex; from pathlib import Path; HotwordIndex.load(Path(sys.argv[1])).compact_here()"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index")], env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr  # at the very moment before the new base takes over
    assert {name: (tmp_path / "index" / name).read_bytes() for name in content} == content
    assert names_in(index.search(said("惠新西街"))) == names_in(HotwordIndex.load(tmp_path / "index").search(said("惠新西街"))) == {"惠新西街"}
    index.compact()  # and the next one goes through
    assert index.stats()["added"] == 0
    assert names_in(index.search(said("惠新西街"))) == {"惠新西街"}


def test_a_child_killed_while_it_compacts_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    index = large_index(tmp_path / "index", 300)
    index.add(["惠新西街"])
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    content = (tmp_path / "index" / FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(killed))
        with pytest.raises(RecipeError, match=r"expected a compaction that ends, found exit code -9\. Fix: the old index still serves"):
            index.compact()
    assert names_in(index.search(said("惠新西街"))) == {"惠新西街"}
    assert (tmp_path / "index" / FILE).read_bytes() == content
    assert names_in(HotwordIndex.load(tmp_path / "index").search(said("惠新西街"))) == {"惠新西街"}, "it is in the journal"
    index.compact()
    assert index.stats()["added"] == 0


def test_eight_threads_lose_no_word_and_find_none_that_is_not_there(tmp_path):
    index = large_index(tmp_path / "index", 500)
    until, errors = time.monotonic() + float(os.environ.get("NIM4_STRESS_S", "4")), []
    fixed = sorted(names_in(index.search(said("北京上海"))))

    def change(number):
        own = [f"惠新{'东西南北'[number]}{end}" for end in "街路桥门"]
        phones = {name: said(name) for name in own}
        try:
            while time.monotonic() < until:
                index.add(own)
                assert all(name in names_in(index.search(phones[name])) for name in own), "lost"
                index.remove(own[:2])
                assert all(name not in names_in(index.search(phones[name])) for name in own[:2]), "phantom"
                assert all(name in names_in(index.search(phones[name])) for name in own[2:]), "lost"
        except Exception as error:
            errors.append(error)
            raise

    def look():
        try:
            while time.monotonic() < until:
                stream = index.stream()
                for phone in said("北京上海惠新东街"):
                    stream.push([phone])
                assert sorted(names_in(index.search(said("北京上海")))) == fixed
        except Exception as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)] + [threading.Thread(target=look) for _ in range(3)]
    threads.append(threading.Thread(target=index.compact))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {text for text in index.state.added} | {index.state.base.text(name) for name in range(index.state.base.num_names)} >= {
        "惠新东桥",
        "惠新西门",
    }


# ------------------------------------------------------------------------------------------------- hints and decoding


def test_hints_are_stable_capped_and_make_room():
    index = HotwordIndex.build(
        make_keys(
            enumerate([*map(Name, ["北京", "北京饭店", "上海", "天津港", "广州"]), Name("张威", 3), Name("张薇", 2), Name("章威"), Name("张巍")]),
            INVENTORY,
            ListReport(),
        ),
        INVENTORY,
    )
    hints = Hints(["manual", "上海", "manual"], limit=5)
    assert hints.update(index.search(said("去北京"))) == ["manual", "上海", "北京"]
    assert hints.update(index.search(said("去北京饭店"))) == ["manual", "上海", "北京饭店"]
    assert hints.update(index.search(said("去北京饭店看天津港上海"))) == ["manual", "上海", "北京饭店", "天津港"]
    assert hints.update(index.search(said("去北京饭店看天津港和张威"))) == ["manual", "上海", "北京饭店", "天津港", "张威"]
    assert Hints(limit=10).update(index.search(said("张威"))) == ["张威", "张薇", "张巍"], "three of four homophones"
    assert Hints(limit=2).update(index.search(said("广州天津港北京饭店"))) == ["天津港", "北京饭店"]
    assert Hints(["a", "b", "c"], limit=2).update(index.search(said("广州"))) == ["a", "b"]


def test_of_names_that_overlap_those_are_hints_that_explain_the_most():
    names = ["南京市长", "南京市", "长江", "长江大桥", "江大桥", "市长"]
    index = HotwordIndex.build(make_keys(enumerate(map(Name, names)), INVENTORY, ListReport()), INVENTORY)
    hits = index.search(said("南京市长江大桥"))
    assert [name.text for hit in hits for name in hit.names] == ["南京市长", "长江大桥"]
    assert Hints().update(hits) == ["南京市长"], "as many phones as the other, and the first of the two"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.5])), max_size=9))
def test_no_other_choice_of_hits_explains_more(places):
    hits = [Hit(start, start + size, cost, ()) for start, size, cost in places]
    costs = {}
    for hit in hits:
        costs[hit.span] = min(hit.cost, costs.get(hit.span, hit.cost))

    def worth(spans):
        together = all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans)))
        return sum(end - start - costs[start, end] for start, end in spans) if together else -1.0

    chosen = compatible(hits)
    assert [hit for hit in hits if hit in chosen] == chosen
    spans = {hit.span for hit in chosen}
    assert [hit for hit in hits if hit.span in spans] == chosen, "all names of a place stay or go together"
    choices = [choice for size in range(len(costs) + 1) for choice in itertools.combinations(costs, size)]
    assert worth(spans) == max(map(worth, choices))


def test_decoding_looks_hints_up_and_says_which(command, aligned, units, tmp_path, nim4, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("你好\n北京\n上海\n", encoding="utf-8")
    build = command("10_hotwords")
    assert build("--list", names, "--units", units, "--out", tmp_path / "index", "--jobs", 1) == (0, [])
    assert build("--list", names, "--units", units, "--out", tmp_path / "index", "--jobs", 1) == (0, [])
    assert "skipped, same inputs and settings" in build.log
    decode = command("11_decode")
    options = ["--model", aligned, "--units", units, "--test", "test", "--device", "cpu", "--out", tmp_path / "out"]
    code, errors = decode(*options, "--configs", "offline_hotwords")
    assert code == 2
    assert "--hotword-index: expected the folder of stage 10" in errors[0]
    # What the untrained head would have to hear: every recording is 北京.
    heard = np.full((8, len(INVENTORY)), -20.0, np.float32)
    heard[np.arange(8), [0, *said("北京"), 0, 0, 0]] = 0.0
    monkeypatch.setattr("nim4.decode.hotword.HotwordView.search_log_probs", lambda view, _, limits: view.search(heard.argmax(1)[1:5]))
    for configs in ("offline_hotwords", "offline_hotwords_exact"):
        assert decode(*options, "--configs", configs, "--hotword-index", tmp_path / "index", "--hotwords", "上海") == (0, [])
        rows = read_jsonl(tmp_path / "out" / configs / "test" / "hyps.jsonl")
        assert [row["hints"] for row in rows] == [["上海", "北京"]] * 4
    assert decode(*options, "--configs", "offline", "--hotwords", "上海,北京") == (0, [])
    same = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "out" / "offline" / "test" / "hyps.jsonl")}
    assert {row["id"]: row["text"] for row in rows} == same, "the prompt is the one with these hints by hand"
    nim4("hotwords", "add", tmp_path / "index", "天津")
    assert decode(*options, "--configs", "offline_hotwords", "--hotword-index", tmp_path / "index", "--hotwords", "上海") == (0, [])
    assert "rebuilding" in decode.log


def test_streams_look_hints_up_chunk_by_chunk(command, talkative, units, tmp_path, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("你好\n北京\n上海\n", encoding="utf-8")
    assert command("10_hotwords")("--list", names, "--units", units, "--out", tmp_path / "index", "--jobs", 1) == (0, [])
    decode = command("11_decode")
    options = ["--model", talkative, "--units", units, "--test", "test", "--device", "cpu", "--out", tmp_path / "out"]
    # What the untrained head would have to hear: every chunk is 北京.
    heard = torch.full((8, len(INVENTORY)), -20.0)
    heard[torch.arange(8), torch.tensor([0, *said("北京"), 0, 0, 0])] = 0.0
    monkeypatch.setattr("nim4.model.ctc.PhonemeHead.forward", lambda head, frames: heard[None])
    given = ["--hotwords", "上海"]
    assert decode(*options, "--configs", "streaming_hotwords", "--hotword-index", tmp_path / "index", *given) == (0, [])
    rows = read_jsonl(tmp_path / "out" / "streaming_hotwords" / "test" / "hyps.jsonl")
    assert [row["hints"] for row in rows] == [["上海", "北京"]] * 4
    assert decode(*options, "--configs", "streaming", "--hotwords", "上海,北京") == (0, [])
    same = {row["id"]: row["text"] for row in read_jsonl(tmp_path / "out" / "streaming" / "test" / "hyps.jsonl")}
    assert {row["id"]: row["text"] for row in rows} == same, "the prompt is the one with these hints by hand"


def test_a_recording_is_searched_and_other_units_are_refused(nim4, trained, names, tmp_path):
    write_audio(tmp_path / "x.wav", seconds=0.6)
    assert nim4("hotwords", "build", names, "--out", tmp_path / "index", "--units", trained, "--jobs", 1)[0] == 0
    for search in ("exact", "lattice"):
        assert nim4("hotwords", "search", tmp_path / "index", "--wav", tmp_path / "x.wav", "--model", trained, "--search", search)[0] == 0
    code, _, messages = nim4("hotwords", "search", tmp_path / "index", "--wav", tmp_path / "none.wav", "--model", trained)
    assert code == 2
    assert "none.wav: expected a recording" in messages[-1]
    other = shutil.copytree(trained, tmp_path / "other")
    lines = (other / "tokens.txt").read_text(encoding="utf-8").splitlines()
    lines[5], lines[6] = lines[6].split()[0] + " 5", lines[5].split()[0] + " 6"
    (other / "tokens.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, _, messages = nim4("hotwords", "search", tmp_path / "index", "--wav", tmp_path / "x.wav", "--model", other)
    assert code == 2
    assert "expected an index of the model's units" in messages[-1]
