"""What fine-tuning does to a batch before the model hears it."""

from dataclasses import replace

import torch

from nim4.config import AugmentConfig, SftConfig
from nim4.corpus.batch import TextBatch
from nim4.train.loop import Draw
from nim4.train.sft import sft_loss

OFF = AugmentConfig(time_warp_frames=0, num_freq_masks=0, num_time_masks=0)


def heard(augment, seed=0):
    """Features and lengths as they reach the model, of two utterances of 100 and 60 frames."""
    calls = []

    def model(x, x_lens, *_):
        calls.append((x, x_lens))
        return torch.zeros(()), torch.zeros((), dtype=torch.int64)

    x_lens = torch.tensor([100, 60])
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    x = torch.arange(100.0)[None, :, None].repeat(2, 1, 80)
    batch = TextBatch(["a", "b"], x, x_lens, nothing, torch.zeros(2, dtype=torch.int64), suffixes=[], answers=[], texts=[])
    config = SftConfig(augment=augment)
    draw = Draw(step=0, own=torch.Generator().manual_seed(seed), shared=torch.Generator().manual_seed(seed))
    sft_loss(torch.zeros(80), config)(model, batch, draw)
    return calls[0]


def test_nothing_is_changed_without_augmentation():
    x, x_lens = heard(OFF)
    assert x_lens.tolist() == [100, 60]
    assert torch.equal(x[0, :, 0], torch.arange(100.0))


def test_each_utterance_is_stretched_to_a_rate_of_its_own():
    x, x_lens = heard(replace(OFF, time_stretch=0.3))
    rates = torch.tensor([100, 60]) / x_lens
    assert (rates.log().abs() <= 0.31).all()
    assert rates[0] != rates[1]
    for row, length, last in zip(x, x_lens.tolist(), (99.0, 59.0), strict=True):
        torch.testing.assert_close(row[:length, 0], torch.linspace(0, last, length), atol=1e-3, rtol=0)


def test_microphones_differ():
    x, _ = heard(replace(OFF, freq_response=1.0))
    added = x - torch.arange(100.0)[None, :, None]
    assert added.std(1).max() < 1e-4
    assert not torch.allclose(added[0], added[1], atol=0.1)
