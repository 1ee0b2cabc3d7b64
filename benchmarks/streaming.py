#!/usr/bin/env python3
"""Texts that follow a speaker, chunk by chunk: ours beside reading everything again for each text, on the same weights, audio and policy.

`ours` is StreamingSession: speech is read once, into keys and values that are only appended to; a partial text is written on a fork of
them, and what was taken back of the text before is verified as a draft. `re-feed` hears with the same cached encoder, but for each partial
it reads all speech embeddings so far, the prompt around them and the kept text from nothing, and then writes with keys and values of that
one text. `re-feed, re-encode` also runs features and encoder over all audio so far, under the mask that gives a stream's frames.
`re-feed, generate` is `re-feed` with transformers' generate. In fp32 all must write the same texts; in bf16, where sums in another order may
change an id, `same texts` says how many are those of `ours`. `ours, final whole` is ours with a second pass that hears the whole anew, with full
context, which may give another final text. Partials are not written when nothing new was heard, in no way. Tokens and passes
of the language model are counted for all partials and the final text; `per new token` divides the tokens by the embeddings of
speech and the ids of the final text, which nobody can do without.
The second table is the final text alone, when all speech has been read: the last partial verified as a draft, plain greedy writing behind
the same keys and values, and generate from nothing. `ids differ`: of the ids of the plain text, those that the model would not choose when
it reads the text in one pass, as verification does. Each round is another recording; the first is followed once before the clock starts.
Without --model: see streaming_model.py. The ids that differ are of random weights as they are, which hardly prefer one id to another.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
import torch
from common import keep, make_record, median_ratio, parser_for
from streaming_model import Measured, Recordings, add_model_options, load_measured
from streaming_ways import AGAIN, OURS, WAYS, WHOLE, Followed, Meter, ReadAgain, follow, in_chunks, write_with_generate

import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ
from nim4.decode import streaming
from nim4.decode.together import alone
from nim4.model.asr import SpeechLlm
from nim4.model.rows import Read, Row, Rows, write
from nim4.report.benchmarks import as_markdown

log = logging.getLogger("nim4")
FINAL = "The final text when all speech has been read: the last partial verified as a draft, beside plain greedy writing and beside generate."
DRAFT, PLAIN, GENERATE = "draft verified", "plain greedy", "generate from nothing"


def build_parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.5, 5.0, 10.0, 20.0, 40.0], help="of utterances, in seconds")
    add_model_options(parser)
    return parser


@dataclass
class Final:
    """One final text, ids without the end, and what it took."""

    ids: list[int]
    ms: float
    tokens: int
    passes: int


@dataclass
class Round:
    """One recording.

    Attributes:
        followed: by each way.
        finals: by each way of writing the final text.
        drafted, accepted: ids of the last partial, and those that were verified.
        num_ids, num_differ: see `ids differ`.
    """

    followed: dict[str, Followed]
    finals: dict[str, Final]
    drafted: int
    accepted: int
    num_ids: int
    num_differ: int


def in_turns(names: Sequence[str], number: int) -> Sequence[str]:
    """The names, beginning with another in each round."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def one_round(measured: Measured, rows: Rows, meter: Meter, samples: np.ndarray, number: int) -> Round:
    """All ways on one recording. Raises RecipeError if it is shorter than a chunk, RuntimeError if texts differ that must not."""
    model = measured.model
    pieces, rest = in_chunks(model, samples)
    if not pieces:
        raise RecipeError("--lengths", expected="at least a chunk, 0.7 s", found=len(samples) / SAMPLING_RATE_HZ, fix="name longer utterances")
    with measured.scripted():
        followed = {way: follow(way, model, rows, pieces, rest, meter) for way in in_turns(list(WAYS), number)}
        stream = followed[AGAIN].stream
        finals, accepted = write_finals(measured, rows, meter, stream, number)
        if measured.is_exact:
            must_be_equal({way: one.texts for way, one in followed.items() if way != WHOLE})
            must_be_equal({way: followed[way].texts[:-1] for way in (OURS, WHOLE)})
            must_be_equal({way: one.ids for way, one in finals.items()})
        with measured.unscaled():
            return Round(followed, finals, len(stream.ids), accepted, *ids_that_differ(model, rows, stream))


def must_be_equal(texts: Mapping[str, object]) -> None:
    """Raises RuntimeError unless all ways wrote the same."""
    first = next(iter(texts))
    for way, text in texts.items():
        if text != texts[first]:
            raise RuntimeError(f"{way} wrote {text}, but {first} {texts[first]}")


def heard(model: SpeechLlm, rows: Rows, stream: ReadAgain) -> Row:
    """A row that has read the speech of a stream."""
    row = rows.new()
    rows.read([Read(rows, row, (), speech=stream.speech[0])])
    return row


@torch.inference_mode()
def write_finals(measured: Measured, rows: Rows, meter: Meter, stream: ReadAgain, number: int) -> tuple[dict[str, Final], int]:
    """The final text by each way, and how many ids of the draft were accepted."""
    model, suffix, limit = measured.model, measured.model.prompt.suffix(), streaming.max_answer_tokens(stream.speech.shape[1])
    lens = torch.tensor([stream.speech.shape[1]], device=measured.device)
    whole, accepted, finals = model.rows(stream.speech, lens, [suffix])[0], 0, {}
    for way in in_turns((DRAFT, PLAIN, GENERATE), number):
        row, tokens, passes, started_s = heard(model, rows, stream), meter.tokens, meter.passes, time.perf_counter()
        if way == GENERATE:
            ids = write_with_generate(model, whole, limit)
            tokens, passes = meter.tokens - tokens, meter.passes - passes
        else:
            written = alone(write(rows, row, suffix, stream.ids if way == DRAFT else (), limit, model.prompt.end))
            ids, tokens, passes = written.ids, written.tokens_read, written.passes
            accepted = max(accepted, written.accepted)
        finals[way] = Final(ids, 1000 * (time.perf_counter() - started_s), tokens, passes)
    return finals, accepted


@torch.inference_mode()
def ids_that_differ(model: SpeechLlm, rows: Rows, stream: ReadAgain) -> tuple[int, int]:
    """How many ids plain greedy writing gives, and how many of them are not the first choice when all are read in one pass."""
    suffix, limit = model.prompt.suffix(), streaming.max_answer_tokens(stream.speech.shape[1])
    ids = alone(write(rows, heard(model, rows, stream), suffix, (), limit, model.prompt.end)).ids
    ((*best, _),) = rows.read([Read(rows, heard(model, rows, stream), suffix + ids, len(ids) + 1)])
    return len(ids), sum(a != b for a, b in zip(ids, best, strict=True))


def stream_rows(length_s: float, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The lines of the first table for one length."""
    rows = []
    for way in WAYS:
        ours, again, own = ([one.followed[name] for one in rounds] for name in (OURS, AGAIN, way))
        new = sum(one.followed[AGAIN].stream.speech.shape[1] + len(one.finals[PLAIN].ids) for one in rounds)
        same = [a == b for x, y in zip(own, ours, strict=True) for a, b in zip(x.texts, y.texts, strict=True)]
        rows.append(
            {
                "audio_s": length_s,
                "way": way,
                "partials": statistics.mean(one.num_written for one in own),
                "tokens": statistics.mean(one.tokens for one in own),
                "tokens_to_re-feed": sum(one.tokens for one in own) / sum(one.tokens for one in again),
                "per_new_token": sum(one.tokens for one in own) / new,
                "passes": statistics.mean(one.passes for one in own),
                "chunk_ms": statistics.median(ms for one in own for ms in one.chunk_ms),
                "last_chunk_ms": statistics.median(one.chunk_ms[-1] for one in own),
                "final_ms": statistics.median(one.final_ms for one in own),
                "time_to_re-feed": median_ratio([one.total_ms for one in own], [one.total_ms for one in again]),
                "same_texts_percent": 100.0 * statistics.mean(same),
            }
        )
    return rows


def final_rows(length_s: float, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The lines of the second table for one length."""
    rows = []
    for way in (DRAFT, PLAIN, GENERATE):
        own, plain = ([one.finals[name] for one in rounds] for name in (way, PLAIN))
        is_draft, drafted, num_ids = way == DRAFT, sum(one.drafted for one in rounds), sum(one.num_ids for one in rounds)
        rows.append(
            {
                "audio_s": length_s,
                "way": way,
                "text_tokens": statistics.mean(len(one.ids) for one in own),
                "passes": statistics.mean(one.passes for one in own),
                "tokens": statistics.mean(one.tokens for one in own),
                "ms": statistics.median(one.ms for one in own),
                "time_to_plain": median_ratio([one.ms for one in own], [one.ms for one in plain]),
                "accepted_percent": 100 * sum(one.accepted for one in rounds) / drafted if is_draft and drafted else "-",
                "same_texts_percent": 100.0 * statistics.mean(a.ids == b.ids for a, b in zip(own, plain, strict=True)),
                "ids_differ": f"{sum(one.num_differ for one in rounds)} of {num_ids}" if is_draft else "-",
            }
        )
    return rows


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.rounds < 1:
        raise RecipeError("--rounds", expected="at least 1", found=args.rounds, fix="name a larger number")
    measured = load_measured(args)
    recordings, meter, rows = Recordings(measured), Meter(measured.model.llm), measured.rows(2, max(args.lengths))
    tables: dict[str, list[dict[str, Any]]] = {__doc__.split("\n")[0]: [], FINAL: []}
    kept: dict[str, dict[str, Any]] = {}
    for length_s in args.lengths:
        try:
            one_round(measured, rows, meter, recordings.samples(0, length_s), 0)  # memory and kernels are set up before the clock starts
            rounds = [one_round(measured, rows, meter, recordings.samples(number, length_s), number) for number in range(args.rounds)]
        except torch.OutOfMemoryError:
            log.error("%g s: too little memory", length_s)
            continue
        for what, lines in zip(tables, (stream_rows(length_s, rounds), final_rows(length_s, rounds)), strict=True):
            for line in lines:
                print(json.dumps(line), file=sys.stderr, flush=True)
            tables[what] += lines
            record = make_record(args, what, f"{args.rounds} utterances of each length; {measured.about}", tables[what], measured.device)
            keep(args, record, instead_of=kept.get(what))  # killed, it leaves the lengths before
            kept[what] = record
    for record in kept.values():
        print(as_markdown(record), end="\n\n")


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
