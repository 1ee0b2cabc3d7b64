"""A second pass that hears the whole anew: its text is that of whole recordings, however the samples come and whoever goes along."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_streaming import Scripted, noise, plain, stream
from tiny import make_talkative, tiny_llm, tiny_speech_llm, tiny_zipformer

from nim4.config import AdaptorConfig, LlmConfig
from nim4.corpus.feats import Fbank
from nim4.decode.encoder import spoken
from nim4.decode.offline import transcripts
from nim4.decode.second_pass import EncodeWhole, Rereading, rereading_of
from nim4.decode.streaming import Job, Recogniser, new_rows
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import Context
from nim4.model.llm import load_llm

CONTEXTS = (Context(16, 4), Context(4, 2), Context(10, 4))  # 10 frames do not fill embeddings of 4
LENGTHS = (150, 5_000, 10_840, 33_333, 52_000, 88_001)  # samples
HINTS = ((), ("ab", "cd"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(llm):
    return make_talkative(tiny_speech_llm(llm))


@pytest.fixture(scope="module")
def zipformer(llm):
    acoustic = tiny_zipformer()
    config = replace(acoustic.config, adaptor=AdaptorConfig(hidden_dim=24), llm=LlmConfig(name=str(llm)))
    torch.manual_seed(0)
    return make_talkative(SpeechLlm(acoustic, load_llm(config.llm), config).eval())


def whole(model, samples, hints=(), **search):
    return transcripts(model, [samples], hints=[hints], **search)[0]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data(), context=st.sampled_from(CONTEXTS), num_samples=st.sampled_from(LENGTHS), hints=st.sampled_from(HINTS))
def test_the_final_text_is_that_of_whole_recordings_however_samples_come(model, data, context, num_samples, hints):
    samples = noise(num_samples)
    cuts = data.draw(st.lists(st.integers(0, num_samples), max_size=12))
    _, final = stream(Recogniser(model, context, rereading=Rereading()).session(hints), np.split(samples, sorted(cuts)))
    assert final.text == whole(model, samples, hints)


@pytest.mark.parametrize("num_samples", LENGTHS[3:])
def test_it_is_another_text_than_that_of_the_chunks_and_partials_are_the_same(model, num_samples):
    samples, rows = noise(num_samples), new_rows(model)
    session, chunks = (Recogniser(model, rows=rows, rereading=again).session() for again in (Rereading(), None))
    partials, final = stream(session, spoken(samples, session))
    partials_of_chunks, final_of_chunks = stream(chunks, spoken(samples, chunks))
    assert partials == partials_of_chunks
    assert final_of_chunks.text == plain(model, samples)
    assert final.text == whole(model, samples) != final_of_chunks.text
    assert (final.phones, final.hints, final.revision) == (final_of_chunks.phones, final_of_chunks.hints, final_of_chunks.revision)
    assert final.settled_chars == len(final.text)


def test_a_zipformer_hears_every_feature_once(zipformer, monkeypatch):
    """Its chunks overlap by more than a Conformer's."""
    samples, heard, together = noise(52_000), [], EncodeWhole.together
    monkeypatch.setattr(EncodeWhole, "together", staticmethod(lambda parts: heard.extend(part.features for part in parts) or together(parts)))
    _, final = stream(Recogniser(zipformer, rereading=Rereading()).session(), np.split(samples, [9_000, 30_001]))
    np.testing.assert_allclose(heard[0], Fbank().extract(samples), atol=1e-4)
    assert final.text == whole(zipformer, samples)


def test_hints_are_those_that_the_stream_has_found(model):
    samples = noise(48_000)
    session = Recogniser(model, hotwords=Scripted(), limits=None, rereading=Rereading()).session(["x"])
    _, final = stream(session, spoken(samples, session))
    assert final.hints == ("x", "abc")
    assert final.text == whole(model, samples, ["x", "abc"]) != whole(model, samples)


class Last:
    """A rescorer that takes the least likely candidate."""

    def best(self, candidates, log_probs):
        assert log_probs.exp().sum(-1).allclose(torch.ones(len(log_probs)))
        return candidates[-1][0]


@pytest.mark.parametrize("rescorer", [None, Last()])
def test_beams_are_those_of_whole_recordings(model, rescorer):
    rereading = Rereading(3, rescorer)
    recogniser = Recogniser(model, rereading=rereading)
    recordings = [noise(num_samples, seed) for seed, num_samples in enumerate((*LENGTHS, LENGTHS[-1]))]
    finals = recogniser.hear([Job(recogniser.session(HINTS[1]), samples, ends=True) for samples in recordings])
    texts = [final.text for final in finals]
    assert texts == [whole(model, samples, HINTS[1], num_beams=3, rescorer=rescorer) for samples in recordings]
    assert rescorer is None or texts != [whole(model, samples, HINTS[1], num_beams=3) for samples in recordings]


def test_segments_of_like_length_are_encoded_together(model):
    recogniser = Recogniser(model, rereading=Rereading())
    recordings = [noise(num_samples, seed) for seed, num_samples in enumerate((64_000, 66_560, 76_800, 92_160, 128_000))]
    sessions, sizes = [recogniser.session() for _ in recordings], []
    for session, samples in zip(sessions, recordings, strict=True):
        session.append(samples)
    hook = model.acoustic.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[:2])))
    finals = recogniser.hear([Job(session, np.zeros(0, np.float32), ends=True) for session in sessions])
    hook.remove()
    assert sorted(sizes) == [(1, 800), (4, 576)]
    assert [final.text for final in finals] == [whole(model, samples) for samples in recordings]


def test_one_that_cannot_be_heard_anew_does_not_harm_the_others(model, monkeypatch):
    recogniser, together = Recogniser(model, rereading=Rereading()), EncodeWhole.together

    def spoiled(parts):
        if any(len(part.features) == 330 for part in parts):
            raise RuntimeError("out of memory")
        return together(parts)

    monkeypatch.setattr(EncodeWhole, "together", staticmethod(spoiled))
    recordings = [noise(num_samples) for num_samples in (52_000, 52_800, 53_000)]
    good, bad, other = recogniser.hear([Job(recogniser.session(), samples, ends=True) for samples in recordings])
    assert isinstance(bad, RuntimeError)
    assert [good.text, other.text] == [whole(model, recordings[0]), whole(model, recordings[2])]


def test_what_is_counted(model):
    samples, rows, lens = noise(64_000), new_rows(model), []
    hook = model.llm.model.register_forward_pre_hook(lambda _, args, inputs: lens.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True)
    session, chunks, beams = (Recogniser(model, rows=rows, rereading=again).session() for again in (Rereading(), None, Rereading(2)))
    _, final = stream(session, spoken(samples, session))
    hook.remove()
    counts = final.counts
    assert (counts.read_tokens, counts.passes) == (sum(lens), len(lens))
    partials, of_chunks = stream(chunks, spoken(samples, chunks))
    assert counts.speech_tokens == of_chunks.counts.speech_tokens == 25
    assert counts.drafted == of_chunks.counts.drafted > 0
    _, of_beams = stream(beams, spoken(samples, beams))
    assert (of_beams.counts.drafted, of_beams.counts.accepted) == (0, 0)
    assert of_beams.counts.read_tokens == partials[-1].counts.read_tokens


@pytest.mark.parametrize("num_right", [0, 5, 9])
def test_the_last_partial_is_a_draft(model, num_right):
    samples, recogniser, written = noise(52_000), Recogniser(model, rereading=Rereading()), []
    without, session = recogniser.session(), recogniser.session()
    without._text = lambda ids: written.extend(ids) or model.tokenizer.decode(ids)
    without.append(samples)
    expected = without.finalize()
    session.append(samples)
    session._ids = [*written[:num_right], (written[num_right] + 1) % 256, *written[num_right + 1 :]]
    final = session.finalize()
    assert final.text == expected.text == whole(model, samples)
    assert (final.counts.accepted, expected.counts.accepted) == (num_right, 0)
    assert final.counts.passes == expected.counts.passes - num_right


def test_features_are_kept_where_they_are_heard_anew_and_gone_at_the_end(model):
    samples = noise(48_000)
    for again, num_kept in ((None, 0), (Rereading(), 4 * 64)):
        session = Recogniser(model, rereading=again).session()
        session.append(samples)
        assert sum(map(len, session._features)) == num_kept
        session.abort()
        assert session._features is None


@pytest.mark.parametrize("pieces", [[], [np.zeros(0, np.float32)], [noise(50)]])
def test_a_stream_without_a_frame_is_empty(model, pieces):
    _, final = stream(Recogniser(model, rereading=Rereading(2)).session(), pieces)
    assert (final.text, final.phones) == ("", ())


def test_what_a_decode_config_says():
    assert rereading_of("chunks") is None
    assert rereading_of("whole", 4) == Rereading(4)
    with pytest.raises(KeyError):
        rereading_of("half")
