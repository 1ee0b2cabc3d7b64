"""Counters of the server in Prometheus' text format; each is touched by one thread only: the event loop's, `step_sessions` by the model's."""

from collections import defaultdict
from collections.abc import Callable, Mapping

PREFIX = "nim4_"
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.64, 1.0, 2.0, 5.0, 10.0)  # ours: fine below a chunk of 640 ms, where waiting is felt
FINE_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
COUNTERS = {
    "requests_total": "HTTP requests answered, by path and status",
    "sessions_total": "streams that began",
    "refused_total": "requests and streams turned away, by reason",
    "closed_total": "streams that ended, by close code; 1006: the client vanished",
    "audio_seconds_total": "seconds of audio recognised, by kind",
    "partials_total": "partial texts sent",
    "finals_total": "final texts sent",
    "errors_total": "error events sent in streams, by code",
    "aborted_total": "utterances given up before their final text, whose memory was freed",
    "no_room_total": "texts and chunks for which an engine had no room; of a gateway",
    "streams_moved_total": "utterances that went on in another engine; of a gateway",
    "replicas_lost_total": "servers and engines that failed, by part; of a gateway",
    "chunks_again_total": "chunks that another server or engine had to read again, by part; of a gateway",
}
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HISTOGRAMS = {
    "chunk_seconds": (BUCKETS_S, "from the arrival of a chunk's last sample to its text, seconds"),
    "final_seconds": (BUCKETS_S, "from the end of speech to the final text, seconds"),
    "transcription_seconds": (BUCKETS_S, "a whole recording, waiting included, seconds"),
    "encode_seconds": (BUCKETS_S, "a chunk in the encoder, waiting included, seconds; of a gateway"),
    "retrieve_seconds": (FINE_BUCKETS_S, "looking up a chunk's hotwords, seconds; of a gateway"),
    "append_seconds": (BUCKETS_S, "a chunk read by the language model, seconds; of a gateway"),
    "partial_seconds": (BUCKETS_S, "a partial text written, seconds; of a gateway"),
    "write_seconds": (BUCKETS_S, "a final text written, seconds; of a gateway"),
    "step_sessions": (SIZES, "streams, and segments of uploads, that one step of the model served together"),
}
GAUGES = {"sessions": "streams that are open", "uploads": "recordings that are being read or recognised", "model_jobs": "jobs that wait or run"}


class Metrics:
    """All numbers of one server."""

    def __init__(self) -> None:
        self.gauges = dict.fromkeys(GAUGES, 0)
        self.more: Callable[[], Mapping[str, float]] = dict  # gauges of an engine, by name
        self._counts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in COUNTERS}
        self._observed: dict[str, list[int]] = {name: [0] * (len(bounds) + 1) for name, (bounds, _) in HISTOGRAMS.items()}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, name: str, amount: float = 1, **labels: object) -> None:
        """Adds to a counter of COUNTERS. Labels must come from a fixed set of values, never from a client."""
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        self._counts[name][f"{{{text}}}" if text else ""] += amount

    def observe(self, name: str, value: float) -> None:
        """Adds a duration or size to a histogram of HISTOGRAMS."""
        self._observed[name][sum(value > bound for bound in HISTOGRAMS[name][0])] += 1
        self._sums[name] += value

    def text(self) -> str:
        """What /metrics answers.

        Source: Prometheus exposition format, version 0.0.4.
        """
        lines = []
        for name, about in GAUGES.items():
            lines += [*_head(name, about, "gauge"), f"{PREFIX}{name} {self.gauges[name]}"]
        for name, value in self.more().items():
            lines += [*_head(name, "of the engine", "gauge"), f"{PREFIX}{name} {value:g}"]
        for name, about in COUNTERS.items():
            lines += _head(name, about, "counter")
            lines += [f"{PREFIX}{name}{labels} {value:g}" for labels, value in self._counts[name].items()]
        for name, (bounds, about) in HISTOGRAMS.items():
            lines += _head(name, about, "histogram")
            below = 0
            for bound, number in zip([*map(str, bounds), "+Inf"], self._observed[name], strict=True):
                below += number
                lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {below}')
            lines += [f"{PREFIX}{name}_sum {self._sums[name]:.6f}", f"{PREFIX}{name}_count {below}"]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]
