"""CKA against n x n Gram matrices, and the monitor that keeps the registry."""

import json

import pytest
import torch
from tiny import noise_batch, tiny_model

from nim4.config import CkaConfig
from nim4.model.checkpoint import read_weights
from nim4.stage import file_hash
from nim4.train.cka import CkaMonitor, PooledCka, plot_registry, read_registry, take_frames


def views(n=40, d1=6, d2=9, seed=0):
    """Two related views with large means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d1, generator=generator, dtype=torch.float64) + 3
    y = x @ torch.randn(d1, d2, generator=generator, dtype=torch.float64) + torch.randn(n, d2, generator=generator, dtype=torch.float64) - 5
    return x, y


def hsic(k, m, unbiased):
    """HSIC of two Gram matrices, by the definitions."""
    n = len(k)
    if not unbiased:
        centring = torch.eye(n, dtype=k.dtype) - 1 / n
        return (k @ centring @ m @ centring).trace()
    k, m = k - k.diag().diag(), m - m.diag().diag()
    return ((k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))) / (n * (n - 3))


def naive_cka(x, y, unbiased):
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m, unbiased) / (hsic(k, k, unbiased) * hsic(m, m, unbiased)).sqrt())


def pooled(x, y, unbiased, pieces=1):
    cka = PooledCka(unbiased)
    for a, b in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
        cka.add(a, b)
    return cka.value()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 7, 40])
def test_equals_the_gram_matrices(unbiased, n):
    for seed in range(3):
        x, y = views(n, seed=seed)
        assert pooled(x, y, unbiased) == pytest.approx(naive_cka(x, y, unbiased), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_pieces_equal_the_whole(unbiased):
    x, y = views(50)
    assert pooled(x, y, unbiased, pieces=7) == pytest.approx(pooled(x, y, unbiased), rel=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_rotation_scale_and_shift_do_not_count(unbiased):
    x, y = views()
    rotation, _ = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert pooled(x, 7.5 * y @ rotation + 100, unbiased) == pytest.approx(pooled(x, y, unbiased), rel=1e-6)
    stretched = y @ torch.diag(torch.linspace(0.1, 10, 9, dtype=torch.float64))
    assert abs(pooled(x, stretched, unbiased) - pooled(x, y, unbiased)) > 0.01  # a shear does


@pytest.mark.parametrize("unbiased", [True, False])
def test_a_view_is_like_itself(unbiased):
    x, _ = views()
    assert pooled(x, x, unbiased) == pytest.approx(1.0, abs=1e-9)
    assert pooled(x.float(), -2 * x.float(), unbiased) == pytest.approx(1.0, abs=1e-6)


def test_independent_views_show_why_the_estimator_matters():
    generator = torch.Generator().manual_seed(0)
    values = {unbiased: [] for unbiased in (True, False)}
    for _ in range(10):
        x, y = torch.randn(2, 64, 128, generator=generator)
        for unbiased, found in values.items():
            found.append(pooled(x, y, unbiased))
    assert abs(sum(values[True]) / 10) < 0.05
    assert min(values[False]) > 0.5


def test_few_or_unequal_frames_are_refused():
    cka = PooledCka(True)
    with pytest.raises(ValueError, match="must be"):
        cka.add(torch.zeros(3, 2), torch.zeros(4, 2))
    cka.add(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 4 frames"):
        cka.value()


# ---------------------------------------------------------------------------------------------------------------- monitor

CONFIG = CkaConfig(threshold=0.9, start_fraction=0.2, every_fraction=0.1, max_frames=1000)  # of 20 steps: at 4, 6, 8 ... 20
BATCHES = [noise_batch([80, 50]), noise_batch([33], seed=1)]


def disturb(model, amount, seed):
    """Moves the last norm of the encoder, and with it the frames, by a known amount."""
    with torch.no_grad():
        weight = model.encoder.blocks[-1].norm.weight
        weight += amount * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def expected_frames(model):
    frames = []
    with torch.inference_mode():
        for batch in BATCHES:
            encoded, lens = model.encoder(model.normalise(batch.x), batch.x_lens)
            frames += [row[:length] for row, length in zip(encoded, lens.tolist(), strict=True)]
    return torch.cat(frames)


def test_the_registry(tmp_path):
    model = tiny_model(dropout=0.3)
    model.train()
    monitor = CkaMonitor(model, BATCHES, CONFIG, tmp_path, max_steps=20)
    monitor.resume(0)
    references = {}
    for step in range(1, 21):
        disturb(model, 2.0, step)
        monitor.after_step(step)
        model.eval()
        references[step] = expected_frames(model)
        model.train()
    rows = read_registry(tmp_path / "registry.jsonl")
    assert [row.step for row in rows] == list(range(4, 21, 2))
    reference, triggers = None, []
    for row in rows:
        if reference is None:
            assert (row.cka, row.ctc_agreement, row.trigger) == (None, None, True)
        else:
            assert row.cka == pytest.approx(naive_cka(references[row.step], references[reference], True), abs=1e-5)
            assert 0 < row.ctc_agreement <= 1
            assert row.trigger == (row.cka < CONFIG.threshold)
        reference = row.step if row.trigger else reference
        triggers.append(row.trigger)
        assert (row.path is not None) == (row.trigger or row.final) == (row.sha256 is not None)
        if row.path:
            assert row.sha256 == file_hash(tmp_path / row.path)
            assert set(read_weights(tmp_path / row.path)) == set(model.state_dict())
    assert 2 <= sum(triggers) < len(triggers) - 1  # both kinds were seen
    assert [row.final for row in rows] == [False] * 8 + [True]
    assert all(torch.equal(value, read_weights(tmp_path / rows[-1].path)[name]) for name, value in model.state_dict().items())
    assert model.training


def test_the_trigger_fires_below_its_threshold_and_not_at_it(tmp_path, monkeypatch):
    likeness = iter([0.95, 0.9, 0.8999, 0.9, 0.3])
    monkeypatch.setattr(PooledCka, "value", lambda self: next(likeness))
    monitor = CkaMonitor(tiny_model(), BATCHES, CONFIG, tmp_path, max_steps=100)  # at 20, 30, ...
    monitor.resume(0)
    for step in range(1, 71):
        monitor.after_step(step)
    rows = read_registry(tmp_path / "registry.jsonl")
    assert [(row.step, row.cka, row.trigger) for row in rows] == [
        (20, None, True),
        (30, 0.95, False),
        (40, 0.9, False),
        (50, 0.8999, True),
        (60, 0.9, False),
        (70, 0.3, True),
    ]
    assert not (tmp_path / "snapshots" / "step-30.safetensors").exists()


@pytest.mark.parametrize("killed_at", [3, 4, 7, 12, 20])
def test_resume_drops_later_rows_and_takes_up_the_reference(tmp_path, killed_at):
    def run(folder, first, last, config=CONFIG):
        model = tiny_model()
        for step in range(1, first):
            disturb(model, 2.0, step)
        monitor = CkaMonitor(model, BATCHES, config, folder, max_steps=20)
        monitor.resume(first - 1)
        for step in range(first, last + 1):
            disturb(model, 2.0, step)
            monitor.after_step(step)
        return (folder / "registry.jsonl").read_bytes()

    whole = run(tmp_path / "whole", 1, 20)
    run(tmp_path / "killed", 1, killed_at)
    resumed_from = killed_at // 3 * 3  # a checkpoint every 3 steps
    assert run(tmp_path / "killed", resumed_from + 1, 20) == whole


def test_frames_are_limited(tmp_path):
    monitor = CkaMonitor(tiny_model(), BATCHES, CkaConfig(max_frames=25), tmp_path, max_steps=1)
    frames, best = monitor._features()
    assert frames.shape == (25, 16)
    assert best.shape == (25,)
    assert torch.equal(frames, expected_frames(tiny_model())[:25])


def test_take_frames():
    assert len(take_frames(iter(BATCHES * 3), 40)) == 2  # 130 // 4 + 33 // 4 frames
    assert len(take_frames(iter(BATCHES), 10_000)) == 2


def test_plot(tmp_path):
    rows = [{"step": 4, "cka": None, "ctc_agreement": None, "trigger": True, "final": False}]
    rows.append({"step": 8, "cka": 0.7, "ctc_agreement": 0.9, "trigger": True, "final": True, "path": "x", "sha256": "y"})
    (tmp_path / "registry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_registry(tmp_path / "registry.jsonl", 0.975, tmp_path / "cka.png")
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")
    assert read_registry(tmp_path / "none.jsonl") == []
