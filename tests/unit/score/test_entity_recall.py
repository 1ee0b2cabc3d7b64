"""Entity recall: counted by hand, and as the command prints it."""

import subprocess
import sys
from pathlib import Path

import pytest

from nim4.corpus.keywords import Keywords
from nim4.score.decoded import read_set
from nim4.score.entity_recall import entity_recall

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["西湖", "西湖公园", "天空之城", "Apple Music"]


@pytest.fixture
def decoded(write_set, make_ref, make_hyp):
    refs = [
        make_ref("a", "x", "导航到西湖公园"),
        make_ref("b", "x", "播放天空之城和天空之城"),
        make_ref("c", "x", "打开 apple music 去西湖"),
        make_ref("d", "x", "打开车窗"),
        make_ref("e", "x", "西湖"),
        make_ref("f", "x", "西湖"),
    ]
    hyps = [
        make_hyp("a", "x", "导航到西湖公园。"),
        make_hyp("b", "x", "播放天空的城"),
        make_hyp("c", "x", "打开 Apple Music 去洗"),
        make_hyp("d", "x", "打开天空之城"),
        make_hyp("e", None, None, error="failed"),
    ]  # f has none
    return write_set("offline", "test_poi", refs, hyps)


def test_names_are_counted_once_per_utterance_as_whole_words(decoded):
    recall, wrong = entity_recall(read_set(decoded), Keywords(NAMES))
    assert (recall.count, recall.total) == (2, 6)  # 西湖公园 and Apple Music, of those two, 天空之城 once, and 西湖 three times
    assert (wrong.count, wrong.total) == (1, 3)
    assert recall.percent == pytest.approx(100 * 2 / 6)
    assert recall.low < recall.percent < recall.high


def test_a_list_of_which_nothing_is_said(decoded):
    recall, wrong = entity_recall(read_set(decoded), Keywords(["火星"]))
    assert (recall.total, recall.percent, wrong.total, wrong.percent) == (0, None, 0, None)


def run(*options):
    command = [sys.executable, ROOT / "utils" / "entity_recall.py", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(decoded, tmp_path):
    (tmp_path / "names.tsv").write_text("name\tweight\ttags\n" + "".join(f"{name}\t1\tpoi\n" for name in NAMES), encoding="utf-8")
    done = run(tmp_path / "11_decode", "--names", tmp_path / "names.tsv")
    assert done.returncode == 0, done.stderr
    assert "| test_poi | offline | 33.33 [" in done.stdout
    assert "2/6 |" in done.stdout
    (tmp_path / "empty.tsv").write_text("# none\n", encoding="utf-8")
    done = run(tmp_path / "11_decode", "--names", tmp_path / "empty.tsv")
    assert done.returncode == 2
    assert "expected at least one name" in done.stderr.strip().splitlines()[-1]
