"""The Zipformer: icefall's outputs from icefall's weights; what a frame may see, in whole passes and in streams."""

import copy
from dataclasses import replace

import pytest
import torch
from golden_zipformer import CHUNK, GOLDEN, LEFT, LENS, SHAPE, features, give_weights
from made_corpora import ROOT
from safetensors.torch import load_file
from tiny import noise_batch

from nim4.config import ModelConfig, RecipeError, ZipformerConfig, build, read_yaml
from nim4.model.conformer import SUBSAMPLING, Context, encoder_lens
from nim4.model.ctc import PhonemeModel
from nim4.model.zipformer import Zipformer

CHUNKS = (4, 8, 16, 24, 32)
AHEAD = Zipformer.lookahead_frames


def made(**settings):
    """An encoder with the weights that icefall's code was run with; names of parameters are icefall's."""
    encoder = Zipformer(ZipformerConfig(**(SHAPE | settings)))
    give_weights(encoder.named_parameters())
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return made()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def stream(encoder, x, context):
    """The encoder's output for (B, T, 80), chunk by chunk, and the state at the end."""
    state, outputs, step = encoder.initial_state(x.shape[0], context), [], SUBSAMPLING * context.chunk_frames
    for start in range(0, x.shape[1], step):
        num_frames = min(context.chunk_frames, -(-(x.shape[1] - start) // SUBSAMPLING))
        piece = x[:, start : start + SUBSAMPLING * num_frames + AHEAD]
        piece = torch.nn.functional.pad(piece, (0, 0, 0, SUBSAMPLING * num_frames + AHEAD - piece.shape[1]), value=encoder.pad_value)
        output, state = encoder.forward_chunk(piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["causal", "offline"])
def test_whole_utterances_are_encoded_as_by_icefall(golden, kind):
    encoder = made(causal=kind == "causal")
    for number, (x, length) in enumerate(zip(features()[0], LENS, strict=True)):
        encoded, _ = encoder(x[None, :length], torch.tensor([length]))
        torch.testing.assert_close(encoded, golden[f"{kind}.{number}"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_streams_are_encoded_as_by_icefall(golden, encoder):
    x, outputs = features()[1], []
    state = encoder.initial_state(len(x), Context(CHUNK, LEFT))
    for start in range(0, x.shape[1] - AHEAD, SUBSAMPLING * CHUNK):
        output, state = encoder.forward_chunk(x[:, start : start + SUBSAMPLING * CHUNK + AHEAD], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), golden["stream"], atol=1e-5, rtol=0)


def test_gradients_are_those_of_icefall(golden):
    encoder, x = made(), features()[0][:1]
    encoder(x, torch.tensor([x.shape[1]]))[0].square().sum().backward()
    gradients = {name.removeprefix("gradient."): tensor for name, tensor in golden.items() if name.startswith("gradient.")}
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        # the one of two entries is a sum of terms that nearly cancel: icefall's, in float32, is 1.4e-4 from ours in float64
        close = 3e-4 if gradient.numel() == 2 else 1e-5
        torch.testing.assert_close(encoder.get_parameter(name).grad, gradient, atol=close * float(gradient.abs().max()), rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("chunk_frames", "left_chunks"), [*((chunk, 4) for chunk in CHUNKS), (8, 0), (8, 1)])
def test_streaming_equals_the_masked_whole_pass(encoder, chunk_frames, left_chunks):
    context = Context(chunk_frames, left_chunks)
    for num_frames in (1, 5, 4 * chunk_frames, 26 * chunk_frames - 1):
        x = noise_batch([num_frames], seed=num_frames).x
        whole, lens = encoder(x, torch.tensor([num_frames]), context)
        streamed, _ = stream(encoder, x, context)
        assert streamed.shape == whole.shape == (1, int(lens), 48)
        torch.testing.assert_close(streamed, whole, atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("context", [Context(), Context(4, 1), Context(16, 4), Context(16, -1)])
@pytest.mark.parametrize("settings", [{}, {"causal": False}], ids=["causal", "offline"])
def test_alone_equals_in_a_padded_batch(context, settings):
    if settings and context.chunk_frames:
        pytest.skip("an offline encoder has no chunks")
    encoder, batch = made(**settings), noise_batch([203, 64, 1, 130])
    batch.x[1, 64:] = float("nan")
    encoded, lens = encoder(batch.x, batch.x_lens, context)
    assert lens.tolist() == encoder_lens(batch.x_lens).tolist() == [51, 16, 1, 33]
    for row, length in enumerate(batch.x_lens.tolist()):
        alone, _ = encoder(batch.x[row : row + 1, :length], torch.tensor([length]), context)
        torch.testing.assert_close(encoded[row : row + 1, : lens[row]], alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_streams_joined_and_split_equal_each_alone(encoder):
    x = noise_batch([160, 160], seed=3).x
    together, state = stream(encoder, x, Context(8, 2))
    states = [stream(encoder, x[row : row + 1], Context(8, 2))[1] for row in range(2)]
    more = noise_batch([32 + AHEAD] * 2, seed=4).x
    expected, _ = encoder.forward_chunk(more, state)
    joined, after = encoder.forward_chunk(more, type(state).join(states))
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=0)
    for row, own in enumerate(after.split()):
        torch.testing.assert_close(together[row : row + 1], stream(encoder, x[row : row + 1], Context(8, 2))[0], atol=1e-5, rtol=0)
        assert own.shape == states[row].shape
        alone, _ = encoder.forward_chunk(more[row : row + 1], own)
        both, _ = encoder.forward_chunk(more, after)
        torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=0)
    assert states[0].shape != encoder.initial_state(1, Context(4, 4)).shape


@torch.inference_mode()
def test_caches_keep_their_size_and_a_chunk_leaves_its_state_as_it_was(encoder):
    def sizes(state):
        return [tuple(part.shape) for part in (state.embed, *(part for cache in state.layers for part in cache), state.filled)]

    empty = encoder.initial_state(1, Context(8, 3))
    for num_frames in (3, 32, 70, 700):
        _, state = stream(encoder, noise_batch([num_frames]).x, Context(8, 3))
        assert sizes(state) == sizes(empty)
        assert int(state.filled) == min(2 * -(-num_frames // 4), 48)
    before, x = copy.deepcopy(state), noise_batch([32 + AHEAD], seed=1).x
    first, _ = encoder.forward_chunk(x, state)
    assert torch.equal(encoder.forward_chunk(x, state)[0], first)
    assert torch.equal(before.embed, state.embed)
    assert all(torch.equal(*parts) for caches in zip(before.layers, state.layers, strict=True) for parts in zip(*caches, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("chunk_frames", [4, 16])
def test_a_chunk_sees_its_look_ahead_and_no_further(encoder, chunk_frames):
    num_frames, lens = SUBSAMPLING * chunk_frames * 3, torch.tensor([SUBSAMPLING * chunk_frames * 3])
    x = noise_batch([num_frames]).x
    seen = SUBSAMPLING * chunk_frames + AHEAD
    before, _ = encoder(x, lens, Context(chunk_frames, 1))
    later, nearer = x.clone(), x.clone()
    later[:, seen:] += 5.0
    nearer[:, seen - 1] += 5.0
    after, _ = encoder(later, lens, Context(chunk_frames, 1))
    torch.testing.assert_close(after[:, :chunk_frames], before[:, :chunk_frames], atol=1e-6, rtol=0)
    assert (after[:, chunk_frames:] - before[:, chunk_frames:]).abs().amax(-1).min() > 1e-3
    after, _ = encoder(nearer, lens, Context(chunk_frames, 1))
    assert (after[:, :chunk_frames] - before[:, :chunk_frames]).abs().amax() > 1e-6


@torch.inference_mode()
def test_attention_ends_at_the_left_context():
    encoder = made(dims=[32], downsampling=[2], num_layers=[1], num_heads=[2], ffn_dims=[32], conv_kernels=[1], unmasked_dims=[32])
    x, lens = noise_batch([SUBSAMPLING * 40]).x, torch.tensor([SUBSAMPLING * 40])
    changed = x.clone()
    changed[:, : SUBSAMPLING * 8 - 8] += 5.0  # the first chunk of 8; the embedding looks 8 feature frames back
    difference = (encoder(changed, lens, Context(8, 1))[0] - encoder(x, lens, Context(8, 1))[0]).abs().amax(-1)[0]
    assert difference[8:16].min() > 1e-5
    assert difference[16:32].max() > 0  # a layer attends three times, each time a chunk further
    assert difference[32:].max() == 0


def test_what_cannot_be_is_told():
    offline = made(causal=False)
    for call in (lambda: offline.initial_state(1, Context(16, 4)), lambda: offline(torch.zeros(1, 64, 80), torch.tensor([64]), Context(16, 4))):
        with pytest.raises(RecipeError, match=r"model\.encoder\.causal: expected true for chunks"):
            call()
    with pytest.raises(RecipeError, match=r"chunk size: expected a multiple of 160 ms.*found 240 ms"):
        made(downsampling=[1, 2, 8]).initial_state(1, Context(6, 4))


@pytest.mark.parametrize(
    "wrong",
    [{"dims": [30, 48, 40]}, {"num_heads": [2]}, {"conv_kernels": [4, 5, 9]}, {"downsampling": [1, 2, 3]}, {"dropout": 0.5}, {"pos_dim": 5}],
)
def test_impossible_shapes_are_told(wrong):
    with pytest.raises(RecipeError, match=f"model.encoder.{next(iter(wrong))}: expected"):
        made(**wrong)


@pytest.mark.parametrize(("name", "millions"), [("nim4", (615, 630)), ("base", (64, 66)), ("mini", (2.5, 3.5)), ("ci", (0, 0.1))])
def test_presets_have_the_size_of_the_conformer(name, millions):
    config = build(ModelConfig, read_yaml(ROOT / "local" / "conf" / "model" / f"{name}_zipformer.yaml") | {"vocab_size": 230}, name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PhonemeModel(config).encoder.parameters())
    assert millions[0] <= count / 1e6 <= millions[1]
    other = build(ModelConfig, read_yaml(ROOT / "local" / "conf" / "model" / f"{name}.yaml"), name)
    assert replace(config, encoder=other.encoder, vocab_size=0) == other, "all but the encoder is the same"
    if name == "base":
        assert config.encoder == ZipformerConfig()


def test_the_encoder_is_chosen_by_its_kind():
    assert build(ModelConfig, {"encoder": {"dim": 32}}, "old").encoder.kind == "conformer"
    assert build(ModelConfig, {"encoder": {"kind": "zipformer", "dims": [32, 64]}}, "new").encoder.dim == 64
    with pytest.raises(RecipeError, match="encoder: kind: expected conformer or zipformer, found 'zipfomer'"):
        build(ModelConfig, {"encoder": {"kind": "zipfomer"}}, "config.yaml")
    with pytest.raises(RecipeError, match="encoder: dims: expected a known setting"):
        build(ModelConfig, {"encoder": {"dims": [32]}}, "config.yaml")
