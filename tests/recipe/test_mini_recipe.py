"""egs/mini from audio to scores, by run.sh itself, as small as it gets; then again, with another setting, and after a kill."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from recipe import command, environment, run

from nim4.stage import read_json, read_jsonl

CONFIGS = ("ctc_greedy", "ctc_streaming", "offline", "offline_rescored", "streaming")
CLOSED = ("test_grammar", "test_joins")
TEST_SETS = (*CLOSED, "test_sent", "test_noise")
TRAINED = ("3_pretrain", "4_align", "5_ia_sft", "6_joint_sft", "7_context_sft", "8_grpo", "9_phoneme_head")
PRODUCTS = [Path("corpora/mini") / name for name in ("manifests", "fbank", "units")] + [
    Path("results/mini/base") / name
    for name in (*TRAINED, "10_hotwords", "12_score", "13_report", *(f"11_decode/{config}/{test}" for config in CONFIGS for test in TEST_SETS))
]
MODEL = Path("3_pretrain/model.safetensors")
SKIPPING_CPU_S = 150  # programs that import torch and see that there is nothing to do: half of it, with a margin for a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("some where else")


@pytest.fixture(scope="module")
def first(folder):
    """The whole recipe; every test below starts from what it made."""
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def content(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def children_cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_stage_leaves_its_product(folder, first):
    for product in PRODUCTS:
        record = read_json(folder / product / "done.json")
        assert record["made_from"]["config"], product
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "results/mini/base" / MODEL).stat().st_size > 100_000
    assert len(read_jsonl(folder / "results/mini/base/3_pretrain/metrics.jsonl")) > 0
    for line in ("stage 0 prepare: done", "stage 3 pretrain: done", "stage 12 score: done", "stage 13 report: done"):
        assert line in first.stderr
    counts = read_json(folder / "corpora/mini/manifests/done.json")["utterances"]
    assert max(counts.values()) == 24, counts
    assert counts["test_grammar"] == counts["test_joins"] == 24


def test_every_set_is_scored_by_every_config(folder, first):
    records = read_jsonl(folder / "results/mini/base/12_score/records.jsonl")
    found = sorted((record["config"], record["test_set"], record["metric"]) for record in records)
    spoken = TEST_SETS[:-1]  # in test_noise nothing is said, so there is no rate
    per = [(config, test, "PER") for config in CONFIGS[:2] for test in spoken]
    mer = [(config, test, "MER") for config in CONFIGS[:2] for test in CLOSED] + [(config, test, "MER") for config in CONFIGS[2:] for test in spoken]
    assert found == sorted(per + mer)
    assert {record["num_utts"] for record in records} == {24}


def test_the_comparison_is_printed(first):
    lines = first.stdout.splitlines()
    for test_set in TEST_SETS[:-1]:
        assert f"{test_set}, PER %" in lines
    assert [name for line in lines if (name := line.split(" ")[0]) in CONFIGS[:2]] == list(CONFIGS[:2]) * 5
    assert sum(line.startswith("offline ") for line in lines) >= 3  # and in the table of punctuation
    assert sum(line.startswith("streaming ") for line in lines) >= 3  # and in those of streams and punctuation, if anything was written
    assert "paired bootstrap" in lines[-1]


def test_a_second_run_skips_every_stage(folder, first):
    before = {product: content(folder / product / "done.json") for product in PRODUCTS}
    started_s = children_cpu_s()
    done = run(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert children_cpu_s() - started_s < SKIPPING_CPU_S
    for product in PRODUCTS:
        assert f"{folder / product}: skipped, same inputs and settings" in done.stderr
    assert "rebuilding" not in done.stderr
    assert {product: content(folder / product / "done.json") for product in PRODUCTS} == before
    assert done.stdout == first.stdout


def test_plain_ctc_by_one_flag_and_a_changed_setting_is_told(folder, first):
    plain = ("--only", 3, "--tag", "plain", "--set", "train.cr_weight=0")
    done = run(folder, *plain, "--set", "train.max_steps=4", script="egs/mini/run.sh")
    assert done.returncode == 0, done.stderr[-3000:]
    made = read_json(folder / "results/mini/plain/3_pretrain/done.json")
    assert made["made_from"]["config"]["train"]["cr_weight"] == 0
    assert made["step"] == 4
    assert not any("cr" in row for row in read_jsonl(folder / "results/mini/plain/3_pretrain/metrics.jsonl"))
    assert content(folder / "results/mini/plain" / MODEL) != content(folder / "results/mini/base" / MODEL)
    assert "stage 2" not in done.stderr
    again = run(folder, *plain, "--set", "train.max_steps=5", script="egs/mini/run.sh")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"{folder}/results/mini/plain/3_pretrain: rebuilding, train.max_steps was 4 and is 5" in again.stderr
    assert read_json(folder / "results/mini/plain/3_pretrain/done.json")["step"] == 5


def test_a_killed_training_goes_on_to_the_same_weights(folder, first):
    options = ("--only", 3, "--tag", "killed")
    product = folder / "results/mini/killed/3_pretrain"
    work = product.with_name("3_pretrain.tmp")
    process = subprocess.Popen(
        command(*options), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not (work / "checkpoints" / "step-4").exists():
            assert process.poll() is None, "training ended before its first checkpoint"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the shell and the training, as a machine that goes down would
        process.wait()
    assert not product.exists(), "the kill came too late to test anything"
    assert not (work / "done.json").exists()
    done = run(folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step " in done.stderr
    assert not work.exists()
    assert content(product.parent / MODEL) == content(folder / "results/mini/base" / MODEL)
    steps = [row["step"] for row in read_jsonl(product / "metrics.jsonl")]
    assert steps == [row["step"] for row in read_jsonl(folder / "results/mini/base/3_pretrain/metrics.jsonl")]


def test_one_flag_gives_a_zipformer_in_every_stage(folder, first):
    options = ("--encoder", "zipformer", "--tag", "zipformer")
    done = run(folder, *options, "--stage", 3, "--decode", "ctc_streaming streaming", "--test", "test_grammar")
    assert done.returncode == 0, done.stderr[-3000:]
    made = folder / "results/mini/zipformer"
    for stage in TRAINED:
        assert "kind: zipformer" in (made / stage / "config.yaml").read_text(encoding="utf-8"), stage
    records = read_jsonl(made / "12_score/records.jsonl")
    assert {(record["config"], record["metric"]) for record in records} == {("ctc_streaming", "PER"), ("ctc_streaming", "MER"), ("streaming", "MER")}
    wrong = run(folder, "--encoder", "zipfomer")
    assert wrong.returncode == 2
    assert "--encoder: expected conformer or zipformer, found 'zipfomer'. Fix: did you mean zipformer?" in wrong.stderr


def test_another_limit_rebuilds_from_the_start(folder, first, tmp_path):
    shutil.copytree(folder / "corpora", tmp_path / "corpora")
    done = run(tmp_path, "--stop-stage", 0, "--limit", 6)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "corpora/mini/manifests: rebuilding, " in done.stderr
    assert "limit was 24 and is 6" in done.stderr
    assert max(read_json(tmp_path / "corpora/mini/manifests/done.json")["utterances"].values()) == 6
    assert len(list((tmp_path / "corpora/mini/manifests/audio/phrases").iterdir())) == 6 * 4  # no phrase is made for nothing
