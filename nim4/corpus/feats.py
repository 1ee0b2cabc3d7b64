"""Features: 80-bin log-Mel energies, offline and streaming, and their global mean and variance.

One definition for the whole repository: 16 kHz mono samples in [-1, 1], 25 ms windows every 10 ms (povey window, pre-emphasis 0.97,
mean of each window removed), 80 mel bins from 20 Hz to 400 Hz below the Nyquist frequency, natural logarithm floored at float32's
epsilon, and no dither, so that the same samples always give the same frames. Windows are centred on their 10 ms (`snip_edges` False
in Kaldi's words): N samples give T = (N + 80) // 160 frames, and the signal is mirrored at both ends.

The arithmetic is lhotse's; `KaldiFbank` (kaldi-native-fbank) is an independent implementation that tests and benchmarks compare with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import lhotse
import numpy as np
import soundfile
import torch
from lhotse import Features, MonoCut
from lhotse.audio import AudioLoadingError, DurationMismatchError
from torch import Tensor

from nim4.config import RecipeError
from nim4.corpus import ffmpeg
from nim4.stage import read_json, write_json

SAMPLING_RATE_HZ = 16_000
NUM_MEL_BINS = 80
WINDOW_SAMPLES = 400
SHIFT_SAMPLES = 160
FRAME_SHIFT_S = 0.01
LEFT_MIRROR_SAMPLES = (WINDOW_SAMPLES - SHIFT_SAMPLES) // 2
MAX_ABS_SAMPLE = 2.0  # resampling and speed perturbation overshoot 1.0 a little; int16 counts are far above
MIN_STD = 1e-3  # a mel bin that never changes is divided by this, not by zero

Array = TypeVar("Array", np.ndarray, Tensor)

# What reading audio may raise. Whoever reads a corpus lists such an utterance and goes on.
UNREADABLE = (AudioLoadingError, DurationMismatchError, soundfile.SoundFileError, OSError, ValueError, AssertionError)


def num_frames(num_samples: int) -> int:
    """Frames that `num_samples` samples give."""
    return (num_samples + SHIFT_SAMPLES // 2) // SHIFT_SAMPLES


def checked_samples(samples: np.ndarray | Tensor, sampling_rate_hz: int) -> Tensor:
    """The samples as (N,) float32, once it is sure that their scale and rate are ours.

    Raises:
        ValueError: if the rate is not 16 kHz, the shape not (N,), the type not floating, a value not finite or above 2 in size.
    """
    if sampling_rate_hz != SAMPLING_RATE_HZ:
        raise ValueError(f"samples must be at {SAMPLING_RATE_HZ} Hz, but are at {sampling_rate_hz} Hz: resample them first")
    samples = torch.as_tensor(samples)
    if samples.ndim != 1:
        raise ValueError(f"samples must have the shape (N,), but have {tuple(samples.shape)}: take one channel")
    if not samples.is_floating_point():
        raise ValueError(f"samples must be float in [-1, 1], but are {samples.dtype}: divide 16-bit samples by 32768")
    if samples.numel():
        peak = max(abs(float(end)) for end in samples.aminmax())  # of both, when a value is NaN; without a copy, hours take a gigabyte
        if not math.isfinite(peak):
            raise ValueError("samples must be finite, but some are not")
        if peak > MAX_ABS_SAMPLE:
            raise ValueError(f"samples must be in [-1, 1], but reach {peak:.6g}: divide 16-bit samples by 32768")
    return samples.to(torch.float32)


def read_samples(cut: MonoCut) -> np.ndarray:
    """The audio of a cut: (N,) float32 in [-1, 1] at 16 kHz. Raises one of UNREADABLE."""
    return checked_samples(cut.load_audio()[0], cut.sampling_rate).numpy()


def read_recording(path: Path) -> np.ndarray:
    """A whole audio file: (N,) float32 in [-1, 1] at 16 kHz, N at least 1, its channels averaged. Raises RecipeError when it cannot be read.

    What lhotse cannot read goes through ffmpeg, where that is installed.
    """
    expected, fix = "an audio file that can be read", "correct the path, or convert the file to WAV"
    if not path.is_file():
        raise RecipeError(path, expected=expected, found="no such file", fix=fix)
    try:
        try:
            samples = lhotse.Recording.from_file(path).resample(SAMPLING_RATE_HZ).load_audio().mean(0)
        except (AudioLoadingError, DurationMismatchError, soundfile.SoundFileError) as error:
            if not ffmpeg.installed():
                fix = "correct the path, convert the file to WAV, or install ffmpeg"
                raise ValueError("a kind that soundfile does not know, or a damaged file, and no ffmpeg") from error
            samples = ffmpeg.read_audio(path, SAMPLING_RATE_HZ)
        if not len(samples):
            raise ValueError("it holds no samples")
        return checked_samples(samples, SAMPLING_RATE_HZ).numpy()
    except UNREADABLE as error:
        unknown = isinstance(error, AudioLoadingError)  # whose message lists the attempts of every reader
        found = "none that an installed reader knows" if unknown else str(error).partition("\n")[0][:200] or type(error).__name__
        raise RecipeError(path, expected=expected, found=found, fix=fix) from error


def load_features(cut: MonoCut) -> Tensor:
    """The stored features of a cut: (T, 80) float32. Raises RecipeError, with the id, when they cannot be read."""
    try:
        return torch.from_numpy(cut.load_features())
    except Exception as error:  # the storage backends raise their own kinds; the id is what a user needs
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # lhotse adds the whole cut in further lines
        raise RecipeError(f"features of {cut.id}", expected="readable features", found=reason, fix="run stage 1 again") from error


class Fbank:
    """Frames of a whole signal, made on `device`; those of a GPU are equal to 1e-3.

    Source: the definition is Kaldi's compute-fbank-feats; lhotse's torch implementation does the work.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        config = lhotse.FbankConfig(
            sampling_rate=SAMPLING_RATE_HZ,
            frame_length=WINDOW_SAMPLES / SAMPLING_RATE_HZ,
            frame_shift=FRAME_SHIFT_S,
            num_filters=NUM_MEL_BINS,
            window_type="povey",
            low_freq=20.0,
            high_freq=-400.0,
            dither=0.0,
            snip_edges=False,
            device=str(device),
        )
        self.lhotse = lhotse.Fbank(config)

    def extract(self, samples: Array, sampling_rate_hz: int = SAMPLING_RATE_HZ) -> Array:
        """Log-Mel frames; a tensor for a tensor, an array for an array.

        Args:
            samples: (N,) float32 in [-1, 1]; N may be 0.
        Returns:
            (T, 80) float32, T = (N + 80) // 160.
        Raises:
            ValueError: if the samples are of another rate, shape, type or scale.
        """
        frames = self.frames_of_padded(mirrored(checked_samples(samples, sampling_rate_hz)))
        return frames.numpy() if isinstance(samples, np.ndarray) else frames

    def frames_of_padded(self, padded: Tensor) -> Tensor:
        """(N,) samples that need no more mirroring -> (T, 80), where they were: frame t starts at sample 160 t. (B, N) -> (B, T, 80)."""
        if padded.shape[-1] < WINDOW_SAMPLES:
            return torch.zeros(*padded.shape[:-1], 0, NUM_MEL_BINS)
        batch = padded.view(-1, padded.shape[-1]).to(self.lhotse.device)
        with torch.no_grad():  # of no context: the left edge has been dealt with
            frames, _ = self.lhotse.extractor.online_inference(batch, context=batch.new_zeros(len(batch), 0))
        return frames.view(*padded.shape[:-1], *frames.shape[1:]).to(padded.device)


def mirrored(samples: Tensor) -> Tensor:
    """(N,) samples with their mirrored edges, exactly as many as the windows of all T frames cover.

    A signal shorter than a mirrored edge is mirrored again and again, as Kaldi does.
    """
    total = samples.numel()
    count = num_frames(total)
    if count == 0:
        return samples.new_zeros(0)
    right = (count - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES - LEFT_MIRROR_SAMPLES - total  # 41 to 200
    if total >= max(LEFT_MIRROR_SAMPLES, right):
        return torch.cat((samples[:LEFT_MIRROR_SAMPLES].flip(0), samples, samples[-right:].flip(0)))
    index = torch.arange(-LEFT_MIRROR_SAMPLES, total + right)
    index = index.remainder(2 * total)  # ... 1 0 | 0 1 ... N-1 | N-1 ... has period 2 N
    return samples[torch.minimum(index, 2 * total - 1 - index)]


class StreamingFbank:
    """The frames of `Fbank`, to 1e-5, from samples that come piece by piece, however they are cut.

    A frame is returned as soon as its whole window has arrived, which ends 7.5 ms after the frame's own 10 ms; the last one or two
    wait for `finish`, because their windows are mirrored at the end. Fewer than 400 samples are kept between calls.
    """

    def __init__(self, fbank: Fbank | None = None, sampling_rate_hz: int = SAMPLING_RATE_HZ):
        self.fbank = fbank or Fbank()
        self._sampling_rate_hz = sampling_rate_hz
        self._waiting = torch.zeros(0)  # samples whose windows are not complete; begins with the mirrored edge once `_started`
        self._started = False  # False: fewer than a window of samples have come, and none is mirrored yet
        self._num_samples = 0
        self._num_frames = 0
        self._finished = False

    @property
    def num_waiting_samples(self) -> int:
        """Samples kept for frames to come."""
        return self._waiting.numel()

    def accept(self, samples: Array) -> Tensor:
        """The frames that these samples complete.

        Args:
            samples: (N,) float32 in [-1, 1], of any length, 0 included.
        Returns:
            (T, 80) float32, T >= 0.
        Raises:
            ValueError: as `Fbank.extract`.
            RuntimeError: after `finish`.
        """
        return self.done(self.fbank.frames_of_padded(self.ready(samples)))

    def finish(self) -> Tensor:
        """(T, 80) float32: the last frames, with the end of the signal mirrored. To be called once."""
        return self.done(self.fbank.frames_of_padded(self.ready_at_the_end()))

    def ready(self, samples: Array) -> Tensor:
        """The first half of `accept`: (N,) samples of which the caller makes frames, `fbank.frames_of_padded`, that `done` is to be told."""
        if self._finished:
            raise RuntimeError("accept() came after finish(): a new signal needs a new StreamingFbank")
        new = checked_samples(samples, self._sampling_rate_hz)
        self._num_samples += new.numel()
        self._waiting = torch.cat((self._waiting, new))
        if not self._started:
            if self._num_samples < WINDOW_SAMPLES:
                return torch.zeros(0)
            self._waiting = torch.cat((self._waiting[:LEFT_MIRROR_SAMPLES].flip(0), self._waiting))
            self._started = True
        return self._waiting

    def ready_at_the_end(self) -> Tensor:
        """The first half of `finish`, as `ready` is of `accept`."""
        if self._finished:
            raise RuntimeError("finish() came twice: a new signal needs a new StreamingFbank")
        self._finished, waiting, self._waiting = True, self._waiting, torch.zeros(0)
        if not self._started:
            return mirrored(waiting)
        missing = (num_frames(self._num_samples) - self._num_frames - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES - waiting.numel()
        return torch.cat((waiting, waiting[-missing:].flip(0)))

    def done(self, frames: Tensor) -> Tensor:
        """The second half: lets go of the samples that no frame to come needs; returns the frames."""
        self._num_frames += len(frames)
        self._waiting = self._waiting[len(frames) * SHIFT_SAMPLES :].clone()
        return frames


class KaldiFbank:
    """The same features by kaldi-native-fbank: a reference that shares no code with `Fbank`. Equal to 1e-3 (mean 1e-5)."""

    def __init__(self) -> None:
        try:
            import kaldi_native_fbank
        except ImportError as error:
            raise RecipeError(
                "kaldi-native-fbank", expected="it to be installed", found=error, fix="pip install kaldi-native-fbank==1.23.0"
            ) from error
        self._library = kaldi_native_fbank
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = SAMPLING_RATE_HZ
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.frame_opts.window_type = "povey"
        options.mel_opts.num_bins = NUM_MEL_BINS
        options.mel_opts.low_freq = 20.0
        options.mel_opts.high_freq = -400.0
        self._options = options

    def extract(self, samples: np.ndarray, push_samples: int | None = None) -> np.ndarray:
        """(N,) float32 in [-1, 1] -> (T, 80) float32; `push_samples` at a time, or all at once."""
        online = self._library.OnlineFbank(self._options)
        step = push_samples or max(len(samples), 1)
        frames = []
        for start in range(0, len(samples), step):
            online.accept_waveform(SAMPLING_RATE_HZ, samples[start : start + step])
            frames += [online.get_frame(i) for i in range(len(frames), online.num_frames_ready)]
        online.input_finished()
        frames += [online.get_frame(i) for i in range(len(frames), online.num_frames_ready)]
        return np.stack(frames) if frames else np.zeros((0, NUM_MEL_BINS), np.float32)


# ---------------------------------------------------------------------------------------------------- mean and variance


@dataclass
class Cmvn:
    """Global mean and variance of the features, as sums, so that corpora can be merged."""

    num_frames: float = 0
    sum: np.ndarray = field(default_factory=lambda: np.zeros(NUM_MEL_BINS))  # (80,) float64
    sum_squares: np.ndarray = field(default_factory=lambda: np.zeros(NUM_MEL_BINS))  # (80,) float64

    def add(self, features: np.ndarray) -> None:
        """Counts (T, 80) frames; summed in float64."""
        frames = np.asarray(features, dtype=np.float64)
        self.num_frames += len(frames)
        self.sum = self.sum + frames.sum(axis=0)
        self.sum_squares = self.sum_squares + np.square(frames).sum(axis=0)

    @classmethod
    def merge(cls, parts: Sequence["Cmvn"], weights: Sequence[float] | None = None) -> "Cmvn":
        """The statistics of several sets together; a set of weight w counts as if it were w times as long."""
        weights = [1] * len(parts) if weights is None else list(weights)
        merged = cls()
        for part, weight in zip(parts, weights, strict=True):
            merged.num_frames += weight * part.num_frames
            merged.sum = merged.sum + weight * part.sum
            merged.sum_squares = merged.sum_squares + weight * part.sum_squares
        return merged

    @property
    def mean(self) -> Tensor:
        """(80,) float32. Raises ValueError while no frame has been counted."""
        if self.num_frames <= 0:
            raise ValueError("statistics must be of at least one frame, but are of none")
        return torch.from_numpy(self.sum / self.num_frames).to(torch.float32)

    @property
    def std(self) -> Tensor:
        """(80,) float32, at least 1e-3."""
        if self.num_frames <= 0:
            raise ValueError("statistics must be of at least one frame, but are of none")
        variance = self.sum_squares / self.num_frames - np.square(self.sum / self.num_frames)
        return torch.from_numpy(np.sqrt(np.maximum(variance, MIN_STD**2))).to(torch.float32)

    def apply(self, features: Array) -> Array:
        """(..., 80) features with mean 0 and variance 1; a tensor for a tensor, an array for an array."""
        if isinstance(features, np.ndarray):
            return (features - self.mean.numpy()) / self.std.numpy()
        return (features - self.mean.to(features)) / self.std.to(features)

    def save(self, path: Path) -> None:
        """Writes cmvn.json."""
        write_json(path, {"num_frames": self.num_frames, "sum": self.sum.tolist(), "sum_squares": self.sum_squares.tolist()})

    @classmethod
    def load(cls, path: Path) -> "Cmvn":
        """Reads cmvn.json. Raises RecipeError when it is missing, broken, empty or of another number of bins."""
        stored = read_json(path)
        try:
            cmvn = cls(float(stored["num_frames"]), np.array(stored["sum"], np.float64), np.array(stored["sum_squares"], np.float64))
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(path, expected="num_frames, sum and sum_squares", found=repr(error), fix="run stage 1 again") from error
        if cmvn.sum.shape != (NUM_MEL_BINS,) or cmvn.sum_squares.shape != (NUM_MEL_BINS,) or cmvn.num_frames <= 0:
            found = f"{cmvn.num_frames:.0f} frames of {cmvn.sum.shape} bins"
            raise RecipeError(path, expected=f"statistics of {NUM_MEL_BINS} bins", found=found, fix="run stage 1 again")
        return cmvn


# ------------------------------------------------------------------------------------------------------------ a whole corpus


@dataclass(frozen=True)
class Shard:
    """What `extract_shard` made."""

    cuts: list[MonoCut]  # with features
    unreadable: list[dict[str, str]]  # {"id", "path", "error"}
    cmvn: Cmvn
    audio_s: float


def extract_shard(cuts: Sequence[MonoCut], archive: Path) -> Shard:
    """Features of some cuts, stored in one file; audio that cannot be read is listed, and the rest goes on.

    One utterance and one thread at a time, so the result does not depend on how the work is shared out.

    Args:
        cuts: 16 kHz cuts with audio.
        archive: absolute path of the file to write, ending in .lca; its folder exists.
    """
    fbank, cmvn = Fbank(), Cmvn()
    done: list[MonoCut] = []
    unreadable: list[dict[str, str]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with lhotse.LilcomChunkyWriter(archive) as writer:
            for cut in cuts:
                try:
                    features = fbank.extract(read_samples(cut))
                    if len(features) == 0:
                        raise ValueError(f"{cut.num_samples} samples are too few for a frame")
                except UNREADABLE as error:
                    unreadable.append({"id": cut.id, "path": str(cut.recording.sources[0].source), "error": " ".join(f"{error!r}".split())[:300]})
                    continue
                cmvn.add(features)
                done.append(replace(cut, features=_stored(cut, features, writer)))
    finally:
        torch.set_num_threads(threads)
    return Shard(done, unreadable, cmvn, sum(cut.duration for cut in done))


def _stored(cut: MonoCut, features: np.ndarray, writer: lhotse.LilcomChunkyWriter) -> Features:
    return Features(
        recording_id=cut.recording.id,
        start=cut.start,
        duration=cut.duration,
        type="kaldi-fbank",
        num_frames=features.shape[0],
        num_features=features.shape[1],
        frame_shift=FRAME_SHIFT_S,
        sampling_rate=cut.sampling_rate,
        channels=cut.channel,
        storage_type=writer.name,
        storage_path=writer.storage_path,
        storage_key=writer.write(cut.id, features),
    )
