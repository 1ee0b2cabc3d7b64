"""Linear probes: what is known before, what input adds to it, and that nothing is gained by learning by heart."""

import math

import pytest
import torch
import torch.nn.functional as F

from nim4.config import EntropyConfig
from nim4.train.probe import FIT, STOP, TEST, ask, draw_parts, information

CONFIG = EntropyConfig(steps=300, batch_rows=128, learning_rate=3e-2)
NUM_ROWS, NUM_LABELS = 600, 5


def made_question(num_conditions=1, seed=0):
    """Rows of 60 utterances; labels that their condition narrows down to one of two where there is more than one condition."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_LABELS, (NUM_ROWS,), generator=generator)
    conditions = labels // 2 if num_conditions > 1 else torch.zeros_like(labels)
    return labels, ask(labels, conditions, draw_parts(60, seed).repeat_interleave(10), seed)


def noise(columns, seed=1):
    return torch.randn(NUM_ROWS, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_utterances", "expected"), [(4, (1, 1, 2)), (11, (5, 1, 5)), (100, (40, 10, 50))])
def test_parts_are_halves_and_a_fifth_for_the_step(num_utterances, expected):
    parts = draw_parts(num_utterances, seed=3)
    assert tuple(torch.bincount(parts, minlength=3).tolist()) == expected
    assert (FIT, STOP, TEST) == (0, 1, 2)
    assert parts.equal(draw_parts(num_utterances, seed=3))


def test_parts_differ_by_seed_and_need_utterances():
    assert not draw_parts(100, seed=0).equal(draw_parts(100, seed=1))
    with pytest.raises(ValueError, match="at least 4"):
        draw_parts(3, seed=0)


def test_known_are_the_frequencies_in_the_fitted_part():
    labels = torch.tensor([7, 7, 7, 9, 7, 9, 7, 8])  # the 8 is in no fitted row
    parts = torch.tensor([FIT] * 4 + [STOP, STOP, TEST, TEST])
    question = ask(labels, torch.zeros(8, dtype=torch.int64), parts, seed=0)
    assert question.kept.tolist() == [True] * 7 + [False]
    assert question.labels.tolist() == [0, 0, 0, 1, 0, 1, 0]
    torch.testing.assert_close(question.known.exp(), torch.tensor([[0.75, 0.25]]).expand(7, -1))
    assert question.entropy == pytest.approx(-math.log(0.75), rel=1e-5)
    assert question.unseen_share == pytest.approx(1 / 8)


def test_known_are_the_frequencies_under_the_condition():
    labels, conditions = torch.tensor([0, 0, 1, 2, 2, 0, 2, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 2])
    parts = torch.tensor([FIT] * 5 + [STOP] * 2 + [TEST] * 3)
    question = ask(labels, conditions, parts, seed=0)
    assert question.kept.tolist() == [True] * 9 + [False], "the condition 2 is in no fitted row"
    torch.testing.assert_close(question.known[0].exp(), torch.tensor([2 / 3, 1 / 3, 0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(question.known[3].exp(), torch.tensor([0.0, 0, 1]), atol=1e-3, rtol=0)


def test_labels_must_recur():
    with pytest.raises(ValueError, match="one part"):
        ask(torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64), torch.tensor([FIT, STOP, TEST]), seed=0)


def test_input_that_names_the_label_gives_all_of_its_entropy():
    labels, question = made_question()
    told = information(question, 10 * F.one_hot(labels).float()[question.kept], CONFIG)
    assert told == pytest.approx(question.entropy, rel=0.02)
    assert question.entropy == pytest.approx(math.log(NUM_LABELS), rel=0.05)


@pytest.mark.parametrize("columns", [2, 200])
def test_noise_gives_nothing_however_wide_it_is(columns):
    """As many columns as fitted rows: a probe without held-out utterances would learn them by heart."""
    for seed in range(3):
        _, question = made_question(seed=seed)
        assert abs(information(question, noise(columns)[question.kept], CONFIG)) < 0.03


def test_only_what_the_condition_does_not_tell_counts():
    labels, question = made_question(num_conditions=3)
    by_condition = 10 * F.one_hot(labels // 2).float()[question.kept]
    assert abs(information(question, by_condition, CONFIG)) < 0.02
    named = information(question, 10 * F.one_hot(labels).float()[question.kept], CONFIG)
    assert named == pytest.approx(question.entropy, rel=0.05)
    assert 0.4 < question.entropy < 0.7, "log 2 for four of the five labels"


def test_information_can_be_repeated():
    _, question = made_question()
    x = noise(5) + F.one_hot(question.labels, 5)
    assert information(question, x, CONFIG) == information(question, x, CONFIG) > 0.1
