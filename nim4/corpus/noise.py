"""Recorded noise and silence in training utterances: on their features, in the data workers.

With probability `prob` an utterance gets silence at both ends, and then noise over all of it, so that the silence is as noisy as the
speech (paper, section 4). With `empty_prob` it is replaced by noise alone, from louder than the speech to next to nothing, and its
transcript becomes empty: a model that has only ever heard speech finds words in everything. What happens to an utterance follows from
(seed, epoch, id) alone, whichever process asks and however often, so runs resume exactly.

Mixing adds Mel powers, log(exp(x) + g noise), as lhotse's feature mixer does, which sets the ratio from summed energies, so that it shifts
with the length of the clip. Here it is the ratio of mean powers. Clips are kept as powers, and the arithmetic is numpy's: on arrays this
small torch's threads would mostly wait for each other.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lhotse import MonoCut
from torch import Tensor

from nim4.config import NoiseConfig, RecipeError
from nim4.corpus.feats import FRAME_SHIFT_S, load_features
from nim4.corpus.manifest import SUFFIX, Source, load_cuts

SILENCE = float(np.finfo(np.float32).eps)  # Mel power of digital silence, the floor of all features
NOISE_ALONE_DB = (-10.0, 40.0)  # ours: how far below the utterance it replaces, drawn evenly
TALKERS = (3, 7)  # ours: voices of one babble, as in Kaldi's recipes for MUSAN
MAX_KEPT_FRAMES = 500_000  # of clips kept in memory, 160 MB; beyond them a clip is read each time it is drawn


@dataclass(frozen=True)
class Fate:
    """What happens to one utterance in one epoch.

    Attributes:
        is_speech: False where noise takes the utterance's place.
        left_frames, right_frames: silence before and after it.
        snr_db: ratio of the utterance's mean power to the noise's.
        rng: decides the clip and the place in it.
    """

    is_speech: bool
    left_frames: int
    right_frames: int
    snr_db: float
    rng: random.Random


def excerpt(clip: np.ndarray, num_frames: int, rng: random.Random) -> np.ndarray:
    """`num_frames` frames from somewhere in a clip (T, 80); one that is too short goes round and round."""
    if len(clip) >= num_frames:
        start = rng.randrange(len(clip) - num_frames + 1)
        return clip[start : start + num_frames]
    return clip[(np.arange(num_frames) + rng.randrange(len(clip))) % len(clip)]


def mix(x: np.ndarray, noise: np.ndarray, snr_db: float, left_frames: int = 0, right_frames: int = 0) -> np.ndarray:
    """An utterance between silences, under noise.

    Args:
        x: (T, 80) float32, natural-log Mel energies.
        noise: (left_frames + T + right_frames, 80) float32, Mel powers.
        snr_db: mean power of `x`, without the silence, over that of the noise.
    Returns:
        (left_frames + T + right_frames, 80) float32, natural-log Mel energies.
    """
    assert len(noise) == left_frames + len(x) + right_frames, (noise.shape, x.shape)
    power = np.exp(x)
    mixed = gain(power, noise, snr_db) * noise
    mixed[left_frames : left_frames + len(x)] += power
    return np.log(np.maximum(mixed, SILENCE, out=mixed), out=mixed)


def gain(power: np.ndarray, noise: np.ndarray, snr_db: float) -> np.float32:
    """What to multiply the Mel powers of a noise by, so that it is `snr_db` below those of an utterance."""
    return np.float32(power.mean() / noise.mean() * 10 ** (-snr_db / 10))


class Noise:
    """The noise of a training run.

    Args:
        sources: manifests with features. A split is taken as often as its weight says, then one of its clips. Of a split named
            babble* several voices speak at once; noise alone comes from splits named noise* only, since music may be sung.
        config: how often and how loud.
        seed: of the training.
    Raises:
        RecipeError: if a probability or a width of the config is impossible, or a manifest cannot be read.
    """

    def __init__(self, sources: Sequence[Source], config: NoiseConfig, seed: int):
        _check(config)
        self._config, self._seed = config, seed
        self._splits = [(source.path.name.removesuffix(SUFFIX), list(load_cuts(source.path)), source.weight) for source in sources]
        self._wordless = [split for split in self._splits if split[0].startswith("noise")]
        self._kept: dict[int, np.ndarray] = {}  # by identity of the clip: ids of two corpora may be equal
        self._num_kept_frames = 0
        self.num_clips = sum(len(clips) for _, clips, _ in self._splits)

    def fate(self, epoch: int, utterance_id: str) -> Fate | None:
        """What happens to an utterance in an epoch; None: nothing."""
        config, rng = self._config, random.Random(f"{self._seed} {epoch} {utterance_id}")
        drawn = rng.random()
        if drawn < config.empty_prob:
            return Fate(False, 0, 0, rng.uniform(*NOISE_ALONE_DB), rng)
        if drawn < config.empty_prob + config.prob:
            left, right = (round(config.silence_s * rng.betavariate(*config.beta) / FRAME_SHIFT_S) for _ in range(2))
            return Fate(True, left, right, rng.gauss(*config.snr_db), rng)
        return None

    def added_s(self, epoch: int, utterance_id: str) -> float:
        """Seconds of silence that `disturb` will add."""
        fate = self.fate(epoch, utterance_id)
        return 0.0 if fate is None else (fate.left_frames + fate.right_frames) * FRAME_SHIFT_S

    def disturb(self, epoch: int, utterance_id: str, x: Tensor) -> tuple[Tensor, bool]:
        """The features of an utterance as they are heard in an epoch.

        Args:
            x: (T, 80) float32.
        Returns:
            (T', 80) float32, T' >= T, and whether the utterance is in it: if not, its transcript is empty.
        Raises:
            RecipeError: if the features of a clip cannot be read.
        """
        fate = self.fate(epoch, utterance_id)
        if fate is None:
            return x, True
        num_frames = fate.left_frames + len(x) + fate.right_frames
        splits = self._splits if fate.is_speech else self._wordless
        if not splits:  # only music and babble: what is left is silence
            return torch.full_like(x, math.log(SILENCE)), False
        noise = self._draw_noise(splits, num_frames, fate.rng)
        if fate.is_speech:
            return torch.from_numpy(mix(x.numpy(), noise, fate.snr_db, fate.left_frames, fate.right_frames)), True
        return torch.from_numpy(np.log(np.maximum(gain(np.exp(x.numpy()), noise, fate.snr_db) * noise, SILENCE))), False

    def _draw_noise(self, splits: Sequence[tuple[str, list[MonoCut], float]], num_frames: int, rng: random.Random) -> np.ndarray:
        """(num_frames, 80) float32: Mel powers of one clip, or of several voices made equally loud."""
        name, clips, _ = rng.choices(splits, [weight for _, _, weight in splits])[0]
        if not name.startswith("babble"):
            return excerpt(self._powers(rng.choice(clips)), num_frames, rng)
        voices = [excerpt(self._powers(rng.choice(clips)), num_frames, rng) for _ in range(rng.randint(*TALKERS))]
        return np.sum([voice / voice.mean() for voice in voices], axis=0)

    def _powers(self, clip: MonoCut) -> np.ndarray:
        kept = self._kept.get(id(clip))
        if kept is None:
            kept = np.exp(load_features(clip).numpy())
            if self._num_kept_frames < MAX_KEPT_FRAMES:
                self._kept[id(clip)] = kept
                self._num_kept_frames += len(kept)
        return kept


def _check(config: NoiseConfig) -> None:
    """Raises RecipeError when the config asks for the impossible."""
    wrong = None
    for name in ("prob", "empty_prob"):
        if not 0 <= getattr(config, name) <= 1:
            wrong = name, "a probability", getattr(config, name)
    if wrong is None and config.prob + config.empty_prob > 1:
        wrong = "prob", "at most 1 together with empty_prob", config.prob
    if config.silence_s < 0:
        wrong = "silence_s", "0 or more", config.silence_s
    if min(config.beta) <= 0:
        wrong = "beta", "two positive numbers", list(config.beta)
    if config.snr_db[1] < 0:
        wrong = "snr_db", "a deviation of 0 or more", list(config.snr_db)
    if wrong:
        name, expected, found = wrong
        raise RecipeError(f"train.noise.{name}", expected=expected, found=found, fix="correct it in the training settings or in --set")
