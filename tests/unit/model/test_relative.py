"""Relative positions: what they score, and that streams and batches stay what they are with them."""

import pytest
import torch
from test_conformer import stream
from tiny import ENCODER, noise_batch, tiny_model

from nim4.config import ConformerConfig, RecipeError
from nim4.model.conformer import Context
from nim4.model.relative import Distances, RelativeScores


@pytest.fixture(scope="module")
def encoder():
    return tiny_model(positions="relative", subsampling_norm=False).encoder


@torch.inference_mode()
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (3, 8), (1, 4), (1, 1)])
def test_scores_are_those_of_each_distance(num_queries, num_keys):
    """Against a loop over queries and keys (arXiv 1901.02860, terms b and d of its equation)."""
    torch.manual_seed(0)
    config = ConformerConfig(**ENCODER, positions="relative")
    scores, dim = RelativeScores(config), config.dim
    query = torch.randn(2, config.num_heads, num_queries, dim // config.num_heads)
    mask = torch.rand(2, 1, num_queries, num_keys) > 0.3
    moved, added = scores(query, Distances.of(num_queries, num_keys, dim, query.device), mask)
    torch.testing.assert_close(moved, query + scores.content_bias[:, None])
    for i in range(num_queries):
        for j in range(num_keys):
            distance = num_keys - num_queries + i - j
            angles = distance / 10_000 ** (torch.arange(0, dim, 2) / dim)
            sinusoid = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten()
            position = scores.project(sinusoid).unflatten(0, scores.content_bias.shape)
            expected = ((query[:, :, i] + scores.position_bias) * position).sum(-1) / (dim // config.num_heads) ** 0.5
            expected = torch.where(mask[:, :, i, j], expected, -torch.inf)
            torch.testing.assert_close(added[:, :, i, j], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("context", [Context(4, 1), Context(8, 0), Context(16, 4)])
def test_streaming_equals_the_masked_whole_pass(encoder, context):
    for num_frames in (5, 203, 4 * context.chunk_frames):
        x = noise_batch([num_frames], seed=num_frames).x
        whole, _ = encoder(x, torch.tensor([num_frames]), context)
        torch.testing.assert_close(stream(encoder, x, context)[0], whole, atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("context", [Context(), Context(8, 2)])
def test_alone_equals_in_a_padded_batch(encoder, context):
    batch = noise_batch([203, 64, 1])
    encoded, lens = encoder(batch.x, batch.x_lens, context)
    for i, length in enumerate(batch.x_lens.tolist()):
        alone, _ = encoder(batch.x[i : i + 1, :length], torch.tensor([length]), context)
        torch.testing.assert_close(encoded[i : i + 1, : lens[i]], alone, atol=1e-5, rtol=0)


def test_every_weight_of_them_learns(encoder):
    batch = noise_batch([64, 40])
    encoded, _ = encoder(batch.x, batch.x_lens)
    encoded.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters() if ".relative." in name}
    assert len(grads) == 3 * len(encoder.blocks)
    assert all(float(grad.abs().max()) > 0 for grad in grads.values())


def test_other_positions_are_told():
    with pytest.raises(RecipeError, match=r"model\.encoder\.positions: expected rotary or relative, found alibi"):
        tiny_model(positions="alibi")
