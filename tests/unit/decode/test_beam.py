"""The beam search against all word sequences, all readings and all alignments."""

import itertools

import numpy as np
import pytest

from nim4.config import DecodeConfig, RecipeError
from nim4.corpus.ngram import NgramStates, count_ngrams
from nim4.corpus.units import PhonemeInventory
from nim4.decode.beam import BeamSearch, ngram_files, readings_of
from nim4.model.ctc import collapse

INVENTORY = PhonemeInventory(["<blk>", "<unk>", "a", "b", "c"])
WORDS = {"x": [[2]], "xy": [[2, 3]], "twice": [[4, 4]], "two": [[3], [3, 4]], "alike": [[2, 3]]}
TEXTS = [["x", "two"], ["x", "two", "twice"], ["xy"], ["alike", "x"], ["twice", "xy"], ["two"], ["x", "x"], []]


def log_softmax(x):
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


def draws(num_frames, num_symbols=5, seeds=12):
    for seed in range(seeds):
        yield log_softmax(2.5 * np.random.default_rng(seed).standard_normal((num_frames, num_symbols)) - [0, 9, 0, 0, 0][:num_symbols])


@pytest.fixture(scope="module")
def model():
    return count_ngrams(TEXTS, 3)


@pytest.fixture(scope="module")
def arpa(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ngram") / "words.arpa"
    model[0].save_arpa(path, model[1])
    return path


def states_of(texts, order, folder):
    model, names = count_ngrams(texts, order)
    model.save_arpa(folder / "made.arpa", names)
    return NgramStates.of_arpa(folder / "made.arpa")


def lm_score(model, names, words):
    return -model.cost([*(names.index(word) for word in words), names.index("</s>")])


def all_paths(log_probs):
    """Phonemes -> log-probabilities of the alignments that spell them."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        found.setdefault(tuple(collapse(path)), []).append(sum(log_probs[t, label] for t, label in enumerate(path)))
    return found


def best_of_all(log_probs, sequences, score, sum_paths):
    paths = all_paths(log_probs)
    worth = {}
    for words, phones in sequences:
        if phones in paths:
            acoustic = np.logaddexp.reduce(paths[phones]) if sum_paths else max(paths[phones])
            worth[words, phones] = acoustic + score(words)
    return max(worth.items(), key=lambda item: item[1])


def word_sequences(lexicon, most):
    for count in range(most + 1):
        for words in itertools.product(lexicon, repeat=count):
            for readings in itertools.product(*(lexicon[word] for word in words)):
                yield words, tuple(itertools.chain(*readings))


@pytest.mark.parametrize("sum_paths", [True, False])
def test_words_are_the_best_of_all(model, arpa, sum_paths):
    weights = {"lm_weight": 0.7, "word_bonus": 0.4}
    search, found = BeamSearch(NgramStates.of_arpa(arpa), WORDS, num_beams=500, sum_paths=sum_paths, **weights), set()
    for log_probs in draws(num_frames=4):
        phones, words, score = search.scored(log_probs)
        sequences = word_sequences(WORDS, 4)
        best, worth = best_of_all(log_probs, sequences, lambda words: 0.7 * lm_score(*model, words) + 0.4 * len(words), sum_paths)
        assert (tuple(words), tuple(phones)) == best
        assert score == pytest.approx(worth, abs=1e-3)
        found.add(tuple(words))
    assert len(found) >= 4  # or the draws were too tame to tell anything


def test_phonemes_are_the_best_of_all(tmp_path):
    model, names = count_ngrams([["a", "b"], ["a", "c", "b"], ["b", "b"], ["c"], ["a"]], 2)
    model.save_arpa(tmp_path / "phones.arpa", names)
    search = BeamSearch.of_config(DecodeConfig("ctc_beam", num_beams=500, ngram="phones"), INVENTORY, tmp_path / "phones.arpa")
    for log_probs in draws(num_frames=4):
        sequences = [(phones, phones) for count in range(5) for phones in itertools.product([2, 3, 4], repeat=count)]
        best, worth = best_of_all(log_probs, sequences, lambda phones: lm_score(model, names, INVENTORY.decode(phones)), sum_paths=True)
        phones, words, score = search.scored(log_probs)
        assert (tuple(phones), tuple(INVENTORY.encode(words))) == (best[1], best[1])
        assert score == pytest.approx(worth, abs=1e-3)


def test_twenty_sound_alikes_are_told_apart_by_what_is_before_them(tmp_path):
    alikes = [f"w{number}" for number in range(20)]
    lexicon = {word: [[2, 3]] for word in alikes} | {f"before{number}": [[4] * (number + 1)] for number in range(20)}
    ngram = states_of([[f"before{number}", word] for number, word in enumerate(alikes)] * 3, 2, tmp_path)
    search = BeamSearch(ngram, lexicon, num_beams=100)
    for number, word in enumerate(alikes):
        labels = [4, 0] * (number + 1) + [2, 2, 0, 3, 3]
        phones, words = search.search(log_softmax(9.0 * np.eye(5)[labels]))
        assert words == [f"before{number}", word]
        assert phones == [4] * (number + 1) + [2, 3]


@pytest.mark.parametrize("num_beams", [4, 30])
def test_a_narrow_beam_finds_what_is_clear(arpa, num_beams):
    labels = [2, 2, 0, 3, 4, 4, 0, 0, 4, 0, 4]  # x, two, twice
    search = BeamSearch(NgramStates.of_arpa(arpa), WORDS, num_beams=num_beams)
    assert search.search(log_softmax(12.0 * np.eye(5)[labels])) == ([2, 3, 4, 4, 4], ["x", "two", "twice"])


def test_no_frames_or_too_few_no_words(arpa):
    search = BeamSearch(NgramStates.of_arpa(arpa), {"twice": WORDS["twice"]}, num_beams=5)
    assert search.search(np.zeros((0, 5), np.float32)) == ([], [])
    assert search.search(log_softmax(9.0 * np.eye(5)[[4, 4]])) == ([], [])  # a blank is missing


def test_readings(tmp_path, caplog):
    inventory = PhonemeInventory.default()
    (tmp_path / "lexicon.tsv").write_text("live\tL AY V\nlive\tL IH V\n", encoding="utf-8")
    found = readings_of(["live", "行", "银行", "cat", "😀"], inventory, tmp_path / "lexicon.tsv")
    assert {word: [" ".join(inventory.decode(ids)) for ids in variants] for word, variants in found.items()} == {
        "live": ["L AY V", "L IH V"],
        "行": ["x ing2", "h ang2", "x ing4", "h eng2"][: len(found["行"])],
        "银行": ["0 in2 h ang2"],
        "cat": ["K AE T"],
    }
    assert len(found["行"]) >= 2
    assert "1 of 5 words of the n-gram cannot be read and are never found: 😀" in caplog.text
    with pytest.raises(RecipeError, match="expected words that can be read, found none among 1"):
        readings_of(["😀"], inventory)


def test_an_ngram_of_other_phonemes_is_told(arpa):
    with pytest.raises(RecipeError, match=r"expected phonemes of the model's tokens.txt, found 5 others of 5, first 'alike'"):
        BeamSearch.of_config(DecodeConfig("ctc_beam", ngram="phones"), INVENTORY, arpa)


def test_files_of_configs(arpa, tmp_path):
    greedy, words, phones = DecodeConfig(), DecodeConfig("ctc_beam", ngram="words"), DecodeConfig("ctc_beam", ngram="phones")
    assert ngram_files({"greedy": greedy}, None, tmp_path) == {"greedy": []}
    found = ngram_files({"greedy": greedy, "words": words, "phones": phones}, arpa, tmp_path)
    assert found == {"greedy": [], "words": [arpa, tmp_path / "lexicon.tsv"], "phones": [arpa]}
    with pytest.raises(RecipeError, match=r"words\.arpa: expected an n-gram of words, found no such file\. Fix: run stage 2 with it"):
        ngram_files({"words": words}, None, tmp_path)
    with pytest.raises(RecipeError, match="--arpa: expected a decode config with an n-gram, found greedy"):
        ngram_files({"greedy": greedy}, arpa, tmp_path)


def test_words_without_phonemes_are_refused(arpa):
    for lexicon, found in (({}, "no words"), ({"good": [[2]], "bad": [[]]}, r"\['bad'\]"), ({"none": []}, r"\['none'\]")):
        with pytest.raises(RecipeError, match=f"expected words with a pronunciation, found {found}"):
            BeamSearch(NgramStates.of_arpa(arpa), lexicon, num_beams=5)
