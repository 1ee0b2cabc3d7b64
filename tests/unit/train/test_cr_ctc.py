"""The loss of stage 3: two views of one batch, and what they share."""

import math

import pytest
import torch
from tiny import noise_batch, tiny_model

from nim4.config import AugmentConfig, ChunkConfig, RecipeError, TrainConfig
from nim4.model.conformer import FULL_CONTEXT, Context
from nim4.model.ctc import consistency_loss, ctc_loss
from nim4.score.error_rate import edit_distance
from nim4.train import cr_ctc as module
from nim4.train.augment import time_warp
from nim4.train.cr_ctc import cr_ctc, spectral_entropy, validate
from nim4.train.loop import Draw

FILL = torch.full((80,), -8.0)
MASKS = {"max_time_mask_frames": 30, "time_warp_frames": 20}


def draw(step=0, seed=0):
    return Draw(step, torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(seed))


class Recorder(torch.nn.Module):
    """The tiny model; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.model, self.calls = tiny_model(), []

    def forward(self, x, x_lens, *contexts):
        self.calls.append((x.clone(), x_lens, *contexts))
        return self.model(x, x_lens, *contexts)


def test_two_views_share_warp_and_context_but_not_masks(monkeypatch):
    warped = []
    monkeypatch.setattr(module, "time_warp", lambda *args: warped.append(time_warp(*args)) or warped[-1])
    recorder, batch = Recorder(), noise_batch([200, 120])
    config = TrainConfig(augment=AugmentConfig(**MASKS), chunk=ChunkConfig(full_prob=0.0, deployed_prob=1.0))
    cr_ctc(FILL, config)(recorder, batch, draw())
    assert len(recorder.calls) == len(warped) == 1  # one forward of both views, one warp
    x, x_lens, context = recorder.calls[0]
    assert context == Context(16, 4)
    assert x_lens.tolist() == [200, 120, 200, 120]
    masked = x == FILL
    first, second = masked[:2], masked[2:]
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    both = ~(first | second)
    assert torch.equal(x[:2][both], x[2:][both])
    assert torch.equal(x[:2][both], warped[0][both])
    assert not torch.equal(warped[0], batch.x)


@torch.inference_mode()
def test_the_first_view_may_see_the_whole_utterance():
    recorder, batch = Recorder(), noise_batch([200, 120], phones=((2, 3, 2), (4,)))
    config = TrainConfig(augment=AugmentConfig(**MASKS), chunk=ChunkConfig(full_prob=0.0, deployed_prob=1.0), full_view=True)
    cr_ctc(FILL, config)(recorder, batch, draw())
    x, x_lens, *contexts = recorder.calls[0]
    assert contexts == [FULL_CONTEXT, Context(16, 4)]
    log_probs, lens = recorder.model(x, x_lens, *contexts)
    for view, context in ((slice(0, 2), FULL_CONTEXT), (slice(2, 4), Context(16, 4))):
        alone, alone_lens = recorder.model(x[view], x_lens[view], context)
        torch.testing.assert_close(log_probs[view], alone)
        assert torch.equal(lens[view], alone_lens)
    assert not torch.allclose(recorder.model(x[2:], x_lens[2:], FULL_CONTEXT)[0], log_probs[2:], atol=1e-3)


@torch.inference_mode()
def test_the_second_view_may_be_late():
    early = torch.randn(2, 12, 5).log_softmax(-1)
    late = torch.cat([torch.randn(2, 3, 5).log_softmax(-1), early[:, :9]], dim=1)
    lens = torch.tensor([12, 8])
    assert float(consistency_loss(torch.cat([early, late]), lens.repeat(2), delay=3)) == pytest.approx(0.0, abs=1e-6)
    assert float(consistency_loss(torch.cat([early, late]), lens.repeat(2))) > 1
    assert float(consistency_loss(torch.cat([late, early]), lens.repeat(2), delay=3)) > 1
    beyond = late.clone()
    beyond[1, 8:] = torch.randn(4, 5).log_softmax(-1)  # padding
    assert float(consistency_loss(torch.cat([early, beyond]), lens.repeat(2), delay=3)) == pytest.approx(0.0, abs=1e-6)


def test_a_delay_needs_two_contexts():
    with pytest.raises(RecipeError, match=r"train\.view_delay"):
        cr_ctc(FILL, TrainConfig(view_delay=4))


def test_plain_ctc_has_either_context():
    config = TrainConfig(cr_weight=0, augment=AugmentConfig(**MASKS), chunk=ChunkConfig(full_prob=0.0, deployed_prob=1.0), full_view=True)
    recorder = Recorder()
    for seed in range(20):
        cr_ctc(FILL, config)(recorder, noise_batch([60]), draw(seed=seed))
    contexts = [context for _, _, *given in recorder.calls for context in given]
    assert len(contexts) == 20
    assert 4 <= contexts.count(FULL_CONTEXT) == 20 - contexts.count(Context(16, 4)) <= 16


@torch.inference_mode()
def test_the_loss_is_mean_ctc_plus_alpha_times_consistency():
    recorder, batch = Recorder(), noise_batch([200, 120], phones=((2, 3, 2), (4,)))
    config = TrainConfig(augment=AugmentConfig(**MASKS), cr_weight=0.2, cr_warmup_steps=4)
    parts = cr_ctc(FILL, config)(recorder, batch, draw(step=3))
    log_probs, lens = recorder.model(*recorder.calls[0])
    views = [ctc_loss(log_probs[i : i + 2], lens[:2], batch.phones, batch.phone_lens) for i in (0, 2)]
    assert float(parts["ctc"]) == pytest.approx(float(sum(views)) / 2, rel=1e-5)
    assert float(parts["cr"]) == pytest.approx(float(consistency_loss(log_probs, lens)), rel=1e-5)
    assert float(parts["cr"]) > 0
    assert float(parts["loss"]) == pytest.approx(float(parts["ctc"] + 0.2 * 0.75 * parts["cr"]), rel=1e-6)


@pytest.mark.parametrize(("step", "warmup", "share"), [(0, 4, 0.0), (1, 4, 0.25), (4, 4, 1.0), (400, 4, 1.0), (0, 0, 0.0), (1, 0, 1.0)])
def test_alpha_is_ramped(step, warmup, share):
    config = TrainConfig(augment=AugmentConfig(**MASKS), cr_weight=0.5, cr_warmup_steps=warmup)
    parts = cr_ctc(FILL, config)(Recorder(), noise_batch([100]), draw(step))
    assert float(parts["loss"] - parts["ctc"]) == pytest.approx(0.5 * share * float(parts["cr"]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("cr_weight", "views", "ratio"), [(0.0, 1, 1.0), (0.2, 2, 2.5)])
def test_plain_ctc_has_one_view_and_ordinary_masks(monkeypatch, cr_weight, views, ratio):
    ratios = []
    monkeypatch.setattr(module, "mask", lambda x, x_lens, fill, config, ratio, generator: ratios.append(ratio) or x)
    recorder, batch = Recorder(), noise_batch([100, 80])
    parts = cr_ctc(FILL, TrainConfig(cr_weight=cr_weight, augment=AugmentConfig(**MASKS)))(recorder, batch, draw())
    assert ratios == [ratio]
    assert len(recorder.calls[0][0]) == 2 * views
    if views == 1:
        log_probs, lens = recorder.model(*recorder.calls[0])
        assert set(parts) == {"loss", "ctc"}
        assert float(parts["loss"]) == pytest.approx(float(ctc_loss(log_probs, lens, batch.phones, batch.phone_lens)), rel=1e-6)


@pytest.mark.parametrize("phones", [((),), ((2, 3), ())])
@pytest.mark.parametrize("cr_weight", [0.0, 0.2])
def test_an_utterance_in_which_nothing_is_said_trains(phones, cr_weight):
    """Also a batch of nothing else. The loss is finite, and falls to blanks."""
    batch = noise_batch([60, 90], phones=phones)
    model = tiny_model().train()
    config = TrainConfig(cr_weight=cr_weight, cr_warmup_steps=1, augment=AugmentConfig(**MASKS, time_stretch=0.2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(25):
        loss = cr_ctc(FILL, config)(model, batch, draw(step, seed=step))["loss"]
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    log_probs, lens = model.eval()(batch.x, batch.x_lens)
    silent = batch.phone_lens == 0
    assert (log_probs.argmax(-1)[silent][:, : int(lens.min())] == 0).all()


def test_padding_does_not_change_the_loss():
    config = TrainConfig(augment=AugmentConfig(num_time_masks=0, num_freq_masks=0, time_warp_frames=0), cr_warmup_steps=0)
    parts = []
    for lens in ([120, 90], [120, 90, 400]):
        batch = noise_batch(lens, phones=((2, 3), (4,)))
        batch.x[:2, 120:] = 1e3
        whole = noise_batch([120, 90])
        batch.x[:2, :120] = whole.x
        parts.append([cr_ctc(FILL, config)(Recorder(), _only(batch, 2), draw(step=1))[name] for name in ("ctc", "cr")])
    torch.testing.assert_close(torch.tensor(parts[0]), torch.tensor(parts[1]), atol=1e-4, rtol=1e-5)


def _only(batch, count):
    """The first utterances of a batch, with its padding."""
    tensors = {name: getattr(batch, name)[:count] for name in ("x", "x_lens", "phones", "phone_lens")}
    return type(batch)(ids=batch.ids[:count], **tensors)


@torch.inference_mode()
def test_validation_numbers():
    model = tiny_model()
    batches = [noise_batch([130, 90], seed=1, phones=((2, 3, 4), (5,))), noise_batch([60], seed=2)]
    numbers = validate(model, batches, torch.device("cpu"))
    errors = {Context(): 0, Context(16, 4): 0}
    frames, blanks, entropy = 0, 0, 0.0
    for batch in batches:
        for i, length in enumerate(batch.x_lens.tolist()):
            for context in errors:
                log_probs, _ = model(batch.x[i : i + 1, :length], batch.x_lens[i : i + 1], context)
                best = log_probs[0].argmax(-1).tolist()
                phones = [label for t, label in enumerate(best) if label and (t == 0 or label != best[t - 1])]
                errors[context] += edit_distance(batch.phones[i, : batch.phone_lens[i]].tolist(), phones)
                if context == Context():
                    frames, blanks = frames + len(best), blanks + best.count(0)
                    entropy -= float((log_probs.exp() * log_probs).sum())
    assert numbers["per"] == pytest.approx(100 * errors[Context()] / 6)
    assert numbers["per_streaming"] == pytest.approx(100 * errors[Context(16, 4)] / 6)
    assert numbers["score"] == pytest.approx((numbers["per"] + numbers["per_streaming"]) / 2)
    assert numbers["blank_share"] == pytest.approx(blanks / frames)
    assert numbers["entropy"] == pytest.approx(entropy / frames, rel=1e-4)
    assert 0 < numbers["nse"] < 1


def test_spectral_entropy():
    assert spectral_entropy(torch.eye(8).double(), 1000) == pytest.approx(1.0)
    assert spectral_entropy(torch.diag(torch.tensor([1.0] + [0.0] * 7)).double(), 1000) == pytest.approx(0.0, abs=1e-9)
    assert spectral_entropy(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double(), 1000) == pytest.approx(math.log(2) / math.log(4))
    assert spectral_entropy(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double(), 3) == pytest.approx(1.0)  # 3 frames span 2 directions
