"""The drift alarm."""

import logging

import pytest
import torch
from made_snapshots import aligned, pretrained
from tiny import noise_batch, tiny_llm

from nim4.model.asr import load_speech_llm
from nim4.train.cka import PooledCka
from nim4.train.drift import DriftAlarm

BATCHES = [noise_batch([80, 50]), noise_batch([33], seed=1), noise_batch([120], seed=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    return aligned(folder / "4", pretrained(folder / "3", 0), tiny_llm(folder / "llm"))


@pytest.fixture
def model(folder):
    return load_speech_llm(folder, torch.device("cpu"))[0]


def frames(model, batches):
    with torch.inference_mode():
        encoded = [model.encode(batch.x, batch.x_lens) for batch in batches]
    return torch.cat([row[:length] for rows, lens in encoded for row, length in zip(rows, lens.tolist(), strict=True)])


def test_the_alarm_fires_when_the_encoder_has_moved(model, caplog):
    before = frames(model, BATCHES)
    alarm = DriftAlarm(model, BATCHES, 1000, 0.9)
    with caplog.at_level(logging.WARNING):
        assert alarm.measure()["encoder_cka"] == pytest.approx(1.0, abs=1e-9)
        assert not caplog.records
        with torch.no_grad():
            model.acoustic.encoder.blocks[-1].norm.weight.copy_(torch.linspace(0, 3, 16) ** 3)
        expected = PooledCka(unbiased=True)
        expected.add(frames(model, BATCHES), before)
        found = alarm.measure()["encoder_cka"]
    assert found == pytest.approx(expected.value(), abs=1e-6)
    assert found < 0.9
    assert [record.message for record in caplog.records] == [
        f"drift alarm: CKA of the encoder with the one this stage started from is {found:.4f}, below drift_alarm 0.9; "
        "a lower train.encoder_lr_ratio keeps it nearer"
    ]


def test_frames_are_limited_and_without_dropout(model):
    model.train()
    alarm = DriftAlarm(model, BATCHES, 25, 0.9)
    assert torch.equal(alarm._frames(), frames(model.eval(), BATCHES)[:25])
    model.train()
    alarm._frames()
    assert model.training
