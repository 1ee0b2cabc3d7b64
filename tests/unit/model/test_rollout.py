"""Answers sampled from one prefill: what padding, neighbours, forks and the cache must not change."""

import pytest
import tiny
import torch

from nim4.model.asr import max_answer_tokens
from nim4.model.llm import Llm, generate
from nim4.model.rollout import _inverse, log_probs, prefill, sample

LENS = [64, 33, 90]  # feature frames
GROUP = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = tiny.tiny_speech_llm(tiny.tiny_llm(tmp_path_factory.mktemp("llm"), scale=1))
    model.llm.model.norm.weight.data *= 6  # sure of itself, as a trained model is
    return model


@pytest.fixture(scope="module")
def speech(model):
    batch = tiny.noise_batch(LENS)
    with torch.no_grad():
        return model.speech(batch.x, batch.x_lens)


SUFFIX_TEXTS = [(), ("hint",), ()]


def read(model, speech, rows=slice(None)):
    """The prefill of some utterances, and the limits of their answers."""
    suffixes = [model.prompt.suffix(hints) for hints in SUFFIX_TEXTS][rows]
    embeds, _, lens = model.rows(speech[0][rows], speech[1][rows], suffixes)
    return prefill(model.llm, embeds, lens), [max_answer_tokens(n) for n in speech[1][rows].tolist()]


def uniforms(num_rows, width=80, seed=0):
    return torch.rand(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def end(model, speech):
    """An id that some answers end with early: the third of the first row."""
    prompts, limits = read(model, speech)
    limits = [limit for limit in limits for _ in range(GROUP)]
    return int(sample(model.llm, prompts.fork(GROUP), uniforms(9), 1.0, limits, end=-1).ids[0, 2])


def sampled(model, speech, end, temperature=1.0, rows=slice(None), u=None):
    prompts, limits = read(model, speech, rows)
    limits = [limit for limit in limits for _ in range(GROUP)]
    forked = prompts.fork(GROUP)
    return forked, sample(model.llm, forked, uniforms(9) if u is None else u, temperature, limits, end)


def test_answers_end_at_the_end_or_at_the_limit(model, speech, end):
    _, answers = sampled(model, speech, end)
    limits = [max_answer_tokens(n) for n in speech[1].tolist() for _ in range(GROUP)]
    assert answers.lens[0] <= 3
    assert len(set(answers.lens.tolist())) > 2
    for ids, length, limit in zip(answers.ids.tolist(), answers.lens.tolist(), limits, strict=True):
        assert end not in ids[: length - 1]
        assert ids[length - 1] == end or length == limit
        assert not any(ids[length:])
    beyond = torch.arange(answers.ids.shape[1]) >= answers.lens[:, None]
    assert not answers.log_probs[beyond].any()
    assert not answers.entropy[beyond].any()


def test_forked_answers_equal_those_of_each_row_alone(model, speech, end):
    _, answers = sampled(model, speech, end)
    for row in range(len(LENS)):
        prompts, limits = read(model, speech, slice(row, row + 1))
        for number in range(GROUP):
            one = row * GROUP + number
            alone = sample(model.llm, prompts, uniforms(9)[one : one + 1], 1.0, limits, end)
            length = int(answers.lens[one])
            assert alone.lens.tolist() == [length]
            assert alone.ids[0].tolist() == answers.ids[one, :length].tolist()
            torch.testing.assert_close(alone.log_probs[0], answers.log_probs[one, :length], atol=1e-4, rtol=1e-4)


def test_the_forks_of_a_prompt_differ_and_other_random_numbers_are_other_answers(model, speech, end):
    _, answers = sampled(model, speech, end)
    assert len({tuple(row) for row in answers.ids.tolist()}) == 9
    _, other = sampled(model, speech, end, u=uniforms(9, seed=1))
    assert other.ids.shape != answers.ids.shape or not torch.equal(other.ids, answers.ids)
    _, same = sampled(model, speech, end)
    assert torch.equal(same.ids, answers.ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_teacher_forcing_gives_the_log_probabilities_of_sampling(model, speech, end, temperature):
    forked, answers = sampled(model, speech, end, temperature)
    again = log_probs(model.llm, forked, answers, temperature)
    torch.testing.assert_close(again, answers.log_probs, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, log_probs(model.llm, forked, answers, temperature))  # scoring leaves the prefill as it was


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_cache_gives_what_whole_rows_give(model, speech, end, temperature):
    _, answers = sampled(model, speech, end, temperature)
    rows = [ids[:length] for ids, length in zip(answers.ids.tolist(), answers.lens.tolist(), strict=True)]
    repeated = [tensor.repeat_interleave(GROUP, 0) for tensor in speech]
    suffixes = [model.prompt.suffix(hints) for hints in SUFFIX_TEXTS for _ in range(GROUP)]
    with torch.no_grad():
        logits, ids = model.answer_logits(*model.rows(*repeated, suffixes, rows)[:2])
    distribution = torch.log_softmax(logits / temperature, -1)
    written = torch.arange(answers.ids.shape[1]) < answers.lens[:, None]
    torch.testing.assert_close(answers.log_probs[written], distribution.gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answers.entropy[written], -(distribution.exp() * distribution).sum(1), atol=1e-4, rtol=1e-4)


def test_temperature_near_zero_is_greedy(model, speech, end):
    _, answers = sampled(model, speech, end, temperature=1e-4)
    suffixes = [model.prompt.suffix(hints) for hints in SUFFIX_TEXTS]
    embeds, _, lens = model.rows(*speech, suffixes, left=True)
    limits = [max_answer_tokens(n) for n in speech[1].tolist()]
    greedy = generate(Llm(model.llm, model.tokenizer, ""), embeds, embeds.shape[1] - lens, limits, end=end)
    for row, ids in enumerate(greedy):
        for number in range(GROUP):
            one = row * GROUP + number
            got = answers.ids[one, : int(answers.lens[one])].tolist()
            assert (got[:-1] if got[-1] == end else got) == ids


def test_gradients_reach_the_prompt_through_the_fork(model, speech, end):
    _, answers = sampled(model, speech, end)
    embeds, _, lens = model.rows(*speech, [model.prompt.suffix(hints) for hints in SUFFIX_TEXTS])
    embeds = embeds.detach().requires_grad_()
    log_probs(model.llm, prefill(model.llm, embeds, lens).fork(GROUP), answers, 1.0)[:GROUP].sum().backward()
    assert embeds.grad[0, : int(lens[0])].abs().sum(-1).min() > 0
    assert not embeds.grad[0, int(lens[0]) :].any()
    assert not embeds.grad[1:].any()


def test_inverse_of_the_cumulative_sum():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert _inverse(probs.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4]
    u = uniforms(1, 20_000)[0]
    shares = torch.bincount(_inverse(probs.expand(len(u), 6), u), minlength=6) / len(u)
    torch.testing.assert_close(shares, probs, atol=0.01, rtol=0)
