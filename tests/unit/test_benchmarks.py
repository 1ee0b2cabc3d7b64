"""The benchmarks run on tiny inputs and leave records whose tables can be printed; how fast they are is nothing to test."""

import argparse
import asyncio
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from spoken_clips import read_clips

from nim4.config import GrpoConfig, GrpoTrainConfig, RecipeError
from nim4.corpus.manifest import cuts_from_table, save_cuts
from nim4.corpus.table import Row
from nim4.decode.streaming import Recogniser, new_rows
from nim4.model.conformer import Context
from nim4.report.benchmarks import as_markdown, newest
from nim4.train.distributed import Processes
from nim4.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load_module(monkeypatch):
    """Loads a file of benchmarks/, as its folder's other files see it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there, and what is sent to another process
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def benchmark_tables(load_module, monkeypatch, tmp_path, capsys):
    """Runs a benchmark with a tiny model; returns its records, which are also what it prints."""

    def run(name, *options):
        path = tmp_path / "records" / f"{name}.jsonl"
        arguments = [*map(str, options), "--record", str(path)]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *arguments])
        load_module(name).main()
        records = newest([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], path)
        printed = capsys.readouterr().out
        for record in records:
            assert as_markdown(record) in printed
            assert record["benchmark"] == name
            assert "--record" not in record["command"]
            assert record["command"].startswith(f"benchmarks/{name}.py")
        return records

    return run


@pytest.fixture
def benchmark(benchmark_tables):
    """The same for one round and a benchmark with one table; returns its record."""

    def run(name, *options):
        (record,) = benchmark_tables(name, *options, "--rounds", 1)
        return record

    return run


@pytest.fixture
def model_config(tmp_path):
    return tiny.write_yaml(tmp_path / "model.yaml", {"encoder": tiny.ENCODER})


@pytest.fixture
def common(load_module):
    return load_module("common")


def test_ways_take_turns_and_each_round_begins_with_another(common):
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = common.take_turns(ways, 4)
    assert "".join(calls) == "abcbcacababc"
    assert [len(times) for times in seconds.values()] == [4, 4, 4]


def test_a_ratio_is_that_of_the_rounds_not_of_the_medians(common):
    assert common.median_ratio([1.0, 10.0, 100.0], [2.0, 5.0, 50.0]) == 2.0


def test_features(benchmark):
    rows = benchmark("fbank", "--minutes", 0.05)["rows"]
    assert rows[0]["speed_to_ours"] == 1.0
    assert all(row["audio_h_per_s"] > 0 and row["largest_difference"] < 1e-2 for row in rows)


def test_scoring_finds_as_many_errors_as_jiwer(benchmark):
    record = benchmark("scoring", "--utterances", 60, "--rounds", 1, "--jobs", 1)
    assert [row["way"] for row in record["rows"]] == ["ours", "jiwer", "intervals", "normalise"]
    assert record["rows"][0]["time_of_ours"] == 1.0
    assert "errors in both" in record["data"]["size"]


def test_training_steps(benchmark, tmp_path, model_config):
    manifest = tiny.write_features(tmp_path / "units", "train", [60, 200, 70, 180, 65, 190, 75, 210])
    tiny.INVENTORY.save(tmp_path / "units" / "tokens.txt")
    train = tiny.write_yaml(tmp_path / "train.yaml", {"pretrain": {"train": tiny.TRAIN}})
    options = ["--manifest", manifest, "--model-config", model_config, "--train-config", train, "--minutes"]
    record = benchmark("train_step", *options, 1)
    assert [(row["loss"], row["batches"]) for row in record["rows"]] == [
        (loss, kind) for loss in ("CR-CTC", "plain CTC") for kind in ("random", "bucketed")
    ]
    random, bucketed = record["rows"][:2]
    assert bucketed["padding_share"] < random["padding_share"]
    assert random["speed_to_random"] == 1.0
    assert bucketed["frames_per_s"] == pytest.approx(100 * bucketed["audio_s_per_s"], rel=1e-3)
    assert record["data"]["size"].startswith("8 utterances")
    with pytest.raises(RecipeError, match="room for at least 2 utterances"):
        benchmark("train_step", *options, 0.001)


FULL_SIZE = ["--size", "ci", "--device", "cpu", "--batch-s", 20, "--grpo-batch-s", 10, "--steps", 2, "--compile", "false"]


def test_full_size_training_steps(benchmark, load_module):
    rows = benchmark("train_full_size", *FULL_SIZE)["rows"]
    assert [(row["stage"][0], row["way"]) for row in rows] == [(stage, way) for stage in "345678" for way in ("ours", "naive")]
    for ours, naive in zip(rows[::2], rows[1::2], strict=True):
        assert ours["padding_percent"] < naive["padding_percent"] or ours["stage"] == "8 grpo"  # one step, of utterances of about one length
        assert naive["speed_to_naive"] == 1.0
        same_work = ours["tflop_per_s"] / naive["tflop_per_s"]  # both train on the same utterances
        assert ours["audio_s_per_s"] / naive["audio_s_per_s"] == pytest.approx(same_work, rel=1e-3)
    full_size = load_module("full_size")
    assert full_size.read_lengths(ROOT / "benchmarks" / "lengths.tsv") == full_size.draw_lengths()


@pytest.fixture
def full_size_run(load_module, monkeypatch, tmp_path):
    """A function that runs the benchmark of the full size on some stages and gives the records it keeps; and its module."""
    module, path = load_module("train_full_size"), tmp_path / "records.jsonl"

    def run(*options):
        arguments = [*map(str, FULL_SIZE), "--rounds", "1", *map(str, options), "--record", str(path)]
        monkeypatch.setattr(sys, "argv", ["benchmarks/train_full_size.py", *arguments])
        try:
            module.main()
        finally:
            run.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return run.records

    run.records = []
    return run, module


def test_a_killed_full_size_run_leaves_the_stages_before(full_size_run, monkeypatch):
    run, module = full_size_run
    run("--stages", 4)
    real = module.run_stage

    def killed_in_stage_5(number, *args):
        if number == 5:
            raise KeyboardInterrupt
        return real(number, *args)

    monkeypatch.setattr(module, "run_stage", killed_in_stage_5)
    with pytest.raises(KeyboardInterrupt):
        run("--stages", 3, 4, 5, 6)
    assert [[row["stage"][0] for row in record["rows"]] for record in run.records] == [["4", "4"], ["3", "3", "4", "4"]]


def test_full_size_stages_that_do_not_fit_or_fail_do_not_stop_the_others(full_size_run, monkeypatch, capsys):
    run, module = full_size_run
    real = module.Way.run

    def out_of_memory(way, number):
        """Stage 4 fits in 2 micro-batches; the padded loop of stage 5 never does; the loop of stage 6 is broken."""
        encoder_trains, llm_trains = (next(part.parameters()).requires_grad for part in (way.trainer.model.acoustic.encoder, way.trainer.model.llm))
        if encoder_trains:
            raise ArithmeticError("a bug")
        if way.name == "naive" if llm_trains else max(map(len, way.rounds[number])) == 1:
            raise torch.OutOfMemoryError
        real(way, number)

    monkeypatch.setattr(module.Way, "run", out_of_memory)
    with pytest.raises(RecipeError, match=r"stages \[6\] that failed"):
        run("--stages", 4, 6, 5)
    (record,) = run.records
    assert [(row["stage"][0], row["way"]) for row in record["rows"]] == [("4", "ours"), ("4", "naive"), ("5", "ours"), ("5", "naive: out of memory")]
    assert [row["micro_batches"] for row in record["rows"]] == [2, 2, 1, "-"]
    assert as_markdown(record) in capsys.readouterr().out


def test_operations_of_a_training_step(load_module):
    """Against a count by hand of the parts that weigh: 2 per weight forward, 4 where a gradient passes, 6 where weights train."""
    full_size = load_module("full_size")
    model = full_size.make_model("ci", torch.device("cpu"))
    batch = full_size.RandomBatches(model)(full_size.make_cuts([full_size.Lengths(2.0, 8), full_size.Lengths(1.0, 4)]), 0)
    lens = full_size.row_lens(model, batch).tolist()
    rows = model.rows(*model.speech(batch.x, batch.x_lens), batch.suffixes, batch.answers)
    assert lens == rows[2].tolist()
    encoder = 75 * sum(p.numel() for p in model.acoustic.encoder.parameters() if p.ndim > 1)
    adaptor = 20 * sum(p.numel() for p in model.adaptor.parameters() if p.ndim > 1)
    weights = sum(p.numel() for p in model.llm.model.layers.parameters() if p.ndim > 1)
    llm = sum(lens) * weights
    llm += sum(n * n for n in lens) * 32 * 2 + 12 * 500 * 32  # attention of 2 layers, output layer on 12 answers' ids
    assert full_size.model_flops(model, "align", batch) == 2 * encoder + 6 * adaptor + 4 * llm
    assert full_size.model_flops(model, "ia_sft", batch) == 2 * encoder + 6 * adaptor + 6 * llm
    assert full_size.model_flops(model, "joint_sft", batch) == 6 * (encoder + adaptor + llm)
    prompts = [lens[0] - 8, lens[1] - 4]  # GRPO: read once, by policy and reference; 8 answers sampled, trained on, and read by the reference
    read = sum(prompts) * weights + sum(n * n for n in prompts) * 64 + 2 * 500 * 32
    answers = 8 * (10 * weights + sum((n - 1) ** 2 - p**2 for n, p in zip(lens, prompts, strict=True)) * 64 + 10 * 500 * 32)
    assert full_size.model_flops(model, "grpo", batch) == 8 * (encoder + adaptor + read) + 10 * answers
    assert full_size.llm_tokens(model, "grpo", batch) == sum(prompts) + 2 * 8 * 12
    assert full_size.llm_tokens(model, "ia_sft", batch) == sum(lens)
    widest, longest = max(prompts), max(lens)
    assert full_size.tokens_in_rows(model, "grpo", batch, apart=True) == (sum(prompts) + 192, 2 * widest + 2 * 8 * 2 * 8)
    padded = 8 * (2 * widest + 2 * 8 + 2 * longest)
    assert full_size.tokens_in_rows(model, "grpo", batch, apart=False) == (8 * 2 * sum(lens), padded)


def test_both_ways_of_grpo_sample_as_many_ids_as_the_transcripts_have_and_agree(load_module, tmp_path, monkeypatch):
    """On the same answers the plain loop's gradient is that of ours."""
    full_size, grpo = load_module("full_size"), load_module("full_size_grpo")
    model = full_size.make_model("ci", torch.device("cpu"))
    batch = grpo.RewardBatches(model)(full_size.make_cuts([full_size.Lengths(2.0, 8), full_size.Lengths(1.0, 4)]), 0)
    config = GrpoConfig(train=GrpoTrainConfig(group_size=2, kl_weight=0.04, compile=False))
    peers = Processes(0, 1, torch.device("cpu"))
    model.acoustic.head.requires_grad_(False)
    trainer, plain = grpo.grpo_ways(
        model, config, lambda policy, loss: Trainer(policy.train(), loss, None, config.train, tmp_path, peers, evaluate=dict)
    )
    for parameter in model.llm.parameters():  # away from the reference, so that its divergence has a gradient
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    gradients, answers = {}, []
    trained = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    monkeypatch.setattr(trainer.optimizer, "step", lambda: gradients.update({name: parameter.grad.clone() for name, parameter in trained}))
    real = sys.modules["nim4.train.grpo"].sample
    monkeypatch.setattr("nim4.train.grpo.sample", lambda *args: answers.append(real(*args)) or answers[-1])
    monkeypatch.setattr("nim4.train.grpo.judge", lambda *args: (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), {}))
    trainer._train_step(trainer.model, [batch])
    ours, (sampled,) = dict(gradients), answers
    assert sampled.lens.tolist() == [8, 8, 4, 4]
    assert [len(row) for row in plain._generate(batch, Context(0, -1), 1.0)] == [8, 4]
    groups = iter([[sampled.ids[k].tolist(), sampled.ids[2 + k][:4].tolist()] for k in (0, 1)])
    monkeypatch.setattr(plain, "_generate", lambda *args: next(groups))
    monkeypatch.setattr(grpo, "judge", lambda *args: (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), {}))
    plain.train([batch])
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - ours[name]).abs().max() < 1e-3 * ours[name].abs().max() + 1e-7, name


def test_training_steps_without_manifests_name_the_command(benchmark, tmp_path):
    with pytest.raises(RecipeError, match=r"expected a manifest of stage 2, found no such file.*\./run\.sh --stop-stage 2"):
        benchmark("train_step", "--manifest", tmp_path / "train.jsonl.gz")


def test_streaming_encoder(benchmark, model_config):
    rows = benchmark("encoder_rtf", "--model-config", model_config, "--seconds", 3.84)["rows"]
    assert [row["pass"] for row in rows if row["streams"] == 16] == ["offline"] + [f"chunk {n} ({40 * n} ms)" for n in (4, 8, 16, 24, 32)]
    assert all(row["rtf"] > 0 for row in rows)
    assert [row["cost_to_offline"] for row in rows if row["pass"] == "offline"] == [1.0, 1.0]
    chunk_4 = rows[1]
    assert chunk_4["ms_per_call"] == pytest.approx(1000 * chunk_4["rtf"] * 0.16, rel=1e-3)  # a call per 160 ms of audio


def test_long_stream(benchmark, model_config):
    rows = benchmark("stream_flat", "--model-config", model_config, "--minutes", 2)["rows"]
    assert [row["minute"] for row in rows] == [1, 2]
    assert rows[0]["time_to_first_minute"] == 1.0
    assert rows[0]["memory_grown_mb"] == 0.0
    assert all(0 < row["chunk_ms"] <= row["chunk_p95_ms"] for row in rows)
    with pytest.raises(RecipeError, match="at least 2, and at least 1"):
        benchmark("stream_flat", "--minutes", 1)


def test_effect_of_reinforcement_learning(benchmark, tmp_path, load_module):
    llm = tiny.tiny_llm(tmp_path / "llm")
    for seed, name in enumerate(("before", "one", "two")):
        model = tiny.tiny_speech_llm(llm)
        model.adaptor.down.weight.data += 0.1 * seed
        model.save(tmp_path / name, model.state_dict(), tiny.INVENTORY)
    manifest = tiny.write_features(tmp_path / "units", "dev", [34, 40, 38])
    options = ["--before", tmp_path / "before", "--after", tmp_path / "one", tmp_path / "two", "--manifest", manifest]
    options += ["--num-empty", 1, "--group-size", 2]
    record = benchmark("grpo_effect", *options, "--limit", 2)
    kinds = ["clean speech", "speech, 5 dB", "noise", "silence"]
    assert [(row["audio"], row["pair"]) for row in record["rows"]] == [(kind, pair) for kind in kinds for pair in ("1", "2", "all")]
    for row in record["rows"]:
        assert (row["mer_before"] == "-") == (row["audio"] in kinds[2:])
        assert all(0 <= row[f"{name}_{side}"] <= 100 for name in ("equal_groups", "loops", "wrote") for side in ("before", "after"))
    first, second, both = record["rows"][:3]
    assert both["mer_after"] == pytest.approx((first["mer_after"] + second["mer_after"]) / 2, rel=1e-3)
    assert first["mer_change"] == pytest.approx(first["mer_after"] - first["mer_before"], rel=1e-2, abs=1e-2)
    assert record["data"]["size"].startswith("2 utterances, 1 clips")
    with pytest.raises(RecipeError, match="expected 1 or 2 folders, found 3"):
        benchmark("grpo_effect", *options[:1], *[tmp_path / "before"] * 3, *options[2:])


def test_an_unchanged_model_has_no_effect(benchmark, tmp_path):
    model = tiny.tiny_speech_llm(tiny.tiny_llm(tmp_path / "llm"))
    model.save(tmp_path / "model", model.state_dict(), tiny.INVENTORY)
    manifest = tiny.write_features(tmp_path / "units", "dev", [34, 40])
    folders = ["--before", tmp_path / "model", "--after", tmp_path / "model"]
    for row in benchmark("grpo_effect", *folders, "--manifest", manifest, "--num-empty", 2, "--group-size", 2, "--context", "streaming")["rows"]:
        assert row["mer_change"] in ("-", 0.0)
        assert all(row[f"{name}_before"] == row[f"{name}_after"] for name in ("reward", "equal_groups", "loops", "wrote"))


@pytest.fixture(scope="module")
def speech(units):
    """Options of the streaming benchmarks: clips that they join."""
    return ["--manifest", units.parent / "manifests" / "train.jsonl.gz", "--device", "cpu"]


def test_streams_beside_reading_everything_again(benchmark_tables, talkative, speech):
    texts, finals = benchmark_tables("streaming", "--model", talkative, *speech, "--lengths", 1.5, 3, "--rounds", 1)
    ways = ["ours", "ours, final whole", "re-feed", "re-feed, re-encode", "re-feed, generate"]
    assert [(row["audio_s"], row["way"]) for row in texts["rows"]] == [(length_s, way) for length_s in (1.5, 3.0) for way in ways]
    assert all(row["same_texts_percent"] == 100 or row["way"] == ways[1] for row in [*texts["rows"], *finals["rows"]])
    for ours, whole, again, encode_again, generate in (texts["rows"][:5], texts["rows"][5:]):
        assert (whole["partials"], whole["final_ms"] > 0) == (ours["partials"], True)
        assert ours["tokens"] < again["tokens"] == encode_again["tokens"] == generate["tokens"]
        assert again["passes"] == encode_again["passes"] == generate["passes"]
        assert again["tokens_to_re-feed"] == again["time_to_re-feed"] == 1.0
    assert texts["rows"][5]["tokens_to_re-feed"] < texts["rows"][0]["tokens_to_re-feed"], "the longer, the more is saved"
    for draft, plain, generate in (finals["rows"][:3], finals["rows"][3:]):
        assert draft["text_tokens"] == plain["text_tokens"] == generate["text_tokens"] > 0
        assert draft["passes"] <= plain["passes"] == generate["passes"]
        assert draft["ids_differ"].startswith("0 of ")


@pytest.mark.parametrize(("precision", "holds", "percent"), [("fp32", 1.0, 100.0), ("bf16", 0.5, 50.0)])
def test_streams_of_random_weights_write_texts_of_the_stated_length(benchmark_tables, precision, holds, percent):
    options = ["--size", "ci", "--device", "cpu", "--lengths", 3, "--rounds", 1, "--tokens-per-s", 4, "--precision", precision]
    texts, finals = benchmark_tables("streaming", *options, "--draft-holds", holds)
    assert [row["same_texts_percent"] for row in texts["rows"] if row["way"] != "ours, final whole"] == [100] * 4
    assert {row["text_tokens"] for row in finals["rows"]} == {round(4 * 0.16 * 19)}
    assert finals["rows"][0]["accepted_percent"] == percent  # 10 ids after the last whole chunk; half of 10 is 5


def test_streams_whose_texts_differ_are_not_timed(benchmark_tables, load_module, monkeypatch, talkative, speech):
    ways = load_module("streaming_ways")
    monkeypatch.setitem(sys.modules, "streaming_ways", ways)
    real = ways.WAYS[ways.GENERATE]

    def forgetful(model, rows):
        stream = real(model, rows)
        stream._write = lambda model, embeds, limit: ways.write_with_generate(model, embeds[:, 1:], limit)
        return stream

    monkeypatch.setitem(ways.WAYS, ways.GENERATE, forgetful)
    with pytest.raises(RuntimeError, match="re-feed, generate wrote"):
        benchmark_tables("streaming", "--model", talkative, *speech, "--lengths", 2, "--rounds", 1)


def test_tokens_are_counted_where_the_language_model_is_entered(load_module, model, units):
    """The books of a session, with the prefix that all share, are what goes through the door."""
    ways = load_module("streaming_ways")
    meter, rows, samples = ways.Meter(model.llm), new_rows(model), 0.1 * np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    pieces, rest = ways.in_chunks(model, samples)
    followed = ways.follow(ways.OURS, model, rows, pieces, rest, meter)
    assert (followed.tokens, followed.passes) == (meter.tokens, meter.passes)
    assert followed.stream.counts.speech_tokens == 19


def test_streams_held(benchmark_tables):
    options = ["--size", "ci", "--device", "cpu", "--streams", 2, 2, "--tries", 1, 1, "--most", 2, "--seconds", 2, "--warm-up-s", 1]
    options += ["--utterance-s", 2]
    (record,) = benchmark_tables("streams_held", *options)
    assert [(row["streams"], row["way"]) for row in record["rows"]] == [(2, "together"), (2, "one by one")]
    for row in record["rows"]:
        assert 0 < row["lag_p50_ms"] <= row["lag_p95_ms"] <= row["latest_ms"]
        assert row["final_p50_ms"] > 0 < row["partials_per_s"]
    assert record["rows"][0]["sessions_per_step"] >= 1


@pytest.fixture
def streams_held(load_module, monkeypatch):
    """The module, and a function that measures one stream with the work of the model replaced."""
    module = load_module("streams_held")

    def run(hear, monkeypatch=monkeypatch):
        streaming_model = load_module("streaming_model")
        args = module.build_parser().parse_args(["--size", "ci", "--device", "cpu", "--seconds", "1", "--warm-up-s", "0"])
        measured = streaming_model.load_measured(args)
        said = [module.Said([np.zeros(10_800, np.float32)], np.zeros(100, np.float32))]
        monkeypatch.setattr(module.StreamingSession, "hearing", hear)
        return module.held(measured, Recogniser(measured.model), said, 1, "together", args)

    return module, run


def test_faults_are_not_hidden_by_a_thread(streams_held):
    def out_of_memory(session, samples, ends):
        raise torch.OutOfMemoryError
        yield

    def broken(session, samples, ends):
        raise ArithmeticError("a bug")
        yield

    for hear, error in ((out_of_memory, torch.OutOfMemoryError), (broken, ArithmeticError)):
        with pytest.raises(error):
            streams_held[1](hear)


def test_numbers_of_streams_that_do_not_fit_are_told(benchmark_tables, monkeypatch):
    real = Recogniser.hear

    def small(recogniser, jobs):
        return real(recogniser, jobs) if len(jobs) < 3 else [torch.OutOfMemoryError() for _ in jobs]

    monkeypatch.setattr(Recogniser, "hear", small)
    options = ["--size", "ci", "--device", "cpu", "--streams", 4, 1, "--tries", 1, 1, "--most", 4, "--seconds", 3]
    options += ["--warm-up-s", 0, "--utterance-s", 1]
    (record,) = benchmark_tables("streams_held", *options)
    told = [(row["streams"], row["way"]) for row in record["rows"]]
    assert told == [(4, "together: out of memory"), (1, "one by one")]


@pytest.mark.parametrize(("holds", "first", "tries", "asked"), [(200, 128, 9, [128, 256, 192, 224, 208, 200]), (3, 16, 9, [16, 8, 4, 2, 3])])
def test_the_largest_number_is_looked_for(load_module, holds, first, tries, asked):
    search, found = load_module("streams_held").Search(first, 512, tries), []
    while search.following is not None:
        found.append(search.following)
        search.tell(search.following <= holds)
    assert found == asked
    assert search.held == holds


def test_a_search_ends_at_the_most_and_with_its_tries(load_module):
    search = load_module("streams_held").Search(2, 6, 9)
    for following in (4, 6, None):
        search.tell(True)
        assert search.following == following
    search = load_module("streams_held").Search(2, 600, 2)
    search.tell(True)
    search.tell(True)
    assert search.following is None


def test_decode_speed(benchmark_tables):
    (record,) = benchmark_tables(
        "decode_speed", "--size", "ci", "--device", "cpu", "--batches", 1, 3, "--rounds", 1, "--tokens", 2, "--prompt-tokens", 9
    )
    assert [(row["rows"], row["way"]) for row in record["rows"]] == [(1, "ours"), (1, "generate"), (3, "ours"), (3, "generate")]
    for row in record["rows"][::2]:
        assert row["ids_differ"].startswith("0 of ")
        assert 0 < row["floor_ms"] < row["ms_per_token"]


def test_encoder_step(benchmark_tables):
    options = ["--size", "ci", "--device", "cpu", "--batches", 1, 3, "--rounds", 1, "--ways", "eager", "graph"]
    (record,) = benchmark_tables("encoder_step", *options)
    assert [(row["streams"], row["way"]) for row in record["rows"]] == [(1, "eager"), (1, "graph"), (3, "eager"), (3, "graph")]
    assert all(row["ms"] > 0 for row in record["rows"])


def test_streams_that_are_late_are_not_held(streams_held, monkeypatch):
    def slow(session, samples, ends):
        time.sleep(0.7)
        return
        yield

    assert streams_held[1](slow)["holds"] == "no"


def test_speakers_begin_at_different_places_and_never_go_back(streams_held):
    module, _ = streams_held
    said = [module.Said([np.full(16_000, number, np.float32) for number in range(4)], np.zeros(8_000, np.float32))]
    for phase_s, first_s, num_pieces in ((0.0, 1.0, 4), (2.0, 1.0, 3), (4.4, 1.0, 1), (5.0, 2.5, 4)):
        plan = module.schedule(said, 0, 0.0, phase_s, 1.5 + 0.5)  # an utterance of 4.5 s and a pause of 2 s
        items = [next(plan) for _ in range(12)]
        assert [at_s for at_s, _, _ in items] == sorted(at_s for at_s, _, _ in items)
        assert (items[0][0], items[0][1][0]) == (first_s, 0.0), "an utterance begins with its first piece"
        assert [ends for _, _, ends in items].index(True) == num_pieces


@pytest.fixture
def load(load_module, monkeypatch):
    """The module of the load test, which waits for nobody here, and its clients' module."""
    clients = load_module("serve_clients")
    monkeypatch.setitem(sys.modules, "serve_clients", clients)
    module = load_module("serve_load")
    for name, value in {"STAGGER_S": 0.2, "CHUNK_S": 60.0, "UPLOAD_EVERY_S": 1.0, "MEMORY_GROWTH": 9.0}.items():
        monkeypatch.setattr(module, name, value)
    return module, clients


@pytest.fixture(scope="module")
def real_speech(tmp_path_factory):
    """A manifest of real speech, which the server's VAD finds."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, samples in enumerate(read_clips(4)):
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        rows.append(Row(str(number), folder / f"{number}.wav", "text", "s", "en"))
    save_cuts(cuts_from_table(rows)[0], folder / "clips.jsonl.gz")
    return folder / "clips.jsonl.gz"


def test_a_long_recording(benchmark_tables, talkative, real_speech):
    options = ["--model", talkative, "--manifest", real_speech, "--hours"]
    (record,) = benchmark_tables("long_recording", *options, 0.01)
    values = {row["measure"]: row["value"] for row in record["rows"]}
    assert values["exit code"] == 0
    assert 36 <= values["audio s"] < 60
    assert values["segments"] > 5
    assert 0 < values["memory quarter 1 mb"] <= values["memory peak mb"]
    with pytest.raises(RecipeError, match="a number above 0"):
        benchmark_tables("long_recording", *options, 0)


def test_a_long_recording_that_is_not_heard_is_told(load_module, monkeypatch, benchmark_tables, talkative, real_speech):
    module = load_module("long_recording")
    monkeypatch.setattr(module, "transcribe", lambda *_: (2, 1.0, [1.0] * 4, ""))
    monkeypatch.setattr(sys, "argv", ["benchmarks/long_recording.py", "--manifest", str(real_speech), "--hours", "0.005"])
    with pytest.raises(RecipeError, match=r"exit code 0, found 0\.0 s, 2"):
        module.main()


@pytest.fixture
def load_test(load, monkeypatch, tmp_path, talkative, real_speech):
    """Runs the load test with a real server; returns its record."""
    path = tmp_path / "record.jsonl"

    def run(*options):
        arguments = ["--model", talkative, "--manifest", real_speech, *options, "--record", path]
        monkeypatch.setattr(sys, "argv", ["benchmarks/serve_load.py", *map(str, arguments)])
        load[0].main()
        (record,) = newest([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], path)
        return record

    return run


def test_load_of_a_server(load_test):
    (row,) = load_test("--clients", 2, "--max-clients", 2, "--seconds", 3, "--vad-share", 0.5)["rows"]
    assert (row["clients"], row["lag_holds"], row["lost"]) == (2, "yes", 0)
    assert 0 < row["lag_p50_ms"] <= row["lag_p95_ms"]
    assert row["first_p50_ms"] > 640, "a chunk must be spoken before it has a text"
    assert row["final_p50_ms"] > 0 < row["server_cpu_percent"]
    assert row["utterances"] >= 2


@pytest.mark.parametrize(
    ("held", "tried"), [(37, [4, 8, 16, 32, 36, 38, 40, 48, 64]), (2, [2, 3, 4]), (0, [1, 2, 4]), (1000, [4, 8, 16, 32, 64, 100])]
)
def test_the_largest_number_of_clients_is_found_by_halving(load, monkeypatch, held, tried):
    async def phase(server, clips, count, args):
        return {"clients": count, "lag_holds": "yes" if count <= held else "no"}

    monkeypatch.setattr(load[0], "phase", phase)
    rows = asyncio.run(load[0].more_and_more(None, [], argparse.Namespace(clients=4, max_clients=100)))
    assert [row["clients"] for row in rows] == tried


def test_mixed_load_of_a_server(load_test, load, monkeypatch):
    monkeypatch.setattr(load[0], "KINDS", dict.fromkeys(load[0].KINDS, 1) | {"deaf": 0, "long": 0})
    values = {row["measure"]: row["value"] for row in load_test("--mixed", "--minutes", 0.2, "--clients", 6)["rows"]}
    assert (values["lost"], values["orphans"], values["broken promises"]) == (0, 0, 0)
    assert values["utterances"] > 5
    assert min(values["uploads"], values["streams short"], values["streams wrong key"]) > 0


def test_load_options(load_test):
    with pytest.raises(RecipeError, match="a share below 1"):
        load_test("--vad-share", 1.0)


class Unread:
    """Stands for the socket of a client, to which nothing is really sent."""

    async def send(self, message):
        pass


def seen_by(clients, kinds, vad=False):
    """A client's stream after it spoke for a second, said that this was all, and got these events."""

    async def spoken():
        stream = clients.Stream(1, vad)
        stream.socket, stream._due_s = Unread(), 0.0
        await stream.speak([clients.SILENCE] * 10)
        if not vad:
            await stream.commit()
        return stream

    stream = asyncio.run(spoken())
    for kind in kinds:
        stream._take({"type": kind, "item_id": "a", "audio_s": 0.7, "audio_start_ms": 100, "audio_end_ms": 700})
    return stream


@pytest.mark.parametrize(("finals", "lost"), [(0, 1), (1, 0), (2, 1)])
def test_a_final_text_is_lost_when_it_does_not_come_exactly_once(load, finals, lost):
    started = ["input_audio_buffer.speech_started"]
    for vad in (False, True):
        stream = seen_by(load[1], [*(started if vad else []), "partial", "input_audio_buffer.committed", *["final"] * finals], vad)
        assert stream.num_lost == lost


def test_lag_is_counted_from_the_last_sample_that_a_text_has_heard(load):
    stream = seen_by(load[1], ["partial", "final"])
    (utterance,) = stream.utterances
    ((at_s, lag_s),) = utterance.partials
    assert at_s - lag_s == stream._sent_s[6]  # 0.7 s are 7 frames
    (with_vad,) = seen_by(load[1], ["input_audio_buffer.speech_started", "partial"], vad=True).utterances
    assert with_vad.start == 1


def test_a_load_that_breaks_a_promise_is_told(load):
    module, _ = load
    mixed = module.Mixed(None, [], argparse.Namespace(clients=1, minutes=1))
    mixed.memory = [(float(at_s), 100.0 if at_s < 50 else 2000.0) for at_s in range(60)]
    mixed.seen.lost, mixed.seen.lag = 2, [61.0]
    module.mixed_rows(mixed, {"sessions": 1, "uploads": 0, "model_jobs": 0}, {})
    assert sorted(mixed.broken) == ["1 orphans", "2 lost final texts", "a lag of 61.00 s", "memory grown to 2000.0 %"]


def test_exported_encoders(benchmark, trained, units):
    options = ["--chunk-ms", 640, "--runtimes", "onnxruntime"]
    rows = benchmark("exported", "--model", trained, "--manifest", units / "test.jsonl.gz", "--limit", 2, *options)["rows"]
    assert [row["runtime"] for row in rows] == ["pytorch", "onnxruntime"]
    assert all(row["rtf"] > 0 and row["memory_mb"] >= 0 and row["same_phones_percent"] == 100 for row in rows)
    assert rows[0]["per_percent"] == rows[1]["per_percent"]
    with pytest.raises(RecipeError, match="--chunk-ms: expected multiples of 40, found 50"):
        benchmark("exported", "--model", trained, "--chunk-ms", 50)


def test_what_vllm_reads_is_within_what_it_may_only_if_it_always_is(load_module):
    def counted(tokens, at_most):
        return {"tokens": tokens, "adapted_items": 0, "ms": 1.0, "at_most": at_most}

    nothing = [{"tokens": 100, "adapted_items": 4, "ms": 2.0}] * 2
    measured = {(2.56, "append"): [counted(4, 4)] * 2, (2.56, "partial"): [counted(40, 50), counted(51, 50)], (2.56, "partial from nothing"): nothing}
    rows = load_module("vllm_counts").rows_of(measured)
    assert [row["within"] for row in rows] == ["yes", "no", "-"]
    assert [(row["tokens_to_nothing"], row["ms_to_nothing"]) for row in rows] == [("-", "-"), (0.455, 0.5), ("-", "-")]
    made = {"data": {"size": "", "seed": 0}, "commit": "", "hardware": "", "torch": "", "load": 0.0, "rounds": 2, "command": "", "what": ""}
    assert "| partial from nothing |" in as_markdown({"benchmark": "vllm_counts", "rows": rows, **made})
