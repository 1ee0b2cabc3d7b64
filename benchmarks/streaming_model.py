"""The model of the streaming benchmarks: a trained folder, or random weights made to write texts of a stated length.

A model with random weights writes nonsense without an end, and no text of its holds under more speech. So its embeddings are scaled until it
repeats itself, a text ends when it is as long as what is said by then (--tokens-per-s), and drafts are spoiled behind the share that is to
hold (--draft-holds). All work is done as with other weights; only what comes out is known beforehand.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import SEED
from full_size import make_model

from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, read_samples
from nim4.corpus.manifest import load_cuts
from nim4.decode import streaming
from nim4.decode.encoder import record_chunks
from nim4.decode.offline import features_of
from nim4.decode.streaming import DEPLOYED
from nim4.model import rows as rows_module
from nim4.model.asr import SpeechLlm, load_speech_llm
from nim4.model.checkpoint import count_parameters
from nim4.model.llm import writing
from nim4.model.rows import Rows
from nim4.stage import ROOT
from nim4.train.distributed import pick_device

SPEECH_TOKEN_S = 0.16
MAX_TOKENS_PER_S = 20
EMBEDDING_SCALE = 64.0  # at which random weights of all sizes here repeat an id for ever; a power of 2, so that it can be taken back exactly


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model folder of stages 4 to 9; none = random weights and noise")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/mini/manifests/test_grammar.jsonl.gz", help="recordings for --model")
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="of random weights: the paper's; ci: tiny, to see that it runs")
    parser.add_argument("--tokens-per-s", type=float, default=4.5, help="ids per second of audio in the texts of random weights")
    parser.add_argument("--draft-holds", type=float, default=0.8, help="share of a draft that holds, with random weights")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


@dataclass(frozen=True)
class Measured:
    """The model of one run.

    Attributes:
        model: in evaluation mode, on its device, in its precision.
        is_exact: whether different ways must give the same texts: in fp32.
        about: what it is, for the record.
    """

    args: argparse.Namespace
    model: SpeechLlm
    is_exact: bool
    about: str

    @property
    def is_random(self) -> bool:
        return self.args.model is None

    @property
    def device(self) -> torch.device:
        return self.model.acoustic.mean.device

    def rows(self, count: int, length_s: float) -> Rows:
        """Room for so many streams of this length, made ready as a server does; the prompt, speech and a text as long as it may be need it."""
        made = streaming.new_rows(self.model)
        made.reserve(count + 2, MAX_TOKENS_PER_S * int(length_s) + 128)
        made.record()
        record_chunks(self.model.acoustic, DEPLOYED)
        return made

    @contextmanager
    def scripted(self) -> Iterator[None]:
        """Random weights write texts of the stated length, and drafts hold as far as stated; trained ones do what they do."""
        if not self.is_random:
            yield
            return
        with patch.object(streaming, "max_answer_tokens", self._text_tokens), patch.object(rows_module, "writing", self._writing):
            yield

    def _text_tokens(self, speech_tokens: int) -> int:
        return max(round(self.args.tokens_per_s * SPEECH_TOKEN_S * speech_tokens), 1)

    def _writing(self, drop: Callable[[int], None], ids: Sequence[int], draft: Sequence[int], limit: int, end: int) -> Any:
        return writing(drop, ids, self.spoiled(draft[:limit]), limit, end)

    def spoiled(self, draft: Sequence[int]) -> list[int]:
        """A draft that holds as far as it is to, where weights are random."""
        spoiled, place = list(draft), round(self.args.draft_holds * len(draft))
        if self.is_random and place < len(draft):
            spoiled[place] = (spoiled[place] + 1) % self.model.llm.config.vocab_size
        return spoiled

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Random weights whose next id depends on all that they read, and hardly prefers one to another."""
        scale = EMBEDDING_SCALE if self.is_random else 1.0
        with torch.no_grad():
            self.model.llm.get_input_embeddings().weight.div_(scale)
            try:
                yield
            finally:
                self.model.llm.get_input_embeddings().weight.mul_(scale)


def load_measured(args: argparse.Namespace) -> Measured:
    """The model that the options name. Raises RecipeError when they do not fit."""
    if not 0 <= args.draft_holds <= 1 or args.tokens_per_s <= 0:
        found = (args.draft_holds, args.tokens_per_s)
        raise RecipeError("--draft-holds, --tokens-per-s", expected="a share from 0 to 1, and more than 0", found=found, fix="correct them")
    device = pick_device(args.device)
    is_exact = args.precision == "fp32" or (args.precision == "auto" and device.type == "cpu")
    if args.model:
        model, about = load_speech_llm(args.model, device)[0], os.path.relpath(args.model, ROOT)
    else:
        model = talkative(make_model(args.size, device).eval())
        about = f"random weights, noise, {args.tokens_per_s:g} ids per second, {100 * args.draft_holds:g} % of each draft hold"
    sizes = [f"{name} {count_parameters(part.parameters())}" for name, part in (("encoder", model.acoustic.encoder), ("LLM", model.llm))]
    precision = "fp32" if is_exact else "bf16"
    return Measured(args, model if is_exact else model.to(torch.bfloat16), is_exact, f"{about}; {', '.join(sizes)}; {precision}")


def talkative(model: SpeechLlm) -> SpeechLlm:
    """Random weights that hear new phonemes in every chunk of noise, and whose language model repeats itself."""
    x, x_lens = features_of([noise(SEED, 10 * SAMPLING_RATE_HZ)], model.acoustic.mean.device)
    with torch.no_grad():
        model.llm.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
        model.acoustic.set_normalisation(x[0].mean(0), x[0].std(0))
        frames, _ = model.acoustic.encoder(model.acoustic.normalise(x), x_lens, DEPLOYED)
        model.acoustic.head.layers[-1].bias.sub_(model.acoustic.head.layers(frames)[0].mean(0))  # no phoneme is the best of all frames
    return model


def noise(number: int, count: int) -> np.ndarray:
    """(count,) float32 samples, the same ones for the same number."""
    return 0.1 * np.random.default_rng([SEED, number]).standard_normal(count, dtype=np.float32).clip(-9, 9)


class Recordings:
    """Utterances of any length: clips of --manifest in a random order, one behind the other, or noise."""

    def __init__(self, measured: Measured):
        self._path = None if measured.is_random else measured.args.manifest
        self._clips = [] if self._path is None else list(load_cuts(self._path))

    def samples(self, number: int, length_s: float) -> np.ndarray:
        """(N,) float32 in [-1, 1] at 16 kHz; a longer one of the same number begins with the shorter. Raises RecipeError when clips are too few."""
        wanted = round(length_s * SAMPLING_RATE_HZ)
        if self._path is None:
            return noise(number, wanted)
        pieces, count = [], 0
        for place in np.random.default_rng([SEED, number]).permutation(len(self._clips)):
            pieces.append(read_samples(self._clips[place]))
            count += len(pieces[-1])
            if count >= wanted:
                return np.concatenate(pieces)[:wanted]
        found = f"{count / SAMPLING_RATE_HZ:.1f} s in all"
        raise RecipeError(self._path, expected=f"recordings of {length_s:g} s together", found=found, fix="name shorter lengths, or another manifest")
