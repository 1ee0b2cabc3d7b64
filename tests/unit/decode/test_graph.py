"""Graphs and lattices against what k2 made of them (k2_golden.json), and k2 itself against the same where it is installed."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from make_k2_golden import GOLDEN, LENS, NUM_SYMBOLS, PHONES, READINGS, WEIGHTS, ngram, searches

from nim4.config import RecipeError
from nim4.decode import graph
from nim4.decode.graph import GraphSearch, Lattice, LatticePath, best_paths, k2_ctc_loss, lexicon_text, names_on_paths, ngram_text
from utils import check_env

MADE = json.loads(GOLDEN.read_text(encoding="utf-8"))
with_k2 = pytest.mark.skipif(importlib.util.find_spec("k2") is None, reason="k2 is not installed")


def collapse(labels):
    return [label for place, label in enumerate(labels) if label and (place == 0 or labels[place - 1] != label)]


def lattice_of(made):
    arrays = [np.array(made[name]) for name in ("src", "dst", "phone")]
    return Lattice(*arrays, made["words"], np.array(made["score"]))


@pytest.fixture(scope="module")
def words():
    return ngram()


def test_the_graphs_are_those_that_k2_was_given(words):
    entries = [(words.words.index(word), phones) for word in READINGS for phones in READINGS[word]]
    assert lexicon_text(entries, NUM_SYMBOLS, len(words.words) - 1, WEIGHTS["word_bonus"]) == MADE["graphs"]["L"]
    assert ngram_text(words, WEIGHTS["lm_weight"]) == MADE["graphs"]["G"]


@pytest.mark.parametrize("name", ["H", "HL", "HLG"])
def test_the_best_path_of_a_lattice_is_k2s(name, words):
    different = set()
    for case in MADE["cases"]:
        best, (path, *more) = case["best"][name], best_paths(lattice_of(case["lattice"][name]), 4)
        known = list(READINGS) if name == "HL" else words.words
        assert list(path.phones) == collapse(best["labels"])
        assert [known[word] for word in path.words] == best["words"]
        assert path.score == pytest.approx(best["score"], abs=1e-3)
        assert path.score >= max((other.score for other in more), default=-math.inf)
        assert len({(other.phones, other.words) for other in (path, *more)}) == 1 + len(more)
        different.add(path)
    assert len(different) >= 4


def paths_of(lattice, state=0, phones=(), words=(), score=0.0):
    """All of them, one by one."""
    if state == lattice.dst.max():
        yield phones, words, score
    for arc in np.flatnonzero(lattice.src == state):
        phone = int(lattice.phone[arc])
        yield from paths_of(lattice, lattice.dst[arc], phones + (phone,) * (phone > 0), words + tuple(lattice.words[arc]), score + lattice.score[arc])


def test_the_best_paths_are_the_best_of_all():
    rng, num_states = np.random.default_rng(0), 7
    arcs = [(src, dst) for src in range(num_states) for dst in range(src + 1, num_states) if dst - src < 4 for _ in range(2)]
    for _ in range(5):
        src, dst = np.array(arcs).T
        words = [[int(word)] * int(word > 0) for word in rng.integers(0, 3, len(arcs))]
        lattice = Lattice(src, dst, rng.integers(0, 3, len(arcs)), words, rng.standard_normal(len(arcs)))
        worth = {}
        for phones, spelled, score in paths_of(lattice):
            worth[phones, spelled] = max(score, worth.get((phones, spelled), -math.inf))
        expected = sorted(worth.values(), reverse=True)[:6]
        found = best_paths(lattice, 6)
        assert [path.score for path in found] == pytest.approx(expected)
        assert [worth[path.phones, path.words] for path in found] == pytest.approx(expected)


def test_a_lattice_without_paths_has_none():
    nothing = np.zeros(0, np.int64)
    assert best_paths(Lattice(nothing, nothing, nothing, [], np.zeros(0)), 3) == []


def test_hotwords_are_found_on_lower_paths():
    paths = [LatticePath((1, 2), (), -1.0), LatticePath((1, 3), (), -1.5), LatticePath((1, 3, 4), (), -4.0)]
    heard = {(1, 2): ["first"], (1, 3): ["second"], (1, 3, 4): ["second", "third"]}

    def search(phones):
        return [SimpleNamespace(names=[SimpleNamespace(text=text)]) for text in heard[phones]]

    assert names_on_paths(paths, search) == {"first": 0.0, "second": 0.5, "third": 3.0}
    assert names_on_paths([], search) == {}


def test_the_beam_search_finds_what_the_graph_does(words):
    beam = pytest.importorskip("nim4.decode.beam", reason="an environment of k2 alone has no numba", exc_type=ModuleNotFoundError)
    search = beam.BeamSearch(words, READINGS, num_beams=500, sum_paths=False, **WEIGHTS)
    for case in MADE["cases"]:
        phones, found, score = search.scored(np.array(case["log_probs"], np.float32))
        best = case["best"]["HLG"]
        assert (phones, found) == (collapse(best["labels"]), best["words"])
        assert score == pytest.approx(best["score"], abs=1e-3)


def test_torchs_ctc_loss_is_k2s():
    from nim4.model.ctc import ctc_loss

    phones = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in PHONES], batch_first=True)
    loss = ctc_loss(torch.tensor(MADE["ctc"]["log_probs"]), torch.tensor(LENS), phones, torch.tensor([len(row) for row in PHONES]))
    assert float(loss) == pytest.approx(MADE["ctc"]["loss"], abs=1e-4)


@with_k2
def test_k2_finds_the_same_again(words):
    made = searches(words)
    for case in MADE["cases"]:
        log_probs = np.array(case["log_probs"], np.float32)
        for name, search in made.items():
            best = case["best"][name]
            assert search.search(log_probs) == (collapse(best["labels"]), best["words"])
            assert best_paths(search.lattice(log_probs))[0].score == pytest.approx(best["score"], abs=1e-3)
    assert made["HLG"].search(np.zeros((0, NUM_SYMBOLS), np.float32)) == ([], [])
    log_probs = torch.tensor(MADE["ctc"]["log_probs"])
    assert float(k2_ctc_loss(log_probs, torch.tensor(LENS), PHONES)) == pytest.approx(MADE["ctc"]["loss"], abs=1e-4)


def test_the_environments_list_has_the_line_that_installs_it():
    assert graph.INSTALL in {package.install for package in check_env.OPTIONAL if package.name == "k2"}


def test_no_k2_is_told(monkeypatch):
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"k2: expected it to be installed, found no such package\. Fix: python -m pip install"):
        GraphSearch(NUM_SYMBOLS)


def test_a_k2_for_another_torch_is_told(monkeypatch, tmp_path):
    (tmp_path / "torch_version.py").write_text('# made\nk2_torch_version = "1.4.0+cu10"\n', encoding="utf-8")
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(RecipeError) as error:
        GraphSearch(NUM_SYMBOLS)
    assert f"k2: expected one built for the installed torch {torch.__version__}, found one for torch 1.4.0+cu10. Fix: python -m" in str(error.value)


def test_a_k2_that_cannot_be_imported_is_told(monkeypatch, tmp_path):
    (tmp_path / "k2.py").write_text("raise ImportError('libtorch_cuda.so:\\n cannot open')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "k2", raising=False)
    with pytest.raises(RecipeError, match=r"k2: expected one that can be imported with torch .*, found libtorch_cuda.so: cannot open\. Fix: "):
        GraphSearch(NUM_SYMBOLS)
