#!/usr/bin/env python3
"""Speed of scoring: alignment and intervals of 3 systems on normalised text, beside jiwer's word error rates of the same, in one run.

Texts are made up (seed 0): 3 to 26 units, every third Latin words, with errors in one unit of twelve. The ways take turns; the table gives the
median of the rounds and the ratio to ours. `ours` does more than jiwer: it keeps insertions, deletions and substitutions of each utterance. Before
timing, both must find the same errors in all. `intervals` is what `python -m nim4 score` adds: three bootstrap intervals and two paired ones.
`normalise` is profile fair without a cache, on --jobs processes.
"""

import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import jiwer
from common import SEED, median_ratio, parser_for, publish, take_turns

import nim4.stage
from nim4.config import RecipeError
from nim4.score import bootstrap
from nim4.score.decoded import Hypothesis, Reference
from nim4.score.normalising import normalised, score_normalised

CHARS = "今天气很好我们去公园玩吧上海北京语音识别系统时间安全配置表现还不错主动刹车道偏离"
WORDS = ["the", "a", "of", "and", "to", "in", "she", "turn", "on", "light", "music", "hello", "world", "apple", "watch", "seven", "please", "call"]
NUM_SYSTEMS = 3


def build_parser():
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--utterances", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2, help="processes that normalise")
    return parser


def make_texts(number: int) -> tuple[list[Reference], list[dict[str, Hypothesis]]]:
    """References and the hypotheses of each system, as profile fair leaves them."""
    rng = random.Random(SEED)
    refs: list[Reference] = []
    systems: list[dict[str, Hypothesis]] = [{} for _ in range(NUM_SYSTEMS)]
    for i in range(number):
        units, blank = (WORDS, " ") if i % 3 == 0 else (CHARS, "")
        spoken = rng.choices(units, k=rng.randint(3, 26))
        refs.append(Reference(f"u{i}", "", blank.join(spoken), f"s{i % 200}", 1.0))
        for hyps in systems:
            heard = [unit for unit in spoken if rng.random() > 0.03]
            heard = [rng.choice(units) if rng.random() < 0.05 else unit for unit in heard]
            hyps[f"u{i}"] = Hypothesis(f"u{i}", None, blank.join(heard), 1.0, None, None)
    return refs, systems


def main() -> None:
    args = build_parser().parse_args()
    if min(args.utterances, args.jobs, args.rounds) < 1:
        raise RecipeError("--utterances, --jobs, --rounds", expected="at least 1", found=args, fix="name larger numbers")
    refs, systems = make_texts(args.utterances)
    spaced = [" ".join(units_of(ref.text)) for ref in refs]
    spaced_hyps = [[" ".join(units_of(hyp.text)) for hyp in hyps.values()] for hyps in systems]
    scored: list = []

    def ours() -> None:
        scored[:] = [score_normalised(refs, hyps, "MER", "speechio") for hyps in systems]  # without compounds, which jiwer does not know

    def by_jiwer() -> list[jiwer.WordOutput]:
        return [jiwer.process_words(spaced, hyps) for hyps in spaced_hyps]

    def intervals() -> None:
        speakers = [None] * len(refs)  # the utterance is the block: the slower case
        units = [len(utt.ref) for utt in scored[0]]
        errors = [[utt.errors for utt in utts] for utts in scored]
        for number, one in enumerate(errors):
            bootstrap.interval(one, units, speakers)
            if number:
                bootstrap.paired_difference(errors[0], one, units, speakers)

    ours()
    found = [sum(utt.errors for utt in utts) for utts in scored]
    theirs = [output.insertions + output.deletions + output.substitutions for output in by_jiwer()]
    if found != theirs:
        raise RecipeError("errors", expected=f"jiwer's, {theirs}", found=found, fix="find the utterance that differs: this is a bug")
    ways = {"ours": ours, "jiwer": by_jiwer, "intervals": intervals, "normalise": lambda: normalised(refs, systems, "fair", num_processes=args.jobs)}
    seconds = take_turns(ways, args.rounds)
    rows = [
        {"way": way, "seconds": statistics.median(times), "utterances_per_s": args.utterances * NUM_SYSTEMS / statistics.median(times)}
        | {"time_of_ours": median_ratio(times, seconds["ours"])}
        for way, times in seconds.items()
    ]
    size = (
        f"{args.utterances} utterances x {NUM_SYSTEMS} systems, {sum(len(utt.ref) for utt in scored[0])} reference units, {sum(found)} errors in both"
    )
    publish(args, "Scoring on normalised text, beside jiwer", size, rows)


def units_of(text: str) -> list[str]:
    """Blanks between all units, as jiwer needs them."""
    return text.split() if " " in text or text in WORDS else list(text)


if __name__ == "__main__":
    nim4.stage.run(main, "scoring")
