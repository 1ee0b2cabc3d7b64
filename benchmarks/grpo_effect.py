#!/usr/bin/env python3
"""What reinforcement learning changed: models before and after stage 8 on clean and noisy speech, on noise alone, and on silence.

Rates of change count, not speed. `mer` is of greedy transcripts, and its change has a 95 % interval of the paired bootstrap; `reward` is
that of stage 8 without hints; `equal groups` are those whose sampled answers all get the same reward, at temperature 1; `loops` and
`wrote` are shares of greedy transcripts that repeat themselves, and that are not empty. Noise is stationary and made here: added to the
features of the speech at a stated ratio, and as sound where it is alone. A round draws noise and answers anew. With several pairs of
models (seeds), the rows of pair `all` pool them by utterance: their interval is that of other utterances, not of other seeds.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import numpy as np
import torch
from common import SEED, parser_for, publish
from torch.nn.utils.rnn import pad_sequence

import nim4.stage
from nim4.config import KeywordConfig, RecipeError, RewardConfig
from nim4.corpus.batch import RewardBatch, eval_batches
from nim4.corpus.feats import SAMPLING_RATE_HZ, Fbank
from nim4.corpus.keywords import RewardExamples
from nim4.corpus.manifest import load_cuts
from nim4.corpus.noise import mix
from nim4.corpus.text import split_tokens
from nim4.model.asr import load_speech_llm
from nim4.model.conformer import FULL_CONTEXT, Context
from nim4.score.bootstrap import paired_difference
from nim4.score.error_rate import edit_distance
from nim4.stage import ROOT
from nim4.train.cr_ctc import DEPLOYED
from nim4.train.distributed import pick_device
from nim4.train.grpo import Policy
from nim4.train.rewards import is_loop, reward

BATCH_S = 60.0
MIN_STD = 1e-4  # of the rewards of a group, as in stage 8
CONTEXTS = {"offline": FULL_CONTEXT, "streaming": DEPLOYED}


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=1)
    parser.add_argument("--before", type=Path, nargs="+", required=True, help="model folders stage 8 started from; one, or one for each of --after")
    parser.add_argument("--after", type=Path, nargs="+", required=True, help="model folders of stage 8, e.g. of several seeds")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/mini/units/dev.jsonl.gz", help="speech: a manifest of stage 2")
    parser.add_argument("--limit", type=int, default=0, help="utterances taken of it, evenly spread; 0 = all")
    parser.add_argument("--snr-db", type=float, default=5.0, help="ratio of speech to noise in the noisy speech, in dB")
    parser.add_argument("--num-empty", type=int, default=20, help="clips of noise alone, and as many of silence, of 1 to 5 s")
    parser.add_argument("--group-size", type=int, default=8, help="answers sampled for each utterance")
    parser.add_argument("--context", default="offline", choices=sorted(CONTEXTS), help="of the encoder")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    return parser


@dataclass(frozen=True)
class Heard:
    """What a model made of some audio; lists are per utterance, in the order of the batches."""

    errors: list[int]
    units: list[int]  # of the reference
    rewards: list[float]
    equal: list[bool]
    loops: list[bool]
    wrote: list[bool]


def listen(policy: Policy, batches: list[RewardBatch], context: Context, group_size: int, seed: int) -> Heard:
    """Greedy transcripts, and groups of sampled ones."""
    heard, config, draw = Heard([], [], [], [], [], []), RewardConfig(), torch.Generator().manual_seed(seed)
    for batch in batches:
        hyps = policy.transcribe(batch.x, batch.x_lens, context=context)
        with torch.inference_mode():
            answers, _ = policy(batch.x, batch.x_lens, batch.suffixes, context, group_size, 1.0, draw)
        sampled = policy.texts(answers)
        for row, (hyp, ref) in enumerate(zip(hyps, batch.texts, strict=True)):
            group = [reward(text, ref, (), config).total for text in sampled[row * group_size : (row + 1) * group_size]]
            heard.errors.append(edit_distance(split_tokens(ref), split_tokens(hyp)))
            heard.units.append(len(split_tokens(ref)))
            heard.rewards.append(reward(hyp, ref, (), config).total)
            heard.equal.append(statistics.pstdev(group) < MIN_STD)
            heard.loops.append(is_loop(hyp))
            heard.wrote.append(bool(split_tokens(hyp)))
    return heard


def empty_batch(policy: Policy, count: int, level: float, rng: np.random.Generator) -> RewardBatch:
    """`count` clips in which nothing is said: noise whose colour and loudness differ (`level` is its greatest deviation), or with level 0 silence."""
    fbank, features = Fbank(), []
    for _ in range(count):
        white = rng.standard_normal(int(rng.uniform(1, 5) * SAMPLING_RATE_HZ))
        smooth = np.convolve(white, np.ones(8) / 8, mode="same")
        mixed = white + rng.uniform(0, 4) * smooth
        sound = level * rng.uniform(0.05, 1) * mixed / np.abs(mixed).max()
        features.append(torch.from_numpy(fbank.extract(sound.astype(np.float32))))
    lens = torch.tensor([len(x) for x in features])
    nothing: list[list] = [[] for _ in features]
    zeros = torch.zeros(count, dtype=torch.int64)
    return RewardBatch(
        ids=[f"empty-{number}" for number in range(count)],
        x=pad_sequence(features, batch_first=True),
        x_lens=lens,
        phones=zeros[:, None],
        phone_lens=zeros,
        suffixes=[policy.prompt.suffix()] * count,
        answers=[policy.prompt.answer("")] * count,
        texts=[""] * count,
        hints=nothing,
        keywords=nothing,
    )


def under_noise(x: torch.Tensor, x_lens: torch.Tensor, snr_db: float, rng: np.random.Generator) -> torch.Tensor:
    """(B, T, 80) log-Mel features under stationary noise, of another colour in each row."""
    noisy = x.clone()
    for row, length in enumerate(x_lens.tolist()):
        powers = np.exp(rng.normal(0, 0.5, (length, x.shape[2])) + rng.normal() * np.linspace(-1, 1, x.shape[2])).astype(np.float32)
        noisy[row, :length] = torch.from_numpy(mix(x[row, :length].numpy(), powers, snr_db))
    return noisy


def audio_of(policy: Policy, inventory: Any, cuts: list, args: argparse.Namespace, number: int) -> dict[str, list[RewardBatch]]:
    """The four kinds of audio of a round, the same for all models."""
    make = RewardExamples(inventory, policy.prompt, KeywordConfig(), SEED)
    clean = list(eval_batches(cuts, make, BATCH_S))
    rng = np.random.default_rng(SEED + number)
    noisy = [replace(batch, x=under_noise(batch.x, batch.x_lens, args.snr_db, rng)) for batch in clean]
    kinds = {"clean speech": clean, f"speech, {args.snr_db:g} dB": noisy}
    return kinds | {"noise": [empty_batch(policy, args.num_empty, 0.5, rng)], "silence": [empty_batch(policy, args.num_empty, 0.0, rng)]}


def pooled(heard: list[Heard]) -> Heard:
    """Several models' results on the same utterances, as if each utterance had been heard by all of them."""
    sums = {name: [sum(values) for values in zip(*(getattr(one, name) for one in heard), strict=True)] for name in ("errors", "units")}
    lists = {name: [value for one in heard for value in getattr(one, name)] for name in ("rewards", "equal", "loops", "wrote")}
    return Heard(**sums, **lists)


def row_of(pair: str, audio: str, before: Heard, after: Heard, speakers: list[str]) -> dict[str, Any]:
    """A line of the table; percentages, but for the rewards."""
    row: dict[str, Any] = {"pair": pair, "audio": audio}
    if sum(before.units):
        change = paired_difference(before.errors, after.errors, before.units, speakers)
        row |= {f"mer_{name}": 100 * sum(heard.errors) / sum(heard.units) for name, heard in (("before", before), ("after", after))}
        row |= {"mer_change": change.points, "from": change.low, "to": change.high}
    else:
        row |= dict.fromkeys(("mer_before", "mer_after", "mer_change", "from", "to"), "-")
    for name, factor, title in (("rewards", 1, "reward"), ("equal", 100, "equal_groups"), ("loops", 100, "loops"), ("wrote", 100, "wrote")):
        row[f"{title}_before"], row[f"{title}_after"] = (factor * float(np.mean(getattr(heard, name))) for heard in (before, after))
    return row


def median_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over the rounds."""
    return {name: value if isinstance(value, str) else statistics.median(row[name] for row in rows) for name, value in rows[0].items()}


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if len(args.before) not in (1, len(args.after)):
        raise RecipeError("--before", expected=f"1 or {len(args.after)} folders", found=len(args.before), fix="name one for each of --after")
    if min(args.rounds, args.num_empty) < 1 or args.group_size < 2:
        found = (args.rounds, args.num_empty, args.group_size)
        raise RecipeError("--rounds, --num-empty, --group-size", expected="at least 1, 1 and 2", found=found, fix="name larger numbers")
    device, context = pick_device(args.device), CONTEXTS[args.context]
    cuts = sorted(load_cuts(args.manifest), key=lambda cut: (-cut.duration, cut.id))  # the order of eval_batches
    cuts = cuts[:: max(len(cuts) // args.limit, 1)][: args.limit] if args.limit else cuts
    befores = args.before * len(args.after) if len(args.before) == 1 else args.before
    heard: dict[tuple[Path, int, str], Heard] = {}
    for folder in dict.fromkeys([*befores, *args.after]):
        model, inventory = load_speech_llm(folder, device)
        policy = Policy(model).eval()
        for number in range(args.rounds):
            for audio, batches in audio_of(policy, inventory, cuts, args, number).items():
                heard[folder, number, audio] = listen(policy, [batch.to(device) for batch in batches], context, args.group_size, SEED + number)
        print(f"{folder} done", file=sys.stderr)
    speakers, rows = [cut.supervisions[0].speaker for cut in cuts], []
    for audio in dict.fromkeys(audio for _, _, audio in heard):
        pairs = [(str(number), [pair]) for number, pair in enumerate(zip(befores, args.after, strict=True), 1)]
        for name, members in pairs + ([("all", [pair for _, (pair,) in pairs])] if len(pairs) > 1 else []):
            of_rounds = []
            for number in range(args.rounds):
                sides = [pooled([heard[pair[side], number, audio] for pair in members]) for side in (0, 1)]
                of_rounds.append(row_of(name, audio, *sides, speakers))
            rows.append(median_row(of_rounds))
    size = f"{len(cuts)} utterances, {args.num_empty} clips each of noise and silence; {args.group_size} answers, {args.context}"
    publish(args, __doc__.split("\n")[0], size, rows, device)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
