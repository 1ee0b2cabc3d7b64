"""Keywords: which of them stand in a text, and the prompts and rewards that follow."""

import random
from collections import Counter

import pytest
import tiny

from nim4.config import KeywordConfig
from nim4.corpus.keywords import Keywords, RewardExamples, contains
from nim4.corpus.manifest import load_cuts
from nim4.corpus.prompts import Prompt
from nim4.corpus.text import split_tokens

NAMES = ["北京", "北京饭店", "Carplay", "car", "New York", "南京"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("去北京饭店", ["北京饭店"]),  # the longest that begins there
        ("去北京的北京饭店", ["北京", "北京饭店"]),
        ("打开 CARPLAY。", ["Carplay"]),
        ("new york, York new", ["New York"]),
        ("北京北京", ["北京"]),
        ("scar", []),
        ("", []),
    ],
)
def test_keywords_of_a_text(text, found):
    assert Keywords(NAMES).within(text) == found


def test_within_finds_what_a_naive_search_finds():
    rng = random.Random(0)
    for _ in range(300):
        names = ["".join(rng.choice("abc") + " " for _ in range(rng.randint(1, 3))) for _ in range(4)]
        text = "".join(rng.choice("abc") + " " for _ in range(8))
        found = Keywords(names).within(text)
        assert all(contains(split_tokens(text), split_tokens(name)) for name in found)
        assert bool(found) == any(contains(split_tokens(text), split_tokens(name)) for name in names)


def test_keywords_without_units_or_alike_are_dropped():
    assert Keywords(["。", "Apple Pay", "apple pay!", ""]).texts == ["Apple Pay"]


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    from transformers import AutoTokenizer

    return Prompt(AutoTokenizer.from_pretrained(tiny.tiny_llm(tmp_path_factory.mktemp("llm"))))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    cuts = list(load_cuts(tiny.write_features(tmp_path_factory.mktemp("features"), "train", [40, 50, 60])))
    for cut, text in zip(cuts, ["去北京饭店看南京 new york", "打开", "carplay"], strict=True):
        cut.supervisions[0].text = text
    return cuts


def test_what_a_batch_holds(prompt, cuts):
    make = RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(distractor_prob=0.0), 0, Keywords(NAMES), Keywords(["打开", "南京"]))
    counts = Counter()
    for epoch in range(300):
        batch = make(cuts, epoch)
        assert batch.num_targets == 3
        assert batch.texts == [cut.supervisions[0].text for cut in cuts]
        assert batch.suffixes == [prompt.suffix(hints) for hints in batch.hints]
        assert set(batch.hints[0]) <= {"北京饭店", "南京", "New York"}
        assert set(batch.keywords[0]) == {*batch.hints[0], "南京"}  # an important one counts, in the prompt or not
        assert (batch.hints[1], batch.keywords[1]) == ([], ["打开"])
        counts[len(batch.hints[0])] += 1
        counts[tuple(batch.hints[2])] += 1
    assert set(counts) == {0, 1, 2, (), ("Carplay",)}  # at most two of three
    assert 50 < counts[0] < 100 < counts[1] < 200  # a quarter, a half, a quarter
    assert 110 < counts[("Carplay",)] < 190


def test_chance_follows_from_epoch_and_id_alone(prompt, cuts):
    make = RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(), 0, Keywords(NAMES))
    batches = [make(cuts, epoch).hints for epoch in range(20)]
    assert [make(cuts[::-1], epoch).hints[::-1] for epoch in range(20)] == batches
    assert [RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(), 1, Keywords(NAMES))(cuts, epoch).hints for epoch in range(20)] != batches


def test_distractors_are_not_in_the_text(prompt, cuts):
    make = RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(hint_prob=0.0, distractor_prob=1.0), 0, Keywords(NAMES))
    seen = {tuple(make(cuts[:1], epoch).hints[0]) for epoch in range(100)}
    assert seen == {(), ("Carplay",), ("car",)}


def test_validation_and_a_stage_without_entities_have_no_hints(prompt, cuts):
    make = RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(hint_prob=1.0, distractor_prob=1.0), 0, Keywords(NAMES))
    assert make(cuts, -1).hints == [[], [], []]
    make = RewardExamples(tiny.INVENTORY, prompt, KeywordConfig(distractor_prob=1.0), 0)
    assert make(cuts, 0).hints == make(cuts, 0).keywords == [[], [], []]
