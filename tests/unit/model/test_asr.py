"""The speech LLM: rows are what was meant, labels lie on the answer alone, padding changes nothing, folders are read as written."""

import pytest
import torch
from tiny import INVENTORY, noise_batch, tiny_llm, tiny_speech_llm
from torch.testing import assert_close

from nim4.config import RecipeError
from nim4.model.asr import IGNORED, load_speech_llm, max_answer_tokens
from nim4.model.checkpoint import load_model
from nim4.model.conformer import Context, valid_mask

LENS = [130, 64, 33]
TEXTS = ["你好 ab", "", "北京"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module")
def batch():
    return noise_batch(LENS)


def ids_of(model):
    return [model.prompt.suffix(hints) for hints in ([], ["x"], [])], [model.prompt.answer(text) for text in TEXTS]


@pytest.mark.parametrize("left", [False, True])
def test_rows_hold_prefix_speech_suffix_answer(model, batch, left):
    speech, lens = model.speech(batch.x, batch.x_lens)
    suffixes, answers = ids_of(model)
    embeds, labels, row_lens = model.rows(speech, lens, suffixes, answers, left=left)
    table = model.llm.get_input_embeddings().weight
    for row in range(3):
        expected = torch.cat([table[model.prompt.prefix], speech[row, : lens[row]], table[suffixes[row] + answers[row]]])
        start = embeds.shape[1] - len(expected) if left else 0
        assert row_lens[row] == len(expected)
        assert torch.equal(embeds[row, start : start + len(expected)], expected)
        assert labels[row][labels[row] != IGNORED].tolist() == answers[row]
        end = start + len(expected)
        assert labels[row, end - len(answers[row]) : end].tolist() == answers[row]


def test_the_loss_is_that_of_each_utterance_alone(model, batch):
    suffixes, answers = ids_of(model)
    for context in (Context(), Context(4, 1)):
        total, right = model(batch.x, batch.x_lens, suffixes, answers, context)
        alone = [model(batch.x[i : i + 1, : LENS[i]], batch.x_lens[i : i + 1], suffixes[i : i + 1], answers[i : i + 1], context) for i in range(3)]
        assert_close(total, sum(loss for loss, _ in alone), atol=1e-3, rtol=1e-5)
        assert int(right) == sum(int(count) for _, count in alone)


def test_the_loss_is_the_whole_models_cross_entropy(model, batch):
    """The output layer on the answers alone gives what transformers' own loss over all positions gives."""
    suffixes, answers = ids_of(model)
    embeds, labels, _ = model.rows(*model.speech(batch.x, batch.x_lens), suffixes, answers)
    own, _ = model(batch.x, batch.x_lens, suffixes, answers)
    theirs = model.llm(inputs_embeds=embeds, labels=labels).loss
    assert_close(own / sum(map(len, answers)), theirs, atol=1e-5, rtol=1e-5)


def test_transcripts_alone_are_those_in_a_batch(batch, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path, tie_word_embeddings=False))  # one that does not only repeat its last token
    hints = [["ab"], [], ["c", "d"]]
    together = model.transcribe(batch.x, batch.x_lens, hints=hints)
    assert together == [model.transcribe(batch.x[i : i + 1, : LENS[i]], batch.x_lens[i : i + 1], hints=hints[i : i + 1])[0] for i in range(3)]
    assert any(together)


def test_a_frozen_encoder_has_no_graph_and_no_dropout(model, batch):
    model.acoustic.encoder.requires_grad_(False)
    model.train()
    assert not model.acoustic.encoder.training
    assert model.acoustic.head.training
    speech, _ = model.speech(batch.x, batch.x_lens)
    speech.sum().backward()
    assert model.adaptor.up.weight.grad is not None
    model.zero_grad(set_to_none=True)
    model.acoustic.encoder.requires_grad_(True)
    assert model.speech(batch.x, batch.x_lens)[0].requires_grad
    model.eval()


def test_a_folder_is_read_as_it_was_written(model, batch, tmp_path):
    model.save(tmp_path / "model", model.state_dict(), INVENTORY)
    again, inventory = load_speech_llm(tmp_path / "model", torch.device("cpu"))
    assert inventory.tokens == INVENTORY.tokens
    assert again.transcribe(batch.x, batch.x_lens) == model.transcribe(batch.x, batch.x_lens)
    phonemes, _ = load_model(tmp_path / "model", torch.device("cpu"))
    assert torch.equal(phonemes(batch.x, batch.x_lens)[0], model.acoustic(batch.x, batch.x_lens)[0])


def test_a_folder_is_read_in_another_precision(model, batch, tmp_path):
    model.save(tmp_path / "model", model.state_dict(), INVENTORY)
    cpu = torch.device("cpu")
    half, plain = (load_speech_llm(tmp_path / "model", cpu, precision)[0] for precision in ("bf16", "auto"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert half.acoustic.mean.dtype == torch.float32
    assert torch.equal(half.acoustic.mean, model.acoustic.mean)
    with torch.inference_mode():
        (ours, lens), (theirs, _) = (one.speech(batch.x, batch.x_lens) for one in (half, plain))
    assert ours.dtype == torch.bfloat16
    valid = valid_mask(lens, ours.shape[1])
    assert 0 < (ours.float() - theirs)[valid].norm() < 0.05 * theirs[valid].norm()
    assert len(half.transcribe(batch.x, batch.x_lens)) == len(batch.x)


def test_a_folder_of_stage_3_is_no_speech_llm(trained):
    with pytest.raises(RecipeError, match="stage 4 or later"):
        load_speech_llm(trained, torch.device("cpu"))


def test_answers_may_be_two_tokens_per_embedding():
    assert max_answer_tokens(10) == 28
