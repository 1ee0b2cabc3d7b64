"""Stage 12 on small decode folders: records, files, skipping, and every kind of broken input."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nim4.config import RecipeError
from nim4.score.profiles import profile_hash
from nim4.score.record import hardware, read_utterances

ROOT = Path(__file__).resolve().parents[3]
KEYS = """config test_set metric rate errors ref_units insertions deletions substitutions missing num_utts ci_low ci_high block profile
profile_hash rtf first_text_p50_ms first_text_p95_ms final_p50_ms final_p90_ms final_p95_ms final_p99_ms partial_lag_p50_ms partial_lag_p95_ms
first_text_audio_p50_ms flicker upwr second_pass_change second_pass_gain punctuation commit model model_step hardware seconds command"""


@pytest.fixture
def three(make_ref):
    return [make_ref("u1", "b ei3 j ing1", "北京"), make_ref("u2", "k AA R", "Car, car"), make_ref("u3", "0 i1", "一")]


def test_a_record_says_everything_about_its_number(write_set, run_stage, make_hyp, three):
    hyps = [make_hyp("u1", "b ei3 j in1", "北鲸", wall_s=0.2), make_hyp("u2", "", None, wall_s=9.0, error="killed")]
    write_set("ctc_greedy", "test", three, hyps, hardware="A CPU, 2 threads", command="python local/11_decode.py")
    per, mer = run_stage()
    assert set(per) >= set(KEYS.split())
    assert (per["metric"], per["profile"], mer["metric"], mer["profile"]) == ("PER", "phones", "MER", "plain")
    assert (per["errors"], per["ref_units"], per["insertions"], per["deletions"], per["substitutions"]) == (6, 9, 0, 5, 1)
    assert per["rate"] == pytest.approx(66.6667)
    assert (mer["errors"], mer["ref_units"], mer["deletions"], mer["substitutions"]) == (4, 5, 3, 1)
    assert (per["missing"], per["missing_absent"], per["missing_failed"], per["missing_empty"], per["num_utts"]) == (2, 1, 1, 0, 3)
    assert per["ci_low"] <= per["rate"] <= per["ci_high"]
    assert (per["block"], per["num_blocks"]) == ("utterance", 3)
    assert per["rtf"] == pytest.approx(0.2)
    assert per["first_text_p50_ms"] is None
    assert (per["commit"], per["model"], per["model_step"], per["hardware"]) == ("abc1234", "exp/mini/base/3_pretrain", 400, "A CPU, 2 threads")
    assert per["command"].startswith("python local/12_score.py --decode ")
    assert per["decode_command"] == "python local/11_decode.py"


def test_files_beside_the_records(write_set, run_stage, make_hyp, three, tmp_path):
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b ei3 j ing1", "北京")])
    run_stage()
    folder = tmp_path / "12_score" / "ctc_greedy" / "test"
    names = {f"{kind}-{metric}" for metric in ("PER", "MER") for kind in ("errs", "recogs", "utts")}
    assert {path.stem for path in folder.iterdir()} == names
    first, second, _ = read_utterances(folder / "utts-MER.jsonl")
    assert (first.ref, first.hyp, first.errors, first.ref_units, first.missing) == ("北 京", "北 京", 0, 2, None)
    assert (second.ref, second.hyp, second.errors, second.missing) == ("car car", "", 2, "absent")
    assert (folder / "errs-MER.txt").read_text(encoding="utf-8").startswith("%MER = 60.00\n")


def test_a_set_without_words_has_no_word_metric(write_set, run_stage, make_hyp, three):
    write_set("ctc_greedy", "closed", three, [make_hyp("u1", "b", "北")])
    write_set("ctc_greedy", "open", three, [make_hyp("u1", "b"), make_hyp("u2", "k")])
    assert [(record["test_set"], record["metric"]) for record in run_stage("--metric", "cer")] == [
        ("closed", "PER"),
        ("closed", "CER"),
        ("open", "PER"),
    ]


def test_speakers_are_the_block_when_there_are_ten(write_set, run_stage, make_ref, make_hyp):
    refs = [make_ref(f"u{i}", "a b", speaker=f"s{i % 10}") for i in range(20)]
    write_set("ctc_greedy", "test", refs, [make_hyp(f"u{i}", "a b") for i in range(20)])
    (record,) = run_stage()
    assert (record["block"], record["num_blocks"], record["rate"], record["ci_high"]) == ("speaker", 10, 0.0, 0.0)


def test_streaming_latency_comes_from_the_events(write_set, run_stage, make_ref, make_hyp):
    refs = [make_ref(f"u{i}", "a", audio_s=1.0) for i in range(3)]
    events = []
    for i in range(3):
        events.append({"id": f"u{i}", "t_audio_s": 0.64, "t_wall_s": 0.66, "text": "", "is_final": False})
        events.append({"id": f"u{i}", "t_audio_s": 1.0, "t_wall_s": 1.1 + 0.1 * i, "text": "a" if i else "", "is_final": False})
        events.append({"id": f"u{i}", "t_audio_s": 1.0, "t_wall_s": 1.3 + 0.1 * i, "text": "a" if i else "", "is_final": True})
    write_set("ctc_streaming", "test", refs, [make_hyp(f"u{i}", "a") for i in range(3)], events)
    (record,) = run_stage()
    assert (record["first_text_p50_ms"], record["first_text_p95_ms"]) == pytest.approx((1250.0, 1295.0))
    assert (record["final_p50_ms"], record["final_p95_ms"]) == pytest.approx((400.0, 490.0))
    assert (record["first_text_utts"], record["final_utts"]) == (2, 3)


def test_an_unchanged_decode_folder_is_skipped_and_a_changed_one_is_not(write_set, run_stage, make_hyp, three, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nim4")
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b")])
    run_stage()
    assert "test, PER %" in caplog.text
    before = (tmp_path / "12_score" / "records.jsonl").stat().st_mtime_ns
    caplog.clear()
    run_stage()
    assert "skipped, same inputs" in caplog.text
    assert (tmp_path / "12_score" / "records.jsonl").stat().st_mtime_ns == before
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b ei3")])
    assert run_stage()[0]["errors"] == 7
    assert "hyps.jsonl changed" in caplog.text
    write_set("ctc_streaming", "test", three, [make_hyp("u1", "b ei3")])
    assert {record["config"] for record in run_stage()} == {"ctc_greedy", "ctc_streaming"}


def test_folders_of_a_killed_run_are_not_scored(write_set, run_stage, make_hyp, three, caplog):
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b")])
    write_set("ctc_greedy", "dev.tmp", three, [make_hyp("u1", "b")])
    assert {record["test_set"] for record in run_stage()} == {"test"}
    assert "dev.tmp: left by a run that did not finish" in caplog.text


def row(**changes):
    return {"id": "u1", "phones": "b", "text": None, "audio_s": 1.0, "wall_s": 0.1, "error": None, **changes}


@pytest.mark.parametrize(
    ("hyps", "message"),
    [
        ("", "expected at least 1 row, found 0"),
        ('{"id": "u1"\n', "line 1: expected one JSON object per line"),
        ("[1]\n", "row 1: expected an object, found list"),
        ([row(), row()], "one row per utterance, found more than one of u1"),
        ([row(), *({**row(), "id": f"x{i}"} for i in range(5))], "5 others: x0, x1, x2, ..."),
        ([{"id": "u1", "phones": "b"}], "row 1: expected 'error' as str | None, found keys id, phones"),
        ([row(phones=None)], "row 1: expected 'phones' or 'text'"),
        ([row(phones=["b"])], "row 1: expected 'phones' as str | None, found phones=['b']"),
        ([row(wall_s=float("nan"))], "row 1: expected 'wall_s' as float | None, found wall_s=nan"),
        ([row(wall_s=-1)], "found wall_s=-1"),
        ([row(audio_s=True)], "row 1: expected 'audio_s' as float, found audio_s=True"),
    ],
)
def test_broken_hypotheses_are_named(write_set, run_stage, three, tmp_path, hyps, message):
    write_set("ctc_greedy", "test", three, hyps)
    with pytest.raises(RecipeError) as error:
        run_stage()
    assert message in str(error.value)
    assert "hyps.jsonl" in str(error.value)
    assert not (tmp_path / "12_score").exists()


def test_other_broken_folders_are_named(write_set, run_stage, make_ref, make_hyp, three, tmp_path):
    with pytest.raises(RecipeError, match=r"expected <config>/<test set>/hyps\.jsonl, found no such folder"):
        run_stage()
    folder = write_set("ctc_greedy", "test", three, None)
    with pytest.raises(RecipeError, match=r"hyps\.jsonl: expected the product of an earlier stage"):
        run_stage()
    write_set("ctc_greedy", "test", three, [row()], events=[{"id": "x", "t_audio_s": 1, "t_wall_s": 1, "text": "", "is_final": True}])
    with pytest.raises(RecipeError, match=r"events\.jsonl: expected only utterances of refs\.jsonl, found 1 others: x"):
        run_stage()
    event = {"id": "u1", "t_audio_s": 1, "t_wall_s": 1, "text": "", "is_final": True}
    write_set("ctc_greedy", "test", three, [row()], events=[event, {**event, "settled_chars": 0}])
    with pytest.raises(RecipeError, match=r"events\.jsonl, row 1: expected 'settled_chars' as int, found keys id"):
        run_stage()
    (folder / "events.jsonl").unlink()
    write_set("ctc_greedy", "test", three, [row()], model=None)
    with pytest.raises(RecipeError, match=r"done\.json: expected an object with 'model' and 'commit'"):
        run_stage()
    write_set("ctc_greedy", "test", [make_ref("u1", "", "你")], [make_hyp("u1", "a")])
    with pytest.raises(RecipeError, match="ctc_greedy/test: expected references with at least 1 unit for PER"):
        run_stage()
    (folder / "done.json").unlink()
    with pytest.raises(RecipeError, match=r"done\.json: expected the product of an earlier stage"):
        run_stage()


def test_a_set_in_which_nothing_is_said_has_no_record_but_its_utterances(write_set, run_stage, make_ref, make_hyp, three, tmp_path, caplog):
    noise = [make_ref("n1", ""), make_ref("n2", "", " ")]
    write_set("ctc_greedy", "test_noise", noise, [make_hyp("n1", "a b"), make_hyp("n2", "")])
    with pytest.raises(RecipeError, match="expected a test set in which something is said, found none"):
        run_stage()
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "a")])
    caplog.set_level(logging.INFO)
    assert {record["test_set"] for record in run_stage()} == {"test"}
    assert "ctc_greedy/test_noise: nothing is said there, so no PER; output for 1 of 2" in caplog.text
    rows = read_utterances(tmp_path / "12_score" / "ctc_greedy" / "test_noise" / "utts-PER.jsonl")
    assert [(row.id, row.hyp, row.errors) for row in rows] == [("n1", "a b", 2), ("n2", "", 0)]


def test_a_broken_input_ends_with_exit_code_2_and_one_line(write_set, run_stage, make_hyp, three, tmp_path):
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b")])
    run_stage()
    before = (tmp_path / "12_score" / "records.jsonl").read_bytes()
    write_set("ctc_greedy", "test", three, "{broken\n")
    command = [sys.executable, "local/12_score.py", "--decode", tmp_path / "11_decode", "--out", tmp_path / "12_score"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert " score ERROR " in error
    assert "hyps.jsonl, line 1: expected one JSON object per line" in error
    assert "Traceback" not in done.stderr
    assert (tmp_path / "12_score" / "records.jsonl").read_bytes() == before


def test_profile_hashes_are_stable_and_differ():
    assert profile_hash("plain") == profile_hash("plain") != profile_hash("phones")
    with pytest.raises(RecipeError, match=r"--profile: expected one of fair, page, .*, plain, found fancy"):
        profile_hash("fancy")


def test_hardware_names_cpu_and_threads():
    assert hardware(1).endswith(", 1 thread")
    assert hardware(4).endswith(", 4 threads")
    assert len(hardware(1)) > len(", 1 thread")


def test_records_are_json_without_nan(write_set, run_stage, make_hyp, three, tmp_path):
    write_set("ctc_greedy", "test", three, [make_hyp("u1", "b", wall_s=None)])
    assert run_stage()[0]["rtf"] is None
    text = (tmp_path / "12_score" / "records.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert all(json.loads(line) for line in text.splitlines())


def test_a_profile_decides_what_counts_as_the_same(write_set, run_stage, make_ref, make_hyp):
    write_set("offline", "test", [make_ref("u1", "a b", "第2个dog cart")], [make_hyp("u1", "a b", "第二个dogcart")])
    rates = {}
    for profile in ("fair", "plain", "page"):
        (record,) = [row for row in run_stage("--profile", profile) if row["metric"] == "MER"]
        assert (record["profile"], record["profile_hash"]) == (profile, profile_hash(profile))
        rates[profile] = record["errors"], record["ref_units"]
    assert rates == {"fair": (0, 5), "plain": (3, 5), "page": (3, 5)}
