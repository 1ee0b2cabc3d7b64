"""Batches of utterances: read, padded, and in an order that can be repeated from any point.

The order of an epoch follows from (seed, epoch) alone. Micro-batches are dealt to the processes in turn, so a training step is
the same set of utterances for 1 process with 2 micro-batches and for 2 processes with 1; and a run resumes exactly by drawing the
epoch's order again and stepping over what was used, whatever data workers had read ahead.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from lhotse import CutSet, MonoCut
from lhotse.cut import Cut, MixedCut
from lhotse.dataset import DynamicBucketingSampler, DynamicCutSampler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from nim4.config import OptimConfig, RecipeError
from nim4.corpus.feats import load_features
from nim4.corpus.manifest import Source, load_cuts
from nim4.corpus.noise import Noise
from nim4.corpus.units import PhonemeInventory

Disturb = Callable[[str, Tensor], tuple[Tensor, bool]]  # utterance id, (T, 80) -> (T', 80), and whether the utterance is still in it


@dataclass(frozen=True)
class Batch:
    """Utterances of one forward pass.

    Attributes:
        ids: utterance ids.
        x: (B, T, 80) float32, log-Mel features, zero beyond `x_lens`.
        x_lens: (B,) int64, feature frames.
        phones: (B, P) int64, zero beyond `phone_lens`.
        phone_lens: (B,) int64.
    """

    ids: list[str]
    x: Tensor
    x_lens: Tensor
    phones: Tensor
    phone_lens: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("x", "x_lens", "phones", "phone_lens")}
        return replace(self, **moved)

    @property
    def num_targets(self) -> float:
        """What the loss of a training step is divided by: feature frames."""
        return float(self.x_lens.sum())

    @property
    def padding_share(self) -> float:
        """Share of the feature frames that are padding."""
        return 1.0 - float(self.x_lens.sum()) / (self.x.shape[0] * self.x.shape[1])


@dataclass(frozen=True)
class TextBatch(Batch):
    """Utterances with what the language model reads and writes around the speech.

    Attributes:
        suffixes: token ids between speech and answer.
        answers: token ids of the transcript and its end.
        texts: the transcripts.
    """

    suffixes: list[list[int]]
    answers: list[list[int]]
    texts: list[str]

    @property
    def num_targets(self) -> float:
        """What the loss of a training step is divided by: the answers' ids."""
        return float(sum(map(len, self.answers)))


@dataclass(frozen=True)
class RewardBatch(TextBatch):
    """Utterances whose answers are rewarded, not given.

    Attributes:
        hints: keywords in the prompt, said or not.
        keywords: what the context reward looks for: the hints, and important keywords that were said.
    """

    hints: list[list[str]]
    keywords: list[list[str]]

    @property
    def num_targets(self) -> float:
        """What the loss of a training step is divided by: utterances, each with its group of answers."""
        return float(len(self.ids))


# (utterances, epoch) -> their batch; what chance decides must follow from the epoch and the ids alone, not from the order of calls
MakeBatch = Callable[[Sequence[Cut], int], Batch]


def phones_of(cut: Cut) -> str:
    """The phoneme string stage 2 wrote. Raises RecipeError when there is none."""
    custom = cut.supervisions[0].custom or {}
    if "phones" not in custom:
        raise RecipeError(
            cut.id, expected="phonemes in the manifest", found="none", fix="give the manifests that stage 2 wrote (data/<corpus>/units)"
        )
    return custom["phones"]


def lengthened(cut: MonoCut, seconds: float) -> Cut:
    """The cut with this much silence behind it, for samplers, which look at durations; its features are those of `speech_of`."""
    return cut.pad(cut.duration + seconds, preserve_id=True) if seconds else cut


def speech_of(cut: Cut) -> MonoCut:
    """The recorded part of a cut that may have been lengthened."""
    return cut.first_non_padding_cut if isinstance(cut, MixedCut) else cut


def collate(cuts: Sequence[Cut], inventory: PhonemeInventory, disturb: Disturb | None = None) -> Batch:
    """Reads the features of `cuts`, disturbs them, and pads them. Raises RecipeError, with the id, when features cannot be read."""
    features, phones = [], []
    for cut in cuts:
        x, said = load_features(speech_of(cut)), phones_of(cut)
        if disturb is not None:
            x, is_speech = disturb(cut.id, x)
            said = said if is_speech else ""
        features.append(x)
        phones.append(torch.tensor(inventory.encode(said), dtype=torch.int64))
    return Batch(
        ids=[cut.id for cut in cuts],
        x=pad_sequence(features, batch_first=True),
        x_lens=torch.tensor([len(x) for x in features]),
        phones=pad_sequence(phones, batch_first=True),
        phone_lens=torch.tensor([len(p) for p in phones]),
    )


class _Collated(Dataset):
    """Turns the sampler's lists of cuts into batches, in the data workers.

    A RecipeError is returned rather than raised: a data worker would wrap it in a traceback.
    """

    def __init__(self, make: MakeBatch):
        self.make = make

    def __getitem__(self, item: tuple[int, CutSet]) -> Batch | RecipeError:
        epoch, cuts = item
        try:
            return self.make(list(cuts), epoch)
        except RecipeError as error:
            return error


def parse_sources(specification: str, default_folder: Path, option: str = "--train") -> list[Source]:
    """`"train"` or `"aishell:train librispeech:train-clean-100=0.3"`, the value of `option`, as sources.

    A split without a corpus is looked for in `default_folder` (data/<corpus>/units); `corpus:split` in the same place of another corpus.
    """
    sources = []
    for item in specification.split():
        name, equals, weight_text = item.partition("=")
        corpus, colon, split = name.rpartition(":")
        if not split or (colon and not corpus):
            raise RecipeError(f"{option} {item}", expected="split or corpus:split", found=repr(name), fix="for example librispeech:train-clean-100")
        folder = default_folder.parent.parent / corpus / default_folder.name if corpus else default_folder
        try:
            weight = float(weight_text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise RecipeError(
                f"{option} {item}",
                expected="a positive weight after =",
                found=weight_text or "none",
                fix="for example librispeech:train-clean-100=0.3",
            )
        sources.append(Source(folder / f"{split}.jsonl.gz", weight))
    if not sources:
        raise RecipeError(option, expected="at least one split", found=repr(specification), fix=f"for example {option} train")
    return sources


def longer_half(cuts: Sequence[MonoCut]) -> list[MonoCut]:
    """The longest half of `cuts`, rounded down; among equal lengths, those whose id comes first."""
    return sorted(cuts, key=lambda cut: (-cut.duration, cut.id))[: len(cuts) // 2]


class TrainBatches:
    """An endless, repeatable stream of training steps, each a list of this process's micro-batches.

    Args:
        sources: manifests and weights.
        make: turns utterances into a batch, see MakeBatch.
        config: `max_duration_s` (padded audio per micro-batch), `accum` (micro-batches per step and process), `seed`, `num_buckets`,
            `num_workers`, `short_first_epochs` and `long_weight` count.
        rank, world_size: this process, and how many there are.
        noise: what `make` mixes into the utterances: the silence it adds counts as audio when batches are filled.
    """

    def __init__(
        self, sources: Sequence[Source], make: MakeBatch, config: OptimConfig, rank: int = 0, world_size: int = 1, noise: Noise | None = None
    ):
        self._cuts = [(list(load_cuts(source.path)), source.weight) for source in sources]
        self._dataset, self._noise = _Collated(make), noise
        self._config, self._rank, self._world_size = config, rank, world_size
        self.cuts = [cut for cuts, _ in self._cuts for cut in cuts]
        self.num_utterances, self.hours = len(self.cuts), sum(cut.duration for cut in self.cuts) / 3600
        if config.long_weight < 1:
            raise RecipeError("train.long_weight", expected="at least 1", found=config.long_weight, fix="1 takes all utterances alike")
        if config.long_weight > 1:  # what comes more than once is a source of its own
            halves = [(longer_half(cuts), weight * (config.long_weight - 1)) for cuts, weight in self._cuts]
            self._cuts += [(half, weight) for half, weight in halves if half]

    def _epoch_cuts(self, epoch: int) -> CutSet:
        chosen: list[MonoCut] = []
        for number, (cuts, weight) in enumerate(self._cuts):
            order = list(cuts)
            random.Random(f"{self._config.seed} {number}").shuffle(order)
            take = max(round(len(order) * weight), 1)
            start = take * epoch
            chosen += [order[i % len(order)] for i in range(start, start + take)]
        random.Random(f"{self._config.seed} epoch {epoch}").shuffle(chosen)
        repeats: dict[str, int] = {}
        for position, cut in enumerate(chosen):  # a weight above 1 takes a cut twice; lhotse wants unique ids
            repeats[cut.id] = repeats.get(cut.id, 0) + 1
            if repeats[cut.id] > 1:
                chosen[position] = cut.with_id(f"{cut.id}-again{repeats[cut.id]}")
        return CutSet.from_cuts(chosen)

    def _groups(self, epoch: int) -> Iterator[list[CutSet]]:
        """The micro-batches of each step of an epoch, of all processes; a last, incomplete step is left for another epoch's order."""
        cuts = self._epoch_cuts(epoch)
        if self._noise is not None:  # the silence counts as audio: it decides how many utterances go into a batch
            cuts = CutSet.from_cuts(lengthened(cut, self._noise.added_s(epoch, cut.id)) for cut in cuts)
        # Every process draws the whole order, as if it were alone; which part is its own is decided later.
        is_sorted = epoch < self._config.short_first_epochs
        num_buckets = min(self._config.num_buckets, len(cuts) // 2)
        if is_sorted or num_buckets < 2:  # lhotse has no single bucket: as drawn, utterances of all lengths stand together
            cuts = cuts.sort_by_duration(ascending=True) if is_sorted else cuts
            sampler = DynamicCutSampler(cuts, max_duration=self._config.max_duration_s, rank=0, world_size=1)
        else:
            sampler = DynamicBucketingSampler(
                cuts, max_duration=self._config.max_duration_s, shuffle=True, seed=self._config.seed, num_buckets=num_buckets, rank=0, world_size=1
            )
            sampler.set_epoch(epoch)
        group: list[CutSet] = []
        for cuts_of_batch in sampler:
            group.append(cuts_of_batch)
            if len(group) == self._config.accum * self._world_size:
                yield group
                group = []

    def _own_cuts(self, epoch: int, first_step: int) -> Iterator[tuple[int, CutSet]]:
        """This process's micro-batches of an epoch from `first_step` on."""
        for group in itertools.islice(self._groups(epoch), first_step, None):
            yield from ((epoch, cuts) for cuts in group[self._rank :: self._world_size])

    def planned(self, num_steps: int) -> Iterator[tuple[int, Cut]]:
        """The (epoch, utterance) pairs of the first `num_steps` steps, of all processes; nothing is read for it."""
        for epoch in itertools.count():
            groups = list(itertools.islice(self._groups(epoch), num_steps))
            yield from ((epoch, cut) for group in groups for cuts in group for cut in cuts)
            num_steps -= len(groups)
            if num_steps == 0 or not groups:
                return

    def steps(self, epoch: int = 0, first_step: int = 0) -> Iterator[tuple[int, int, list[Batch]]]:
        """Yields (epoch, step within the epoch, micro-batches) for ever, from the given place on.

        Raises:
            RecipeError: if an epoch has not a single whole step, or features cannot be read.
        """
        while True:
            loader = DataLoader(
                self._dataset,
                sampler=_Once(self._own_cuts(epoch, first_step)),
                batch_size=None,
                num_workers=self._config.num_workers,
                multiprocessing_context="fork" if self._config.num_workers else None,
            )
            step, micro_batches = first_step, []
            for batch in loader:
                if isinstance(batch, RecipeError):
                    raise batch
                micro_batches.append(batch)
                if len(micro_batches) == self._config.accum:
                    yield epoch, step, micro_batches
                    step, micro_batches = step + 1, []
            if step == 0:
                raise RecipeError(
                    "training data",
                    expected="at least one step per epoch",
                    found=f"{self.num_utterances} utterances, {self.hours:.3f} h",
                    fix="lower train.max_duration_s",
                )
            epoch, first_step = epoch + 1, 0


class _Once:
    """An iterator as a DataLoader's sampler: it is asked for its iterator once."""

    def __init__(self, items: Iterator[tuple[int, CutSet]]):
        self._items = items

    def __iter__(self) -> Iterator[tuple[int, CutSet]]:
        return self._items


def phone_batches(inventory: PhonemeInventory, noise: Noise | None = None) -> MakeBatch:
    """How stages 3 and 9 make their batches: features, with noise in some when there is any, and phonemes."""
    return lambda cuts, epoch: collate(cuts, inventory, disturb_of(noise, epoch))


def disturb_of(noise: Noise | None, epoch: int) -> Disturb | None:
    """What happens to the utterances of an epoch; nothing in epoch -1, that of validation."""
    return None if noise is None or epoch < 0 else partial(noise.disturb, epoch)


def eval_batches(cuts: CutSet, make: MakeBatch, max_duration_s: float) -> Iterator[Batch]:
    """All of `cuts` once, longest first, in padded batches of at most `max_duration_s` (one longer utterance stands alone).

    They are made as of epoch -1, in which nothing is left to chance.
    """
    pending: list[MonoCut] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if pending and pending[0].duration * (len(pending) + 1) > max_duration_s:
            yield make(pending, -1)
            pending = []
        pending.append(cut)
    if pending:
        yield make(pending, -1)
