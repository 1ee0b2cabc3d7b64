"""Utterances as the language model is taught them: cut at chunk boundaries, decided by seed, epoch and id."""

import pytest
from tiny import INVENTORY, tiny_tokenizer, write_features

from nim4.config import SftConfig
from nim4.corpus.examples import Examples
from nim4.corpus.manifest import load_cuts
from nim4.corpus.prompts import Prompt

PROMPT = Prompt(tiny_tokenizer())
TEXT = "ab，cd。ef"
ENDS = [(2, 9), (5, 14), (8, 25)]  # of the words ab, cd and ef


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    cuts = list(load_cuts(write_features(tmp_path_factory.mktemp("features"), "train", [150] * 20)))
    for cut in cuts:
        cut.supervisions[0].text = TEXT
    return cuts


def made(cuts, epoch=0, hints=None, **settings):
    config = SftConfig(**({"partial_prob": 1.0} | settings))
    return Examples(INVENTORY, PROMPT, config, {cut.id: ENDS for cut in cuts}, hints)(cuts, epoch)


def test_speech_is_cut_between_chunks_and_so_is_the_text(cuts):
    batch = made(cuts)
    expected = {64: "ab，cd", 128: "ab，cd。ef", 150: TEXT}
    assert {int(length) for length in batch.x_lens} == {64, 128}
    for length, text, answer, suffix in zip(batch.x_lens.tolist(), batch.texts, batch.answers, batch.suffixes, strict=True):
        assert text == expected[length]
        assert answer == PROMPT.answer(text)
        assert suffix == PROMPT.suffix(partial=True)


def test_a_word_that_ends_with_the_cut_is_not_yet_said(cuts):
    ends = {cut.id: [(2, 9), (5, 15)] for cut in cuts}
    batch = Examples(INVENTORY, PROMPT, SftConfig(partial_prob=1.0), ends)(cuts, 0)
    assert {text for length, text in zip(batch.x_lens.tolist(), batch.texts, strict=True) if length == 64} == {"ab"}


def test_what_is_drawn_follows_from_seed_epoch_and_id(cuts):
    alone = [made([cut]) for cut in cuts]
    assert made(cuts).x_lens.tolist() == [int(batch.x_lens[0]) for batch in alone]
    assert made(cuts, epoch=1).x_lens.tolist() != made(cuts).x_lens.tolist()
    assert made(cuts, seed=1).x_lens.tolist() != made(cuts).x_lens.tolist()


def test_as_many_are_cut_as_was_asked_for(cuts):
    shares = [sum(length < 150 for batch in [made(cuts, epoch, partial_prob=0.3)] for length in batch.x_lens.tolist()) / 20 for epoch in range(30)]
    assert 0.24 < sum(shares) / len(shares) < 0.36


def hints_of_text(text, rng):
    return [text[rng.randrange(3) :]]


@pytest.mark.parametrize("hints", [None, hints_of_text])
def test_those_that_will_be_cut_are_known_before(cuts, hints):
    examples = Examples(INVENTORY, PROMPT, SftConfig(partial_prob=0.3), {cut.id: ENDS for cut in cuts}, hints)
    for epoch in range(5):
        batch = examples(cuts, epoch)
        cut_short = {name for name, length in zip(batch.ids, batch.x_lens.tolist(), strict=True) if length < 150}
        assert examples.cut_ids((epoch, cut) for cut in cuts) == cut_short
        assert 0 < len(cut_short) < 20


def test_of_a_copy_the_original_has_to_be_known(cuts):
    examples = Examples(INVENTORY, PROMPT, SftConfig(partial_prob=1.0), {})
    assert examples.cut_ids([(0, cuts[0].with_id("say-again-1-again3"))]) == {"say-again-1", "say-again-1-again3"}


def test_validation_is_whole_and_without_hints(cuts):
    batch = made(cuts, epoch=-1, hints=lambda text, rng: ["ab"])
    assert set(batch.x_lens.tolist()) == {150}
    assert batch.texts == [TEXT] * 20
    assert batch.suffixes == [PROMPT.suffix()] * 20


def test_hints_stand_in_the_prompt_and_never_in_the_answer(cuts):
    batch = made(cuts, partial_prob=0.0, hints=lambda text, rng: ["gh", text[:2]])
    assert batch.suffixes == [PROMPT.suffix(["gh", "ab"])] * 20
    assert batch.answers == [PROMPT.answer(TEXT)] * 20


def test_an_utterance_without_known_word_ends_stays_whole(cuts):
    batch = Examples(INVENTORY, PROMPT, SftConfig(partial_prob=1.0), {})(cuts, 0)
    assert set(batch.x_lens.tolist()) == {150}
    assert batch.suffixes == [PROMPT.suffix()] * 20
