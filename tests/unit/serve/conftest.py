"""A Triton server for all tests of this folder, and what it serves."""

import pytest
import torch
from triton_server import TritonServer

from nim4.model.checkpoint import WEIGHTS, load_model
from nim4.stage import file_hash


@pytest.fixture(scope="session")
def acoustic(talkative):
    """The phoneme model of `talkative`."""
    return load_model(talkative, torch.device("cpu"))[0]


@pytest.fixture(scope="session")
def repository(talkative, acoustic, tmp_path_factory):
    """A model repository of the Python backend."""
    pytest.importorskip("onnx")
    from nim4.export.triton import export_triton

    folder = tmp_path_factory.mktemp("triton") / "repository"
    export_triton(acoustic, file_hash(talkative / WEIGHTS), folder, "python", (640, 160))
    return folder


@pytest.fixture(scope="session")
def triton(repository, tmp_path_factory):
    """A server of it, which no test may end."""
    with TritonServer(repository, tmp_path_factory.mktemp("server")) as server:
        yield server
