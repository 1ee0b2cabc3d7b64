"""Entities: which phrases of made transcripts count, and how word lists are read."""

import re

import pytest

from nim4.config import EntityConfig, RecipeError
from nim4.corpus.entities import (
    Entity,
    candidates,
    choose_by_rule,
    collect_phrases,
    read_entities,
    read_word_list,
    save_entities,
    with_phones,
)
from nim4.corpus.g2p import Lexicon

ALL = EntityConfig(min_count=1, everyday_share=0.0)


def phrases_of(*texts, listed=()):
    found = collect_phrases(texts, listed)
    return dict(found.listed), dict(found.capitalised), dict(found.others)


def test_chinese_phrases_of_the_dictionary_and_names_outside_it():
    # 我 和 的 are grammar, 一个 too; 周杰伦 is in no dictionary, 房地产 and 汽车 are; 三 ends a run
    assert phrases_of("我和周杰伦的汽车", "房地产一个", "三周杰伦") == ({}, {}, {"周杰伦": 2, "汽车": 1, "房地产": 1})
    assert phrases_of("张", "张伟又以李娜") == ({}, {}, {"张伟": 1, "李娜": 1})  # one character is no phrase


def test_punctuation_ends_a_run_and_a_space_does_not():
    assert phrases_of("周杰，伦娜") == ({}, {}, {"周杰": 1, "伦娜": 1})
    assert phrases_of("周杰 伦") == ({}, {}, {"周杰伦": 1})


def test_latin_words_in_chinese_text():
    assert phrases_of("打开 the Apple Pay 支付", "用 A4L 和 b c") == ({}, {}, {"Apple Pay": 1, "打开": 1, "支付": 1, "A4L": 1})
    four = phrases_of("我说 check your bank account today")[2]
    assert four == {"check": 1, "bank": 1, "account": 1, "today": 1}  # too long for a name: an English clause


def test_capitals_in_english():
    names = phrases_of("The Beatles met Ed Sheeran in New York City today. Yesterday Paul slept. Yesterday was it. I saw Yesterday")[1]
    assert names == {"Beatles": 1, "Ed Sheeran": 1, "New York City": 1, "Yesterday Paul": 1, "Yesterday": 1}
    assert phrases_of("He met Aa Bb Cc Dd there")[1] == {}  # four in a row are no name


def test_english_without_capitals_gives_single_words():
    assert phrases_of("THE BANK OF BOSTON", "g i b s o n", "ask an ox") == ({}, {}, {"BANK": 1, "BOSTON": 1, "ask": 1})


def test_spellings_are_counted_together_under_the_most_frequent():
    assert phrases_of("打开carplay", "打开CarPlay", "打开CarPlay")[2]["CarPlay"] == 3


def test_the_word_list_comes_first_and_the_longest_entry_wins():
    listed, _, others = phrases_of("北京饭店在北京", "北京汽车", listed=["北京", "北京饭店"])
    assert listed == {"北京饭店": 1, "北京": 2}
    assert others == {"汽车": 1}


def test_everyday_phrases_go_and_rare_ones_too():
    texts = ["公司"] * 9 + ["丽江"] * 3 + ["搜狐"] * 2 + ["周杰伦"]
    found = collect_phrases(texts)
    assert choose_by_rule(found, EntityConfig(min_count=2, everyday_share=0.4)) == {"丽江": 3, "搜狐": 2}
    assert choose_by_rule(found, EntityConfig(min_count=2, everyday_share=0.0)) == {"公司": 9, "丽江": 3, "搜狐": 2}
    assert choose_by_rule(found, EntityConfig(min_count=1, everyday_share=1.0)) == {"周杰伦": 1}
    assert candidates(found, EntityConfig(min_count=2)) == {"公司": 9, "丽江": 3, "搜狐": 2}
    assert choose_by_rule(collect_phrases([]), EntityConfig()) == {}


def test_capitalised_and_listed_phrases_are_never_everyday_ones():
    found = collect_phrases(["they saw Boston"] * 9 + ["丽江"] + ["公司"] * 8, listed=["公司"])
    assert choose_by_rule(found, EntityConfig(min_count=1, everyday_share=0.9)) == {"Boston": 9, "公司": 8, "丽江": 1}


def test_entities_with_phones_are_kept_and_read_back(tmp_path):
    chosen = choose_by_rule(collect_phrases(["北京 speaker", "北京"], ["北京", "背景", "한국"]), ALL)
    entities = with_phones(chosen, ["北京", "背景", "한국"], Lexicon())
    assert entities == [
        Entity("北京", 2, ("b", "ei3", "j", "ing1")),
        Entity("speaker", 1, ("S", "P", "IY", "K", "ER")),
        Entity("背景", 0, ("b", "ei4", "j", "ing3")),  # nobody says it; 한국 cannot be read
    ]
    save_entities(entities, tmp_path / "entities.jsonl")
    assert read_entities(tmp_path / "entities.jsonl") == entities


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "", "count": 1, "phones": "a"}', "line 2: expected an object with text, count and phones, found {'text': ''"),
        ('{"text": "北京"}', "line 2: expected an object with text"),
        ('{"text": 3, "count": 1, "phones": "a"}', "line 2: expected an object with text"),
        ("[1]", "line 2: expected an object with text"),
        ('{"tex', "line 2: expected one JSON object per line"),
        (None, "line 1: expected one JSON object per line"),
    ],
)
def test_broken_entities_are_told(tmp_path, line, message):
    path = tmp_path / "entities.jsonl"
    if line is not None:
        save_entities([Entity("北京", 2, ("b",))], path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_entities(path)


def test_word_lists(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeff北京饭店\n\n# a comment\n Apple Pay \n", encoding="utf-8")
    assert read_word_list(path) == ["北京饭店", "Apple Pay"]
    path.write_text("北京\n……\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"names.txt, line 2: expected a word or name"):
        read_word_list(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="at least one word or name"):
        read_word_list(path)
    with pytest.raises(RecipeError, match=r"one word or name per line.*correct --important"):
        read_word_list(tmp_path / "missing.txt", "--important")
