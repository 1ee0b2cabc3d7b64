"""What the tests of the model, its training and its decoding share."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from made_corpora import load_program, run_program

from nim4 import __main__ as nim4_main
from nim4 import stage
from nim4.decode.second_pass import EncodeWhole, WriteBest
from nim4.model.asr import load_speech_llm


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are quickest, and sums always in the same order, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Where tests of web pages leave what they saw."""
    folder = Path(os.environ.get("NIM4_PAGE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Command:
    """A program of local/, run in this process as a shell would: gives the exit code and the lines of errors; `log` has all of the last run."""

    def __init__(self, name, monkeypatch, capsys):
        self._name, self._monkeypatch, self._capsys = name, monkeypatch, capsys
        self.log = ""

    def __call__(self, *options):
        self._monkeypatch.setattr(sys, "argv", [self._name, *map(str, options)])
        code = 0
        try:
            stage.run(load_program(self._name).main, self._name)
        except SystemExit as end:
            code = end.code
        self.log = self._capsys.readouterr().err
        return code, [line for line in self.log.splitlines() if " ERROR " in line]


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("03_pretrain")` is that program as a function of its options."""
    return lambda name: Command(name, monkeypatch, capsys)


@pytest.fixture
def nim4(monkeypatch, capsys):
    """`python -m nim4` in this process: exit code, lines printed, errors and warnings, but those of Python."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["nim4", *map(str, options)])
        code = 0
        try:
            stage.run(nim4_main.main, "nim4")
        except SystemExit as end:
            code = end.code
        done = capsys.readouterr()
        told = [line for line in done.err.splitlines() if " ERROR " in line or " WARNING " in line]
        return code, done.out.splitlines(), [line for line in told if "Warning: " not in line]

    return run


@pytest.fixture(scope="session")
def units(tmp_path_factory):
    """`<folder>/units` as stages 1 and 2 leave it for a few made utterances: splits train, dev and test, cmvn.json in `<folder>/fbank`."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_manifests(folder)
    with pytest.MonkeyPatch.context() as patch:
        run_program(patch, "01_fbank", "--manifests", folder / "manifests", "--out", folder / "fbank", "--cmvn-splits", "train", "--jobs", 1)
        run_program(patch, "02_units", "--fbank", folder / "fbank", "--out", folder / "units")
    return folder / "units"


@pytest.fixture(scope="session")
def trained(units, tmp_path_factory):
    """A model folder as stage 3 leaves it after a few steps on `units`, with the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        run_program(patch, "03_pretrain", *tiny.pretrain_options(units, folder), "--out", folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def aligned(units, trained, tmp_path_factory):
    """A model folder as stage 4 leaves it after a few steps from `trained`, with a tiny language model."""
    folder = tmp_path_factory.mktemp("aligned")
    with pytest.MonkeyPatch.context() as patch:
        run_program(patch, "04_align", *tiny.align_options(units, folder, trained), "--out", folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def talkative(aligned, tmp_path_factory):
    """The model folder `aligned` with other weights, which write texts that depend on what is said."""
    folder = tmp_path_factory.mktemp("talkative")
    model, inventory = load_speech_llm(aligned, torch.device("cpu"))
    model.save(folder, tiny.make_talkative(model).state_dict(), inventory)
    shutil.copy(aligned / "done.json", folder)
    return folder


@pytest.fixture(scope="module")
def model(talkative):
    """The speech LLM of `talkative`."""
    return load_speech_llm(talkative, torch.device("cpu"))[0]


@pytest.fixture
def heard_anew(monkeypatch):
    """Grows by the number of features of each segment that a second pass encodes again."""
    lens = []
    for request in (EncodeWhole, WriteBest):

        def together(parts, own=request.together):
            lens.extend(len(part.features) for part in parts)
            return own(parts)

        monkeypatch.setattr(request, "together", staticmethod(together))
    return lens


@pytest.fixture(scope="module")
def server(model):
    """A server of `model`, for the tests of one file."""
    from running_server import RunningServer  # the web framework, which few tests need

    with RunningServer(model) as running:
        yield running
