"""Forced alignment against a search of every path."""

import itertools

import numpy as np
import pytest

from nim4.model.ctc import BLANK, forced_align


def random_log_probs(num_frames, vocab_size, seed):
    logits = np.random.default_rng(seed).normal(size=(num_frames, vocab_size))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def best_by_search(log_probs, phones):
    """First and last frame of each phone on the best of all frame labellings that collapse to `phones`."""
    best, best_score = None, -np.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        runs, frame = [], 0
        for label, group in itertools.groupby(path):
            length = len(list(group))
            if label != BLANK:
                runs.append((label, frame, frame + length - 1))
            frame += length
        if [label for label, _, _ in runs] != list(phones):
            continue
        score = sum(float(log_probs[frame, label]) for frame, label in enumerate(path))
        if score > best_score:
            best, best_score = [[first, last] for _, first, last in runs], score
    return best


@pytest.mark.parametrize("phones", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2], [2, 2, 2]])
@pytest.mark.parametrize("num_frames", [5, 6])
def test_it_is_the_best_of_all_paths(phones, num_frames):
    for seed in range(5):
        log_probs = random_log_probs(num_frames, 3, seed)
        assert forced_align(log_probs, phones).tolist() == best_by_search(log_probs, phones), seed


def test_exactly_enough_frames():
    assert forced_align(random_log_probs(3, 4, 0), [1, 2, 3]).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert forced_align(random_log_probs(3, 4, 0), [2, 2]).tolist() == [[0, 0], [2, 2]]


def test_phones_are_found_where_they_are_sure():
    labels = [0, 0, 3, 3, 0, 1, 2, 2, 0, 2, 0]
    log_probs = np.log(np.full((len(labels), 4), 0.01) + 0.96 * np.eye(4)[labels]).astype(np.float32)
    spans = forced_align(log_probs, (3, 1, 2, 2))
    assert spans.tolist() == [[2, 3], [5, 5], [6, 7], [9, 9]]
    assert spans.dtype == np.int64


def test_more_phones_than_a_byte_can_count():
    labels = np.resize([1, 0, 2, 2, 0], 1000)
    log_probs = np.log(np.full((len(labels), 3), 0.01) + 0.97 * np.eye(3)[labels]).astype(np.float32)
    expected = [span for start in range(0, 1000, 5) for span in ([start, start], [start + 2, start + 3])]
    assert forced_align(log_probs, [1, 2] * 200).tolist() == expected


def test_of_equally_probable_paths_it_is_always_the_same():
    flat = np.full((9, 3), -np.log(3), dtype=np.float32)
    spans = forced_align(flat, [1, 2, 1])
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] > spans[:-1, 1]).all()
    assert forced_align(flat, [1, 2, 1]).tolist() == spans.tolist()


@pytest.mark.parametrize("num_frames", [0, 4])
def test_nothing_said_has_no_spans(num_frames):
    assert forced_align(random_log_probs(num_frames, 3, 0), []).shape == (0, 2)


@pytest.mark.parametrize(
    ("num_frames", "phones", "message"),
    [(2, [1, 2, 1], "at least 3"), (2, [1, 1], "at least 3"), (0, [1], "at least 1"), (5, [1, 3], "0 to 2"), (5, [0, 1], "blank"), (5, [-1], "ids")],
)
def test_what_does_not_fit_is_refused(num_frames, phones, message):
    with pytest.raises(ValueError, match=message):
        forced_align(random_log_probs(num_frames, 3, 0), phones)


def test_an_impossible_phone_is_refused():
    log_probs = random_log_probs(5, 3, 0)
    log_probs[:, 2] = -np.inf
    with pytest.raises(ValueError, match="no alignment"):
        forced_align(log_probs, [1, 2])
