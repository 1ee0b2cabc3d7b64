"""Stage 1: features of a whole corpus, whoever computes them."""

from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from made_corpora import load_program, make_aishell, run_program

from nim4.config import RecipeError
from nim4.corpus.feats import Cmvn, Fbank
from nim4.corpus.manifest import load_cuts, split_paths
from nim4.stage import read_json, read_jsonl


@pytest.fixture
def manifests(tmp_path, monkeypatch):
    make_aishell(tmp_path / "source")
    out = tmp_path / "manifests"
    run_program(monkeypatch, "00_prepare", "--corpus", "aishell", "--source", tmp_path / "source", "--out", out)
    return out


@pytest.fixture
def fbank(monkeypatch, manifests):
    """Runs stage 1 with archives of 2 s of audio, so that there are several."""

    def run(out, *options, source=manifests):
        program = load_program("01_fbank")
        monkeypatch.setattr(program, "SHARD_S", 2.0)
        monkeypatch.setattr("sys.argv", ["01_fbank", "--manifests", str(source), "--out", str(out), *map(str, options)])
        program.main()

    return run


def contents(folder):
    """Every product by its name; done.json holds times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "done.json"
    }


def test_features_can_be_loaded_and_counted(tmp_path, fbank, caplog):
    caplog.set_level("INFO")
    fbank(tmp_path / "fbank", "--jobs", 1)
    assert list(split_paths(tmp_path / "fbank")) == ["dev", "test", "train"]
    assert len(list((tmp_path / "fbank" / "feats" / "train").iterdir())) == 4
    extractor, num_frames = Fbank(), 0
    for cut in load_cuts(tmp_path / "fbank" / "train.jsonl.gz"):
        features = cut.load_features()
        assert features.shape == (cut.num_frames, 80) == (50, 80)
        assert np.abs(features - extractor.extract(cut.load_audio()[0])).max() < 0.02
        num_frames += len(features)
    cmvn = Cmvn.load(tmp_path / "fbank" / "cmvn.json")
    assert cmvn.num_frames == num_frames == 13 * 50
    assert read_jsonl(tmp_path / "fbank" / "unreadable.jsonl") == []
    assert read_json(tmp_path / "fbank" / "done.json")["unreadable"] == 0
    fbank(tmp_path / "fbank", "--jobs", 1)
    assert "skipped" in caplog.text


def test_processes_and_a_dask_cluster_make_the_same_bytes(tmp_path, fbank):
    distributed = pytest.importorskip("distributed")
    fbank(tmp_path / "alone", "--jobs", 1)
    fbank(tmp_path / "two", "--jobs", 2)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        fbank(tmp_path / "dask", "--executor", cluster.scheduler_address)
    alone = contents(tmp_path / "alone")
    assert len(alone) == 3 + 2 + 4 + 2 + 2
    assert contents(tmp_path / "two") == alone
    assert contents(tmp_path / "dask") == alone


def test_no_dask_scheduler_there(tmp_path, fbank, monkeypatch):
    distributed = pytest.importorskip("distributed")

    def no_answer(address, timeout):
        raise OSError(f"Timed out trying to connect to {address} after {timeout} s")

    monkeypatch.setattr(distributed, "Client", no_answer)
    with pytest.raises(RecipeError, match=r"--executor tcp://127\.0\.0\.1:9.*a Dask scheduler"):
        fbank(tmp_path / "fbank", "--executor", "tcp://127.0.0.1:9")
    assert not (tmp_path / "fbank").exists()


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    program = load_program("01_fbank")

    class Pool(Executor):
        def submit(self, *arguments):
            future = Future()
            future.set_exception(BrokenProcessPool("a child died"))
            return future

    monkeypatch.setattr(program, "workers", lambda jobs, address: nullcontext(Pool()))
    with pytest.raises(RecipeError, match="use fewer --jobs"):
        program.extract([("train", tmp_path / "0.lca", [])], 2, "")


def test_speed_copies_of_the_training_data(tmp_path, fbank):
    fbank(tmp_path / "fbank", "--jobs", 1, "--speed-perturb", "true")
    cuts = load_cuts(tmp_path / "fbank" / "train.jsonl.gz")
    assert len(cuts) == 3 * 13
    assert len(load_cuts(tmp_path / "fbank" / "dev.jsonl.gz")) == 8
    by_id = {cut.id: cut for cut in cuts}
    for prefix, frames in (("", 50), ("sp0.9-", 56), ("sp1.1-", 45)):
        cut = by_id[f"{prefix}BAC009S0002W0121"]
        assert cut.load_features().shape == (frames, 80)
        assert cut.num_frames == frames
        assert cut.supervisions[0].text == "广州 市 房地产 中介 协会 分析"


def test_audio_that_went_bad_is_listed(tmp_path, manifests, fbank, caplog):
    wav = tmp_path / "source" / "data_aishell" / "wav"
    (wav / "test" / "S0764" / "BAC009S0764W0121.wav").unlink()
    (wav / "dev" / "S0724" / "BAC009S0724W0122.wav").write_bytes(b"RIFF broken")
    fbank(tmp_path / "fbank", "--jobs", 1)
    rows = read_jsonl(tmp_path / "fbank" / "unreadable.jsonl")
    assert [(row["id"], row["split"]) for row in rows] == [("BAC009S0724W0122", "dev"), ("BAC009S0764W0121", "test")]
    assert all(row["path"] and row["error"] for row in rows)
    assert read_json(tmp_path / "fbank" / "done.json")["unreadable"] == 2
    assert "2 utterances could not be read" in caplog.text
    assert "BAC009S0724W0122" not in {cut.id for cut in load_cuts(tmp_path / "fbank" / "dev.jsonl.gz")}


def test_a_corpus_that_is_gone_is_an_error_and_earlier_features_stay(tmp_path, manifests, fbank):
    fbank(tmp_path / "fbank", "--jobs", 1)
    before = contents(tmp_path / "fbank")
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"split 'dev'.*8 of 8 unreadable"):
        fbank(tmp_path / "fbank", "--jobs", 1, "--speed-perturb", "true")
    assert contents(tmp_path / "fbank") == before


def test_a_corpus_without_training_splits_has_no_mean(tmp_path, fbank):
    fbank(tmp_path / "fbank", "--jobs", 1, "--cmvn-splits", "")
    assert load_cuts(tmp_path / "fbank" / "dev.jsonl.gz")[0].has_features
    assert not (tmp_path / "fbank" / "cmvn.json").exists()


def test_wrong_options_are_told(tmp_path, manifests, fbank):
    with pytest.raises(RecipeError, match="did you mean 'train'"):
        fbank(tmp_path / "fbank", "--cmvn-splits", "trian")
    with pytest.raises(RecipeError, match="--jobs"):
        fbank(tmp_path / "fbank", "--jobs", 0)
    with pytest.raises(RecipeError, match="run the earlier stages first"):
        fbank(tmp_path / "fbank", source=tmp_path / "nowhere")
    (manifests / "dev.jsonl.gz").write_bytes(b"not a manifest")
    with pytest.raises(RecipeError, match="gzipped JSON lines"):
        fbank(tmp_path / "fbank")


def test_the_number_of_threads_is_left_as_it_was(tmp_path, fbank):
    torch.set_num_threads(2)
    fbank(tmp_path / "fbank", "--jobs", 1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
