"""Chunks of many streams: padded to a batch and a width that are recorded, they give what they give alone."""

import copy

import pytest
import torch
from tiny import tiny_model

from nim4.corpus.feats import Fbank
from nim4.decode import encoder as encoder_module
from nim4.decode.encoder import BATCHES, FRAMED, Encode, Frame, _encode, _encode_fast, record_chunks
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Context

CONTEXT = Context(8, 2)


def chunks_of(model, lens):
    """Chunks with so many feature frames behind three whole ones, each of another stream; and one that is the first of its stream."""
    made, whole = [], SUBSAMPLING * CONTEXT.chunk_frames + LOOKAHEAD_FRAMES
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate([*lens, whole]):
        state = model.encoder.initial_state(1, CONTEXT)
        for _ in range(3 if number < len(lens) else 0):
            _, state = model.encoder.forward_chunk(torch.randn(1, whole, 80, generator=generator).to(model.mean.device), state)
        features = torch.randn(length, 80, generator=generator) * 4 - 8
        made.append(Encode(model, features, min(-(-length // SUBSAMPLING), CONTEXT.chunk_frames), CONTEXT.chunk_frames, state))
    return made


def check(found, expected, atol):
    """The same frames, phonemes and, behind a whole chunk, caches."""
    for (own, state), (other, other_state), chunk in found_with(found, expected):
        assert own.frames.shape == other.frames.shape
        torch.testing.assert_close(own.frames, other.frames, atol=atol, rtol=0)
        torch.testing.assert_close(own.log_probs, other.log_probs, atol=atol, rtol=0)
        if chunk.num_frames == CONTEXT.chunk_frames:
            for name in ("keys", "values", "conv", "filled"):
                torch.testing.assert_close(getattr(state, name), getattr(other_state, name), atol=atol, rtol=0)


def found_with(found, expected):
    return [(own, *other) for own, other in zip(found, expected, strict=True)]


def test_frames_of_many_streams_are_what_they_are_alone():
    fbank, samples = Fbank(), 0.1 * torch.randn(FRAMED + 1, 1000, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        on = Fbank(device)
        found = Frame.together([Frame(on, own) for own in samples])
        for frames, own in zip(found, samples, strict=True):
            torch.testing.assert_close(frames, fbank.frames_of_padded(own), atol=1e-6 if device == "cpu" else 1e-3, rtol=0)


@torch.inference_mode()
def test_padded_chunks_are_what_they_are_alone(monkeypatch):
    model = tiny_model()
    chunks = chunks_of(model, (35, 35, 12, 1, 33))
    alone = [(Encode.together([chunk])[0], chunk) for chunk in chunks]
    monkeypatch.setattr(Encode, "width", CONTEXT.chunk_frames)
    monkeypatch.setattr(encoder_module, "_encode", _encode_fast)
    assert len({chunk.kind for chunk in chunks}) == 1
    for _ in range(2):
        check(Encode.together(chunks), alone, 1e-5)
    monkeypatch.setattr(encoder_module, "BATCHES", (1, 2))
    check(Encode.together(chunks), alone, 1e-5)


@torch.inference_mode()
def test_weights_that_have_moved_are_seen(monkeypatch):
    model = tiny_model()
    (chunk, *_) = chunks_of(model, (35,))
    first = _encode_fast([chunk])[0].clone()
    for part, other in zip(model.parameters(), tiny_model(seed=1).parameters(), strict=True):
        part.data = other.data
    second = _encode_fast([chunk])[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, _encode([chunk])[0], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_chunks_are_those_that_are_not():
    model = tiny_model().cuda()
    record_chunks(model, CONTEXT)
    assert len(encoder_module._graphs(model)._made) == len(BATCHES)
    chunks = chunks_of(model, (35, 35, 12, 1, 33))
    plain = copy.deepcopy(model).cpu()
    alone = []
    for chunk in chunks:
        state = type(chunk.state)(*(part.cpu() for part in (chunk.state.keys, chunk.state.values, chunk.state.conv, chunk.state.filled)))
        alone.append((Encode.together([Encode(plain, chunk.features, chunk.num_frames, chunk.chunk_frames, state)])[0], chunk))
    for _ in range(2):
        found = Encode.together(chunks)
        for own, state in found:
            object.__setattr__(own, "frames", own.frames.cpu())
            state.__init__(*(part.cpu() for part in (state.keys, state.values, state.conv, state.filled)))
        check(found, alone, 1e-3)
