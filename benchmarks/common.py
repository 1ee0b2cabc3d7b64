"""What the benchmarks share: options, ways that take turns, and the record whose table is printed and kept."""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nim4.report.benchmarks import as_markdown
from nim4.score.record import hardware
from nim4.stage import atomic_write, git_commit

SEED = 0


def parser_for(description: str, rounds: int | None) -> argparse.ArgumentParser:
    """The options every benchmark has; `description` is the module's docstring. `rounds` None: it measures once."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if rounds is None:
        parser.set_defaults(rounds=1)
    else:
        parser.add_argument("--rounds", type=int, default=rounds, help="rounds; the table gives their median")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--record", type=Path, help="file to which one JSON line with the result is added")
    return parser


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; each round begins with another way, so that a busy moment does not hit always the same one."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            started_s = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started_s)
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of one way's seconds divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def publish(args: argparse.Namespace, what: str, size: str, rows: list[dict[str, Any]], device: torch.device | None = None) -> None:
    """Prints the table and adds the record to `--record`; arguments as of make_record."""
    record = make_record(args, what, size, rows, device)
    print(as_markdown(record))
    keep(args, record)


def make_record(args: argparse.Namespace, what: str, size: str, rows: list[dict[str, Any]], device: torch.device | None = None) -> dict[str, Any]:
    """What a benchmark found, and what made it.

    Args:
        what: what was measured, in one line.
        size: the data, in words: how much, and of what.
        rows: one dict per line of the table, keys with units; floats are kept to five digits.
        device: where it ran; default: the CPU.
    """
    on_gpu = device is not None and device.type == "cuda"
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "what": what,
        "command": shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *_without_record(sys.argv[1:])]),
        "commit": git_commit(),
        "data": {"size": size, "seed": SEED},
        "hardware": torch.cuda.get_device_name(device) if on_gpu else hardware(args.threads),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "rounds": args.rounds,
        "rows": [{key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()} for row in rows],
    }


def keep(args: argparse.Namespace, record: dict[str, Any], instead_of: dict[str, Any] | None = None) -> None:
    """Adds the record to `--record`, in the place of an earlier one of the same run: a killed run leaves what it had kept."""
    if args.record:
        lines = args.record.read_text(encoding="utf-8").splitlines() if args.record.exists() else []
        earlier = json.dumps(instead_of, ensure_ascii=False)
        with atomic_write(args.record) as file:
            file.writelines(f"{line}\n" for line in [*(line for line in lines if line != earlier), json.dumps(record, ensure_ascii=False)])


def _without_record(arguments: Sequence[str]) -> list[str]:
    """The command line without `--record FILE`, which has no part in the result."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != "--record":
            kept.append(argument)
        skip = argument == "--record"
    return kept
