"""POST /v1/audio/transcriptions: a recording of any length that the limits allow, cut where nobody speaks, in the forms that OpenAI has."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, UNREADABLE, read_recording
from nim4.decode.recordings import Segment, as_srt, as_vtt, full_text
from nim4.serve.limits import Limits, Refused, tenant_of
from nim4.serve.service import Reception
from nim4.serve.settings import checked_language, hints_of

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("segment", "word")
WANTED = "timestamp_granularities[]"
FIELDS = {"file", "model", "language", "prompt", "response_format", "temperature", "index", "punctuation", WANTED}
RATES_HZ = (8_000, 192_000)
MAX_UNPACKED_BYTES = 1 << 30  # ours: of float32 samples, all channels; an hour at 48 kHz


async def transcription(request: Request, service: Reception) -> Response:
    """The text of an upload. Raises Refused; ClientDisconnect when nobody waits for it any more."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    if service.metrics.gauges["uploads"] >= service.limits.max_uploads:
        raise Refused(503, "too_many_uploads", f"{service.limits.max_uploads} uploads are being recognised", retry_after_s=5)
    service.metrics.gauges["uploads"] += 1
    try:
        samples, options = await received(request, service)
        found: list[Segment] = []
        how = [options[name] for name in ("hotwords", "index", "with_words")]
        async for segment in service.segments(samples, *how, tenant_of(request.scope)):
            found.append(segment if options["punctuation"] else segment.unpunctuated())
            if await request.is_disconnected():
                raise ClientDisconnect
    finally:
        service.metrics.gauges["uploads"] -= 1
    service.metrics.observe("transcription_seconds", loop.time() - started_s)
    return answer(found, len(samples) / SAMPLING_RATE_HZ, options)


def answer(found: Sequence[Segment], audio_s: float, options: dict[str, Any]) -> Response:
    """The segments of a recording in the form that `options` name."""
    style, text = options["format"], full_text(found)
    if style == "json":
        return JSONResponse({"text": text})
    if style != "verbose_json":
        return PlainTextResponse({"text": f"{text}\n", "srt": as_srt(found), "vtt": as_vtt(found)}[style])
    body: dict[str, Any] = {"task": "transcribe", "language": options["language"], "duration": round(audio_s, 3), "text": text}
    places = [{"start": round(segment.start_s, 3), "end": round(segment.end_s, 3), "text": segment.text} for segment in found]
    if "segment" in options["granularities"]:
        body["segments"] = [{"id": number, **place} for number, place in enumerate(places)]
    if "word" in options["granularities"]:
        words = [word for segment in found for word in segment.words or ()]
        body["words"] = [{"word": word.text, "start": round(word.start_s, 3), "end": round(word.end_s, 3)} for word in words]
        untimed = [place | {"reason": segment.untimed} for place, segment in zip(places, found, strict=True) if segment.untimed is not None]
        body |= {"untimed": untimed} if untimed else {}
    return JSONResponse(body)


async def received(request: Request, service: Reception) -> tuple[np.ndarray, dict[str, Any]]:
    """The samples of an upload, as read_upload gives them, and the options of checked_form. Raises Refused."""
    try:
        async with asyncio.timeout(service.limits.upload_s):
            form = await request.form(max_files=1, max_fields=len(FIELDS) + len(GRANULARITIES))
    except TimeoutError as error:
        raise Refused(408, "upload_too_slow", f"an upload takes at most {service.limits.upload_s:g} s") from error
    try:
        upload, options = checked_form(form, service)
        with tempfile.NamedTemporaryFile(prefix="nim4-") as file:
            await asyncio.to_thread(copy, upload, file)
            async with service.one_reader:
                return await asyncio.to_thread(read_upload, Path(file.name), service.limits), options
    finally:
        await form.close()


def checked_form(form: FormData, service: Reception) -> tuple[UploadFile, dict[str, Any]]:
    """The upload; language, hotwords, index, format and granularities of its transcription, and whether its words are timed. Raises Refused."""
    unknown = sorted(set(form) - FIELDS)
    if unknown:
        raise Refused(400, "unknown_parameter", "the form has a field that this server does not know, see docs/serving.md", unknown[0][:100])
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise Refused(400, "missing_required_parameter", "file must be an upload", "file")
    fields = {name: value for name, value in form.items() if name != "file"}
    wrong = [name for name, value in form.multi_items() if name != "file" and not isinstance(value, str)]
    if wrong:
        raise Refused(400, "invalid_value", f"{wrong[0]} must be a text", wrong[0])
    service.check_model(fields.get("model"))
    if fields.get("temperature", "0") not in ("0", "0.0"):
        raise Refused(400, "unsupported_value", "temperature must be 0: texts are the most likely ones", "temperature")
    style, granularities = fields.get("response_format", "json"), form.getlist(WANTED)
    if style not in FORMATS:
        raise Refused(400, "unsupported_value", f"response_format must be one of {', '.join(FORMATS)}", "response_format")
    if not set(granularities) <= set(GRANULARITIES):
        raise Refused(400, "unsupported_value", f"{WANTED} must be of {', '.join(GRANULARITIES)}", WANTED)
    if granularities and style != "verbose_json":
        raise Refused(400, "invalid_value", f"{WANTED} needs the response_format verbose_json", WANTED)
    if fields.get("punctuation", "true") not in ("true", "false"):
        raise Refused(400, "invalid_value", "punctuation must be true or false", "punctuation")
    service.index(fields.get("index"))
    language, hotwords = checked_language(fields.get("language")), hints_of(fields.get("prompt", ""))
    options = {"language": language, "hotwords": hotwords, "index": fields.get("index"), "format": style}
    options["punctuation"] = fields.get("punctuation", "true") == "true"
    with_words = style in ("srt", "vtt") or "word" in granularities
    return upload, options | {"granularities": granularities or ["segment"], "with_words": with_words}


def copy(upload: UploadFile, file: Any) -> None:
    """The bytes of an upload, to a file that has a name."""
    while block := upload.file.read(1 << 20):
        file.write(block)
    file.flush()


def read_upload(path: Path, limits: Limits) -> np.ndarray:
    """A recording that a client sent: (N,) float32 in [-1, 1] at 16 kHz, N at least 1.

    Its header is looked at before anything is unpacked, since a small file can hold days of silence.

    Raises:
        Refused: if it is no audio that soundfile reads, broken, empty, not finite, at a rate outside RATES_HZ, or too long.
    """
    try:
        about = soundfile.info(path)
    except UNREADABLE as error:
        raise Refused(400, "invalid_audio", "file is no audio that can be read: WAV, FLAC, Ogg or MP3, whole", "file") from error
    if not RATES_HZ[0] <= about.samplerate <= RATES_HZ[1]:
        raise Refused(400, "invalid_audio", f"file is at {about.samplerate} Hz: 8 to 192 kHz can be read", "file")
    if about.frames > limits.max_upload_s * about.samplerate:
        raise Refused(400, "audio_too_long", f"a recording has at most {limits.max_upload_s:.0f} s: cut it at a pause", "file")
    if 4 * about.frames * about.channels > MAX_UNPACKED_BYTES:
        raise Refused(400, "audio_too_long", f"unpacked, file has more than {MAX_UNPACKED_BYTES >> 30} GiB: send 16 kHz, one channel", "file")
    if about.frames == 0:
        raise Refused(400, "invalid_audio", "file holds no samples", "file")
    if _ends_early(path):
        raise Refused(400, "invalid_audio", "file is shorter than its header says: it was truncated", "file")
    try:
        return read_recording(path)
    except RecipeError as error:
        why = str(error.__cause__) if type(error.__cause__) is ValueError else "it is broken or truncated"
        raise Refused(400, "invalid_audio", f"file cannot be read: {why}", "file") from error


def _ends_early(path: Path) -> bool:
    """Whether a WAV is shorter than it says, which soundfile reads without a word; one that was written to a pipe does not say."""
    with open(path, "rb") as file:
        head = file.read(8)
    length = int.from_bytes(head[4:], "little") + 8
    return head[:4] == b"RIFF" and path.stat().st_size < length < 0x7FFFF000
