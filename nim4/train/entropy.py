"""What encoder frames hold: how many directions (NSE), how much of the phones (PAI), how much of the text beyond its phones (CSAI).

The three measures are named in the companion paper, arXiv 2604.08003, whose formulas were not available to us: the definitions here
are ours, and so are the numbers' sizes. All are taken on one fixed list of utterances, cut into phones once by the CTC head of a
fixed reference model (forced alignment, full context), so that checkpoints differ in their frames and in nothing else.

- NSE, normalised spectral entropy: entropy of the normalised eigenvalues of the frames' centred covariance, over the logarithm of
  their greatest possible number. Frames: those on which the reference alignment has a phone, not a blank.
- PAI, phonetic accessible information: H(P) - CE of a linear probe from one frame to its aligned phone, in nats; and as a share of
  H(P). H(P) is measured like CE: the phones' frequencies in one half of the utterances, on the other half.
- CSAI, conditional semantic accessible information: CE of a text unit given its phones, minus CE with a linear probe of the unit's mean
  encoder frame on top, in nats. Units are Chinese characters and English words. Given the phones: frequencies of the units that have
  this sequence of phones, the best that a probe of the sequence could do; a probe fitted step by step would leave something untold,
  which the frames would then tell, and it would pass for more than phones. CSAI cannot be more than the first CE: where no units of
  the list sound alike, both are about 0 for every encoder. A few dozen utterances are too few for it: on 38, where the step of a probe
  is chosen on 3, we saw -0.06 +- 0.03 nats.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nim4.config import EntropyConfig, RecipeError, as_dict
from nim4.corpus.batch import eval_batches, phone_batches, phones_of
from nim4.corpus.g2p import Lexicon
from nim4.corpus.g2p_en import Phones
from nim4.corpus.manifest import utterances
from nim4.corpus.text import is_han
from nim4.corpus.units import PhonemeInventory
from nim4.model.ctc import PhonemeModel, forced_align
from nim4.train.cr_ctc import spectral_entropy
from nim4.train.probe import MIN_UTTERANCES, Question, ask, draw_parts, information

log = logging.getLogger("nim4")

BATCH_S = 60.0  # padded audio encoded at once; the result does not depend on it


@dataclass(frozen=True)
class Spoken:
    """One utterance, as the reference model aligned it.

    Attributes:
        id: of the utterance.
        frames: (N,) int64, the encoder frames that have a phone.
        phones: (N,) int64, their phones.
        units: label, phone ids, first and last encoder frame (inclusive) of each text unit.
    """

    id: str
    frames: Tensor
    phones: Tensor
    units: list[tuple[str, list[int], int, int]]


def text_units(words: Sequence[tuple[str, Phones]]) -> list[tuple[str, int]]:
    """(unit, number of its phones): the characters of Chinese words, whose syllables have two phones each; other words whole."""
    units: list[tuple[str, int]] = []
    for word, phones in words:
        if all(map(is_han, word)) and len(phones) == 2 * len(word):
            units += [(char, 2) for char in word]
        else:
            units.append((word, len(phones)))
    return units


class FixedList:
    """The utterances on which checkpoints are compared, aligned by the reference model, with all that does not depend on a checkpoint.

    Args:
        cuts: lhotse cuts with features and phones; at least 4 must be usable.
        reference: aligns them; in evaluation mode.
        inventory: the reference's.
        lexicon: reads the text in the language in which stage 2 read it.
        config: probe budget and number of seeds.
    Raises:
        RecipeError: if fewer than 4 utterances can be used. Left out, and counted by reason in `left_out`, are utterances without
            phones, whose phones do not fit into their frames, or whose text the lexicon reads otherwise than stage 2 did.
    """

    def __init__(self, cuts: Sequence[Any], reference: PhonemeModel, inventory: PhonemeInventory, lexicon: Lexicon, config: EntropyConfig):
        self.config = config
        self._cuts, self._make = cuts, phone_batches(inventory)
        self.left_out = {"no phones": 0, "phones do not fit": 0, "read otherwise": 0}
        phones = {cut.id: phones_of(cut).split() for cut in cuts}
        texts = {fact.id: fact.text for fact in utterances(cuts)}
        self.spoken: list[Spoken] = []
        for name, frames in self._encode(reference):
            words = lexicon.words(texts[name])
            if not phones[name]:
                self.left_out["no phones"] += 1
            elif [phone for _, listed in words for phone in listed] != phones[name]:
                self.left_out["read otherwise"] += 1
            else:
                self._add(name, inventory.encode(phones[name]), words, reference.head(frames[None])[0].cpu().numpy())
        if len(self.spoken) < MIN_UTTERANCES:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
            fix = "name a larger split, or a reference trained on this corpus's phonemes"
            raise RecipeError("--split", expected=f"at least {MIN_UTTERANCES} usable utterances", found=f"{len(self.spoken)} ({reasons})", fix=fix)
        self._ask(reference.mean.device)

    def _add(self, name: str, ids: list[int], words: Sequence[tuple[str, Phones]], log_probs: np.ndarray) -> None:
        """Cuts an utterance into phones and text units."""
        try:
            spans = forced_align(log_probs, ids).tolist()
        except ValueError as error:
            log.info("%s: left out, %s", name, error)
            self.left_out["phones do not fit"] += 1
            return
        labelled = [(frame, phone) for (first, last), phone in zip(spans, ids, strict=True) for frame in range(first, last + 1)]
        units, start = [], 0
        for label, count in text_units(words):
            units.append((label, ids[start : start + count], spans[start][0], spans[start + count - 1][1]))
            start += count
        self.spoken.append(Spoken(name, *torch.tensor(labelled).T, units))

    def _ask(self, device: torch.device) -> None:
        """What the probes are asked, for each seed: the phones of frames, and the text units of which the phones are known."""
        phones = torch.cat([spoken.phones for spoken in self.spoken])
        phone_owner = torch.tensor([number for number, spoken in enumerate(self.spoken) for _ in spoken.phones])
        units = [unit for spoken in self.spoken for unit in spoken.units]
        unit_owner = torch.tensor([number for number, spoken in enumerate(self.spoken) for _ in spoken.units])
        numbers = {label: number for number, label in enumerate(dict.fromkeys(label for label, *_ in units))}
        labels = torch.tensor([numbers[label] for label, *_ in units])
        sequences = {ids: number for number, ids in enumerate(dict.fromkeys(tuple(ids) for _, ids, _, _ in units))}
        said = torch.tensor([sequences[tuple(ids)] for _, ids, _, _ in units])
        self.num_frames, self.num_units = len(phones), len(units)
        self.num_homophones = _count_homophones(units)
        self.phone_questions: list[Question] = []
        self.unit_questions: list[Question] = []
        for seed in range(self.config.num_seeds):
            parts = draw_parts(len(self.spoken), seed)
            try:
                self.phone_questions.append(ask(phones, torch.zeros_like(phones), parts[phone_owner], seed).to(device))
                self.unit_questions.append(ask(labels, said, parts[unit_owner], seed).to(device))
            except ValueError as error:
                raise RecipeError("--split", expected="phones and text units that recur", found=error, fix="name a larger split") from error

    def _encode(self, model: PhonemeModel) -> Iterator[tuple[str, Tensor]]:
        """(id, (S, D) float32 encoder frames without padding) of every utterance, under full context."""
        with torch.inference_mode():
            for batch in eval_batches(self._cuts, self._make, BATCH_S):
                batch = batch.to(model.mean.device)
                encoded, lens = model.encoder(model.normalise(batch.x), batch.x_lens)
                for name, frames, length in zip(batch.ids, encoded, lens.tolist(), strict=True):
                    yield name, frames[:length].float()

    def views(self, model: PhonemeModel) -> tuple[Tensor, Tensor]:
        """A checkpoint's view of the list: (N, D) frames that have a phone and (M, D) mean frames of the text units, float32."""
        spoken_of = {spoken.id: spoken for spoken in self.spoken}
        frames, means = {}, {}
        for name, encoded in self._encode(model):
            if name in spoken_of:
                spoken = spoken_of[name]
                frames[name] = encoded[spoken.frames.to(encoded.device)]
                means[name] = torch.stack([encoded[first : last + 1].mean(0) for _, _, first, last in spoken.units])
        # As clones they are no tensors of inference mode, through which no gradient could pass.
        frames_in_order, means_in_order = (torch.cat([view[spoken.id] for spoken in self.spoken]).clone() for view in (frames, means))
        return frames_in_order, means_in_order

    def measure(self, model: PhonemeModel) -> dict[str, Any]:
        """NSE, PAI and CSAI of a checkpoint, in evaluation mode, as a record keeps them; `_std` is the deviation over the seeds.

        A seed draws the halves of the utterances and the order of minibatches. NSE uses no probe and all frames, hence no seed.

        Raises:
            ValueError: if a frame is not finite.
        """
        frames, means = self.views(model)
        if not bool(torch.isfinite(frames).all() and torch.isfinite(means).all()):
            raise ValueError("encoder frames that are not finite")
        covariance = torch.cov(frames.double().T, correction=0)
        frames, means = _standardised(frames), _standardised(means)
        pai = [information(question, frames[question.kept], self.config) for question in self.phone_questions]
        csai = [information(question, means[question.kept], self.config) for question in self.unit_questions]
        entropies = [question.entropy for question in self.phone_questions]
        shares = [value / entropy if entropy > 0 else 0.0 for value, entropy in zip(pai, entropies, strict=True)]
        record: dict[str, Any] = {"nse": spectral_entropy(covariance, self.num_frames)}
        for name, values in (("pai", pai), ("pai_share", shares), ("csai", csai)):
            record |= {name: fmean(values), f"{name}_std": stdev(values) if len(values) > 1 else None}
        return record

    def facts(self) -> dict[str, Any]:
        """What the records of all checkpoints share."""
        return {
            "definitions": "ours; arXiv 2604.08003 names the measures",
            "unit": "nats",
            "phone_entropy": fmean(question.entropy for question in self.phone_questions),
            "unit_entropy_given_phones": fmean(question.entropy for question in self.unit_questions),
            "frames": self.num_frames,
            "text_units": self.num_units,
            "homophones": self.num_homophones,
            "unseen_frames_share": fmean(question.unseen_share for question in self.phone_questions),
            "unseen_text_units_share": fmean(question.unseen_share for question in self.unit_questions),
            "utterances": len(self.spoken),
            "left_out": self.left_out,
            "seeds": list(range(self.config.num_seeds)),
            "config": as_dict(self.config),
        }


def _standardised(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in every column, so that the probe's budget means the same for encoders of any scale; constant columns are 0."""
    return (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)


def _count_homophones(units: Sequence[tuple[str, list[int], int, int]]) -> int:
    """Text units whose phones another label of the list has too: only they can give CSAI."""
    labels_of: dict[tuple[int, ...], set[str]] = {}
    for label, ids, _, _ in units:
        labels_of.setdefault(tuple(ids), set()).add(label)
    return sum(len(labels_of[tuple(ids)]) > 1 for _, ids, _, _ in units)
