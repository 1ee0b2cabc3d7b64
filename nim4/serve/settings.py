"""What a client may set, and what is wrong with it: fields of a stream, ours and where OpenAI's session messages have them, and of an upload."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.decode.encoder import ENCODER_FRAME_MS
from nim4.decode.hotword_hints import MAX_HINTS
from nim4.decode.streaming import DEPLOYED
from nim4.serve.limits import Refused
from nim4.serve.service import MODEL_NAME, Reception

MAX_HOTWORD_CHARS = 50  # ours: a hint is a name
LANGUAGES = ("zh", "en")
TRANSCRIPTIONS = ("audio.input.transcription.", "input_audio_transcription.")  # of today's messages, and of those before them
OBJECTS = {"audio", "audio.input", "audio.input.format", *(name.rstrip(".") for name in TRANSCRIPTIONS)}
FIXED: dict[str, Any] = {  # what OpenAI's clients may say, when they say what is so
    "type": "transcription",
    "input_audio_format": "pcm16",
    "audio.input.format.type": "audio/pcm",
    "audio.input.format.rate": SAMPLING_RATE_HZ,
    "input_audio_noise_reduction": None,
    "audio.input.noise_reduction": None,
}
TURN_DETECTIONS = ("turn_detection", "audio.input.turn_detection")
TURN_FIXED: dict[str, Any] = {"type": "server_vad", "create_response": False, "interrupt_response": False, "idle_timeout_ms": None}


@dataclass(frozen=True)
class TurnDetection:
    """How the server finds where somebody speaks, as OpenAI names it; the rest of VadConfig is the server's.

    Attributes:
        threshold: probability of speech, 0 to 1.
        prefix_padding_ms: of audio that is kept before speech.
        silence_duration_ms: of silence that ends an utterance.
    """

    type: str
    threshold: float
    prefix_padding_ms: int
    silence_duration_ms: int

    @classmethod
    def of(cls, vad: VadConfig) -> "TurnDetection":
        """That of a configuration."""
        return cls("server_vad", vad.threshold, round(1000 * vad.padding_s), round(1000 * vad.min_silence_s))

    def vad(self, rest: VadConfig) -> VadConfig:
        """The configuration, with the rest from another."""
        padding_s, min_silence_s = self.prefix_padding_ms / 1000, self.silence_duration_ms / 1000
        return replace(rest, threshold=self.threshold, padding_s=padding_s, min_silence_s=min_silence_s)


@dataclass(frozen=True)
class StreamSettings:
    """Of one stream; a change holds from the next utterance on.

    Attributes:
        turn_detection: how utterances are found; None: the client ends them.
        language: that the client says they speak; changes nothing, the model hears which it is.
        hotwords: hints by hand.
        index: name of the index in which hints are looked up.
        chunk_ms: audio between two partial texts.
        punctuation: whether texts have it.
    """

    turn_detection: TurnDetection | None
    language: str | None = None
    hotwords: tuple[str, ...] = ()
    index: str | None = None
    chunk_ms: int = DEPLOYED.chunk_frames * ENCODER_FRAME_MS
    punctuation: bool = True


def about(service: Reception) -> dict[str, Any]:
    """What a client may set, and how much of it; `free_streams`: how many could begin now."""
    return {
        "model": MODEL_NAME,
        "indexes": list(service.indexes),
        "languages": LANGUAGES,
        "chunks_ms": list(service.chunks_ms),
        "max_hotwords": MAX_HINTS,
        "max_hotword_chars": MAX_HOTWORD_CHARS,
        "max_ahead_s": service.limits.max_ahead_s,
        "free_streams": max(service.limits.max_sessions - len(service.streams), 0),
    }


def changed(settings: StreamSettings, session: Any, service: Reception) -> StreamSettings:
    """The settings after a session message; what it does not name stays.

    Args:
        session: as it came: our fields, or OpenAI's.
    Raises:
        Refused: if something is unknown or wrong; then nothing changes.
    """
    if not isinstance(session, dict):
        raise Refused(400, "invalid_value", "session must be an object", "session")
    new: dict[str, Any] = {}
    for name, value in _flat(session):
        inner = name
        for prefix in TRANSCRIPTIONS:
            inner = inner.removeprefix(prefix)
        if name in FIXED:
            if value != FIXED[name]:
                raise Refused(400, "unsupported_value", f"{name} must be {FIXED[name] or 'null'}", name)
        elif name in TURN_DETECTIONS:
            new["turn_detection"] = checked_turn_detection(value, name, service.vad)
        elif inner == "language":
            new["language"] = checked_language(value)
        elif inner == "model":
            service.check_model(value)
        elif inner == "prompt" and inner != name:
            new["hotwords"] = hints_of(value)
        elif name == "hotwords":
            new["hotwords"] = checked_hotwords(value, name)
        elif name == "index":
            service.index(value)
            new["index"] = value or None
        elif name == "chunk_ms":
            if value not in service.chunks_ms:
                raise Refused(400, "invalid_value", f"chunk_ms must be one of {', '.join(map(str, service.chunks_ms))}", name)
            new["chunk_ms"] = int(value)
        elif name == "punctuation":
            if not isinstance(value, bool):
                raise Refused(400, "invalid_value", "punctuation must be true or false", name)
            new["punctuation"] = value
        else:
            raise Refused(400, "unknown_parameter", "session has a field that this server does not know, see docs/serving.md", name[:100])
    return replace(settings, **new)


def checked_turn_detection(value: Any, param: str, server: VadConfig) -> TurnDetection | None:
    """How utterances are found: null, or OpenAI's object; what it does not name is as the server has it. Raises Refused."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Refused(400, "invalid_value", f"{param} must be an object or null", param)
    bounds = {"threshold": (0, 1), "prefix_padding_ms": (0, 250 * server.max_segment_s), "silence_duration_ms": (32, 10_000)}  # of vad.check
    given: dict[str, Any] = {}
    for name, number in value.items():
        where = f"{param}.{name}"[:100]
        if name in TURN_FIXED:
            if number != TURN_FIXED[name]:
                raise Refused(400, "unsupported_value", f"{where} must be {json.dumps(TURN_FIXED[name])}", where)
        elif name not in bounds:
            raise Refused(400, "unknown_parameter", "turn detection has a field that this server does not know, see docs/serving.md", where)
        elif isinstance(number, bool) or not isinstance(number, int | float) or not bounds[name][0] <= number <= bounds[name][1]:
            raise Refused(400, "invalid_value", f"{where} must be a number from {bounds[name][0]:g} to {bounds[name][1]:g}", where)
        else:
            given[name] = number
    return replace(TurnDetection.of(server), **given)


def hints_of(prompt: Any) -> tuple[str, ...]:
    """A prompt in OpenAI's interface as hotwords: what stands between commas and line breaks. Raises Refused as checked_hotwords."""
    if not isinstance(prompt, str):
        raise Refused(400, "invalid_value", "prompt must be a text: hotwords, separated by commas", "prompt")
    return checked_hotwords([word for word in re.split(r"[,\uff0c\u3001\n]", prompt) if word.strip()], "prompt")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + key
        if name in OBJECTS and isinstance(value, dict):
            yield from _flat(value, name + ".")
        elif value is not None or name not in OBJECTS:
            yield name, value


def checked_hotwords(words: Iterable[Any], param: str) -> tuple[str, ...]:
    """Hints given by hand, each once. Raises Refused for what is no list of short texts, or too long."""
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise Refused(400, "invalid_value", f"{param} must be a list of texts", param)
    if len(words) > MAX_HINTS:
        raise Refused(400, "too_many_hotwords", f"at most {MAX_HINTS} hotwords, not {len(words)}: more belong in an index", param)
    if any(len(word) > MAX_HOTWORD_CHARS for word in words):
        raise Refused(400, "hotword_too_long", f"a hotword has at most {MAX_HOTWORD_CHARS} characters", param)
    if not all(word.strip().isprintable() for word in words):
        raise Refused(400, "invalid_value", f"{param} must be printable", param)
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip()))


def checked_language(language: Any) -> str | None:
    """The language a client says they speak; the model hears by itself which it is. Raises Refused for one it was not made for."""
    if language not in (None, "", *LANGUAGES):
        raise Refused(400, "unsupported_language", f"language must be one of {', '.join(LANGUAGES)}, or be left out", "language")
    return language or None
