"""Where somebody speaks: the one door to Silero's voice activity detector, and the rules that make segments of its probabilities.

    samples -> windows of 32 ms -> probability of speech -> started / stopped, the same for any split of the samples

Streams may be heard together (nim4/decode/together.py): alone, each window is far too little work for what it costs to ask for it.

The network is small: it is written out here, for 16 kHz, and its weights are read from the wheel of silero-vad without importing that
package, which would set torch's threads to one for everybody. Its own TorchScript takes twice the time, and keeps the state of one stream.
Source: silero-vad 6.2.3 (MIT), `silero_vad.jit` (the wheel's safetensors file holds weights of another version); rules: its VADIterator,
and ours where VadConfig says so.
"""

import functools
import importlib.util
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import RecipeError, VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ, checked_samples
from nim4.decode.together import Work, alone

WINDOW_SAMPLES = 512  # silero's, at 16 kHz
CONTEXT_SAMPLES = 64  # of the window before, which the network sees again
PIECE_SAMPLES = 32_000  # of a recording, at once, so that an hour is not copied, and others have a turn in between
MIN_QUIET = 0.01  # silero's get_speech_timestamps: whatever the threshold, a window of less probability is silent
QUIET_WINDOWS = 3  # ours: a cut is made in the middle of the quietest 96 ms, since single windows are quiet inside of stops, too


class _Silero(nn.Module):
    """Silero's network."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.ModuleList(nn.Conv1d(before, after, 3, stride=stride, padding=1) for before, after, stride in sizes)
        self.rnn = nn.LSTMCell(128, 128)
        self.decoder = nn.Conv1d(128, 1, 1)

    def forward(self, windows: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, N, 576) float32 samples and the states before them, two of (B, 128) -> (B, N) probabilities of speech, and the states behind."""
        spectrum = self.stft(F.pad(windows.flatten(0, 1)[:, None], (0, CONTEXT_SAMPLES), mode="reflect"))
        x = (spectrum[:, :129].square() + spectrum[:, 129:].square()).sqrt()
        for conv in self.encoder:
            x = conv(x).relu_()
        outputs = []
        for frame in x[..., 0].unflatten(0, windows.shape[:2]).unbind(1):
            state = self.rnn(frame, state)
            outputs.append(state[0])
        x = torch.stack(outputs, 1).relu().flatten(0, 1)[..., None]
        return self.decoder(x).sigmoid().view(windows.shape[:2]), state


@functools.cache
def _silero() -> _Silero:
    found = importlib.util.find_spec("silero_vad")
    if found is None or not found.submodule_search_locations:
        raise RecipeError("silero-vad", expected="it to be installed", found="no such package", fix="pip install silero-vad==6.2.3")
    path = Path(found.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    if not path.is_file():
        raise RecipeError(path, expected="the weights of silero-vad 6.2.3", found="no such file", fix="pip install silero-vad==6.2.3")
    weights = {}
    for name, tensor in torch.jit.load(path, map_location="cpu").state_dict().items():
        if name.startswith("_model."):  # the other one is for 8 kHz
            name = name.removeprefix("_model.").replace("forward_basis_buffer", "weight").replace("reparam_conv.", "")
            weights[name.replace("decoder.rnn", "rnn").replace("decoder.decoder.2", "decoder")] = tensor
    network = _Silero()
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Probe:
    """Windows of a stream, (N, 576) float32, in which somebody may speak, and the state before them."""

    order: ClassVar[int] = 0

    windows: Tensor
    state: tuple[Tensor, Tensor]

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return Probe, len(self.windows)

    @staticmethod
    def together(probes: Sequence["Probe"]) -> list[tuple[list[float], tuple[Tensor, Tensor]]]:
        """Probabilities of speech, and the state behind."""
        state = (torch.cat([probe.state[part] for probe in probes]) for part in (0, 1))
        probabilities, (first, second) = _silero()(torch.stack([probe.windows for probe in probes]), tuple(state))
        return list(zip(probabilities.tolist(), zip(first.split(1), second.split(1), strict=True), strict=True))


class SpeechProbability:
    """Probability of speech in each window of a stream, on the CPU.

    Raises:
        RecipeError: if silero-vad is not installed.
    """

    def __init__(self) -> None:
        _silero()
        self._context = torch.zeros(CONTEXT_SAMPLES)
        self._state = (torch.zeros(1, 128), torch.zeros(1, 128))

    def hear(self, windows: Tensor) -> Work[list[float]]:
        """Takes the next (N, 512) float32 samples in [-1, 1] at 16 kHz, N at least 1."""
        before = torch.cat([self._context[None], windows[:-1, -CONTEXT_SAMPLES:]])
        self._context = windows[-1, -CONTEXT_SAMPLES:].clone()
        probabilities, self._state = yield Probe(torch.cat([before, windows], 1), self._state)
        return probabilities


@dataclass(frozen=True)
class VadEvent:
    """Speech started or stopped at a sample, counted from the start of the stream, padding included."""

    kind: Literal["speech_started", "speech_stopped"]
    sample: int


class VoiceActivity:
    """Segments of speech in one stream, as its samples come.

    Events alternate, begin with speech_started, and their samples never fall; a segment that becomes too long is stopped at its quietest
    late point, and the next one starts at the same sample. `finish` stops what is going on. Less than a window of samples is kept.

    Raises:
        RecipeError: if silero-vad is not installed, or a setting is out of its range.
    """

    def __init__(self, config: VadConfig | None = None):
        self._config = config = config or VadConfig()
        check(config)
        self._probability = SpeechProbability()
        self._waiting = torch.zeros(0)  # less than a window
        self._padding, self._max = samples_of(config.padding_s), samples_of(config.max_segment_s)
        self._padding_behind = min(self._padding, samples_of(config.min_silence_s))
        self._heard = 0  # samples in whole windows
        self._stopped = 0  # where the last segment ended
        self._candidate: int | None = None  # where speech may have begun, while that is not yet sure
        self._start: int | None = None  # of the segment that is going on
        self._silence: int | None = None  # where it became silent in it
        self._energies: list[float] = []  # of the last few windows
        self._first_cut = 0  # where the segment may be cut at the earliest
        self._quietest = (0.0, 0)  # energy and place of the best cut so far
        self._finished = False

    @property
    def speaking(self) -> bool:
        """Whether a segment is going on."""
        return self._start is not None

    @property
    def settled(self) -> int:
        """No event to come is before this sample: in a segment, all up to here is of it; outside, of none."""
        if self._start is None:
            return max(self._stopped, (self._heard if self._candidate is None else self._candidate) - self._padding)
        silence = self._heard if self._silence is None else self._silence + self._padding_behind
        return min(self._heard, silence, self._quietest[1])

    def push(self, samples: np.ndarray) -> list[VadEvent]:
        """The events that (N,) float32 samples in [-1, 1] at 16 kHz complete.

        Raises:
            ValueError: if they are of another shape, type or scale; the stream goes on without them.
            RuntimeError: after `finish`.
        """
        return alone(self.pushing(samples))

    def finish(self) -> list[VadEvent]:
        """The events that the end of the stream completes."""
        return alone(self.finishing())

    def pushing(self, samples: np.ndarray) -> Work[list[VadEvent]]:
        """`push` as work for nim4/decode/together.py."""
        if self._finished:
            raise RuntimeError("push() came after finish(): a new stream needs a new VoiceActivity")
        x = torch.cat([self._waiting, checked_samples(samples, SAMPLING_RATE_HZ)])
        whole = len(x) - len(x) % WINDOW_SAMPLES
        self._waiting = x[whole:].clone()
        return (yield from self._hear_all(x[:whole]))

    def finishing(self) -> Work[list[VadEvent]]:
        """`finish` as such work."""
        if self._finished:
            raise RuntimeError("finish() came twice: a new stream needs a new VoiceActivity")
        self._finished = True
        total = self._heard + len(self._waiting)
        events = yield from self._hear_all(F.pad(self._waiting, (0, -len(self._waiting) % WINDOW_SAMPLES)))
        if self._start is not None:
            events.append(self._stop(self._heard if self._silence is None else self._silence + self._padding_behind))
        return [VadEvent(event.kind, min(event.sample, total)) for event in events]

    def _hear_all(self, samples: Tensor) -> Work[list[VadEvent]]:
        if not len(samples):
            return []
        windows = samples.view(-1, WINDOW_SAMPLES)
        probabilities = yield from self._probability.hear(windows)
        energies = windows.square().sum(1).tolist()
        return [event for energy, probability in zip(energies, probabilities, strict=True) for event in self._hear(energy, probability)]

    def _hear(self, energy: float, probability: float) -> list[VadEvent]:
        config, start = self._config, self._heard
        self._heard += WINDOW_SAMPLES
        self._energies = [*self._energies[1 - QUIET_WINDOWS :], energy]
        if self._start is None:
            return self._outside(start, probability >= config.threshold)
        if probability >= config.threshold:
            self._silence = None
        elif self._silence is None and probability < max(config.threshold - config.hysteresis, MIN_QUIET):
            self._silence = start
        return self._inside()

    def _outside(self, start: int, is_speech: bool) -> list[VadEvent]:
        if not is_speech:
            self._candidate = None
            return []
        self._candidate = start if self._candidate is None else self._candidate
        if self._heard - self._candidate < samples_of(self._config.min_speech_s):
            return []
        event = self._begin(max(self._stopped, self._candidate - self._padding))
        return [event, *self._inside()]

    def _inside(self) -> list[VadEvent]:
        if self._silence is not None and self._heard - self._silence >= samples_of(self._config.min_silence_s):
            return [self._stop(self._silence + self._padding_behind)]
        energy, cut = sum(self._energies), self._heard - QUIET_WINDOWS * WINDOW_SAMPLES // 2
        if cut >= self._first_cut and energy <= self._quietest[0]:
            self._quietest = (energy, cut)
        if self._heard + WINDOW_SAMPLES - self._start <= self._max:
            return []
        cut, silence = self._quietest[1], self._silence
        if silence is not None and cut >= silence:  # it was about to end: nothing but silence is behind the cut
            return [self._stop(min(cut, silence + self._padding_behind))]
        stopped = self._stop(cut)
        started = self._begin(cut)
        self._silence = silence
        return [stopped, started]

    def _begin(self, sample: int) -> VadEvent:
        self._start, self._candidate, self._silence = sample, None, None
        self._first_cut = sample + self._max - samples_of(self._config.cut_search_s)
        self._quietest = (float("inf"), self._first_cut)
        return VadEvent("speech_started", sample)

    def _stop(self, sample: int) -> VadEvent:
        self._start, self._stopped = None, min(sample, self._heard)
        return VadEvent("speech_stopped", self._stopped)


def segments(samples: np.ndarray, config: VadConfig | None = None) -> list[tuple[int, int]]:
    """Where somebody speaks in a whole recording: (start, end) in samples, end exclusive, in order and without overlap.

    Args:
        samples: (N,) float32 in [-1, 1] at 16 kHz; N may be 0.
    Raises:
        ValueError, RecipeError: as VoiceActivity.
    """
    return [place for found in segments_by_piece(samples, config) for place in found]


def segments_by_piece(samples: np.ndarray, config: VadConfig | None = None) -> Iterator[list[tuple[int, int]]]:
    """The same, as they are found: those that each PIECE_SAMPLES of the recording complete, and those that its end does."""
    activity, start = VoiceActivity(config), 0
    for place in range(0, len(samples) + PIECE_SAMPLES, PIECE_SAMPLES):
        found = []
        for event in activity.push(samples[place : place + PIECE_SAMPLES]) if place < len(samples) else activity.finish():
            if event.kind == "speech_started":
                start = event.sample
            elif start < event.sample:
                found.append((start, event.sample))
        yield found


def samples_of(seconds: float) -> int:
    """Samples of a duration."""
    return round(seconds * SAMPLING_RATE_HZ)


def check(config: VadConfig) -> None:
    """Raises RecipeError if a setting is out of its range."""
    quiet_s = QUIET_WINDOWS * WINDOW_SAMPLES / SAMPLING_RATE_HZ
    for name, expected, is_good in (
        ("threshold", "0 to 1", 0 <= config.threshold <= 1),
        ("hysteresis", "0 to 1", 0 <= config.hysteresis <= 1),
        ("min_speech_s", "0 to 1", 0 <= config.min_speech_s <= 1),
        ("min_silence_s", "0.032 to 10", 0.032 <= config.min_silence_s <= 10),
        ("max_segment_s", "2 to 60", 2 <= config.max_segment_s <= 60),
        ("padding_s", f"0 to {config.max_segment_s / 4:g}, a quarter of max_segment_s", 0 <= config.padding_s <= config.max_segment_s / 4),
        ("cut_search_s", f"{2 * quiet_s:g} to half of max_segment_s", 2 * quiet_s <= config.cut_search_s <= config.max_segment_s / 2),
    ):
        if not is_good:
            raise RecipeError(f"vad.{name}", expected=expected, found=getattr(config, name), fix="correct it, or leave it out")
