"""Streams of the speech LLM: the final text is plain greedy decoding, however the samples come; what is settled stays; work is bounded."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_talkative, tiny_llm, tiny_speech_llm, tiny_tokenizer
from transformers import AutoTokenizer

from nim4.corpus.feats import Fbank
from nim4.decode import streaming
from nim4.decode.encoder import spoken
from nim4.decode.streaming import Recogniser, new_rows, num_kept_tokens
from nim4.decode.together import alone
from nim4.model.conformer import Context
from nim4.model.llm import Llm, generate
from nim4.model.rows import Read, write
from nim4.stage import ROOT

CONTEXT = Context(16, 4)
BYTES = tiny_tokenizer()
MINI = AutoTokenizer.from_pretrained(ROOT / "egs" / "mini" / "llm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False)))


@pytest.fixture(scope="module")
def recogniser(model):
    return Recogniser(model, CONTEXT)


def noise(num_samples, seed=0):
    """Noise whose loudness and pitch change, so that phonemes do."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    loudness = 0.05 * (1 + np.sin(9 * time))
    return (loudness * (rng.standard_normal(num_samples) + np.sin(2000 * time * (1 + np.sin(3 * time))))).clip(-1, 1).astype(np.float32)


def plain(model, samples, hints=(), context=CONTEXT):
    """Greedy decoding of the whole recording under the same chunks."""
    features = torch.from_numpy(Fbank().extract(samples))[None]
    with torch.inference_mode():
        return model.write(*model.speech(features, torch.tensor([features.shape[1]]), context), hints=[hints])[0]


def stream(session, pieces):
    """Partials after each piece, and the final hypothesis."""
    partials = []
    for piece in pieces:
        session.append(piece)
        partials.append(session.partial())
    return partials, session.finalize()


@pytest.mark.parametrize("context", [CONTEXT, Context(4, 2), Context(10, 4)])  # 10 frames do not fill embeddings of 4
@pytest.mark.parametrize("num_samples", [150, 5_000, 10_840, 33_333, 52_000])
def test_the_final_text_is_plain_greedy_decoding_however_samples_come(model, context, num_samples):
    samples, recogniser = noise(num_samples), Recogniser(model, context)
    expected = plain(model, samples, context=context)
    assert expected
    assert num_samples < 30_000 or expected != plain(model, samples[::-1].copy(), context=context)
    rng = np.random.default_rng(1)
    splits = {
        "at once": [samples],
        "20 ms": np.split(samples, range(320, num_samples, 320)),
        "anywhere": np.split(samples, np.sort(rng.integers(0, num_samples + 1, 7))),
    }
    finals = [stream(recogniser.session(), pieces)[1] for pieces in splits.values()]
    without_partials = recogniser.session()
    without_partials.append(samples)
    finals.append(without_partials.finalize())
    assert {final.text for final in finals} == {expected}
    assert len({final.phones for final in finals}) == 1
    assert all(final.is_final and final.settled_chars == len(final.text) for final in finals)


def test_hints_by_hand_are_in_the_prompt(model, recogniser):
    samples = noise(30_000)
    _, final = stream(recogniser.session(["ab", "cd", "ab"]), [samples])
    assert final.hints == ("ab", "cd")
    assert final.text == plain(model, samples, ["ab", "cd"]) != plain(model, samples)


class Scripted:
    """A hotword index that finds a name in the second chunk, and takes it back in the fourth for a longer one."""

    def stream(self):
        self.hits, self.chunks = [], 0
        return self

    def push_labels(self, labels):
        self.chunks += 1
        found = {2: "ab", 4: "abc"}.get(self.chunks)
        if found:
            self.hits = [SimpleNamespace(start=0, end=4, span=(0, 4), cost=0.0, names=[SimpleNamespace(text=found)])]


def test_hints_follow_what_is_heard_chunk_by_chunk(model):
    samples = noise(16_000 * 3)
    session = Recogniser(model, CONTEXT, hotwords=Scripted(), limits=None).session(["x"])
    partials, final = stream(session, spoken(samples, session))
    assert [hypothesis.hints for hypothesis in partials] == [("x",), ("x", "ab"), ("x", "ab"), ("x", "abc"), ("x", "abc")]
    assert final.hints == ("x", "abc")
    assert final.text == plain(model, samples, ["x", "abc"])


def test_every_speech_token_is_read_once(model, recogniser):
    samples = noise(16_000 * 4)
    with torch.inference_mode():
        features = torch.from_numpy(Fbank().extract(samples))[None]
        speech = model.speech(features, torch.tensor([features.shape[1]]), CONTEXT)[0][0]
    rows = []
    handle = model.llm.model.register_forward_pre_hook(lambda _, args, inputs: rows.append(inputs["inputs_embeds"][0]), with_kwargs=True)
    session = recogniser.session()
    _, final = stream(session, spoken(samples, session))
    handle.remove()
    distances = torch.cdist(speech, torch.cat(rows), compute_mode="donot_use_mm_for_euclid_dist")
    assert ((distances < 1e-2).sum(1) == 1).all()
    assert final.counts.speech_tokens == len(speech) == 25
    assert final.counts.read_tokens == sum(map(len, rows))
    assert final.counts.passes == len(rows)


def test_partials_are_bounded_and_what_is_settled_stays(model, recogniser, monkeypatch):
    limits = []

    def watched(rows, row, ids, draft, limit, end, speech):
        limits.append(limit)
        return write(rows, row, ids, draft, limit, end, speech)

    monkeypatch.setattr(streaming, "write", watched)
    samples = noise(16_000 * 8)
    session = recogniser.session()
    partials, final = stream(session, spoken(samples, session))
    assert max(limits[:-1]) == 16
    assert partials[0].settled_chars == 0 < partials[-1].settled_chars
    for before, after in itertools.pairwise(partials):
        assert after.text.startswith(before.text[: before.settled_chars])
        assert after.settled_chars >= before.settled_chars
    assert [hypothesis.revision for hypothesis in [*partials, final]] == sorted(hypothesis.revision for hypothesis in [*partials, final])
    assert final.counts.refreshed == final.revision - 1 == len(limits) - 1


def test_a_partial_is_skipped_while_no_phoneme_is_new(model, recogniser):
    session = recogniser.session()
    first = noise(30_000)
    session.append(first[:5_000])
    empty = session.partial()
    assert (empty.text, empty.revision, empty.counts.passes, empty.counts.skipped) == ("", 0, 0, 1)
    session.append(first[5_000:])
    written = session.partial()
    again = session.partial()
    assert written.phones
    assert (written.revision, again.revision, again.counts.skipped) == (1, 1, 2)
    assert again.counts.passes == written.counts.passes
    assert (again.text, again.settled_chars) == (written.text, written.settled_chars)
    assert session.finalize().text == plain(model, first)


def test_sessions_do_not_mix(recogniser):
    recordings = [noise(40_000, seed=1), noise(26_000, seed=2)[::-1].copy()]
    alone = [stream(recogniser.session(), np.split(samples, range(4_000, len(samples), 4_000))) for samples in recordings]
    assert alone[0][1].text != alone[1][1].text
    sessions, partials = [recogniser.session(), recogniser.session()], ([], [])
    for start in range(0, 40_000, 4_000):
        for session, samples, seen in zip(sessions, recordings, partials, strict=True):
            if start < len(samples):
                session.append(samples[start : start + 4_000])
                seen.append(session.partial())
    aborted = recogniser.session()
    aborted.append(recordings[0])
    aborted.abort()
    together = [(seen, session.finalize()) for seen, session in zip(partials, sessions, strict=True)]
    assert together == alone


@pytest.mark.parametrize("end", ["finalize", "abort"])
def test_a_session_that_has_ended_is_told(recogniser, end):
    session = recogniser.session()
    session.append(noise(20_000))
    getattr(session, end)()
    for call in (session.partial, session.finalize, lambda: session.append(noise(10)), lambda: session.missing_samples):
        with pytest.raises(RuntimeError, match="has ended"):
            call()
    session.abort()


@pytest.mark.parametrize(
    "samples",
    [np.array([0.1, np.nan], np.float32), np.full(9, 300.0, np.float32), np.zeros((2, 5), np.float32), np.zeros(5, np.int16)],
)
def test_samples_that_are_none_are_refused_and_the_session_goes_on(model, recogniser, samples):
    session, good = recogniser.session(), noise(20_000)
    session.append(good[:7_000])
    with pytest.raises(ValueError, match="samples must"):
        session.append(samples)
    session.append(good[7_000:])
    final = session.finalize()
    assert (final.text, final.audio_s) == (plain(model, good), 1.25)


@pytest.mark.parametrize("pieces", [[], [np.zeros(0, np.float32)], [noise(50)]])
def test_a_stream_without_a_frame_is_empty(recogniser, pieces):
    _, final = stream(recogniser.session(), pieces)
    assert (final.text, final.phones, final.counts.passes) == ("", (), 0)


def test_any_draft_gives_the_greedy_answer(model):
    torch.manual_seed(3)
    speech, suffix, end = torch.randn(7, 32), model.prompt.suffix(), model.prompt.end
    rows, row = new_rows(model), None

    def written(draft):
        nonlocal row
        row = rows.new()
        rows.read([Read(rows, row, (), speech=speech)])
        return alone(write(rows, row, suffix, draft, 20, end))

    greedy = written([])
    with torch.inference_mode():
        embeds, _, _ = model.rows(speech[None], torch.tensor([7]), [suffix])
        assert [greedy.ids] == generate(Llm(model.llm, model.tokenizer, ""), embeds, torch.tensor([0]), [20], end=end)
    assert len(greedy.ids) > 6
    wrong = [*greedy.ids[:3], (greedy.ids[3] + 1) % 256, *greedy.ids[4:]]
    for draft, accepted in (
        (greedy.ids, len(greedy.ids)),
        (greedy.ids[:6], 6),
        (wrong, 3),
        ([end, *greedy.ids], 0),
        ([*greedy.ids, *greedy.ids], None),
    ):
        found = written(draft)
        assert found.ids == greedy.ids
        assert accepted in (None, found.accepted)
        assert found.passes == max(greedy.passes - found.accepted, 1)
        assert row.length == len(model.prompt.prefix) + 7 + len(suffix) + found.accepted + found.passes - 1


@settings(deadline=None)
@given(st.text())
@pytest.mark.parametrize("tokenizer", [BYTES, MINI], ids=["bytes", "mini"])
def test_rolling_back_never_cuts_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    kept = num_kept_tokens(tokenizer, ids)
    start = tokenizer.decode(ids[:kept], skip_special_tokens=True)
    assert text.startswith(start)
    assert kept <= max(len(ids) - 5, 0)
    if "\ufffd" not in text:
        assert kept >= len(ids) - 5 - 3  # at most three more bytes of a character


@settings(deadline=None)
@given(st.lists(st.integers(0, 255)), st.integers(0, 10))
def test_rolling_back_keeps_whole_characters_of_any_bytes(ids, at_least):
    kept = num_kept_tokens(BYTES, ids, at_least)
    assert at_least <= kept <= max(len(ids) - 5, at_least)
    if kept > at_least:
        start = BYTES.decode(ids[:kept])
        assert BYTES.decode(ids).startswith(start)
        assert not start.endswith("\ufffd")


def test_the_log_tells_when_a_listener_sees_what(recogniser):
    ticks = itertools.count()
    session = recogniser.session(clock=lambda: float(next(ticks)))
    session.append(noise(10_840))
    session.append(noise(10_240))
    session.partial()
    session.finalize()
    assert [(event.compute_s, event.hypothesis.audio_s, event.hypothesis.is_final) for event in session.events] == [
        (3.0, 1.3175, False),
        (1.0, 1.3175, True),
    ]
