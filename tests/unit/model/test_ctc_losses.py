"""CTC and CR-CTC losses against sums over alignments and formulas written out, and greedy search."""

import itertools
import math

import pytest
import torch
from tiny import noise_batch, tiny_model

from nim4.model.ctc import BLANK, collapse, consistency_loss, ctc_loss, greedy_search


def random_log_probs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def summed_over_alignments(log_probs, phones):
    """-log of the summed probability of every frame labelling that collapses to `phones`."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = [label for label, _ in itertools.groupby(path)]
        if [label for label in merged if label != 0] == phones:
            total += math.exp(sum(float(log_probs[t, label]) for t, label in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("phones", [[1, 2], [1, 1], [2], []])
def test_ctc_loss_sums_over_all_alignments(phones):
    log_probs = random_log_probs(1, 5, 3)
    padded = torch.tensor([[*phones, 2, 2]])
    loss = ctc_loss(log_probs, torch.tensor([4]), padded, torch.tensor([len(phones)]))
    assert float(loss) == pytest.approx(summed_over_alignments(log_probs[0, :4], phones), abs=1e-5)


def test_ctc_loss_adds_up_over_the_batch_and_ignores_padding():
    log_probs, lens = random_log_probs(2, 6, 4), torch.tensor([6, 4])
    phones, phone_lens = torch.tensor([[1, 2, 3], [3, 9, 9]]) % 4, torch.tensor([3, 1])
    parts = [ctc_loss(log_probs[i : i + 1], lens[i : i + 1], phones[i : i + 1], phone_lens[i : i + 1]) for i in range(2)]
    whole = ctc_loss(log_probs, lens, phones, phone_lens)
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-6)
    log_probs[1, 4:], phones[1, 1:] = -7.0, 2
    assert float(ctc_loss(log_probs, lens, phones, phone_lens)) == pytest.approx(float(whole), rel=1e-6)


def test_ctc_loss_is_infinite_where_nothing_fits():
    assert torch.isinf(ctc_loss(random_log_probs(1, 2, 3), torch.tensor([2]), torch.tensor([[1, 1]]), torch.tensor([2])))


def symmetric_kl(first, second):
    """1/2 [KL(second || first) + KL(first || second)] over all frames, written out."""
    p, q = first.exp(), second.exp()
    return 0.5 * float((q * (second - first)).sum() + (p * (first - second)).sum())


def test_consistency_loss_is_the_symmetric_divergence_of_the_two_views():
    first, second = random_log_probs(3, 5, 4), random_log_probs(3, 5, 4, seed=1)
    lens = torch.tensor([5, 2, 4])
    by_hand = sum(symmetric_kl(first[i, :length], second[i, :length]) for i, length in enumerate(lens.tolist()))
    both = torch.cat([first, second])
    assert float(consistency_loss(both, lens.repeat(2))) == pytest.approx(by_hand, rel=1e-5)
    both[1, 2:], both[4, 2:] = -3.0, -1.0  # padding of the second utterance
    assert float(consistency_loss(both, lens.repeat(2))) == pytest.approx(by_hand, rel=1e-5)


def test_consistency_loss_of_equal_views_is_zero():
    view = random_log_probs(2, 5, 4)
    assert float(consistency_loss(view.repeat(2, 1, 1), torch.tensor([5, 3, 5, 3]))) == pytest.approx(0, abs=1e-6)


def test_consistency_gradient_does_not_flow_through_the_target_side():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lens = torch.tensor([3, 3])
    (gradient,) = torch.autograd.grad(consistency_loss(logits.log_softmax(-1), lens), logits)
    # d/dz1 of 1/2 KL(p2 || p1) with p2 held is 1/2 (p1 - p2); the other term holds p1.
    p = logits.detach().softmax(-1)
    by_hand = 0.5 * torch.stack([p[0] - p[1], p[1] - p[0]])
    by_hand[:, 3:] = 0
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=0)
    p1, p2 = logits.log_softmax(-1)
    through_both = 0.5 * ((p2.exp() * (p2 - p1)) + (p1.exp() * (p1 - p2)))[:3].sum()
    (other,) = torch.autograd.grad(through_both, logits)
    assert (other - gradient).abs().max() > 1e-3  # so the comparison above tells the two apart


@pytest.mark.parametrize(
    ("frames", "last", "phones"),
    [([0, 2, 2, 0, 2, 3, 3, 0], BLANK, [2, 2, 3]), ([2, 2, 3], 2, [3]), ([0, 2], 2, [2]), ([], 2, []), ([0, 0], BLANK, [])],
)
def test_collapse(frames, last, phones):
    assert collapse(frames, last) == phones


def test_greedy_search_ends_with_the_utterance():
    frames = torch.tensor([[1, 1, 0, 1, 2], [3, 0, 3, 3, 2]])
    log_probs = torch.nn.functional.one_hot(frames, 4).float().log_softmax(-1)
    assert greedy_search(log_probs, torch.tensor([5, 4])) == [[1, 1, 2], [3, 3]]


@torch.inference_mode()
def test_the_model_normalises_its_features():
    model, batch = tiny_model(), noise_batch([40])
    before, _ = model(batch.x, batch.x_lens)
    mean, std = torch.linspace(-3, 3, 80), torch.linspace(0.5, 2, 80)
    model.set_normalisation(mean, std)
    raw = (batch.x + 8.0) / 4.0 * std + mean  # tiny_model normalises with -8 and 4
    torch.testing.assert_close(model(raw, batch.x_lens)[0], before, atol=1e-5, rtol=0)
    assert {"mean", "inverse_std"} <= set(model.state_dict())
    torch.testing.assert_close(before.exp().sum(-1), torch.ones(1, 10))
