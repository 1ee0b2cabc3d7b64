#!/usr/bin/env python3
"""What so many streams at once would take, on paper: GPUs, cores, memory, network, index; from measured figures, beside a simulation of arrivals.

Nothing here has served a million streams. The figures are the last records in results/benchmarks.jsonl, and the formulas are in docs/capacity.md.
The simulation lets people come and go at random and engines fail, and counts who finds no place; the formula must foresee it.

    benchmarks/capacity.py --streams 1000000
    benchmarks/capacity.py --held 200            were an engine to hold 200 streams
"""

import argparse
import heapq
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import parser_for, publish

from nim4.config import RecipeError
from nim4.stage import ROOT, read_jsonl, run

WHAT = "What so many streams at once would take, on paper; from measured figures."
SIMULATED = "People who come and go, and engines that fail, in one cell: who finds no place, beside the formula."
CHUNK_S = 0.64
PCM_BYTES_S = 32_000
FRAME_HZ, TOKEN_HZ, MEL_BINS, LOOKAHEAD = 25, 6.25, 80, 3


@dataclass(frozen=True)
class Shape:
    """The paper's sizes, as far as it gives them; what is kept per stream follows from them.

    Attributes:
        kv_token_bytes: keys and values of a token of Qwen3-1.7B in bf16: 2 x 28 layers x 8 heads x 128 x 2 bytes.
        weights_bytes: encoder of 0.62 B and language model of 1.72 B parameters, bf16.
        gpu_bytes: of one GPU, that may be used.
    """

    dim: int = 1280
    blocks: int = 14
    left_frames: int = 64
    conv_kernel: int = 33
    conv_expansion: int = 2
    kv_token_bytes: int = 2 * 28 * 8 * 128 * 2
    weights_bytes: float = 2 * (0.622e9 + 1.721e9)
    gpu_bytes: float = 0.9 * 141e9

    @property
    def encoder_state_bytes(self) -> int:
        """Of one stream, bf16."""
        return 2 * self.blocks * (2 * self.left_frames * self.dim + self.conv_expansion * self.dim * (self.conv_kernel // 2))

    def stream_bytes(self, utterance_s: float, text_tokens: int) -> float:
        """What a stream keeps on a GPU at the end of its utterance."""
        return self.encoder_state_bytes + self.kv_token_bytes * (TOKEN_HZ * utterance_s + text_tokens)


@dataclass(frozen=True)
class Measured:
    """Figures of records.

    Attributes:
        held: streams of one GPU, the most that were followed in real time.
        core_s: of a gateway, for each second of audio.
        retrieve_s: of a core, a chunk's search among `names` names.
        index_bytes: in memory, of those names.
    """

    held: int
    core_s: float
    retrieve_s: float
    names: int
    index_bytes: float


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, None)
    parser.add_argument("--streams", type=int, default=1_000_000, help="people who speak at the same time, on average, in the busiest hour")
    parser.add_argument("--cell", type=int, default=10_000, help="of them in one cell, whose engines and gateways serve nobody else")
    parser.add_argument("--held", type=int, help="streams that an engine holds; default: the record's")
    parser.add_argument("--names", type=int, default=10_000_000, help="hotwords that all streams may look up")
    parser.add_argument("--utterance-s", type=float, default=10.0, help="length of an utterance")
    parser.add_argument("--session-s", type=float, default=120.0, help="length of a session")
    parser.add_argument("--blocked", type=float, default=1e-3, help="share of sessions that may find no place")
    parser.add_argument("--days-to-failure", type=float, default=30.0, help="of an engine, on average")
    parser.add_argument("--recovery-s", type=float, default=120.0, help="until a failed engine is there again")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "benchmarks.jsonl", help="where the figures are")
    return parser


def read_measured(path: Path, held: int | None) -> Measured:
    """The figures of the last records. Raises RecipeError if one is missing."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(path):
        if "names that survive" not in record["what"]:
            rows[record["benchmark"]] = record["rows"]
    for name in ("streams_held", "gateway_cost", "hotwords"):
        if name not in rows:
            raise RecipeError(path, expected=f"a record of {name}", found="none", fix=f"benchmarks/{name}.py --record {path}")
    holds = [row["streams"] for row in rows["streams_held"] if row.get("holds") == "yes"]
    search = max((row for row in rows["hotwords"] if (row["engine"], row["way"]) == ("trie", "lattice")), key=lambda row: row["names"])
    return Measured(
        held or max(holds, default=1),
        max(row["cpu_ms_per_audio_s"] for row in rows["gateway_cost"]) / 1000,
        search["p99_us"] / 1e6,
        search["names"],
        1e6 * search["resident_mb"],
    )


# ------------------------------------------------------------------------------------------------------------------ the formulas


def blocked(load: float, places: int) -> float:
    """The share of arrivals that find all places taken (Erlang B); whatever the lengths of sessions are, as long as people come independently.

    Args:
        load: people who would be there if there were places enough, on average.
    Source: Erlang 1917; the recursion 1/B(n) = 1 + n / load / B(n - 1).
    """
    inverse = 1.0
    for place in range(1, places + 1):
        inverse = 1.0 + inverse * place / load
    return 1.0 / inverse


def places_for(load: float, share: float) -> int:
    """The fewest places at which no more than a share of arrivals finds none."""
    low, high = 0, max(4, math.ceil(2 * load) + 10)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if blocked(load, middle) <= share else (middle, high)
    return high


def spare_engines(engines: int, days_to_failure: float, recovery_s: float, share: float = 1e-4) -> int:
    """So many more that, but for a share of the time, no more are away: failures come independently, so those away are Poisson distributed."""
    mean = engines * recovery_s / (86_400 * days_to_failure)
    spare, term = 0, math.exp(-mean)
    total = term
    while 1 - total > share:
        spare += 1
        term *= mean / spare
        total += term
    return spare


def plan(args: argparse.Namespace, measured: Measured, shape: Shape) -> tuple[list[dict[str, Any]], int, int]:
    """The rows of the table; engines of a cell, and the spare ones among them."""
    cells = math.ceil(args.streams / args.cell)
    load = args.streams / cells
    in_use = math.ceil(places_for(load, args.blocked) / measured.held)
    spare = spare_engines(in_use, args.days_to_failure, args.recovery_s)
    streams, gpus = args.streams, cells * (in_use + spare)
    text_tokens = 120  # prompt, ten hints, and the text
    fits = (shape.gpu_bytes - shape.weights_bytes) / shape.stream_bytes(args.utterance_s, text_tokens)
    features = 4 * MEL_BINS * (4 * CHUNK_S * FRAME_HZ + LOOKAHEAD) / CHUNK_S
    frames = 4 * shape.dim * FRAME_HZ
    retrieve = measured.retrieve_s * math.sqrt(max(args.names / measured.names, 1.0)) / CHUNK_S
    cores = streams * (measured.core_s + retrieve) / 0.6
    hosts = math.ceil(cores / 64)
    index = measured.index_bytes * args.names / measured.names
    again_s = measured.held * args.utterance_s / 2
    rows = [
        ("cells", cells, f"streams / {args.cell:,}"),
        ("engines, GPUs", gpus, f"cells x (Erlang's places / {measured.held} held + {spare} spare)"),
        ("share of places in use", load / (in_use * measured.held), "load / places"),
        ("streams whose state fits a GPU", int(fits), f"(memory - weights) / {shape.stream_bytes(args.utterance_s, text_tokens) / 1e6:.0f} MB"),
        ("gateway cores", math.ceil(cores), f"streams x ({1000 * measured.core_s:.1f} + {1000 * retrieve:.2f} ms per s) / 60 % busy"),
        ("gateway hosts of 64 cores", hosts, "cores / 64"),
        (
            "index of a host, GB",
            index / 1e9,
            f"{measured.index_bytes / measured.names:.0f} bytes x {args.names:,} names, mapped once by all its gateways",
        ),
        ("index shards", max(1, math.ceil(index / 64e9)), "index / 64 GB of a host's memory"),
        ("clients' network, Gbit/s", 8 * PCM_BYTES_S * streams / 1e9, "16-bit samples at 16 kHz"),
        ("to encoders, Gbit/s", 8 * features * streams / 1e9, "features, fp32"),
        ("from encoders, Gbit/s", 8 * (frames + 2 * 4 * 4 * FRAME_HZ) * streams / 1e9, "frames and four phones, fp32"),
        ("to engines, Gbit/s", 8 * frames * streams / 1e9, "frames, fp32; none where both are on one host"),
        ("kept for a lost engine, GB", frames * args.utterance_s * streams / 1e9, "frames of an utterance, in all gateways"),
        ("audio to read again, s", again_s, f"after an engine is lost: {measured.held} x half an utterance, by those that are left"),
    ]
    return [{"what": name, "number": value, "formula": formula} for name, value, formula in rows], in_use + spare, spare


# ---------------------------------------------------------------------------------------------------------------- the simulation


def simulate(
    load: float, engines: int, held: int, session_s: float, days_to_failure: float, recovery_s: float, sessions: int, seed: int = 0
) -> dict[str, float]:
    """Events of one cell, in order of time: people come independently and stay for lengths that scatter widely (log-normal); each goes to the
    engine with the most room. An engine fails, its streams look for room elsewhere, and it comes back empty.

    Returns:
        shares of sessions that found no place, and that lost theirs; the mean and the most that were there.
    """
    rng = random.Random(seed)
    sigma = 1.0
    mu = math.log(session_s) - sigma**2 / 2
    num_at, is_there = [0] * engines, [True] * engines
    where: dict[int, int] = {}
    events: list[tuple[float, int, str, int]] = []  # time, a number that settles ties, kind, whose
    order = iter(range(1 << 62))

    def soon(time_s: float, kind: str, whose: int) -> None:
        heapq.heappush(events, (time_s, next(order), kind, whose))

    def place(session: int) -> bool:
        engine = min(range(engines), key=lambda engine: (not is_there[engine], num_at[engine]))
        if not is_there[engine] or num_at[engine] >= held:
            return False
        num_at[engine] += 1
        where[session] = engine
        return True

    soon(0.0, "come", 0)
    for engine in range(engines):
        soon(rng.expovariate(1 / (86_400 * days_to_failure)), "fail", engine)
    warm_s, came, turned_away, dropped, most, area, last_s = 8 * session_s, 0, 0, 0, 0, 0.0, 8 * session_s
    next_session = 0
    while came < sessions:
        time_s, _, kind, whose = heapq.heappop(events)
        if time_s > warm_s:
            area, last_s = area + len(where) * (time_s - last_s), time_s
            most = max(most, len(where))
        if kind == "come":
            came += time_s > warm_s
            if place(whose):
                soon(time_s + rng.lognormvariate(mu, sigma), "go", whose)
            else:
                turned_away += time_s > warm_s
            next_session += 1
            soon(time_s + rng.expovariate(load / session_s), "come", next_session)
        elif kind == "go":
            if whose in where:
                num_at[where.pop(whose)] -= 1
        elif kind == "fail":
            is_there[whose], num_at[whose] = False, 0
            for session in [session for session, engine in where.items() if engine == whose]:
                del where[session]
                dropped += not place(session) and time_s > warm_s
            soon(time_s + recovery_s, "back", whose)
        else:
            is_there[whose] = True
            soon(time_s + rng.expovariate(1 / (86_400 * days_to_failure)), "fail", whose)
    return {"no_place": turned_away / came, "lost": dropped / came, "mean": area / max(last_s - warm_s, 1e-9), "most": most}


def blocked_with_failures(load: float, engines: int, held: int, days_to_failure: float, recovery_s: float) -> float:
    """The same where each engine is away for a share of the time: the mean of Erlang's formula over how many are."""
    away = recovery_s / (recovery_s + 86_400 * days_to_failure)
    chances = ((gone, math.comb(engines, gone) * away**gone * (1 - away) ** (engines - gone)) for gone in range(engines + 1))
    return sum(chance * (blocked(load, held * (engines - gone)) if gone < engines else 1.0) for gone, chance in chances if chance > 1e-9)


def check(args: argparse.Namespace, held: int) -> list[dict[str, Any]]:
    """A cell small enough to be simulated for weeks, at several loads: what the formula says and what happened."""
    rows = []
    engines = max(4, math.ceil(200 / held))
    places = engines * held
    for share in (0.90, 1.0):
        for failures, days in (("never", 1e6), ("each 12 times a day", 1 / 12)):  # far more often than in earnest, so that it can be seen
            found = simulate(share * places, engines, held, args.session_s, days, args.recovery_s, sessions=60_000)
            rows.append(
                {
                    "engines": engines,
                    "places": places,
                    "load": share * places,
                    "engines_fail": failures,
                    "no_place_formula": blocked_with_failures(share * places, engines, held, days, args.recovery_s),
                    "no_place_simulated": found["no_place"],
                    "lost_simulated": found["lost"],
                    "mean_there": found["mean"],
                }
            )
    return rows


def main() -> None:
    args = build_parser().parse_args()
    for name in ("streams", "cell", "names"):
        if getattr(args, name) < 1:
            raise RecipeError(f"--{name}", expected="at least 1", found=getattr(args, name), fix="leave it out")
    measured = read_measured(args.records, args.held)
    rows, _, _ = plan(args, measured, Shape())
    publish(args, WHAT, f"{args.streams:,} streams; figures of {args.records.name}", rows)
    print()
    publish(args, SIMULATED, f"60,000 sessions of {args.session_s:g} s on average, log-normal", check(args, measured.held))


if __name__ == "__main__":
    run(main, "capacity")
