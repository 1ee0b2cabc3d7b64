"""Hints: sound-alikes as a search over all pairs finds them, drawn as often as was asked for, never part of the transcript."""

import itertools
import random
from collections import Counter

import pytest
from tiny import INVENTORY, tiny_tokenizer, write_features

from nim4.config import HintConfig, RecipeError, SftConfig
from nim4.corpus.entities import with_phones
from nim4.corpus.examples import Examples
from nim4.corpus.g2p import Lexicon
from nim4.corpus.hints import MAX_PHONES, Hints, SoundAlikes
from nim4.corpus.manifest import load_cuts
from nim4.corpus.prompts import Prompt

WORDS = ["北京", "背景", "南京", "上海", "商行", "语言", "语音", "speaker", "speech", "Apple Pay", "丽江"]
TEXT = "打开北京语言 speaker"
KEYWORDS = {"北京", "语言", "speaker"}
ALWAYS = {"keywords_prob": 1.0, "distractor_prob": 1.0, "only_distractors_prob": 0.0, "unrelated_prob": 0.0}


def hints(*more, **settings):
    return Hints(with_phones(Counter(), [*WORDS, *more], Lexicon()), HintConfig(**settings))


def drawn(draw, text, count=2000, seed=0):
    return [draw(text, random.Random(f"{seed} {number}")) for number in range(count)]


def other_phones(one, other, limit):
    """How many phones differ, when the two sound alike; written anew, from the definition."""
    count = sum(a != b for a, b in zip(one, other, strict=False))
    return count if len(one) == len(other) <= MAX_PHONES and count <= min(limit, len(one) // 2) else None


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_sound_alikes_are_those_of_a_search_over_all_pairs(limit):
    rng = random.Random(limit)
    keys = [[rng.choice("abcd") for _ in range(rng.choice([0, 1, 2, 3, 4, 4, 6, 6, 8]))] for _ in range(300)]
    keys += [["a"] * MAX_PHONES, ["a"] * (MAX_PHONES - 1) + ["b"]] * 2 + [["a"] * (MAX_PHONES + 1)] * 2
    index = SoundAlikes(keys, limit)
    pairs = 0
    for number, key in enumerate(keys):
        expected = {}
        for other, other_key in enumerate(keys):
            count = other_phones(key, other_key, limit)
            if key and other != number and count is not None:
                expected.setdefault(count, []).append(other)
        found = index.of(number)
        assert found == expected
        assert list(found) == sorted(found)
        pairs += sum(map(len, found.values()))
    assert pairs > 200


def test_sound_alikes_in_mandarin():
    entities = with_phones(Counter(), [*WORDS, "贝京", "背井"], Lexicon())
    texts = [entity.text for entity in entities]
    alike = SoundAlikes([entity.phones for entity in entities], 2).of(texts.index("北京"))
    assert {count: {texts[number] for number in found} for count, found in alike.items()} == {1: {"贝京"}, 2: {"背景", "背井", "南京"}}


def test_no_entities_no_hints():
    assert SoundAlikes([], 2)._files == {}
    draw = Hints([], HintConfig(keywords_prob=0.5, only_distractors_prob=0.0, unrelated_prob=0.5))
    assert {tuple(found) for found in drawn(draw, TEXT, 50)} == {()}


def test_what_is_drawn_follows_from_text_and_chance_alone():
    draw, again = hints(), hints()
    first = drawn(draw, TEXT, 200)
    draw("南京 speech", random.Random(5))
    assert drawn(draw, TEXT, 200) == drawn(again, TEXT, 200) == first
    assert drawn(draw, TEXT, 200, seed=1) != first


def within_bounds(share, probability, count):
    """Five standard deviations: one run in a million fails by chance, and the seeds are fixed."""
    return abs(share - probability) < 5 * (probability * (1 - probability) / count) ** 0.5


def test_kinds_come_as_often_as_was_asked_for():
    count = 4000
    found = drawn(hints(), TEXT, count)
    kinds = Counter()
    for listed in map(set, found):
        if listed & KEYWORDS:
            assert listed >= KEYWORDS
            kinds["keywords"] += 1
        elif {"speech", "Apple Pay", "丽江", "上海", "商行"} & listed:
            kinds["unrelated"] += 1  # an unrelated draw can be a sound-alike only, so this counts some of them
        elif listed:
            kinds["sound-alikes"] += 1
        else:
            kinds["none"] += 1
    assert within_bounds(kinds["keywords"] / count, 0.5, count)
    assert within_bounds(kinds["none"] / count, 0.3 + 0.1 * chance_of_none(), count)
    assert within_bounds((kinds["sound-alikes"] + kinds["unrelated"]) / count, 0.2 - 0.1 * chance_of_none(), count)
    assert kinds["sound-alikes"] > 0.08 * count
    assert kinds["unrelated"] > 0.06 * count


def chance_of_none():
    """An unrelated draw of 1, 2 or 3 of the words is empty when all are part of the text."""
    said, words = len(KEYWORDS), len(WORDS)
    shares = [said / words]
    shares.append(shares[0] * (said - 1) / (words - 1))
    shares.append(shares[1] * (said - 2) / (words - 2))
    return sum(shares) / 3


def test_distractors_come_per_keyword_as_often_as_was_asked_for():
    found = drawn(hints(keywords_prob=1.0, distractor_prob=0.3, only_distractors_prob=0.0, unrelated_prob=0.0), "语言", 3000)
    assert {tuple(sorted(listed)) for listed in found} == {("语言",), ("语言", "语音")}
    assert within_bounds(sum(len(listed) == 2 for listed in found) / 3000, 0.3, 3000)


def test_near_and_far_sound_alikes_come_equally_often():
    found = drawn(hints("贝京", **ALWAYS), "北京", 2000)
    counts = Counter(next(word for word in listed if word != "北京") for listed in found)
    assert set(counts) == {"贝京", "背景", "南京"}  # one phone differs, two, two
    assert within_bounds(counts["贝京"] / 2000, 0.5, 2000)


def test_wrong_hints_only():
    found = drawn(hints(keywords_prob=0.0, only_distractors_prob=1.0, unrelated_prob=0.0), TEXT, 200)
    assert {word for listed in found for word in listed} == {"背景", "南京", "语音"}  # speaker has no sound-alike
    assert {len(listed) for listed in found} == {2}
    assert drawn(hints(keywords_prob=0.0, only_distractors_prob=1.0, unrelated_prob=0.0), "无关", 50) == [[]] * 50


def test_unrelated_hints():
    found = drawn(hints(keywords_prob=0.0, only_distractors_prob=0.0, unrelated_prob=1.0, max_unrelated=4), TEXT, 500)
    assert {word for listed in found for word in listed} == set(WORDS) - KEYWORDS
    assert {len(listed) for listed in found} == {0, 1, 2, 3, 4}


def test_a_distractor_is_never_part_of_the_transcript():
    wrong_only = {"keywords_prob": 0.0, "only_distractors_prob": 1.0, "unrelated_prob": 0.0}
    draw = hints("贝京", **wrong_only)
    expected = {"北京背景": {"南京", "贝京"}, "北京贝 京，南京": {"背景"}, "背景在南京和北京，贝京": set()}  # 贝 京 is as good as 贝京
    for text, words in expected.items():
        assert {word for listed in drawn(draw, text, 200) for word in listed} == words
    inside = hints("pay", "day", **wrong_only)
    assert {tuple(listed) for listed in drawn(inside, "day one", 50)} == {("pay",)}
    assert {tuple(listed) for listed in drawn(inside, "day payment", 50)} == {()}  # not even inside a word


def test_an_unrelated_hint_is_never_part_of_the_transcript():
    draw = hints("pay", keywords_prob=0.0, only_distractors_prob=0.0, unrelated_prob=1.0)
    assert "pay" not in {word for listed in drawn(draw, "we applepay", 500) for word in listed}


def test_order_is_random_and_nothing_comes_twice():
    found = drawn(hints(**ALWAYS | {"distractor_prob": 0.0}), TEXT, 600)
    assert Counter(map(tuple, found)).keys() == set(itertools.permutations(sorted(KEYWORDS)))
    assert drawn(hints(**ALWAYS | {"distractor_prob": 0.0}), "北京北京", 20) == [["北京"]] * 20


def test_there_are_never_more_hints_than_allowed():
    text = "北京背景南京上海商行语言语音 speaker speech，Apple Pay"
    found = drawn(hints(**ALWAYS, max_hints=4), text, 300)
    assert {len(listed) for listed in found} == {4}
    assert {word for listed in found for word in listed} == set(WORDS) - {"丽江"}  # which ones are kept is left to chance
    assert max(map(len, drawn(hints(**ALWAYS), text, 300))) == 10


def test_answers_are_the_same_with_and_without_hints(tmp_path):
    prompt, config = Prompt(tiny_tokenizer()), SftConfig()
    cuts = list(load_cuts(write_features(tmp_path, "train", [60] * 20)))
    for cut in cuts:
        cut.supervisions[0].text = TEXT
    plain, hinted = Examples(INVENTORY, prompt, config)(cuts, 0), Examples(INVENTORY, prompt, config, hints=hints(**ALWAYS))(cuts, 0)
    assert hinted.answers == plain.answers == [prompt.answer(TEXT)] * 20
    assert hinted.texts == plain.texts
    assert all(len(with_hints) > len(without) for with_hints, without in zip(hinted.suffixes, plain.suffixes, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"keywords_prob": 0.9}, {"unrelated_prob": -0.1}, {"distractor_prob": 1.5}, {"max_hints": 0}, {"max_unrelated": 0}, {"max_phone_changes": -1}],
    ids=str,
)
def test_impossible_settings(wrong):
    with pytest.raises(RecipeError, match="hints: expected"):
        hints(**wrong)
