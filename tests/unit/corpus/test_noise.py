"""Noise and silence in training: the ratio asked for, silence before noise, and chance that follows from seed, epoch and id alone."""

import math
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import INVENTORY, write_features

from nim4.config import NoiseConfig, OptimConfig, RecipeError
from nim4.corpus.batch import TrainBatches, phone_batches
from nim4.corpus.manifest import Source, load_cuts, save_cuts
from nim4.corpus.noise import Noise, excerpt, mix

LENS = [40 + 7 * (i * 13 % 30) for i in range(30)]
FLOOR = math.log(np.finfo(np.float32).eps)
OFTEN = NoiseConfig(prob=0.5, empty_prob=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train, and three splits of noise: of short clips, of long ones, and of voices."""
    folder = tmp_path_factory.mktemp("features")
    write_features(folder, "train", LENS)
    write_features(folder, "noise", [30, 80, 500], prefix="n")
    write_features(folder, "music", [400, 600], prefix="m")
    write_features(folder, "babble", [100] * 8, prefix="b")
    return folder


def make(folder, *splits, seed=0, **config):
    sources = [Source(folder / f"{name}.jsonl.gz", float(weight or 1)) for name, _, weight in (split.partition("=") for split in splits)]
    return Noise(sources, NoiseConfig(**config), seed)


def speech(num_frames=100, seed=3):
    return np.random.default_rng(seed).normal(-6, 2, (num_frames, 80)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 20.0])
@pytest.mark.parametrize("silence", [(0, 0), (40, 25)])
def test_the_ratio_is_the_one_asked_for(snr_db, silence):
    """Of the powers, whatever the levels, and without the silence: longer silence must not make the noise weaker."""
    x, power = speech(), np.exp(speech(100 + sum(silence), seed=4) + 5).astype(np.float32)
    left = silence[0]
    mixed = np.exp(mix(x, power, snr_db, *silence).astype(np.float64))
    mixed[left : left + 100] -= np.exp(x)
    assert 10 * math.log10(np.exp(x).mean() / mixed.mean()) == pytest.approx(snr_db, abs=0.01)
    shape = mixed / power / np.median(mixed / power)  # the noise keeps its shape, but where speech is so loud that float32 loses it
    assert (abs(shape - 1) < 0.01).mean() > 0.99


def test_silence_comes_before_noise():
    x, power = speech(), np.exp(speech(150, seed=4))
    mixed = mix(x, power, 10.0, 30, 20)
    assert mixed.shape == (150, 80)
    for silence in (mixed[:30], mixed[130:]):
        assert (silence > FLOOR + 0.1).mean() > 0.99  # noise is in it
        assert np.exp(silence).mean() == pytest.approx(np.exp(x).mean() / 10, rel=0.3)
    assert (mixed[30:130] >= x).all()
    assert mix(x, np.full_like(power, 1e-30), 400.0, 30, 20)[:30] == pytest.approx(FLOOR)  # digital silence, as features have it


def test_excerpts_are_anywhere_and_short_clips_go_round():
    clip = np.arange(50.0)[:, None].repeat(80, 1)
    starts = set()
    for seed in range(300):
        inside, around = (excerpt(clip, count, random.Random(seed))[:, 0] for count in (20, 120))
        starts.add(inside[0])
        assert np.array_equal(np.diff(inside), np.ones(19))
        assert set(np.diff(around)) == {1.0, -49.0}
        assert len(around) == 120
    assert starts == set(range(31))


# ----------------------------------------------------------------------------------------------------------------- chance


def test_shares_and_sizes_are_those_of_the_config(folder):
    noise = make(folder, "noise")
    fates = [noise.fate(0, f"u{i}") for i in range(20_000)]
    mixed = [fate for fate in fates if fate and fate.is_speech]
    alone = [fate for fate in fates if fate and not fate.is_speech]
    assert len(mixed) / len(fates) == pytest.approx(0.2, abs=0.01)
    assert len(alone) / len(fates) == pytest.approx(0.01, abs=0.003)
    ratios = np.array([fate.snr_db for fate in mixed])
    assert (ratios.mean(), ratios.std()) == (pytest.approx(10, abs=0.3), pytest.approx(5, abs=0.3))
    for frames in ([fate.left_frames for fate in mixed], [fate.right_frames for fate in mixed]):
        assert np.mean(frames) == pytest.approx(25, abs=1)  # Beta(1, 3) has mean 1/4 and deviation 0.19
        assert np.std(frames) == pytest.approx(19.4, abs=1)
        assert 0 <= min(frames) <= max(frames) <= 100
    assert not any(fate.left_frames or fate.right_frames for fate in alone)


def test_seed_epoch_and_id_decide_everything(folder):
    x = torch.from_numpy(speech())

    def heard(epoch, name, seed=0):
        return make(folder, "noise", "music", "babble", seed=seed, prob=1.0, empty_prob=0.0).disturb(epoch, name, x)[0]

    first = heard(1, "u1")
    noise = make(folder, "noise", "music", "babble", prob=1.0, empty_prob=0.0)
    for epoch, name in ((0, "u1"), (1, "u2"), (1, "u1"), (1, "u1")):  # whatever was asked before
        again = noise.disturb(epoch, name, x)[0]
    assert torch.equal(first, again)
    for other in (heard(2, "u1"), heard(1, "u2"), heard(1, "u1", seed=1)):
        assert first.shape != other.shape or not torch.equal(first, other)


def test_the_silence_announced_is_the_silence_added(folder):
    noise = make(folder, "noise", prob=0.6, empty_prob=0.2)
    for i, length in enumerate(LENS):
        x = torch.from_numpy(speech(length))
        y, is_speech = noise.disturb(0, f"u{i}", x)
        assert len(y) == length + round(100 * noise.added_s(0, f"u{i}"))
        assert is_speech or len(y) == length


def test_noise_alone_is_noise_and_never_song_or_speech(folder):
    x = torch.from_numpy(speech())
    levels = []
    for i in range(100):
        y, is_speech = make(folder, "noise", "music", "babble", prob=0.0, empty_prob=1.0).disturb(0, f"u{i}", x)
        assert not is_speech
        assert y.shape == x.shape
        assert y.min() >= FLOOR - 1e-5
        levels.append(10 * math.log10(x.exp().mean() / y.exp().mean()))
    assert min(levels) < -5
    assert max(levels) > 20
    y, is_speech = make(folder, "music", "babble", prob=0.0, empty_prob=1.0).disturb(0, "u", x)
    assert not is_speech
    assert (y == FLOOR).all()


def test_babble_is_several_voices(tmp_path):
    """Each clip is loud in a bin of its own."""
    write_features(tmp_path, "babble", [60] * 8, prefix="b")
    noise = make(tmp_path, "babble", prob=1.0, empty_prob=0.0, snr_db=(0.0, 0.0))
    for number, clip in enumerate(noise._splits[0][1]):
        power = np.full((60, 80), 1e-6, np.float32)
        power[:, 10 * number] = 1.0
        noise._kept[id(clip)] = power
    voices = Counter()
    for i in range(60):
        y, _ = noise.disturb(0, f"u{i}", torch.full((100, 80), -10.0))
        voices[int((y.exp().mean(0) > 2 * y.exp().mean(0).median()).sum())] += 1
    assert min(voices) >= 2  # the same voice may be drawn twice
    assert 6 <= max(voices) <= 7
    assert len(voices) >= 4


def test_splits_are_drawn_by_weight(folder):
    """Each split is one loud bin."""
    noise = make(folder, "noise=3", "music", prob=1.0, empty_prob=0.0)
    for number, (_, clips, _) in enumerate(noise._splits):
        for clip in clips:
            noise._kept[id(clip)] = np.eye(80, dtype=np.float32)[[number]] + 1e-6
    loudest = Counter(int(noise.disturb(0, f"u{i}", torch.full((5, 80), -10.0))[0].mean(0).argmax()) for i in range(1000))
    assert loudest[0] / 1000 == pytest.approx(0.75, abs=0.05)
    assert loudest[1] == 1000 - loudest[0]


@pytest.mark.parametrize(
    "config",
    [{"prob": 1.2}, {"empty_prob": -0.1}, {"prob": 0.9, "empty_prob": 0.2}, {"silence_s": -1.0}, {"beta": (0.0, 3.0)}, {"snr_db": (10.0, -1.0)}],
)
def test_impossible_settings_are_told(folder, config):
    with pytest.raises(RecipeError, match=rf"train\.noise\.{next(iter(config))}: expected "):
        make(folder, "noise", **config)


# ---------------------------------------------------------------------------------------------------------------- batches


def batches(folder, noise, **settings):
    place = {name: settings.pop(name) for name in ("rank", "world_size") if name in settings}
    defaults = {"max_duration_s": 6.0, "accum": 1, "seed": 0, "num_buckets": 3, "num_workers": 0, "short_first_epochs": 1}
    return TrainBatches(
        [Source(folder / "train.jsonl.gz")], phone_batches(INVENTORY, noise), OptimConfig(**(defaults | settings)), **place, noise=noise
    )


def taken(stream, count):
    return [(epoch, step, micro_batches[0]) for epoch, step, micro_batches in islice(stream, count)]


def assert_same(first, second):
    assert [place[:2] for place in first] == [place[:2] for place in second]
    for (*_, one), (*_, other) in zip(first, second, strict=True):
        assert one.ids == other.ids
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("x", "x_lens", "phones", "phone_lens"))


def test_without_noise_batches_are_untouched(folder):
    noise = make(folder, "noise", prob=0.0, empty_prob=0.0)
    assert_same(taken(batches(folder, noise).steps(), 25), taken(batches(folder, None).steps(), 25))


def test_batches_are_the_same_in_any_number_of_workers_and_from_any_place(folder):
    whole = taken(batches(folder, Noise([Source(folder / "noise.jsonl.gz")], OFTEN, 0)).steps(), 24)
    assert whole[-1][0] >= 2
    for num_workers in (0, 2):
        stream = batches(folder, Noise([Source(folder / "noise.jsonl.gz")], OFTEN, 0), num_workers=num_workers)
        for start in (0, 4, 15):
            epoch, step, _ = whole[start]
            assert_same(taken(stream.steps(epoch, step), 24 - start), whole[start:])


def test_an_utterance_is_heard_differently_in_each_epoch(folder):
    lens = {}
    noise = make(folder, "noise", prob=1.0, empty_prob=0.0)
    for epoch, _, batch in taken(batches(folder, noise).steps(), 40):
        for name, length in zip(batch.ids, batch.x_lens.tolist(), strict=True):
            lens.setdefault(name, {})[epoch] = length
    assert sum(len(set(found.values())) > 1 for found in lens.values()) > 20


def test_silence_counts_as_audio_of_the_batch(folder):
    found = []
    for prob in (0.0, 1.0):
        noise = make(folder, "noise", prob=prob, empty_prob=0.0, beta=(2.0, 2.0))
        frames = [batch.x.shape[0] * batch.x.shape[1] for *_, batch in taken(batches(folder, noise, short_first_epochs=0).steps(), 40)]
        found.append((np.mean(frames), np.max(frames)))
    assert found[1][0] < 1.1 * found[0][0], found
    assert found[1][1] < 1.4 * 600, found


def test_an_utterance_replaced_by_noise_has_no_phones(folder):
    phones = {cut.id: INVENTORY.encode(cut.supervisions[0].custom["phones"]) for cut in load_cuts(folder / "train.jsonl.gz")}
    noise, kinds = make(folder, "noise", prob=0.3, empty_prob=0.3), Counter()
    for epoch, _, batch in taken(batches(folder, noise).steps(), 40):
        for name, row, length in zip(batch.ids, batch.phones, batch.phone_lens.tolist(), strict=True):
            fate = noise.fate(epoch, name)
            said = fate is None or fate.is_speech
            kinds[said] += 1
            assert row[:length].tolist() == (phones[name] if said else [])
    assert min(kinds[True], kinds[False]) > 10


def test_a_clip_that_cannot_be_read_is_told(folder, tmp_path):
    clips = list(load_cuts(folder / "noise.jsonl.gz"))
    for clip in clips:
        clip.features.storage_path = str(tmp_path / "gone.lca")
    save_cuts(clips, tmp_path / "noise.jsonl.gz")
    for num_workers in (0, 1):
        stream = batches(folder, make(tmp_path, "noise", prob=1.0, empty_prob=0.0), num_workers=num_workers)
        with pytest.raises(RecipeError, match=r"features of n\d+: expected readable features"):
            next(stream.steps())


def test_clips_beyond_the_memory_are_read_again(folder, monkeypatch):
    x = torch.from_numpy(speech())
    kept = make(folder, "noise", prob=1.0, empty_prob=0.0)
    monkeypatch.setattr("nim4.corpus.noise.MAX_KEPT_FRAMES", 0)
    read = make(folder, "noise", prob=1.0, empty_prob=0.0)
    assert all(torch.equal(kept.disturb(0, f"u{i}", x)[0], read.disturb(0, f"u{i}", x)[0]) for i in range(10))
    assert not read._kept
