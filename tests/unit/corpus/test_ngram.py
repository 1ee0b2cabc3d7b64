"""Kneser-Ney counts, and ARPA files: what they say, and how broken ones are told."""

import itertools
import random

import numpy as np
import pytest

from nim4.config import RecipeError
from nim4.corpus.ngram import KneserNey, NgramStates, count_ngrams, read_arpa

GOOD = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-99\t<s>\t-0.3
-0.5\t</s>
-1\t<unk>
-0.4\ta\t-0.1

\\2-grams:
-0.2\t<s> a
-0.1\ta </s>

\\end\\
"""


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one(order):
    sequences = [[1, 2, 3, 0], [1, 2, 2, 0], [4, 2, 3, 3, 0], [0]]
    ngram = KneserNey(sequences, order, vocab_size=9)
    for context in ([], [1], [1, 2], [4, 2, 3], [8], [2, 2, 2, 2, 2], [7, 1]):
        assert sum(ngram.prob(context, token) for token in range(9)) == pytest.approx(1)
        assert all(ngram.prob(context, token) > 0 for token in range(9))


def test_it_learns():
    ngram = KneserNey([[1, 2, 0]] * 8 + [[3, 2, 0], [4, 5, 0]], 3, vocab_size=9)
    assert ngram.prob([1], 2) > 0.8
    assert ngram.cost([1, 2, 0]) < ngram.cost([2, 1, 0])


def arpa_prob(ngrams, context, word):
    """log10, as Katz back-off reads it."""
    if (*context, word) in ngrams:
        return ngrams[*context, word].prob
    return (ngrams[context].backoff if context in ngrams else 0.0) + arpa_prob(ngrams, context[1:], word)


def states_logp(states, words):
    """Natural logarithm of the probability of a text, by the automaton."""
    state, total = states.start, 0.0
    for word in (*words, "</s>"):
        while True:
            arcs = slice(states.first[state], states.first[state + 1])
            place = np.flatnonzero(states.word[arcs] == states.words.index(word))
            if len(place):
                break
            total, state = total + states.backoff[state], states.backoff_to[state]
        total, state = total + states.logp[arcs][place[0]], states.to[arcs][place[0]]
    return total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_arpa_file_has_the_same_probabilities(order, tmp_path):
    rng = random.Random(order)
    texts = [[rng.choice("aaabbcd") for _ in range(rng.randint(0, 6))] for _ in range(30)] + [["a", "<unk>"]]
    model, names = count_ngrams(texts, order)
    assert names == ["</s>", "<unk>", "a", "b", "c", "d"]
    model.save_arpa(tmp_path / "made.arpa", names)
    ngrams = {ngram.words: ngram for ngram in read_arpa(tmp_path / "made.arpa")}
    assert {len(words) for words in ngrams} == set(range(1, order + 1))
    states = NgramStates.of_arpa(tmp_path / "made.arpa")
    assert states.words == ("a", "b", "c", "d", "</s>")
    for length in range(order + 1):
        for context in itertools.product(range(1, len(names)), repeat=length):
            words = ("<s>", *(names[token] for token in context))[-(order - 1) :] if order > 1 else ()
            for token, name in enumerate(names):
                assert 10 ** arpa_prob(ngrams, words, name) == pytest.approx(model.prob(context, token), rel=1e-4)
            if 1 not in context:
                walked = states_logp(states, [names[token] for token in context])
                assert walked == pytest.approx(-model.cost([*context, 0]), abs=1e-4)


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "good.arpa"
    path.write_text("made by somebody\n" + GOOD, encoding="utf-8")
    ngrams = list(read_arpa(path))
    assert ngrams[0] == (("<s>",), -99.0, -0.3)
    assert ngrams[-1] == (("a", "</s>"), -0.1, 0.0)
    assert NgramStates.of_arpa(path).words == ("a", "</s>")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", "line 15: expected \\data\\, found 'the end of the file'"),
        ("ngram 1=4\nngram 2=2\n", "", "line 3: expected ngram 1=COUNT, COUNT at least 1, found '\\\\1-grams:'"),
        ("ngram 1=4\n", "ngram 3=4\n", "line 2: expected ngram 1=COUNT, found 'ngram 3=4'"),
        ("ngram 2=2", "ngram 2=two", "line 3: expected \\1-grams:, found 'ngram 2=two'"),
        ("ngram 1=4", "ngram 1=5", "line 11: expected 5 1-grams, as the header says, found 4"),
        ("ngram 2=2", "ngram 2=3", "line 15: expected 3 2-grams, as the header says, found 2"),
        ("\\2-grams:", "\\3-grams:", "line 11: expected \\2-grams:, found '\\\\3-grams:'"),
        ("-0.2\t<s> a", "-0.2\t<s>", "line 12: expected log10 probability, 2 words, found '-0.2\\t<s>'"),
        ("-0.2\t<s> a", "x\t<s> a", "line 12: expected numbers before and behind the words, found 'x\\t<s> a'"),
        ("-0.2\t<s> a", "0.2\t<s> a", "line 12: expected a log10 probability of at most 0"),
        ("-0.2\t<s> a", "nan\t<s> a", "line 12: expected a log10 probability of at most 0"),
        ("\n\\end\\\n", "", "line 13: expected \\end\\, found 'the end of the file'"),
        ("ngram 2=2\n", "ngram 2=1\nngram 3=0\n", "line 16: expected 1 2-grams, as the header says, found 2"),
        ("-0.1\ta </s>", "-0.1\tb </s>", ", b </s>: expected its context as an n-gram, too, found none"),
        ("\t</s>\n", "\t<end>\n", "expected <s> and </s> among its words, found no </s>"),
    ],
)
def test_a_broken_file_is_told(old, new, message, tmp_path):
    path = tmp_path / "broken.arpa"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        NgramStates.of_arpa(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize(("content", "found"), [(b"mmap lm http://kheafield.com/code\n\0", "KenLM's binary form"), (b"\xff\xfe", "utf-8")])
def test_a_file_that_is_no_arpa_is_told(content, found, tmp_path):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(RecipeError, match=found):
        NgramStates.of_arpa(tmp_path / "model")
    with pytest.raises(RecipeError, match="No such file"):
        NgramStates.of_arpa(tmp_path / "missing")
