"""utils/results.py: tables from kept records; and the pages of this repository are what it writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_compare import write_scores

from nim4 import stage
from nim4.config import RecipeError
from nim4.report import baselines, benchmarks
from nim4.score import table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results_module():
    spec = importlib.util.spec_from_file_location("results", ROOT / "utils" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(results_module, monkeypatch, tmp_path):
    """Runs results.py on the pages and records below tmp_path."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["results.py", "--root", str(tmp_path), *map(str, args)])
        results_module.main()

    return run


def make_record(**changes):
    rows = [{"way": "ours", "h_per_s": 123.4, "share": 0.0123}, {"way": "theirs, 旧", "h_per_s": 5.0, "share": 0}]
    made = {"commit": "1a2b3c4", "data": {"size": "3 signals", "seed": 0}, "hardware": "A CPU, 1 thread", "torch": "2.13.0", "load": 1.1}
    return {"benchmark": "fbank", "what": "How fast.", "command": "benchmarks/fbank.py", "rounds": 7, "rows": rows, **made, **changes}


def write_benchmarks(folder, *records):
    path = folder / "results" / "benchmarks.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def page(folder, *names):
    path = folder / "RESULTS.md"
    path.write_text("# Results\n" + "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in names), encoding="utf-8")
    return path


GOLDEN = """\
**fbank**: How fast.

| way        | h per s |  share |
| ---------- | ------: | -----: |
| ours       |     123 | 0.0123 |
| theirs, 旧 |    5.00 |      0 |

`benchmarks/fbank.py`: 3 signals, seed 0; median of 7 rounds; commit 1a2b3c4, A CPU, 1 thread, torch 2.13.0, load average 1.1"""


def test_a_benchmark_reads_like_this():
    assert benchmarks.as_markdown(make_record()) == GOLDEN


def test_the_newest_record_of_each_command_and_hardware_is_shown(results, tmp_path):
    old, other = make_record(commit="0000000"), make_record(command="benchmarks/fbank.py --minutes 1")
    write_benchmarks(tmp_path, make_record(benchmark="train_step"), old, other, make_record(), make_record(hardware="A GPU"))
    path = page(tmp_path, "benchmarks")
    results()
    text = path.read_text(encoding="utf-8")
    assert GOLDEN in text
    assert "0000000" not in text
    assert text.count("**fbank**") == 3
    assert text.index("**train_step**") > text.rindex("**fbank**")
    results()
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("change", "missing"), [({"commit": None}, "commit"), ({"rows": []}, "rows, data.size"), ({"data": {"size": "3"}}, "rows, data.size")]
)
def test_a_record_that_does_not_say_what_it_is_is_refused(results, tmp_path, change, missing):
    write_benchmarks(tmp_path, make_record(), make_record(**change))
    before = page(tmp_path, "benchmarks").read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"benchmarks\.jsonl, row 2: expected the record of a benchmark, found no valid {missing}"):
        results()
    assert page(tmp_path, "benchmarks").read_text(encoding="utf-8") == before


def test_kept_runs_give_the_table_of_the_runs(results, tmp_path):
    write_scores(tmp_path / "exp" / "plain" / "12_score", command="python local/12_score.py")
    write_scores(tmp_path / "exp" / "base" / "12_score", command="python local/12_score.py")
    runs = [tmp_path / "exp" / "plain", tmp_path / "exp" / "base"]  # not in alphabetical order: the first is what is compared with
    expected = table.as_markdown(table.make_blocks(table.read_rows(runs)))
    assert "vs plain:ctc_greedy" in expected
    path = page(tmp_path, "cr_ctc")
    results("--keep", "cr_ctc", *runs)
    assert path.read_text(encoding="utf-8") == (
        f"# Results\n<!-- cr_ctc:begin -->\n{expected}\n- made by `python local/12_score.py`\n<!-- cr_ctc:end -->\n"
    )
    kept = sorted(str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*.jsonl"))
    assert len(kept) == 2 * (1 + 2 * 2)  # per run: the records, and two metrics of two configs
    results("--keep", "cr_ctc", runs[1])
    assert sorted(path.name for path in (tmp_path / "results" / "cr_ctc").iterdir()) == ["base", "runs.txt"]
    assert "plain:" not in path.read_text(encoding="utf-8")


def test_reported_figures_stand_beside_kept_runs_of_the_same_set_and_metric(results, tmp_path):
    for corpus in ("aishell", "mini"):
        write_scores(tmp_path / corpus / "12_score", ["ctc_greedy"], decode_command=f"local/11_decode.py --model m --units data/{corpus}/units")
        results("--keep", corpus, tmp_path / corpus)
    row = {
        "table": "public",
        "group": "Mandarin",
        "benchmark": "AISHELL-1",
        "subset": None,
        "values": {"theirs": 1.5},
        "corpus": "aishell",
        "set": "test",
    }
    content = {"source": "their page", "rows": [row | {"metric": "MER"}, row | {"metric": "CER"}]}
    (tmp_path / "results" / "reported").mkdir()
    (tmp_path / "results" / "reported" / "tables.json").write_text(json.dumps(content))
    path = page(tmp_path, "reported")
    results()
    _, _, title, _, header, _, *rows, _ = path.read_text(encoding="utf-8").splitlines()
    assert title == "**Public test sets**, reported: their page"
    assert header == "| group | test set | metric | reported: theirs | measured here |"
    (record,) = [one for one in stage.read_jsonl(tmp_path / "results/aishell/aishell/records.jsonl") if one["metric"] == "MER"]
    here = f"aishell:ctc_greedy {record['rate']:.2f} [10.00, 90.00] (plain 0123456789ab)"
    assert rows == [f"| Mandarin | AISHELL-1 | MER | 1.50 | {here} |", "| Mandarin | AISHELL-1 | CER | 1.50 | - |"]


def test_what_cannot_be_kept_leaves_the_kept_alone(results, tmp_path):
    write_scores(tmp_path / "exp" / "base" / "12_score")
    write_scores(tmp_path / "other" / "base" / "12_score")
    base = tmp_path / "exp" / "base"
    results("--keep", "mini", base)
    (tmp_path / "other" / "base" / "12_score" / "ctc_greedy" / "test" / "utts-PER.jsonl").unlink()
    for arguments, message in (
        (["mini"], "at least 1 run"),
        (["benchmarks", base], "not 'benchmarks'"),
        (["../mini", base], "lower-case"),
        (["mini", tmp_path / "nowhere"], "records.jsonl"),
        (["mini", tmp_path / "other" / "base"], "utts-PER"),
    ):
        with pytest.raises(RecipeError, match=message):
            results("--keep", *arguments)
    write_scores(tmp_path / "other" / "base" / "12_score")
    with pytest.raises(RecipeError, match="runs with different tags"):
        results("--keep", "mini", base, tmp_path / "other" / "base")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["mini"]
    assert (tmp_path / "results" / "mini" / "base" / "ctc_greedy" / "test" / "utts-PER.jsonl").is_file()


def test_a_block_without_records_says_how_to_keep_some_and_holds_up_no_other(results, tmp_path):
    write_benchmarks(tmp_path, make_record())
    path = page(tmp_path, "mini", "benchmarks")
    with pytest.raises(RecipeError, match=r"block mini: expected kept runs .* Fix: utils/results\.py --keep mini"):
        results()
    text = path.read_text(encoding="utf-8")
    assert GOLDEN in text
    assert "<!-- mini:begin -->\n<!-- mini:end -->" in text


def heard(hyp, ref, errors):
    """One system's row of an utterance in a record of `score`."""
    counts = {"errors": {"MER": errors}, "ref_units": {"MER": len(ref.split())}}
    return {"hyp": hyp, "missing": None if hyp else "empty", "error": None, **counts, "units": [ref, hyp]}


def test_baselines_are_compared_set_by_set_and_on_english_alone(tmp_path):
    said = [("a", "mixed", "打 开 open", "打 开 open", "the open"), ("b", "mixed", "print", "print", "sprint"), ("n", "noise", "", "", "mm")]
    errors = {"a": 2, "b": 1, "n": 1}
    utts = [
        {"id": id, "speaker": None, "set": name, "ref": ref, "systems": [heard(ours, ref, 0), heard(theirs, ref, errors[id])]}
        for id, name, ref, ours, theirs in said
    ]
    made = {"profile": "fair", "profile_hash": "123", "commit": "abc", "command": "python -m nim4 score", "metrics": ["MER"]}
    record = {**made, "systems": [{"name": "ours"}, {"name": "theirs"}], "utterances": utts}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in baselines.as_markdown(path).splitlines() if line.startswith("|")]
    assert rows[0][:4] == ["test set", "system", "MER % (95 % CI)", "vs ours (95 % CI, P better)"]
    ours, theirs, silent_ours, silent_theirs = rows[2:]
    assert (ours[2].split()[0], ours[4], ours[6]) == ("0.00", "0.00", "-")
    assert (theirs[2].split()[0], theirs[3].split()[0], theirs[4]) == ("75.00", "+75.00", "100.00")  # `the` is one too many, `sprint` is wrong
    assert (silent_ours[2], silent_ours[6], silent_theirs[6]) == ("-", "0 of 1", "1 of 1")
    path.write_text(json.dumps({**record, "utterances": [{**utts[0], "set": None}]}), encoding="utf-8")
    with pytest.raises(RecipeError, match="references with sets"):
        baselines.as_markdown(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="a record of python -m nim4 score"):
        baselines.as_markdown(path)


def test_the_pages_are_what_the_records_say(results_module):
    stale, blocks = [], 0
    for path in (ROOT / name for name in results_module.PAGES if (ROOT / name).is_file()):
        text = path.read_text(encoding="utf-8")
        for name in results_module.blocks_of(path):
            blocks += 1
            inside = text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()
            if inside != results_module.render(name, ROOT / "results").strip():
                stale.append(f"{path.name}: {name}")
    assert blocks > 0
    assert not stale, "run utils/results.py"
