"""The adaptor: lengths, its tail, and that a stream gives what the whole gives."""

import torch

from nim4.config import AdaptorConfig
from nim4.model.adaptor import SpeechAdaptor


def made(stack=4):
    torch.manual_seed(0)
    return SpeechAdaptor(AdaptorConfig(stack=stack, hidden_dim=16), encoder_dim=6, llm_dim=10)


def test_lengths_are_rounded_up():
    x = torch.randn(5, 9, 6)
    y, lens = made()(x, torch.tensor([9, 8, 5, 1, 0]))
    assert y.shape == (5, 3, 10)
    assert lens.tolist() == [3, 2, 2, 1, 0]


def test_the_tail_counts():
    adaptor, x = made(), torch.randn(1, 6, 6)
    y, lens = adaptor(x, torch.tensor([6]))
    changed = x.clone()
    changed[0, 5] += 1
    assert lens.tolist() == [2]
    assert (adaptor(changed, torch.tensor([6]))[0][0, 1] - y[0, 1]).abs().max() > 1e-3


def test_what_lies_beyond_the_length_does_not_count():
    adaptor, x = made(), torch.randn(2, 12, 6)
    changed = x.clone()
    changed[:, 6:] = 7.0
    lens = torch.tensor([6, 5])
    assert torch.equal(adaptor(x, lens)[0][:, :2], adaptor(changed, lens)[0][:, :2])


def test_chunk_by_chunk_is_the_whole():
    adaptor, x = made(), torch.randn(1, 20, 6)
    whole = adaptor(x, torch.tensor([20]))[0]
    pieces = [adaptor(x[:, start : start + 8], torch.tensor([min(8, 20 - start)]))[0] for start in (0, 8, 16)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-6)
