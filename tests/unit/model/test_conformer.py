"""The streaming Conformer: what a frame may see, in whole passes and in streams."""

import copy

import pytest
import torch
from made_corpora import ROOT
from tiny import noise_batch, tiny_model

from nim4.config import ConformerConfig, ModelConfig, RecipeError, build, read_yaml
from nim4.corpus.units import num_encoder_frames
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Context, chunk_mask, encoder_lens
from nim4.model.ctc import PhonemeModel

CHUNKS = (4, 8, 16, 24, 32)


@pytest.fixture(scope="module")
def encoder():
    return tiny_model().encoder


def stream(encoder, x, context):
    """The encoder's output for (B, T, 80), chunk by chunk, and the state at the end."""
    state, outputs, step = encoder.initial_state(x.shape[0], context), [], SUBSAMPLING * context.chunk_frames
    for start in range(0, x.shape[1], step):
        num_frames = min(context.chunk_frames, -(-(x.shape[1] - start) // SUBSAMPLING))
        piece = x[:, start : start + SUBSAMPLING * num_frames + LOOKAHEAD_FRAMES]
        piece = torch.nn.functional.pad(piece, (0, 0, 0, SUBSAMPLING * num_frames + LOOKAHEAD_FRAMES - piece.shape[1]))
        output, state = encoder.forward_chunk(piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


@torch.inference_mode()
@pytest.mark.parametrize("left_chunks", [0, 1, 2, 4])
@pytest.mark.parametrize("chunk_frames", CHUNKS)
def test_streaming_equals_the_masked_whole_pass(encoder, chunk_frames, left_chunks):
    context = Context(chunk_frames, left_chunks)
    for num_frames in (1, 5, 4 * chunk_frames, 12 * chunk_frames + 1, 30 * chunk_frames + 6, 32 * chunk_frames - 1):
        x = noise_batch([num_frames], seed=num_frames).x
        whole, lens = encoder(x, torch.tensor([num_frames]), context)
        streamed, _ = stream(encoder, x, context)
        assert streamed.shape == whole.shape == (1, int(lens), 16)
        torch.testing.assert_close(streamed, whole, atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kernel", [1, 3, 33])
def test_streaming_equals_the_whole_pass_with_kernels_shorter_and_longer_than_a_chunk(kernel):
    encoder = tiny_model(conv_kernel=kernel, conv_expansion=1).encoder
    x = noise_batch([203]).x
    whole, _ = encoder(x, torch.tensor([203]), Context(8, 2))
    torch.testing.assert_close(stream(encoder, x, Context(8, 2))[0], whole, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_several_streams_at_once_equal_each_alone(encoder):
    x = noise_batch([128, 128], seed=3).x
    together, _ = stream(encoder, x, Context(8, 2))
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], stream(encoder, x[i : i + 1], Context(8, 2))[0], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("context", [Context(), Context(4, 1), Context(16, 4), Context(16, -1)])
def test_alone_equals_in_a_padded_batch(context):
    model, batch = tiny_model(), noise_batch([203, 64, 1, 130])
    encoded, lens = model.encoder(batch.x, batch.x_lens, context)
    log_probs, _ = model(batch.x, batch.x_lens, context)
    assert lens.tolist() == [num_encoder_frames(int(length)) for length in batch.x_lens] == [51, 16, 1, 33]
    for i, length in enumerate(batch.x_lens.tolist()):
        x = batch.x[i : i + 1, :length]
        alone, _ = model.encoder(x, torch.tensor([length]), context)
        torch.testing.assert_close(encoded[i : i + 1, : lens[i]], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(log_probs[i : i + 1, : lens[i]], model(x, torch.tensor([length]), context)[0], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("context", [Context(), Context(8, 2)])
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_what_lies_beyond_an_utterance_is_ignored(context, garbage):
    model, batch = tiny_model(), noise_batch([120, 61])
    clean, lens = model(batch.x, batch.x_lens, context)
    batch.x[1, 61:] = garbage
    dirty, _ = model(batch.x, batch.x_lens, context)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1, : lens[1]], clean[1, : lens[1]])


@torch.inference_mode()
@pytest.mark.parametrize("chunk_frames", CHUNKS)
def test_a_chunk_sees_its_look_ahead_and_no_further(encoder, chunk_frames):
    num_frames, lens = SUBSAMPLING * chunk_frames * 3, torch.tensor([SUBSAMPLING * chunk_frames * 3])
    x = noise_batch([num_frames]).x
    seen = SUBSAMPLING * chunk_frames + LOOKAHEAD_FRAMES
    before, _ = encoder(x, lens, Context(chunk_frames, 1))
    later, nearer = x.clone(), x.clone()
    later[:, seen:] += 5.0
    nearer[:, seen - 1] += 5.0
    after, _ = encoder(later, lens, Context(chunk_frames, 1))
    torch.testing.assert_close(after[:, :chunk_frames], before[:, :chunk_frames], atol=1e-6, rtol=0)
    assert (after[:, chunk_frames:] - before[:, chunk_frames:]).abs().amax(-1).min() > 1e-3
    after, _ = encoder(nearer, lens, Context(chunk_frames, 1))
    assert (after[:, :chunk_frames] - before[:, :chunk_frames]).abs().amax(-1).min() > 1e-6  # the last of the look-ahead reaches the whole chunk


@torch.inference_mode()
def test_attention_ends_at_the_left_context():
    encoder = tiny_model(conv_kernel=1, num_blocks=1).encoder  # kernel 1: only attention looks left
    x, lens = noise_batch([SUBSAMPLING * 40]).x, torch.tensor([SUBSAMPLING * 40])
    changed = x.clone()
    changed[:, : SUBSAMPLING * 8] += 5.0  # the first chunk of 8
    difference = (encoder(changed, lens, Context(8, 2))[0] - encoder(x, lens, Context(8, 2))[0]).abs().amax(-1)[0]
    assert difference[8:24].min() > 1e-5
    assert difference[24:].max() == 0


def test_a_padded_last_chunk_is_as_a_short_one(encoder):
    _, state = stream(encoder, noise_batch([64]).x, Context(8, 2))
    x = noise_batch([35], seed=1).x
    for own in (1, 5, 8):
        short = x[:, : SUBSAMPLING * own + LOOKAHEAD_FRAMES].clone()
        short[:, SUBSAMPLING * own :] = 0.0
        padded = torch.cat([short, torch.zeros(1, 35 - short.shape[1], 80)], 1)
        valid = torch.arange(8)[None] < own
        expected, _ = encoder.forward_chunk(short, state)
        torch.testing.assert_close(encoder.forward_chunk(padded, state, valid)[0][:, :own], expected, atol=1e-5, rtol=0)


def test_chunk_mask():
    mask = chunk_mask(6, Context(2, 1), torch.device("cpu")).int().tolist()
    assert mask == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2
    assert chunk_mask(6, Context(2, -1), torch.device("cpu")).int()[4].tolist() == [1] * 6
    assert chunk_mask(3, Context(), torch.device("cpu")).all()


@torch.inference_mode()
def test_a_chunk_leaves_its_state_as_it_was(encoder):
    _, state = stream(encoder, noise_batch([100]).x, Context(8, 2))
    before = copy.deepcopy(state)
    x = noise_batch([35], seed=1).x
    first, _ = encoder.forward_chunk(x, state)
    for name in ("keys", "values", "conv"):
        assert all(map(torch.equal, getattr(state, name), getattr(before, name)))
    assert torch.equal(state.filled, before.filled)
    assert torch.equal(encoder.forward_chunk(x, state)[0], first)


@torch.inference_mode()
def test_caches_keep_their_size(encoder):
    def sizes(state):
        return [tuple(tensor.shape) for tensor in (*state.keys, *state.values, *state.conv, state.filled)]

    empty = encoder.initial_state(1, Context(8, 3))
    for num_frames in (3, 32, 70, 700):
        _, state = stream(encoder, noise_batch([num_frames]).x, Context(8, 3))
        assert sizes(state) == sizes(empty) == [(1, 2, 24, 8)] * 4 + [(1, 32, 3)] * 2 + [(1,)]
        assert int(state.filled) == min(int(encoder_lens(torch.tensor(num_frames))), 24)


@pytest.mark.parametrize(("name", "millions"), [("nim4", (620, 624)), ("base", (50, 70)), ("mini", (1, 5))])
def test_sizes(name, millions):
    config = build(ModelConfig, read_yaml(ROOT / "local" / "conf" / "model" / f"{name}.yaml") | {"vocab_size": 230}, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PhonemeModel(config).encoder.parameters())
    assert millions[0] <= count / 1e6 <= millions[1]


@pytest.mark.parametrize("wrong", [{"conv_kernel": 8}, {"num_heads": 3}, {"num_heads": 2, "dim": 6}, {"num_blocks": 0}, {"dropout": 1.0}])
def test_impossible_shapes_are_told(wrong):
    with pytest.raises(RecipeError, match=f"model.encoder.{next(iter(wrong))}: expected"):
        tiny_model(**wrong)


def test_the_default_size_is_that_of_the_nim4_config():
    assert build(ModelConfig, read_yaml(ROOT / "local" / "conf" / "model" / "nim4.yaml"), "nim4").encoder == ConformerConfig()
