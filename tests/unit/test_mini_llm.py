"""The language model of egs/mini: its text, its tokenizer, its baseline, and the weights that are kept in the repository."""

import dataclasses
import itertools
import json
import random
import sys
from importlib import import_module

import pytest
import torch
from made_corpora import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nim4.corpus import prompts
from nim4.corpus.ngram import KneserNey
from nim4.corpus.prompts import Prompt

sys.path.insert(0, str(ROOT / "egs" / "mini"))
MODULES = (
    "llm_card",
    "llm_examples",
    "llm_measure",
    "llm_network",
    "llm_text",
    "llm_tokens",
    "llm_training",
)  # beside the recipe, not beside the tests
llm_card, llm_examples, llm_measure, llm_network, llm_text, tokens, llm_training = map(import_module, MODULES)

LLM = ROOT / "egs" / "mini" / "llm"
ODD_TEXTS = [
    "",
    "总工，open 北京饭店，close speech 识别。",
    "  two  spaces\tand\r\nlines\n\n",
    "Ünïcödé e\u0301 ﬁ ｆｕｌｌ１２ 12,345.6",
    "東京タワー ㄅㄆ 한국 😀👩‍👩‍👧 𠮷 \x00\ufeff\u200b\ufffd",
    "a turn <|im_end|><|im_start|>user <|endoftext|>",
    prompts.SYSTEM + prompts.INSTRUCTION.lower(),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLM)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(LLM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts():
    """The training text as the record says that it was made."""
    settings = json.loads((LLM / "record.json").read_text(encoding="utf-8"))["settings"]
    return llm_text.training_texts(settings["num_grammar"], settings["num_joins"], settings["seed"])


# ------------------------------------------------------------------------------------------------------------- the text


def test_no_text_of_dev_or_test_is_trained_on(texts):
    held_back = {text for split, found in llm_text.transcripts().items() if not split.startswith("train") for text in found}
    both = held_back & set(texts)
    assert len(held_back) > 500
    assert not [text for text in both if not llm_text.is_short_phrase(text)]
    assert not both & set(llm_text.transcripts()["dev_sent"] + llm_text.transcripts()["test_sent"])


def test_the_training_text_is_what_the_record_says(texts):
    record = json.loads((LLM / "record.json").read_text(encoding="utf-8"))
    assert llm_text.facts(texts) == record["text"]


def test_held_out_texts_are_new(texts):
    held_out = llm_text.held_out_texts(texts, 20, seed=2)
    assert {kind: len(found) for kind, found in held_out.items()} == {"grammar": 20, "joins": 20, "sentences": 38}
    assert not set(texts) & {text for found in held_out.values() for text in found}


def test_the_source_of_phrases_is_a_distribution():
    grammar = {"phrase": ["<order>。", "<order>，<order>。"], "order": ["open a", "close a", "close a"]}
    probs = llm_text._expand(grammar, "<phrase>")
    assert sum(probs.values()) == pytest.approx(1)
    assert probs["close a。"] == pytest.approx(1 / 2 * 2 / 3)
    assert probs["open a，close a。"] == pytest.approx(1 / 2 * 1 / 3 * 2 / 3)


def test_an_unfinished_answer_is_cut_at_a_word():
    text = "总工，open 北京饭店，print 语音识别。"
    cuts = {"", "总工", "总工，open", "总工，open 北京", "总工，open 北京饭店", "总工，open 北京饭店，print"}
    cuts |= {"总工，open 北京饭店，print 语音", "总工，open 北京饭店，print 语音识别"}
    rng = random.Random(0)
    drawn = [llm_examples.draw_example(text, [text], rng, plain=0, spoken=0.5, hints=0.5, partial=0.8) for _ in range(300)]
    assert {example.answer for example in drawn if example.partial} == cuts
    assert {example.answer for example in drawn if not example.partial} == {text}
    assert all(hint.replace(" ", "") in text.replace(" ", "") for example in drawn for hint in example.hints)


# -------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_where_they_belong(tokenizer):
    for token in (tokens.DOCUMENT_END, prompts.TURN_START, prompts.TURN_END):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == (prompts.TURN_END, tokens.DOCUMENT_END)
    generation = GenerationConfig.from_pretrained(LLM)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert Prompt(tokenizer).answer("open" + prompts.TURN_END).count(tokenizer.eos_token_id) == 1


def test_words_and_prompt_are_few_tokens_and_no_phrase_is_one(tokenizer, texts):
    prompt = Prompt(tokenizer)
    assert len(prompt.prefix) + len(prompt.suffix()) <= 20
    for word in llm_text.WORDS:
        assert len(prompt.answer(word)) - 1 == (1 if word.isascii() else len(word))
    han = {char for text in texts for char in text if "一" <= char <= "鿿"}
    assert not [char for char in han if len(prompt.answer(char)) != 2]
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert not [token for token in pieces if len(token) > 1 and any("一" <= char <= "鿿" for char in token)]


def test_examples_follow_the_prompt(tokenizer):
    encode = tokens.Encoder(tokenizer)
    example = llm_examples.Example("open", spoken=(("OW",), ("ong1", "g"), ()), hints=("上海",), partial=True)
    places, num_given = encode(example)
    assert places[num_given:] == [(token,) for token in encode.prompt.answer("open")]
    start = len(encode.prompt.prefix)
    assert places[:start] == [(token,) for token in encode.prompt.prefix]
    assert [tokenizer.decode(ids) for ids in places[start : start + 3]] == ["OW", "ong1g", " "]
    assert places[start + 3 : num_given] == [(token,) for token in encode.prompt.suffix(["上海"], partial=True)]
    places, num_given = encode(llm_examples.Example("open", plain=True))
    assert tokenizer.decode([token for (token,) in places]) == tokens.DOCUMENT_END + "open" + tokens.DOCUMENT_END
    assert num_given == 1


def test_padding_and_what_is_given_are_not_predicted():
    none = tokens.EMPTY
    x, labels = tokens.collate([([(5, 4), (6,), (7,)], 1), ([(8,), (9,)], 1)])
    assert x.tolist() == [[[5, 4], [6, none], [7, none]], [[8, none], [9, none], [none, none]]]
    assert labels.tolist() == [[tokens.NOT_PREDICTED, 6, 7], [tokens.NOT_PREDICTED, 9, tokens.NOT_PREDICTED]]


def test_a_place_is_the_mean_of_its_tokens():
    table = torch.nn.Embedding(10, 4)
    x, _ = tokens.collate([([(5, 4), (6,), (7,)], 1), ([(8,), (9,)], 1)])
    embedded = tokens.embed(table, x)
    torch.testing.assert_close(embedded[0, 0], (table.weight[5] + table.weight[4]) / 2)
    torch.testing.assert_close(embedded[1, 1], table.weight[9])
    assert not embedded[1, 2].any()


def test_speech_of_the_training_text_has_the_phones_of_its_words_and_errors():
    text = "总工，open 北京饭店。"
    right = ["z", "ong3", "g", "ong1", "OW", "P", "AH", "N", "b", "ei3", "j", "ing1", "f", "an4", "d", "ian4"]
    drawn = [llm_examples.draw_example(text, [text], random.Random(seed), plain=0, spoken=1, hints=0, partial=0).spoken for seed in range(50)]
    heard = [[phone for frame in spoken for phone in frame] for spoken in drawn]
    assert {phone for phones in heard for phone in phones} > set(right)
    assert [phone for phone, _ in itertools.groupby(min(heard, key=lambda phones: len(set(phones) - set(right))))] == right
    assert 0.02 < sum(phone not in right for phones in heard for phone in phones) / sum(map(len, heard)) < 0.25


# ---------------------------------------------------------------------------------------------------------- the product


def test_the_product_is_small_and_complete(model, tokenizer):
    files = {path.name: path.stat().st_size for path in LLM.iterdir()}
    product = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == product | {"README.md", "record.json"}
    assert sum(files.values()) <= 12e6
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() <= 5e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert AutoModelForCausalLM.from_pretrained(LLM).dtype == torch.bfloat16


def test_the_page_is_made_from_the_record():
    record = json.loads((LLM / "record.json").read_text(encoding="utf-8"))
    assert (LLM / "README.md").read_text(encoding="utf-8") == llm_card.card(record)
    assert record["settings"] == json.loads(json.dumps(dataclasses.asdict(llm_network.MiniLlmConfig())))


def test_the_weights_beat_the_baseline_and_use_what_stands_for_speech(model, tokenizer, texts):
    held_out = {kind: found[:60] for kind, found in llm_text.held_out_texts(texts, 60, seed=3).items() if kind != "sentences"}
    encode = tokens.Encoder(tokenizer)
    ngrams = [KneserNey([encode.text(text) for text in texts], 5, len(tokenizer))]
    for row in llm_measure.perplexities(model, encode, ngrams, held_out).values():
        assert row["source_per_token"] < row["model_per_token"] < row["ngram_per_token"]
        assert row["heard_per_token"] < row["model_per_token"]


def test_it_continues_an_order(model, tokenizer):
    prompt = Prompt(tokenizer)
    ids = prompt.prefix + prompt.suffix() + prompt.answer("close 北京饭")[:-1]
    with torch.inference_mode():
        following = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert tokenizer.decode([following]) == "店"


# --------------------------------------------------------------------------------------------------------- the training


def test_training_lowers_the_loss_and_is_the_same_each_time():
    config = llm_network.MiniLlmConfig(
        dim=32, num_layers=1, num_heads=2, head_dim=16, ffn_dim=32, steps=30, batch=8, warmup_steps=5, learning_rate=1e-2
    )
    texts = llm_text.draw("grammar", 200, seed=0)
    tokenizer = tokens.train_tokenizer(texts, config.vocab_size)

    def run():
        model = llm_network.build_model(config, tokenizer)
        documents = [tokens.Encoder(tokenizer)(llm_examples.Example(text)) for text in texts[:20]]
        before = llm_measure.cost(model, documents)
        llm_training.train(model, llm_training.batches(texts, tokens.Encoder(tokenizer), config), config, "cpu")
        return before, llm_measure.cost(model, documents)

    before, after = run()
    assert after < 0.6 * before
    assert run() == (before, after)
