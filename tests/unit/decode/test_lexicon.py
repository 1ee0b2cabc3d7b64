"""The lexicon search against all word sequences and all alignments."""

import itertools
import math

import numpy as np
import pytest

from nim4.config import RecipeError
from nim4.decode.lexicon import LexiconSearch, join_words

LEXICONS = {
    "single phones": {"x": [[1]], "y": [[2]]},
    "shared joint": {"ab": [[1, 2]], "bc": [[2, 3]], "b": [[2]]},
    "repeats inside": {"aa": [[1, 1]], "aba": [[1, 2, 1]], "a": [[1]]},
    "two readings": {"hang": [[1, 2], [3, 2]], "b": [[2]], "ccc": [[3, 3, 3]]},
    "sound-alikes": {"one": [[1, 2]], "other": [[1, 2]], "c": [[3]]},
}


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def best_alignment(log_probs, phones):
    """The best frame labelling that collapses to `phones`: the chain phone by phone, blanks between, by brute recursion over frames."""
    chain = [0]
    for phone in phones:
        chain += [phone, 0]
    scores = {0: 0.0}  # position in the chain -> score, before the first frame at the first blank
    for t, frame in enumerate(log_probs):
        moved = {}
        for place, score in scores.items():
            for step in (0, 1, 2):
                to = place + step
                if to >= len(chain) or (step == 2 and (chain[to] == 0 or chain[to] == chain[place])):
                    continue
                if t == 0 and step == 2:
                    continue
                moved[to] = max(moved.get(to, -math.inf), score + frame[chain[to]])
        scores = moved
    return max(scores.get(len(chain) - 1, -math.inf), scores.get(len(chain) - 2, -math.inf) if len(chain) > 1 else -math.inf)


def score_of(log_probs, words, lexicon):
    """The best score of a word sequence, over readings."""
    readings = itertools.product(*(lexicon[word] for word in words))
    best = max(best_alignment(log_probs, list(itertools.chain(*phones))) for phones in readings)
    return best - len(words) * math.log(len(lexicon))


def sequences(lexicon, most):
    return [words for count in range(most + 1) for words in itertools.product(lexicon, repeat=count)]


def test_the_reference_equals_all_labellings():
    log_probs = log_softmax(np.random.default_rng(0).standard_normal((4, 3)))
    for phones in ([], [1], [1, 2], [1, 1], [2, 1, 2]):
        best = -math.inf
        for path in itertools.product(range(3), repeat=4):
            if [label for label, _ in itertools.groupby(path) if label] == phones:
                best = max(best, sum(log_probs[t, label] for t, label in enumerate(path)))
        assert best_alignment(log_probs, phones) == pytest.approx(best)


@pytest.mark.parametrize("name", LEXICONS)
def test_the_search_finds_the_best_of_all_sequences(name):
    lexicon = LEXICONS[name]
    search, found = LexiconSearch(lexicon), set()
    shortest = min(len(reading) for readings in lexicon.values() for reading in readings)
    for seed in range(15):
        rng = np.random.default_rng(seed)
        num_frames = int(rng.integers(1, 3 * shortest + 3))
        log_probs = log_softmax(3 * rng.standard_normal((num_frames, 4)) + np.array([0.0, 2.0, 2.0, 2.0]))
        words = tuple(search.search(log_probs))
        scores = {words: score_of(log_probs, words, lexicon) for words in sequences(lexicon, num_frames // shortest)}  # more do not fit
        assert scores[words] == pytest.approx(max(scores.values()), abs=1e-9), (seed, words)
        found.add(words)
    assert len(found) >= 3  # or the posteriors were too tame to tell anything


def frames(*labels, num_symbols=4, sure=8.0):
    return log_softmax(sure * np.eye(num_symbols)[list(labels)])


@pytest.mark.parametrize(
    ("lexicon", "labels", "words"),
    [
        ("shared joint", (1, 2, 0, 2, 3), ["ab", "bc"]),
        ("shared joint", (1, 2, 2, 0, 2, 0, 2, 3, 3), ["ab", "b", "bc"]),
        ("repeats inside", (1, 0, 1), ["aa"]),
        ("repeats inside", (1, 1, 1), ["a"]),
        ("repeats inside", (1, 2, 1, 0, 1), ["aba", "a"]),
        ("two readings", (3, 2, 0, 2), ["hang", "b"]),
        ("single phones", (1, 2, 1), ["x", "y", "x"]),  # words meet without a blank
        ("single phones", (0, 0, 0, 0), []),
    ],
)
def test_forced_cases(lexicon, labels, words):
    assert LexiconSearch(LEXICONS[lexicon]).search(frames(*labels)) == words


def test_no_frames_no_words():
    assert LexiconSearch({"a": [[1]]}).search(np.zeros((0, 4))) == []


@pytest.mark.parametrize(("lexicon", "found"), [({}, "no words"), ({"good": [[1]], "bad": [[]]}, r"\['bad'\]"), ({"none": []}, "no words")])
def test_a_lexicon_without_phonemes_is_refused(lexicon, found):
    with pytest.raises(RecipeError, match=f"--lexicon: expected words with a pronunciation, found {found}"):
        LexiconSearch(lexicon)


@pytest.mark.parametrize(
    ("words", "text"),
    [(["打开", "空调"], "打开空调"), (["打开", "play", "北京"], "打开 play 北京"), (["play", "music"], "play music"), ([], ""), (["one"], "one")],
)
def test_join_words(words, text):
    assert join_words(words) == text
