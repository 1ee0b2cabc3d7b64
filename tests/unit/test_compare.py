"""utils/compare.py on hand-made score folders: the table, its refusals, --write and --diff."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nim4.config import RecipeError
from nim4.score import diff, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def compare_module():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "utils" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(compare_module, monkeypatch, capsys):
    """Runs compare.py; returns what it prints."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "120")
        compare_module.main()
        return capsys.readouterr().out

    return run


UTTS = {  # config -> (id, ref, hyp, errors)
    "ctc_greedy": [("u1", "打 开 carplay", "打 开 carplay", 0), ("u2", "去 北 京", "去 背 景", 2), ("u3", "你 好", "你", 1), ("u4", "好", "号", 1)],
    "ctc_streaming": [
        ("u1", "打 开 carplay", "大 开 car play", 3),
        ("u2", "去 北 京", "去 北 京", 0),
        ("u3", "你 好", "你", 1),
        ("u4", "好", "浩", 1),
    ],
}


def write_scores(folder, configs=("ctc_greedy", "ctc_streaming"), **changes):
    """A 12_score folder with MER and PER of set `test`, both from UTTS."""
    records = []
    for config in configs:
        for metric in ("PER", "MER"):
            rows = UTTS[config]
            path = folder / config / "test" / f"utts-{metric}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            keys = ("id", "ref", "hyp", "errors")
            utts = [{**dict(zip(keys, row, strict=True)), "speaker": "s", "ref_units": len(row[1].split()), "missing": None} for row in rows]
            path.write_text("".join(json.dumps(utt, ensure_ascii=False) + "\n" for utt in utts), encoding="utf-8")
            errors = sum(row[3] for row in rows)
            counts = {"errors": errors, "ref_units": 9, "insertions": 1, "deletions": 1, "substitutions": errors - 2, "missing": 0, "num_utts": 4}
            streaming = config == "ctc_streaming"
            speed = {"rtf": 0.0412, "first_text_p50_ms": 812.3 if streaming else None, "first_text_p95_ms": 1388.0 if streaming else None}
            made = {"commit": "1a2b3c4", "model": "exp/mini/base/3_pretrain", "model_step": 400, "hardware": "A CPU, 2 threads"}
            profile = {"profile": "phones" if metric == "PER" else "plain", "profile_hash": "0123456789ab", "block": "utterance", "num_blocks": 4}
            rate = {"rate": 100 * errors / 9, "ci_low": 10.0, "ci_high": 90.0}
            records.append({"config": config, "test_set": "test", "metric": metric, **rate, **counts, **speed, **made, **profile, **changes})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


GOLDEN = """\
test, PER %
decode config       PER % (95 % CI)  vs ctc_greedy (95 % CI, P better)  ins/del/sub  missing    RTF  first text p50/p95 ms
ctc_greedy     44.44 [10.00, 90.00]  -                                        1/1/2        0  0.041                      -
ctc_streaming  55.56 [10.00, 90.00]  {change}        1/1/3        0  0.041             812 / 1388
profile phones 0123456789ab, 4 utterances, intervals over 4 utterances

test, MER %
decode config       MER % (95 % CI)  vs ctc_greedy (95 % CI, P better)  ins/del/sub  missing    RTF  first text p50/p95 ms
ctc_greedy     44.44 [10.00, 90.00]  -                                        1/1/2        0  0.041                      -
ctc_streaming  55.56 [10.00, 90.00]  {change}        1/1/3        0  0.041             812 / 1388
profile plain 0123456789ab, 4 utterances, intervals over 4 utterances

model exp/mini/base/3_pretrain step 400, commit 1a2b3c4, A CPU, 2 threads
paired bootstrap, 1000 draws, seed 0; first text is counted from the start of the audio, compute time included
"""


def test_the_table_reads_like_this(compare, tmp_path):
    write_scores(tmp_path / "base" / "12_score")
    printed = compare(tmp_path / "base")
    change = table.make_blocks(table.read_rows([tmp_path / "base"]))[0].differences[1]
    assert change.points == pytest.approx(100 / 9)
    assert change.low < 0 < change.high
    shown = f"{change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}] P {change.p_better:.2f}"
    assert printed == GOLDEN.format(change=shown.ljust(33))


def test_streams_whose_texts_change_have_a_table_of_their_own(compare, tmp_path):
    waits = {
        "first_text_audio_p50_ms": 640,
        "first_text_audio_p95_ms": 1280,
        "partial_lag_p50_ms": 41.2,
        "partial_lag_p95_ms": 88.0,
        "final_p50_ms": 30.4,
        "final_p90_ms": 52.0,
        "final_p99_ms": 71.6,
    }
    shares = {"flicker": 12.34, "upwr": 15.0, "second_pass_change": 4.56, "second_pass_gain": -1.25}
    folder = write_scores(tmp_path / "base" / "12_score", ["ctc_streaming"], **waits, **shares)
    printed = compare(folder)
    assert table.STREAMS in printed
    cells = ["ctc_streaming", "test", "812 / 1388", "640 / 1280", "41 / 88", "30 / 52 / 72", "12.3", "15.0", "4.6", "-1.2"]
    assert [re.split("  +", line) for line in printed.splitlines() if line.startswith("ctc_streaming  test")] == [cells]
    assert f"| {' | '.join(cells)} |" in compare(folder, "--markdown")
    assert table.STREAMS not in compare(write_scores(tmp_path / "plain" / "12_score"))


def test_punctuation_has_a_table_of_its_own(compare, tmp_path):
    marks = {"all": (75.0, 4, 4, 3), ",": (100.0, 3, 3, 3), "?": (0.0, 1, 1, 0)}
    scores = {mark: dict(zip(("f1", "in_refs", "in_hyps", "right"), numbers, strict=True)) for mark, numbers in marks.items()}
    printed = compare(write_scores(tmp_path / "base" / "12_score", ["ctc_greedy"], punctuation=scores))
    assert ["ctc_greedy", "test", "75.0 (4)", "100.0 (3)", "0.0 (1)"] in [re.split("  +", line) for line in printed.splitlines()]
    none = {mark: score | {"in_hyps": 0, "right": 0, "f1": 0.0} for mark, score in scores.items()}  # as CTC with a lexicon writes
    assert table.PUNCTUATION not in compare(write_scores(tmp_path / "none" / "12_score", ["ctc_greedy"], punctuation=none))
    assert table.PUNCTUATION not in compare(write_scores(tmp_path / "plain" / "12_score"))


def test_a_folder_a_score_folder_and_a_file_are_the_same(compare, tmp_path):
    folder = write_scores(tmp_path / "base" / "12_score")
    assert compare(tmp_path / "base") == compare(folder) == compare(folder / "records.jsonl")


def test_several_folders_prefix_their_rows_by_the_tag(compare, tmp_path):
    write_scores(tmp_path / "base" / "12_score")
    write_scores(tmp_path / "plain" / "12_score", ["ctc_greedy"], model="exp/mini/plain/3_pretrain")
    printed = compare(tmp_path / "base", tmp_path / "plain")
    assert "vs base:ctc_greedy" in printed
    assert "\nplain:ctc_greedy  " in printed
    assert "+0.00 [+0.00, +0.00] P 0.50" in printed
    assert "plain:ctc_greedy: model exp/mini/plain/3_pretrain step 400, commit 1a2b3c4" in printed
    assert "base:ctc_greedy, base:ctc_streaming: model exp/mini/base/3_pretrain" in printed
    assert "vs plain:ctc_greedy" in compare(tmp_path / "base", tmp_path / "plain", "--first", "plain:ctc_greedy")


def test_equal_tags_of_two_corpora_are_told_apart(tmp_path):
    write_scores(tmp_path / "mini" / "base" / "12_score", ["ctc_greedy"])
    write_scores(tmp_path / "aishell" / "base" / "12_score", ["ctc_greedy"])
    rows = table.read_rows([tmp_path / "mini" / "base", tmp_path / "aishell" / "base"])
    assert {row.label for row in rows} == {"mini/base:ctc_greedy", "aishell/base:ctc_greedy"}


@pytest.mark.parametrize("key", ["commit", "profile", "profile_hash", "num_utts", "rate", "block"])
def test_a_row_that_does_not_say_what_it_is_does_not_print(compare, tmp_path, key):
    write_scores(tmp_path / "base" / "12_score", **{key: None})
    with pytest.raises(RecipeError, match=rf"records\.jsonl, row 1: .* found no valid {key}\."):
        compare(tmp_path / "base")


def test_two_profiles_do_not_share_a_table(compare, tmp_path):
    write_scores(tmp_path / "base" / "12_score")
    write_scores(tmp_path / "old" / "12_score", profile_hash="ffffffffffff")
    with pytest.raises(RecipeError, match=r"test PER: expected rows of one profile and hash.*phones 0123456789ab.*phones ffffffffffff"):
        compare(tmp_path / "base", tmp_path / "old")


def test_other_utterances_are_no_pair(compare, tmp_path):
    folder = write_scores(tmp_path / "base" / "12_score")
    path = folder / "ctc_streaming" / "test" / "utts-MER.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("u4", "u5"), encoding="utf-8")
    with pytest.raises(RecipeError, match="test MER, ctc_greedy and ctc_streaming: expected the same utterances"):
        compare(folder)
    path.unlink()
    with pytest.raises(RecipeError, match=r"utts-MER\.jsonl: expected the utterances behind a record"):
        compare(folder)


def test_broken_input_ends_with_exit_code_2(tmp_path):
    (tmp_path / "records.jsonl").write_text("{broken\n")
    for args, message in (([tmp_path], "records.jsonl, line 1"), ([tmp_path / "nowhere"], "found neither"), ([], "at least one folder")):
        done = subprocess.run([sys.executable, ROOT / "utils" / "compare.py", *args], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_markdown_is_written_between_its_markers_only(compare, tmp_path):
    write_scores(tmp_path / "base" / "12_score")
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nend\n", encoding="utf-8")
    assert compare(tmp_path / "base", "--markdown", "--write", readme, "--block", "results") == ""
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n<!-- results:begin -->\n**test, PER %**\n\n| decode config | PER % (95 % CI) |")
    assert text.endswith("compute time included\n<!-- results:end -->\nend\n")
    assert "\n| --- | ---: | --- | ---: | ---: | ---: | ---: |\n| ctc_greedy | 44.44 [10.00, 90.00] | - |" in text
    assert "old" not in text
    compare(tmp_path / "base", "--markdown", "--write", readme, "--block", "results")
    assert readme.read_text(encoding="utf-8") == text
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "content", ["nothing\n", "<!-- results:begin -->\n", "<!-- results:end --> <!-- results:begin -->", "<!-- results:begin --> " * 2]
)
def test_missing_markers_leave_the_file_alone(compare, tmp_path, content):
    write_scores(tmp_path / "base" / "12_score")
    readme = tmp_path / "README.md"
    readme.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match="expected <!-- results:begin --> and below it <!-- results:end -->"):
        compare(tmp_path / "base", "--write", readme, "--block", "results")
    assert readme.read_text(encoding="utf-8") == content
    with pytest.raises(RecipeError, match="--write FILE together with --block NAME"):
        compare(tmp_path / "base", "--write", readme)


def test_a_sure_gain_is_bold_in_markdown(tmp_path, monkeypatch):
    worse = [(f"u{i}", "a b", "a", 1) for i in range(9)]
    monkeypatch.setitem(UTTS, "ctc_greedy", worse)
    monkeypatch.setitem(UTTS, "ctc_streaming", [(f"u{i}", "a b", "a b", 0) for i in range(9)])
    write_scores(tmp_path / "12_score")
    text = table.as_markdown(table.make_blocks(table.read_rows([tmp_path])))
    assert "| **-50.00 [-50.00, -50.00] P 1.00** |" in text


DIFF = """\
A: ctc_greedy on test in {folder}: 44.44 % MER
B: ctc_streaming on test in {folder}: 55.56 % MER
B - A: {change}
4 utterances: 3 changed (1 worse, 1 better, 1 with as many errors)
columns: * no unit here; last row: - only A is right, + only B is right, ~ both are wrong, in different ways

u1  errors 0 -> 3 of 3
ref  打 开 carplay *
A    打 开 carplay *
B    大 开 car     play
     -     -       -

u4  errors 1 -> 1 of 1
ref  好
A    号
B    浩
     ~

u2  errors 2 -> 0 of 3
ref  去 北 京
A    去 背 景
B    去 北 京
        +  +
"""


def test_diff_lists_changed_utterances_worst_first_in_columns(compare, tmp_path):
    folder = write_scores(tmp_path / "base" / "12_score")
    printed = compare(tmp_path / "base", "--diff", "ctc_greedy/test", "ctc_streaming/test")
    assert printed == DIFF.format(folder=folder, change=printed.splitlines()[2].removeprefix("B - A: "))
    assert "+11.11 [" in printed
    assert compare("--diff", "ctc_greedy/test", "ctc_streaming/test", tmp_path / "base") == printed
    assert compare("--diff", f"{folder}:ctc_greedy/test", f"{tmp_path}/base:ctc_streaming/test") == printed
    assert "PER" in compare(folder, "--diff", "ctc_greedy/test", "ctc_streaming/test", "--metric", "per").splitlines()[0]
    limited = compare(folder, "--diff", "ctc_greedy/test", "ctc_streaming/test", "--limit", 1)
    assert limited.endswith("\n\n2 more: --limit 3 shows all\n")
    assert "u2" not in limited


def test_diff_colours_errors_on_request(compare, tmp_path):
    folder = write_scores(tmp_path / "12_score")
    specs = ("--diff", "ctc_greedy/test", "ctc_streaming/test")
    assert "\x1b[" not in compare(folder, *specs)
    printed = compare(folder, *specs, "--color", "always")
    assert "B    \x1b[33m大\x1b[0m 开 \x1b[33mcar\x1b[0m     \x1b[36mplay\x1b[0m" in printed
    assert "\x1b[31merrors 0 -> 3 of 3\x1b[0m" in printed
    assert "\x1b[32merrors 2 -> 0 of 3\x1b[0m" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--diff", "ctc_greedy", "ctc_streaming/test"], "--diff ctc_greedy: expected CONFIG/SET or DIR:CONFIG/SET"),
        (["--diff", "ctc_gredy/test", "ctc_streaming/test"], "did you mean 'ctc_greedy/test'"),
        (["--diff", "ctc_greedy/test", "ctc_streaming/test", "--metric", "wer"], r"--metric: expected a metric of both sides \(MER, PER\)"),
        (["--diff", "ctc_greedy/test", "ctc_streaming/test", "--markdown"], "expected no --write, --markdown or --first"),
        (["--diff", "ctc_greedy/test", "ctc_streaming/test", "--limit", "0"], "--limit: expected at least 1"),
        (["--first", "ctc"], "--first: expected a row of the table"),
    ],
)
def test_wrong_options_are_named(compare, tmp_path, args, message):
    folder = write_scores(tmp_path / "12_score")
    with pytest.raises(RecipeError, match=message):
        compare(folder, *args)


def test_insertions_of_both_share_columns():
    assert diff.columns(["a", "b"], ["x", "a"], ["y", "z", "a", "b", "c"]) == [
        ("", "x", "y"),
        ("", "", "z"),
        ("a", "a", "a"),
        ("b", "", "b"),
        ("", "", "c"),
    ]


def test_long_alignments_are_folded(compare, tmp_path, monkeypatch):
    ref = " ".join(["北"] * 60)
    monkeypatch.setitem(UTTS, "ctc_greedy", [("u1", ref, ref, 0)])
    monkeypatch.setitem(UTTS, "ctc_streaming", [("u1", ref, "京 " + ref[2:], 1)])
    lines = compare(write_scores(tmp_path / "12_score"), "--diff", "ctc_greedy/test", "ctc_streaming/test").splitlines()
    shown = [line for line in lines if line.startswith("ref")]
    assert len(shown) == 2
    assert sum(line.count("北") for line in shown) == 60
    assert max(map(table.display_width, shown)) <= 120


def test_widths_follow_the_east_asian_rules():
    assert table.display_width("ab北京") == 6
    assert table.display_width("e\u0301") == 1
    assert table.pad("北", 4) == "北  "
    assert table.pad("北", 4, right=True) == "  北"
