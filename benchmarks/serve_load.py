#!/usr/bin/env python3
"""How many people a server on this machine follows in real time: paced clients, more and more of them, until partial texts come too late.

A `python -m nim4 serve` process gets N streams, clips of a manifest in frames of 100 ms as fast as they are spoken, with pauses of 30 % of the
time between them; they begin one after the other, and what comes before all have begun is not counted. N is doubled until the 95th percentile
of the partials' lag exceeds a chunk of 640 ms, and then halved in between to the largest N that holds. Lag: from the moment when the last sample
that a partial text has heard was sent to the arrival of the text. Final: from the end of speech to the final text. In --vad-share of the streams the
server finds the end of speech; their lag and final (`vad`) include the silence that it waits for. All clients are one event loop in this process.

--mixed instead keeps N streams of all kinds for some minutes: short and long utterances, the server's VAD, silence, speech that is taken back, odd
bytes and broken JSON in the middle of speech, clients that vanish or stop reading, wrong keys, and uploads. It ends with exit code 2 unless every
utterance has exactly one final text, nobody else waits longer than a chunk, memory stays within 5 % once warm, and nothing is left behind.
"""

import argparse
import asyncio
import io
import json
import os
import random
import socket as sockets
import statistics
import sys
import time
import wave
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
from common import SEED, parser_for, publish
from serve_clients import FRAME_S, ServerProcess, Stream, read_clips
from websockets.exceptions import ConnectionClosed, InvalidStatus

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.stage import ROOT

CHUNK_S = 0.64
FINAL_S = 0.3  # a final text that comes later is told
PAUSE_SHARE = 0.3
STAGGER_S = 6.0  # in which the streams begin
UPLOAD_EVERY_S = 10.0
MEMORY_GROWTH = 0.05
MIXED = "Streams of all kinds on one server for a while: what they wait for, what is lost, what is left behind."


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=None)
    parser.add_argument("--model", type=Path, default=ROOT / "exp/mini/base/9_phoneme_head", help="model folder of stages 4 to 9")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/mini/manifests/test_grammar.jsonl.gz", help="what is said")
    parser.add_argument("--clients", type=int, default=4, help="streams to begin with; with --mixed all the time")
    parser.add_argument("--max-clients", type=int, default=256, help="streams at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured at each number of streams")
    parser.add_argument("--vad-share", type=float, default=0.25, help="share of the streams whose end of speech the server finds")
    parser.add_argument("--mixed", action="store_true", help="streams of all kinds, see above")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of --mixed")
    return parser


@dataclass
class Seen:
    """What clients saw, in seconds.

    Attributes:
        lag, final: where the client ends utterances.
        vad_lag, vad_final: where the server does.
        first: from the first sample to the first partial text.
        spoken_s: audio that clients sent that end utterances, and so send no silence.
        utterances, lost: how many there were, and how many of them without exactly one final text.
    """

    lag: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    vad_lag: list[float] = field(default_factory=list)
    vad_final: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    spoken_s: float = 0.0
    utterances: int = 0
    lost: int = 0

    def add(self, stream: Stream, start_s: float = 0.0, end_s: float = float("inf")) -> None:
        """Takes what a stream saw between two times on the clock, and what it lost at any time."""
        lag, final = (self.vad_lag, self.vad_final) if stream.vad else (self.lag, self.final)
        for utterance in stream.utterances:
            lag += [lag_s for at_s, lag_s in utterance.partials if start_s <= at_s < end_s]
            final += [at_s - utterance.ended_s for at_s in utterance.finals if start_s <= at_s < end_s]
            if not stream.vad and utterance.partials and start_s <= utterance.partials[0][0] < end_s:
                self.first.append(stream.first_s(utterance))
        self.spoken_s += 0.0 if stream.vad else stream.spoken_s(start_s, end_s)
        self.utterances += len(stream.utterances)
        self.lost += stream.num_lost

    def row(self) -> dict[str, Any]:
        """Percentiles in ms, a dash where there is nothing."""
        wanted = {"first": (50, 95), "lag": (50, 95), "final": (50, 95, 99), "vad_lag": (95,), "vad_final": (50, 95)}
        row = {f"{name}_p{percent}_ms": in_ms(getattr(self, name), percent) for name, percents in wanted.items() for percent in percents}
        return row | {
            "partials_per_audio_s": len(self.lag) / self.spoken_s if self.spoken_s else "-",
            "utterances": self.utterances,
            "lost": self.lost,
        }


def in_ms(seconds: Sequence[float], percent: float) -> float | str:
    """A percentile."""
    return 1000 * float(np.percentile(seconds, percent)) if seconds else "-"


class Cpu:
    """What server and clients use between two calls, in percent of a core; and how long the server waits for one, since others have them."""

    def __init__(self, server: ServerProcess):
        self._server = server
        self.restart()

    def restart(self) -> None:
        self._at = self._now()

    def _now(self) -> tuple[float, ...]:
        return time.monotonic(), self._server.cpu_s, time.process_time(), self._server.waited_s

    def row(self) -> dict[str, float]:
        wall_s, *used = (now - then for now, then in zip(self._now(), self._at, strict=True))
        names = ("server_cpu_percent", "clients_cpu_percent", "server_waits_percent")
        return {name: 100 * seconds / wall_s for name, seconds in zip(names, used, strict=True)}


async def until_idle(server: ServerProcess) -> dict[str, float]:
    """The server's metrics when it has nothing left to do, or a minute later."""
    for _ in range(120):
        metrics = await asyncio.to_thread(server.metrics)
        if not any(metrics[name] for name in ("sessions", "uploads", "model_jobs")):
            break
        await asyncio.sleep(0.5)
    return metrics


# --------------------------------------------------------------------------------------------------------- more and more clients


async def phase(server: ServerProcess, clips: Sequence[list[bytes]], count: int, args: argparse.Namespace) -> dict[str, Any]:
    """`count` streams at once: a line of the table."""
    rng, began_s, seen, closed = random.Random(f"{SEED} {count}"), time.monotonic(), Seen(), Counter()
    start_s = began_s + STAGGER_S + 2
    end_s = start_s + args.seconds

    async def client(number: int) -> None:
        await asyncio.sleep(STAGGER_S * number / count)
        async with Stream(server.port, vad=number < round(args.vad_share * count)) as stream:
            try:
                while time.monotonic() < end_s:
                    clip = rng.choice(clips)
                    await stream.speak(clip)
                    if not stream.vad:
                        await stream.commit()
                    await stream.pause(FRAME_S * len(clip) * PAUSE_SHARE / (1 - PAUSE_SHARE))
                await stream.stop()
            except (ConnectionClosed, TimeoutError):  # it has too much to do: this is what is looked for
                closed[stream.socket.close_code] += 1
            seen.add(stream, start_s, end_s)

    async def cpu() -> dict[str, float]:
        await asyncio.sleep(start_s - time.monotonic())
        used = Cpu(server)
        await asyncio.sleep(end_s - time.monotonic())
        return used.row()

    used, *_ = await asyncio.gather(cpu(), *(client(number) for number in range(count)))
    await until_idle(server)
    row = seen.row()
    holds = not closed and not isinstance(row["lag_p95_ms"], str) and row["lag_p95_ms"] <= 1000 * CHUNK_S
    in_time = holds and row["final_p95_ms"] <= 1000 * FINAL_S
    row = {"clients": count, "lag_holds": "yes" if holds else "no", "final_in_300_ms": "yes" if in_time else "no"} | row | used
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


async def more_and_more(server: ServerProcess, clips: Sequence[list[bytes]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of the table, by number of clients."""
    rows, largest, too_many, count = {}, 0, args.max_clients + 1, args.clients
    while too_many - largest > max(1, largest // 10):
        rows[count] = await phase(server, clips, count, args)
        if rows[count]["lag_holds"] == "yes":
            largest = count
        else:
            too_many = count
        count = min(2 * largest, args.max_clients) if too_many > args.max_clients else (largest + too_many) // 2
        if count in rows:
            break
    return [rows[count] for count in sorted(rows)]


# ------------------------------------------------------------------------------------------------------------ all kinds of clients


KINDS = {"short": 4, "long": 3, "turns": 4, "silent": 1, "aborted": 2, "malformed": 2, "vanishing": 2, "deaf": 1, "wrong_key": 1}  # how often


class Mixed:
    """Streams of all kinds on one server for some time.

    Attributes:
        seen: by clients that do nothing wrong, and by those whose mistakes the server answers.
        broken: what must not happen, and how often it did.
        counts: streams by kind.
        memory: of the server, (seconds since the beginning, MB).
        uploads: seconds that they took.
    """

    def __init__(self, server: ServerProcess, clips: Sequence[list[bytes]], args: argparse.Namespace):
        self._server, self._clips, self._count = server, clips, args.clients
        self._rng, self._seconds = random.Random(SEED), 60 * args.minutes
        self.seen, self.broken, self.counts = Seen(), Counter(), Counter()
        self.memory: list[tuple[float, float]] = []
        self.uploads: list[float] = []

    async def run(self) -> None:
        """All of it; it ends by itself."""
        self._began_s = time.monotonic()
        await asyncio.gather(self._watch(), self._upload(), *(self._client(number) for number in range(self._count)))

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    async def _client(self, number: int) -> None:
        await asyncio.sleep(STAGGER_S * number / self._count)
        while self._elapsed_s < self._seconds:
            (kind,) = self._rng.choices(list(KINDS), list(KINDS.values()))
            self.counts[kind] += 1
            try:
                await getattr(self, f"_{kind}")()
            except (ConnectionClosed, InvalidStatus, TimeoutError, OSError) as error:
                self.broken[f"{kind}: {type(error).__name__} {error}"] += 1

    async def _watch(self) -> None:
        while self._elapsed_s < self._seconds:
            self.memory.append((self._elapsed_s, self._server.memory_mb))
            if len(self.memory) % 60 == 1:
                seen = f"{self.seen.utterances} utterances, {sum(self.broken.values())} broken promises"
                print(f"{self._elapsed_s:.0f} s: {self.memory[-1][1]:.0f} MB, {seen}", file=sys.stderr, flush=True)
            await asyncio.sleep(1.0)

    async def _upload(self) -> None:
        while self._elapsed_s < self._seconds:
            try:
                self.uploads.append(await asyncio.to_thread(self._server.upload, as_wav(self._clip())))
            except OSError as error:
                self.broken[f"upload: {error}"] += 1
            await asyncio.sleep(UPLOAD_EVERY_S)

    def _clip(self) -> list[bytes]:
        return self._rng.choice(self._clips)

    def _expect(self, holds: bool, promise: str) -> None:
        if not holds:
            self.broken[promise] += 1

    async def _end(self, stream: Stream, errors: Sequence[str] = ()) -> None:
        """Stops a stream, which must have had these answers to its mistakes."""
        await stream.stop()
        self.seen.add(stream)
        self._expect(stream.close_code == 1000, f"closed with {stream.close_code}")
        self._expect(stream.errors == list(errors), f"errors {stream.errors}")

    async def _short(self) -> None:
        async with Stream(self._server.port) as stream:
            for _ in range(3):
                await stream.speak(self._clip()[:15])
                await stream.commit()
                await stream.pause(0.6)
            await self._end(stream)

    async def _long(self) -> None:
        async with Stream(self._server.port) as stream:
            await stream.speak([frame for _ in range(6) for frame in self._clip()])
            await self._end(stream)  # without a commit: the end of the stream is the end of speech

    async def _turns(self) -> None:
        async with Stream(self._server.port, vad=True) as stream:
            for _ in range(3):
                await stream.speak(self._clip())
                await stream.pause(1.5)
            await self._end(stream)
            self._expect(bool(stream.utterances), "speech that the server did not find")

    async def _silent(self) -> None:
        async with Stream(self._server.port, vad=True) as stream:
            await stream.pause(6.0)
            await self._end(stream)
            self._expect(not stream.utterances, "speech in silence")

    async def _aborted(self) -> None:
        async with Stream(self._server.port) as stream:
            await stream.speak(self._clip())
            await stream.clear()
            await stream.speak(self._clip())
            await stream.commit()
            await self._end(stream)

    async def _malformed(self) -> None:
        async with Stream(self._server.port) as stream:
            clip = self._clip()
            await stream.speak(clip[:10])
            for wrong in (b"odd", "{no JSON", '{"type": "dance"}', '{"type": "session.update", "session": {"hotwords": 7}}'):
                await stream.socket.send(wrong)
            await stream.speak(clip[10:])
            await stream.commit()
            await self._end(stream, ["invalid_audio", "invalid_json", "unknown_event", "invalid_value"])

    async def _vanishing(self) -> None:
        async with Stream(self._server.port) as stream:
            await stream.speak(self._clip()[:20])
            stream.socket.transport.abort()

    async def _deaf(self) -> None:
        """Asks much and takes no answer, until the server has given it up."""
        raw = sockets.socket()
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        await asyncio.to_thread(raw.connect, ("127.0.0.1", self._server.port))
        async with Stream(self._server.port, sock=raw, max_queue=1, ping_interval=None) as stream:
            stream.deafen()
            names = [chr(0x4E00 + number) * 50 for number in range(10)]
            with suppress(ConnectionClosed):
                for _ in range(3000):
                    await stream.send("session.update", session={"hotwords": names})
                await asyncio.sleep(15)
            stream.socket.transport.abort()

    async def _wrong_key(self) -> None:
        try:
            async with Stream(self._server.port, key="wrong"):
                self.broken["a wrong key was accepted"] += 1
        except InvalidStatus as refused:
            self._expect(refused.response.status_code == 401, f"a wrong key got {refused.response.status_code}")


def as_wav(frames: Sequence[bytes]) -> bytes:
    """Frames as a file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE_HZ)
        file.writeframes(b"".join(frames))
    return data.getvalue()


def growth(memory: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """MB in use in the last tenth of the time, and its ratio to what was in use when a fifth to three tenths had gone by."""
    end_s = memory[-1][0]
    warm = statistics.median(mb for at_s, mb in memory if 0.2 * end_s <= at_s <= 0.3 * end_s)
    last = statistics.median(mb for at_s, mb in memory if at_s >= 0.9 * end_s)
    return last, last / warm


def mixed_rows(mixed: Mixed, metrics: dict[str, float], cpu: dict[str, float]) -> list[dict[str, Any]]:
    """The table of --mixed, a number per line; tells `mixed.broken` what the numbers break."""
    last_mb, grown = growth(mixed.memory)
    orphans = int(metrics["sessions"] + metrics["uploads"] + metrics["model_jobs"])
    longest_s = max(mixed.seen.lag, default=0.0)
    promises = {
        f"{mixed.seen.lost} lost final texts": mixed.seen.lost == 0,
        f"{orphans} orphans": orphans == 0,
        f"memory grown to {100 * grown:.1f} %": grown <= 1 + MEMORY_GROWTH,
        f"a lag of {longest_s:.2f} s": 0 < longest_s <= CHUNK_S,
    }
    mixed.broken.update(promise for promise, kept in promises.items() if not kept)
    values = {f"streams_{kind}": mixed.counts[kind] for kind in KINDS} | {"uploads": len(mixed.uploads)} | mixed.seen.row()
    values |= {"lag_p99_ms": in_ms(mixed.seen.lag, 99), "lag_max_ms": in_ms(mixed.seen.lag, 100), "upload_p50_ms": in_ms(mixed.uploads, 50)}
    values |= cpu | {"memory_mb": last_mb, "memory_to_warm": grown, "orphans": orphans, "broken_promises": sum(mixed.broken.values())}
    return [{"measure": name.replace("_", " "), "value": value} for name, value in values.items()]


def main() -> None:
    args = build_parser().parse_args()
    if not 0 <= args.vad_share < 1 or min(args.clients, args.seconds, args.minutes) <= 0 or args.clients > args.max_clients:
        found = (args.vad_share, args.clients, args.max_clients, args.seconds, args.minutes)
        expected = "a share below 1, and numbers above 0, the first of clients not above the last"
        raise RecipeError("--vad-share, --clients, --max-clients, --seconds, --minutes", expected=expected, found=found, fix="correct them")
    clips = read_clips(args.manifest)
    options = ["--max-sessions", str(4 * args.max_clients), "--requests-per-minute", "100000", "--device", "cpu"]
    with ServerProcess(args.model, args.threads, options) as server:
        if not args.mixed:
            rows = asyncio.run(more_and_more(server, clips, args))
            publish(args, __doc__.split("\n")[0], f"{len(clips)} clips, {args.seconds:g} s at each number of clients; {about(args)}", rows)
            return
        mixed, cpu = Mixed(server, clips, args), Cpu(server)
        asyncio.run(mixed.run())
        used, metrics = cpu.row(), asyncio.run(until_idle(server))
    mixed.broken.update(server.errors)
    if server.exit_code != 0:
        mixed.broken[f"exit code {server.exit_code}"] += 1
    rows = mixed_rows(mixed, metrics, used)
    publish(args, MIXED, f"{len(clips)} clips, {args.minutes:g} minutes, {args.clients} streams at a time; {about(args)}", rows)
    if mixed.broken:
        found = "; ".join(f"{count} x {what}" for what, count in mixed.broken.most_common(10))
        raise RecipeError("--mixed", expected="a server that keeps what it promises", found=found, fix="see docs/serving.md for the promises")


def about(args: argparse.Namespace) -> str:
    """The server, in words."""
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    return f"{os.path.relpath(args.model, ROOT)}, {threads} for the model"


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
