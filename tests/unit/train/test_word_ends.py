"""Where words end in text and time, and utterances cut by it."""

import numpy as np
import pytest
import torch
from tiny import INVENTORY, tiny_llm, tiny_model, write_features

from nim4.config import LlmConfig, RecipeError, SftConfig
from nim4.corpus.examples import Examples
from nim4.corpus.g2p import Lexicon
from nim4.corpus.manifest import load_cuts
from nim4.corpus.prompts import Prompt
from nim4.corpus.units import PhonemeInventory
from nim4.corpus.word_places import place_words
from nim4.model.ctc import forced_align
from nim4.model.llm import load_llm
from nim4.stage import read_jsonl
from nim4.train import word_ends as module
from nim4.train.distributed import Processes
from nim4.train.word_ends import find_word_ends, word_ends

ALONE = Processes(0, 1, torch.device("cpu"))


def parts(text, language="zh-en"):
    """`text` cut behind each word that was placed, with the number of phonemes of each; None where it cannot be placed."""
    placed = place_words(text, Lexicon(language).words(text))
    if placed is None:
        return None
    starts = [(0, 0), *placed]
    return [(text[a:b], n - m) for (a, m), (b, n) in zip(starts, placed, strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("总工，open 背景语音。", [("总", 2), ("工", 2), ("，open", 4), (" 背", 2), ("景", 2), ("语", 2), ("音", 2)]),  # phrases by character
        ("“你好,” HELLO World!", [("“你", 2), ("好", 2), (",” HELLO", 4), (" World", 4)]),
        ("Ｏｐｅｎ it", [("Ｏｐｅｎ", 4), (" it", 2)]),  # full width
        ("I don’t go", [("I", 1), (" don’t", 4), (" go", 2)]),
        ("open open open", [("open", 4), (" open", 4), (" open", 4)]),
        ("用 A4L 吧", [("用", 2), (" A4L", 5), (" 吧", 2)]),  # letters and digits that touch are one word
        ("花儿", [("花", 2), ("儿", 2)]),
        ("", []),
    ],
)
def test_words_are_found_in_their_text(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "我有3个苹果",  # a number is read as words that are not written
        "三3",
        "3三",  # 三 is there, but it is the second one
        "chapter 12 begins",
        "1 one",
        "R&D and more",  # "and" is there, but not for &
        "一百 50%",
    ],
)
def test_what_is_not_written_as_it_is_read_is_not_placed(text):
    assert parts(text) is None


def test_what_is_written_and_not_read_is_not_placed():
    assert place_words("open the door", [("open", ("OW",)), ("door", ("D",))]) is None
    assert place_words("open the", [("open", ("OW",))]) is None


# --------------------------------------------------------------------------------------------------------------- alignment


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """Random features with the texts below, phonemes as stage 2 writes them; the inventory is the real one."""
    texts = ["打开 window", "北京", "我有3个", "上海 open", "你好", "open the window"]
    cuts = list(load_cuts(write_features(tmp_path_factory.mktemp("features"), "train", [140, 100, 120, 200, 12, 160])))
    for cut, text in zip(cuts, texts, strict=True):
        cut.supervisions[0].text = text
        cut.supervisions[0].custom["phones"] = " ".join(Lexicon().phones(text))
    cuts[1].supervisions[0].custom["phones"] += " a1"  # as another lexicon would read it
    return cuts


@pytest.fixture(scope="module")
def inventory():
    return PhonemeInventory.default()


def test_word_ends_are_those_of_the_forced_alignment(cuts, inventory):
    model = tiny_model(vocab_size=len(inventory))
    rows = {row["id"]: row for row in find_word_ends(cuts, Lexicon(), model, inventory, torch.device("cpu"))}
    assert {name: row["reason"] for name, row in rows.items() if "reason" in row} == {
        "u001": "its phonemes are not those of its text",
        "u002": "a word that is not written as it is read",
        "u004": "too short for its phonemes",
    }
    for number in (0, 3, 5):  # alone as in a batch
        x = torch.from_numpy(cuts[number].load_features())[None]
        with torch.inference_mode():
            log_probs, _ = model(x, torch.tensor([x.shape[1]]))
        spans = forced_align(log_probs[0].numpy(), inventory.encode(cuts[number].supervisions[0].custom["phones"]))
        placed = place_words(cuts[number].supervisions[0].text, Lexicon().words(cuts[number].supervisions[0].text))
        assert rows[cuts[number].id]["ends"] == [[end, int(spans[num_phones - 1, 1])] for end, num_phones in placed]


def test_word_ends_are_kept(cuts, inventory, tmp_path, caplog, monkeypatch):
    model = tiny_model(vocab_size=len(inventory))
    twice, wanted = [*cuts, cuts[3]], {"u000", "u001", "u002", "u003", "u004", "elsewhere"}
    with caplog.at_level("INFO"):
        ends = word_ends(twice, wanted, "zh-en", model, inventory, tmp_path, ALONE)
    assert sorted(ends) == ["u000"]
    assert "1 of the 5 utterances drawn for it can be cut short; 1 never: " in caplog.text
    assert {row["id"]: row.get("reason") for row in read_jsonl(tmp_path / "word_ends.jsonl")}["u003"] == "an id that two utterances have"
    more = word_ends(twice, wanted | {"u005"}, "zh-en", model, inventory, tmp_path, ALONE)
    assert sorted(more) == ["u000", "u005"]
    assert more["u000"] == ends["u000"]
    monkeypatch.setattr(module, "find_word_ends", None)
    assert word_ends(twice, wanted, "zh-en", model, inventory, tmp_path, ALONE) == more


# ---------------------------------------------------------------------------------------------------------- cut utterances


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    return Prompt(load_llm(LlmConfig(str(tiny_llm(tmp_path_factory.mktemp("llm"))))).tokenizer)


def test_the_target_of_a_cut_utterance_ends_before_the_cut(tmp_path, prompt):
    """At random ends, and many draws: no word is asked for whose last phoneme is not over a frame before the cut, and none is left out."""
    lens = [100, 129, 130, 65, 64, 300]
    cuts = list(load_cuts(write_features(tmp_path, "train", lens)))
    rng = np.random.default_rng(0)
    ends = {}
    for cut, length in zip(cuts, lens, strict=True):
        cut.supervisions[0].text = "abcdefgh"
        ends[cut.id] = [(i + 1, int(frame)) for i, frame in enumerate(np.sort(rng.integers(0, length // 4, 8)))]
    examples = Examples(INVENTORY, prompt, SftConfig(partial_prob=0.7), ends)
    partial, whole = prompt.suffix(partial=True), prompt.suffix()
    seen = set()
    for epoch in range(40):
        batch = examples(cuts, epoch)
        assert batch.x.shape[1] == batch.x_lens.max()
        for row, (cut, length) in enumerate(zip(cuts, lens, strict=True)):
            kept, text = int(batch.x_lens[row]), batch.texts[row]
            assert batch.answers[row] == prompt.answer(text)
            assert not batch.x[row, kept:].any()  # nothing of what comes after the cut
            if batch.suffixes[row] == whole:
                assert (kept, text) == (length, "abcdefgh")
                continue
            assert batch.suffixes[row] == partial
            assert kept % 64 == 0
            assert 0 < kept < length
            boundary = kept // 4
            spoken = [end for end, frame in ends[cut.id] if frame + 1 <= boundary - 1]
            assert text == "abcdefgh"[: max(spoken, default=0)]
            seen.add((row, kept))
    assert {row for row, _ in seen} == {0, 1, 2, 3, 5}  # 64 frames have no boundary inside
    assert {kept for row, kept in seen if row == 5} == {64, 128, 192, 256}


def test_copies_of_an_utterance_are_cut_too(tmp_path, prompt):
    (cut,) = load_cuts(write_features(tmp_path, "train", [100]))
    cut.supervisions[0].text = "ab"
    for name, known in (("u000-again2", "u000"), ("say-again-1-again3", "say-again-1"), ("x-again2", "x-again2")):
        examples = Examples(INVENTORY, prompt, SftConfig(partial_prob=1.0), {known: [(1, 3), (2, 20)]})
        assert examples([cut.with_id(name)], 0).texts == ["a"], name
    assert examples([cut.with_id("other")], 0).texts == ["ab"]
    assert examples([cut.with_id("x-again2")], -1).texts == ["ab"]  # validation


def test_cutting_needs_word_ends(prompt):
    with pytest.raises(RecipeError, match=r"train\.partial_prob: expected 0 in this stage, found 0.5"):
        Examples(INVENTORY, prompt, SftConfig(partial_prob=0.5))
