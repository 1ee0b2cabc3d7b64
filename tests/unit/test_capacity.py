"""The plan on paper: its formulas are the textbook's, a simulation agrees, and it takes its figures from records alone."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from nim4.config import RecipeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def capacity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("capacity", ROOT / "benchmarks" / "capacity.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "capacity", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def records(tmp_path):
    """One old record that must not count, and the new ones."""
    search = [
        {"engine": "trie", "way": way, "names": 1_000_000, "p99_us": p99, "resident_mb": 100.0} for way, p99 in (("exact", 9.0), ("lattice", 64.0))
    ]
    rows = {
        "streams_held": [{"streams": 100, "holds": "yes"}, {"streams": 200, "holds": "no"}],
        "gateway_cost": [{"cpu_ms_per_audio_s": 10.0}, {"cpu_ms_per_audio_s": 8.0}],
        "hotwords": search,
    }
    old = {"benchmark": "streams_held", "what": "old", "rows": [{"streams": 1, "holds": "yes"}]}
    lines = [old, *({"benchmark": name, "what": name, "rows": own} for name, own in rows.items())]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_erlangs_formula_is_the_textbooks(capacity):
    for load, places in ((1.0, 1), (2.0, 3), (20.0, 30)):
        terms = [load**n / math.factorial(n) for n in range(places + 1)]
        assert capacity.blocked(load, places) == pytest.approx(terms[-1] / sum(terms))
    places = capacity.places_for(100.0, 1e-3)
    assert capacity.blocked(100.0, places) <= 1e-3 < capacity.blocked(100.0, places - 1)


def test_a_simulation_agrees_with_the_formulas(capacity):
    for days in (1e6, 1 / 12):
        expected = capacity.blocked_with_failures(40.0, 4, 10, days, 120.0)
        found = capacity.simulate(40.0, 4, 10, 120.0, days, 120.0, sessions=20_000)
        assert found["no_place"] == pytest.approx(expected, rel=0.15)
        assert (found["lost"] > 0) == (days < 1)
        assert found["most"] <= 40
    assert capacity.blocked_with_failures(40.0, 4, 10, 1 / 12, 120.0) > 1.1 * capacity.blocked(40.0, 40)


def test_spare_engines_cover_the_usual_failures(capacity):
    assert capacity.spare_engines(1, 1e6, 120.0) == 0
    assert capacity.spare_engines(100, 30.0, 120.0) <= capacity.spare_engines(10_000, 30.0, 120.0)
    mean = 10_000 * 120 / (86_400 * 30)
    assert capacity.spare_engines(10_000, 30.0, 120.0) > mean


def test_the_plan_is_made_of_the_last_records(capacity, records):
    args = capacity.build_parser().parse_args(["--streams", "20000", "--names", "4000000"])
    measured = capacity.read_measured(records, None)
    assert (measured.held, measured.core_s, measured.retrieve_s) == (100, 0.01, 64e-6)
    rows, engines, spare = capacity.plan(args, measured, capacity.Shape())
    number = {row["what"]: row["number"] for row in rows}
    assert number["cells"] == 2
    assert engines == math.ceil(capacity.places_for(10_000, 1e-3) / 100) + spare
    assert number["engines, GPUs"] == 2 * engines
    assert number["gateway cores"] == math.ceil(20_000 * (0.01 + 2 * 64e-6 / 0.64) / 0.6)
    assert number["index of a host, GB"] == pytest.approx(0.4)
    assert number["from encoders, Gbit/s"] > number["clients' network, Gbit/s"]


def test_a_figure_that_was_not_measured_is_told(capacity, records):
    kept = [line for line in records.read_text().splitlines() if "gateway_cost" not in line]
    records.write_text("\n".join(kept))
    with pytest.raises(RecipeError, match=r"expected a record of gateway_cost, found none. Fix: benchmarks/gateway_cost.py"):
        capacity.read_measured(records, None)
    assert capacity.build_parser().parse_args([]).streams == 1_000_000
