#!/usr/bin/env python3
"""What a stream costs the gateway: processor time for each second of audio, the encoder on a Triton server, a language model that costs nothing.

The encoder has the paper's width and one block, so that what travels is as large as in earnest. The server runs on the same machine, clients in
a process of their own: only this process's time is counted. Needs tritonclient, and an environment that utils/triton_env.sh has made.

    benchmarks/gateway_cost.py --triton /tmp/env/triton --streams 1 4 8
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from websockets.asyncio.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import parser_for, publish

from nim4.config import ConformerConfig, ModelConfig
from nim4.corpus.hotword_list import ListReport, Name, make_keys
from nim4.corpus.units import PhonemeInventory
from nim4.decode.hotword import HotwordIndex
from nim4.export.triton import export_triton
from nim4.model.checkpoint import WEIGHTS, save_model
from nim4.model.ctc import PhonemeModel
from nim4.serve.app import Server, make_app, open_port
from nim4.serve.engines import Engines
from nim4.serve.gateway import Gateway
from nim4.serve.limits import Gate, Limits
from nim4.serve.triton_client import TritonEncoder
from nim4.serve.vllm_engine import Counts, Text
from nim4.stage import ROOT, file_hash

WHAT = "What a stream costs the gateway: its processor time for each second of audio, encoder on Triton, a language model that costs nothing."
PIECE_S = 0.1
VARIABLE = "NIM4_TRITON_ENV"
NAMES = ("北京", "上海", "总工程师", "人民广场", "语音识别")


class FreeEngine:
    """Takes frames, and writes a text of usual length at once."""

    def __init__(self) -> None:
        self.streams: set[FreeEngine] = set()

    async def open(self, tenant: str = "") -> "FreeStream":
        return FreeStream(self)

    def metrics(self) -> dict[str, float]:
        return {"streams": 0}

    async def close(self) -> None:
        pass


class FreeStream:
    def __init__(self, engine: FreeEngine):
        self.engine, self._phones, self._revision = engine, 0, 0

    async def append(self, frames: torch.Tensor, num_phones: int) -> None:
        self._phones = num_phones

    async def partial(self, hints: object = ()) -> Text:
        self._revision += 1
        return Text("今天天气很好" * 4, (), self._revision, 18, False, Counts())

    async def final(self, hints: object = ()) -> Text:
        return Text("今天天气很好" * 4, (), self._revision + 1, 24, True, Counts())

    async def close(self) -> None:
        pass


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, None)
    parser.add_argument("--triton", type=Path, default=os.environ.get(VARIABLE), help="environment with nvidia-pytriton")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8], help="clients at the same time")
    parser.add_argument("--seconds", type=float, default=20.0, help="of speech of each client")
    return parser


async def speak(port: int, num_streams: int, seconds: float) -> list[float]:
    """Paced clients who begin one after the other within a chunk; seconds from the end of speech to the final text of each."""
    noise = (np.random.default_rng(0).normal(0, 3000, round(16_000 * seconds))).clip(-32768, 32767).astype("<i2").tobytes()

    async def one(number: int) -> float:
        await asyncio.sleep(0.64 * number / num_streams)
        async with connect(f"ws://127.0.0.1:{port}/v1/realtime") as socket:
            await socket.send(json.dumps({"type": "session.update", "session": {"turn_detection": None, "index": "names"}}))
            began_s, size = time.monotonic(), round(32_000 * PIECE_S)
            reading = asyncio.create_task(ended(socket))
            for start in range(0, len(noise), size):
                await asyncio.sleep(max(0.0, began_s + start / 32_000 - time.monotonic()))
                await socket.send(noise[start : start + size])
            await socket.send(json.dumps({"type": "stop"}))
            stopped_s = time.monotonic()
            return await reading - stopped_s

    async def ended(socket: object) -> float:
        async for message in socket:
            if json.loads(message)["type"] == "final":
                return time.monotonic()
        raise RuntimeError("a stream ended without a text")

    return list(await asyncio.gather(*map(one, range(num_streams))))


def clients(port: int, num_streams: int, seconds: float, told: object) -> None:
    told.put(asyncio.run(speak(port, num_streams, seconds)))


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    os.environ[VARIABLE] = str(args.triton)
    inventory = PhonemeInventory.default()
    config = ModelConfig(ConformerConfig(num_blocks=1, dropout=0.0), len(inventory))
    torch.manual_seed(0)
    model = PhonemeModel(config).eval()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        save_model(folder / "model", model.state_dict(), config, inventory)
        export_triton(model, file_hash(folder / "model" / WEIGHTS), folder / "repository", "python")
        server_of = runpy.run_path(str(ROOT / "tests" / "unit" / "triton_server.py"))["TritonServer"]
        triton = stack.enter_context(server_of(folder / "repository", folder))
        encoder = TritonEncoder(triton.address, folder / "model")
        asyncio.run(encoder.check())
        index = HotwordIndex.build(make_keys(enumerate(map(Name, NAMES)), inventory, ListReport()), inventory)
        service = Gateway(encoder, Engines([started]), inventory, {"names": index}, Limits(max_sessions=4096, requests_per_minute=100_000))
        service.warm_up()
        listening = open_port("127.0.0.1", 0)
        server = Server(make_app(service, Gate([], [], 100_000)), service)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        rows = [measure(listening.getsockname()[1], service, number, args.seconds) for number in args.streams]
        server.should_exit = True
        thread.join(20)
        service.close()
    size = f"{args.seconds:g} s of noise each, D {config.encoder.dim}, chunks of 640 ms, pieces of {PIECE_S:g} s"
    publish(args, WHAT, size, rows)


async def started() -> FreeEngine:
    return FreeEngine()


def measure(port: int, service: Gateway, num_streams: int, seconds: float) -> dict[str, object]:
    """One row of the table."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=clients, args=(port, num_streams, seconds, told))
    process.start()
    while not service.streams:
        time.sleep(0.01)
    before, sums = time.process_time(), SimpleNamespace(**service.metrics._sums)
    lags = told.get(timeout=seconds + 60)
    cpu_s = time.process_time() - before
    process.join()
    chunks = num_streams * seconds / 0.64
    spent = {name: 1000 * (service.metrics._sums[f"{name}_seconds"] - getattr(sums, f"{name}_seconds")) / chunks for name in ("encode", "retrieve")}
    return {
        "streams": num_streams,
        "cpu_ms_per_audio_s": 1000 * cpu_s / (num_streams * seconds),
        "streams_per_core": num_streams * seconds / cpu_s,
        "encode_ms": spent["encode"],
        "retrieve_ms": spent["retrieve"],
        "final_p50_ms": 1000 * float(np.median(lags)),
    }


if __name__ == "__main__":
    main()
