"""The door to transformers: loading, its errors, low-rank updates, and generation that does not depend on neighbours."""

import json

import pytest
import torch
from tiny import tiny_llm
from torch.testing import assert_close

from nim4.config import LlmConfig, RecipeError
from nim4.model.llm import Llm, add_lora, cut_at, generate, link_llm, load_llm, n_best, save_llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def llm(folder):
    llm = load_llm(LlmConfig(name=str(folder)))
    llm.model.eval()
    return llm


def logits(model, seed=0):
    torch.manual_seed(seed)
    return model(inputs_embeds=torch.randn(1, 5, 32)).logits


def test_saved_as_it_was_loaded(llm, tmp_path):
    save_llm(llm, llm.model.state_dict(), tmp_path / "again")
    again = load_llm(LlmConfig(name=str(tmp_path / "again")))
    assert torch.equal(logits(again.model.eval()), logits(llm.model))
    assert again.tokenizer.get_vocab() == llm.tokenizer.get_vocab()


def test_low_rank_updates_alone_train_and_are_merged_when_saved(llm, tmp_path):
    config = LlmConfig(name=llm.name, lora_rank=4, lora_dropout=0.0)
    before = logits(llm.model)
    updated = add_lora(llm, config)
    trained = {name for name, parameter in updated.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in updated.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    after = logits(updated.model.eval())
    assert (after - before).abs().max() > 1e-2
    save_llm(updated, updated.model.state_dict(), tmp_path / "merged")
    merged = load_llm(LlmConfig(name=str(tmp_path / "merged"))).model.eval()
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert_close(logits(merged), after, atol=1e-4, rtol=1e-4)


def test_linked_files_are_the_same(folder, tmp_path):
    link_llm(folder, tmp_path / "linked")
    assert sorted(path.name for path in (tmp_path / "linked").iterdir()) == sorted(path.name for path in folder.iterdir())
    assert (tmp_path / "linked" / "model.safetensors").samefile(folder / "model.safetensors")


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(RecipeError, match="language model's folder in Hugging Face layout, found no such folder"):
        load_llm(LlmConfig(name=str(tmp_path / "nowhere")))


def test_broken_weights_are_told(folder, tmp_path):
    link_llm(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RecipeError, match="a language model that transformers can load"):
        load_llm(LlmConfig(name=str(tmp_path)))


def test_a_tokenizer_without_turns_is_told(folder, tmp_path):
    link_llm(folder, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    with pytest.raises(RecipeError, match="as one token"):
        load_llm(LlmConfig(name=str(tmp_path)))


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    with pytest.raises(RecipeError, match="a tokenizer with at most 200 ids"):
        load_llm(LlmConfig(name=str(tiny_llm(tmp_path, vocab_size=200))))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_alone_is_generation_in_a_batch(llm, num_beams):
    torch.manual_seed(3)
    rows = [torch.randn(length, 32) for length in (9, 4, 6)]
    longest, limits = 9, [7, 12, 5]
    padded = torch.stack([torch.cat([torch.full((longest - len(row), 32), 5.0), row]) for row in rows])
    pads = torch.tensor([longest - len(row) for row in rows])
    together = generate(llm, padded, pads, limits, end=257, num_beams=num_beams)
    alone = [
        generate(llm, row[None], torch.zeros(1, dtype=torch.int64), [limit], end=257, num_beams=num_beams)[0]
        for row, limit in zip(rows, limits, strict=True)
    ]
    assert together == alone
    assert [len(row) for row in together] != [0, 0, 0]
    assert all(len(row) <= limit for row, limit in zip(together, limits, strict=True))


def test_the_best_of_a_beam_come_with_their_log_probabilities(llm):
    torch.manual_seed(3)
    rows = torch.randn(2, 6, 32)
    found = n_best(llm, rows, torch.zeros(2, dtype=torch.int64), [5, 5], end=257, num=3)
    for row, candidates in zip(rows, found, strict=True):
        assert len({tuple(ids) for ids, _ in candidates}) == 3
        assert [score for _, score in candidates] == sorted((score for _, score in candidates), reverse=True)
        for ids, score in candidates:
            written = ids if len(ids) == 5 else [*ids, 257]
            whole = torch.cat([row, llm.model.get_input_embeddings()(torch.tensor(written))])
            log_probs = llm.model(inputs_embeds=whole[None]).logits[0, len(row) - 1 : -1].log_softmax(-1)
            assert score == pytest.approx(log_probs[torch.arange(len(written)), torch.tensor(written)].sum().item(), abs=1e-4)


def test_ids_end_before_the_end():
    assert cut_at([3, 4, 9, 5, 9], 9) == [3, 4]
    assert cut_at([3, 4], 9) == [3, 4]


def test_a_llm_knows_its_width(llm):
    assert Llm(llm.model, llm.tokenizer, "").dim == 32
