"""CTC decoding: a stream gives the same as the whole recording under the same mask, however its samples come."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_zipformer

from nim4.corpus.feats import Fbank
from nim4.decode.ctc import StreamingCtc, offline_log_probs
from nim4.decode.encoder import StreamingEncoder, spoken
from nim4.decode.together import run
from nim4.model.conformer import Context
from nim4.model.ctc import collapse


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def noise(num_samples, seed=0):
    """Noise whose loudness changes, so that frames differ."""
    rng = np.random.default_rng(seed)
    loudness = 0.05 * (1 + np.sin(np.arange(num_samples) / 1500))
    return (loudness * rng.standard_normal(num_samples)).clip(-1, 1).astype(np.float32)


def decode(model, pieces, context):
    session = StreamingCtc(model, context)
    outputs = [session.accept(piece) for piece in pieces]
    outputs.append(session.finish())
    return torch.cat(outputs), session.phones, [len(output) for output in outputs]


@torch.inference_mode()
@pytest.mark.parametrize("make", [tiny_model, tiny_zipformer])
@pytest.mark.parametrize("context", [Context(16, 4), Context(4, 1), Context(8, 0)])
@pytest.mark.parametrize("num_samples", [150, 3000, 16_001, 33_333, 10_240 * 3])
def test_any_split_gives_the_masked_whole_pass(make, context, num_samples):
    model, samples = make(), noise(num_samples)
    features = torch.from_numpy(Fbank().extract(samples))[None]
    whole, _ = model(features, torch.tensor([features.shape[1]]), context)
    rng = np.random.default_rng(1)
    splits = {
        "at once": [samples],
        "chunks": np.split(samples, range(10_240, num_samples, 10_240)),
        "milliseconds": np.split(samples, range(160, num_samples, 160)),
        "anywhere": np.split(samples, np.sort(rng.integers(0, num_samples + 1, 9))),
    }
    outputs = []
    for pieces in splits.values():
        log_probs, phones, _ = decode(model, pieces, context)
        torch.testing.assert_close(log_probs, whole[0], atol=1e-4, rtol=0)
        assert phones == collapse(whole[0].argmax(-1).tolist())
        outputs.append(log_probs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_phonemes_come_chunk_by_chunk(model):
    context, samples = Context(16, 4), noise(16_000 * 3)
    _, _, counts = decode(model, np.split(samples, range(10_240, len(samples), 10_240)), context)
    # A chunk waits for 3 more frames and half a window, so each comes with the samples of the next; 300 frames are 75 in all.
    assert counts == [0, 16, 16, 16, 16, 11]


def test_a_speaker_hands_over_what_completes_a_chunk(model):
    samples, session = noise(16_000 * 2), StreamingCtc(model, Context(16, 4))
    pieces = spoken(samples, session)
    assert [(len(piece), len(session.accept(piece))) for piece in pieces] == [(10_840, 16), (10_240, 16), (10_240, 16), (680, 0)]
    assert len(session.finish()) == 2


@torch.inference_mode()
def test_a_zipformer_hears_streams_together_as_alone_and_waits_longer():
    model, context = tiny_zipformer(), Context(8, 2)
    recordings = [noise(num_samples, num_samples) for num_samples in (16_000, 16_000, 9_000)]
    alone = [decode(model, [samples], context) for samples in recordings]
    encoders = [StreamingEncoder(model, context) for _ in recordings]
    tasks = run([encoder.accepting(samples) for encoder, samples in zip(encoders, recordings, strict=True)])
    ends = run([encoder.finishing() for encoder in encoders])
    for task, end, encoder, (log_probs, phones, _) in zip(tasks, ends, encoders, alone, strict=True):
        chunks = [*task.value(), *end.value()]
        torch.testing.assert_close(torch.cat([chunk.log_probs for chunk in chunks]), log_probs, atol=1e-5, rtol=0)
        assert encoder.phones == phones
    session = StreamingCtc(model, Context(16, 4))
    assert session.missing_samples == StreamingCtc(tiny_model(), Context(16, 4)).missing_samples + 1600  # 100 ms


def test_samples_after_the_end_are_refused(model):
    session = StreamingCtc(model, Context(16, 4))
    session.finish()
    with pytest.raises(RuntimeError, match="after finish"):
        session.accept(noise(10))


def test_work_and_memory_do_not_grow_with_the_stream(model):
    session = StreamingCtc(model, Context(16, 4))
    for second in range(20):
        session.accept(noise(16_000, seed=second))
        features = session._encoder._features
        assert len(features._framed) <= 4 * 16 + 3
        assert len(features._samples) < 10_840
    assert session._encoder._state.keys[0].shape[2] == 64
    assert features._fbank.num_waiting_samples < 400


def test_a_repeated_label_over_the_end_of_a_chunk_is_one_phoneme():
    model = tiny_model()
    frames = iter([[2, 2, 0, 3], [3, 3, 0, 3], [0, 3]])

    class Dictated(torch.nn.Module):
        def forward(self, encoded):
            return torch.nn.functional.one_hot(torch.tensor(next(frames)), 6).float().log_softmax(-1)[None]

    model.head = Dictated()
    session = StreamingCtc(model, Context(4, 1))
    session._encoder._features._framed = torch.zeros(4 * 10, 80)
    session.finish()
    assert session.phones == [2, 3, 3, 3]


def test_a_stream_without_a_frame_is_empty(model):
    for pieces in ([], [np.zeros(0, np.float32)], [noise(50)]):
        log_probs, phones, _ = decode(model, pieces, Context(16, 4))
        assert log_probs.shape == (0, 6)
        assert phones == []


@torch.inference_mode()
def test_offline_batches_equal_each_recording_alone(model):
    recordings = [noise(count, seed=count) for count in (20_000, 161, 50, 9_999)]
    together = offline_log_probs(model, recordings)
    for samples, rows in zip(recordings, together, strict=True):
        features = Fbank().extract(samples)
        assert rows.shape == (-(-len(features) // 4), 6)
        assert rows.dtype == np.float32
        (alone,) = offline_log_probs(model, [samples])
        np.testing.assert_allclose(rows, alone, atol=1e-5)
    whole, _ = model(torch.from_numpy(Fbank().extract(recordings[0]))[None], torch.tensor([125]))
    np.testing.assert_allclose(together[0], whole[0].numpy(), atol=1e-5)
