"""Augmentation: how much is changed, where, and that a generator decides all of it."""

import math

import pytest
import torch

from nim4.config import AugmentConfig, ChunkConfig
from nim4.model.conformer import Context
from nim4.train.augment import NUM_RESPONSE, draw_context, freq_response, freq_warp, mask, time_stretch, time_warp

FILL = torch.linspace(-9, -7, 80)
MANY = AugmentConfig()  # the paper's masks


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(lens, seed=1):
    x = torch.randn(len(lens), max(lens), 80, generator=seeded(seed))
    for row, length in zip(x, lens, strict=True):
        row[length:] = 0
    return x, torch.tensor(lens)


# ------------------------------------------------------------------------------------------------------------------ masks


def time_masked(lens, ratio, seed, config=MANY):
    """(B, T) bool: frames masked in time, by a config without frequency masks."""
    x, x_lens = features(lens)
    config = AugmentConfig(**{**vars(config), "num_freq_masks": 0})
    return (mask(x, x_lens, FILL, config, ratio, seeded(seed)) != x).all(-1)


def test_masked_values_become_the_fill_and_the_rest_stays():
    x, lens = features([400, 150])
    masked = mask(x, lens, FILL, MANY, 1.0, seeded())
    changed = masked != x
    assert 0.02 < changed[0].float().mean() < 0.8
    assert torch.equal(masked[changed], FILL.expand_as(x)[changed])
    assert not changed[1, 150:].any()  # padding
    assert not torch.equal(changed[0, :150], changed[1, :150])  # each row has masks of its own


def test_mask_is_decided_by_the_generator():
    x, lens = features([300, 200])
    first = mask(x, lens, FILL, MANY, 2.5, seeded(3))
    assert torch.equal(first, mask(x, lens, FILL, MANY, 2.5, seeded(3)))
    assert not torch.equal(first, mask(x, lens, FILL, MANY, 2.5, seeded(4)))


@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_no_more_time_is_masked_than_allowed(ratio):
    lens = [1200, 400, 100, 30, 7, 1]
    for seed in range(20):
        shares = time_masked(lens, ratio, seed).sum(1) / torch.tensor(lens)
        assert (shares <= MANY.max_time_mask_fraction * ratio).all()


def test_time_masks_are_no_longer_than_allowed():
    config = AugmentConfig(num_time_masks=1, max_time_mask_frames=20, num_freq_masks=0)
    widths = [int(time_masked([1000], 1.0, seed, config).sum()) for seed in range(60)]
    assert max(widths) <= 20
    assert len(set(widths)) > 10  # uniform, not fixed


def test_cr_ctc_masks_two_and_a_half_times_as_much():
    lens = [1000] * 20
    config = AugmentConfig(max_time_mask_frames=20)  # short masks, so that few overlap
    once, more = (sum(float(time_masked(lens, ratio, seed, config).float().mean()) for seed in range(10)) / 10 for ratio in (1.0, 2.5))
    # overlaps swallow a little: of a share s the union of many masks keeps 1 - exp(-s)
    assert math.log1p(-more) / math.log1p(-once) == pytest.approx(2.5, rel=0.1)


def test_frequency_masks():
    x, lens = features([500])
    config = AugmentConfig(num_time_masks=0)
    for seed in range(20):
        changed = mask(x, lens, FILL, config, 2.5, seeded(seed)) != x
        bins = changed[0].all(0)
        assert torch.equal(changed[0], bins.expand(500, 80))
        assert int(bins.sum()) <= 2 * 27  # the ratio is for time only


def test_no_masks():
    x, lens = features([50])
    assert torch.equal(mask(x, lens, FILL, AugmentConfig(num_time_masks=0, num_freq_masks=0), 2.5, seeded()), x)


# ------------------------------------------------------------------------------------------------------------------ warps


def test_time_warp_keeps_both_ends_and_the_order():
    lens = torch.tensor([200, 300])
    x = torch.arange(300.0)[None, :, None].expand(2, 300, 80).contiguous()  # each frame holds its own time
    moved = 0.0
    for seed in range(30):
        warped = time_warp(x, lens, 40, seeded(seed))
        assert warped.shape == x.shape
        for row, length in zip(warped, lens.tolist(), strict=True):
            assert row[0, 0] == 0
            assert row[length - 1, 0] == pytest.approx(length - 1, abs=1e-2)
            assert (row[1:length, 0] >= row[: length - 1, 0]).all()
            moved = max(moved, float((row[:length, 0] - torch.arange(float(length))).abs().max()))
            assert moved < 40
            assert torch.equal(row[length:], x[0, length:])  # padding stays where it is
        assert torch.equal(warped[:, :, 0], warped[:, :, 79])
    assert moved > 25  # and it does warp


def test_time_warp_interpolates_between_neighbours():
    x, lens = features([200])
    warped = time_warp(x, lens, 40, seeded(2))
    ramp = torch.arange(200.0)[None, :, None].expand(1, 200, 80).contiguous()
    position = time_warp(ramp, lens, 40, seeded(2))[0, :, 0]
    below = position.floor().long().clamp(max=198)
    weight = (position - below)[:, None]
    torch.testing.assert_close(warped[0], x[0, below] * (1 - weight) + x[0, below + 1] * weight, atol=1e-4, rtol=0)


def test_time_warp_leaves_short_utterances_alone():
    x, lens = features([200, 81, 82, 20])
    warped = time_warp(x, lens, 40, seeded(1))
    assert torch.equal(warped[[1, 3]], x[[1, 3]])
    assert not torch.equal(warped[0], x[0])
    assert not torch.equal(warped[2], x[2])


def test_time_warp_off_and_repeatable():
    x, lens = features([200])
    assert time_warp(x, lens, 0, seeded()) is x
    assert torch.equal(time_warp(x, lens, 40, seeded(5)), time_warp(x, lens, 40, seeded(5)))
    assert not torch.equal(time_warp(x, lens, 40, seeded(5)), time_warp(x, lens, 40, seeded(6)))


def test_time_stretch_changes_lengths_within_limits_and_keeps_the_ends():
    lens = [400, 300, 200] * 20
    x, x_lens = features(lens)
    y, y_lens = time_stretch(x, x_lens, torch.ones_like(x_lens), 0.25, seeded())
    change = (y_lens / x_lens).log().abs()
    assert change.max() <= 0.25 + 0.01
    assert change.max() > 0.2
    assert y.shape[1] == y_lens.max()
    for row, length, new_row, new_length in zip(x, x_lens, y, y_lens, strict=True):
        torch.testing.assert_close(new_row[0], row[0])
        torch.testing.assert_close(new_row[new_length - 1], row[length - 1], atol=1e-3, rtol=1e-3)


def test_time_stretch_leaves_the_frames_that_are_needed():
    x, x_lens = features([100] * 50)
    _, y_lens = time_stretch(x, x_lens, torch.full_like(x_lens, 95), 0.25, seeded())
    assert y_lens.min() == 95
    _, y_lens = time_stretch(x, x_lens, torch.full_like(x_lens, 150), 0.25, seeded())
    assert y_lens.min() == 100  # never longer only to make room


def test_time_stretch_off():
    x, x_lens = features([50, 20])
    y, y_lens = time_stretch(x, x_lens, x_lens, 0.0, seeded())
    assert y is x
    assert y_lens is x_lens


def test_freq_warp_stretches_each_utterance_by_its_own_factor():
    x = torch.arange(80.0).expand(50, 4, 80).contiguous()  # each bin holds its own number
    warped = freq_warp(x, 0.1, seeded())
    factors = warped[:, 0, 40] / 40
    assert factors.min() >= 0.9
    assert factors.max() <= 1.1
    assert len(set(factors.tolist())) == 50
    torch.testing.assert_close(warped, (x * factors[:, None, None]).clamp(max=79), atol=1e-3, rtol=0)
    assert freq_warp(x, 0.0, seeded()) is x
    assert torch.equal(warped, freq_warp(x, 0.1, seeded()))


def test_freq_response_adds_a_smooth_curve_to_each_utterance():
    x = torch.randn(400, 3, 80, generator=seeded())
    added = freq_response(x, 0.5, seeded(1)) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-5, rtol=0)  # the same in all frames
    curves = added[:, 0]
    assert curves.diff(dim=1).abs().max() < 0.3  # neighbouring bins stay together
    loudness = curves.mean(1)
    assert loudness.std().item() == pytest.approx(0.5, rel=0.15)
    assert abs(loudness.mean().item()) < 0.1
    assert torch.linalg.matrix_rank(curves, rtol=1e-3) == NUM_RESPONSE
    assert freq_response(x, 0.0, seeded()) is x
    assert torch.equal(freq_response(x, 0.5, seeded(1)), freq_response(x, 0.5, seeded(1)))


# --------------------------------------------------------------------------------------------------------------- contexts


def test_contexts_are_drawn_with_their_shares():
    config, generator = ChunkConfig(), seeded()
    drawn = [draw_context(config, generator) for _ in range(4000)]
    others = [context for context in drawn if context.chunk_frames]
    share = len(others) / len(drawn)
    assert 1 - share == pytest.approx(config.full_prob, abs=0.03)
    assert drawn.count(Context(16, 4)) / len(drawn) == pytest.approx(config.deployed_prob + 0.4 * 0.2 * 0.8 / 8, abs=0.03)
    assert {context.chunk_frames for context in others} == {4, 8, 16, 24, 32}
    assert {context.left_chunks for context in others} == {-1, *range(1, 9)}
    sized = [context for context in others if context != Context(16, 4)]
    assert sum(context.left_chunks == -1 for context in sized) / len(sized) == pytest.approx(config.all_left_prob, abs=0.04)


def test_equal_generators_draw_equal_contexts():
    config = ChunkConfig()
    assert [draw_context(config, seeded(i)) for i in range(50)] == [draw_context(config, seeded(i)) for i in range(50)]
    assert draw_context(ChunkConfig(full_prob=1.0), seeded()) == Context()
    assert draw_context(ChunkConfig(full_prob=0.0, deployed_prob=1.0), seeded()) == Context(16, 4)
