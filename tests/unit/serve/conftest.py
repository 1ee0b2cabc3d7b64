"""A Triton server for all tests of this folder, and what it serves."""

import os
from pathlib import Path

import pytest
import torch
from speech_pieces import make_folder
from spoken_clips import join, read_clips
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


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """The model folder that NIM4_VLLM_MODEL names, or one of a tiny, random model."""
    given = os.environ.get("NIM4_VLLM_MODEL")
    return Path(given) if given else make_folder(tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="session")
def phrases():
    """Four phrases of four words each by one speaker, 16-bit at 16 kHz."""
    words = read_clips(40, "dspspeech20")
    takes = [[words[5 * ((2 * number + place) % 8) + number] for place in range(4)] for number in range(4)]  # 5 of each word
    return [(32767 * join(clips, 0.1)).astype("<i2") for clips in takes]
