"""A second pass that hears a segment anew: the encoder runs over the whole of it with full context, as it does for recordings.

    features of all chunks -> encoder, full context -> frames -+-> adaptor -> [ prefix | speech | suffix ]   the last partial is verified as a draft
                                                               +-> beams, among which the phoneme head has its say

An encoder that may see a chunk and what stands before it hears worse than one that may see the whole, and nothing that reads its frames can make
up for that. So the final text is that of `transcripts` (nim4/decode/offline.py) for the same samples and hints; partials stay as they are.

Ours: the second pass of arXiv 2604.18105, section 3.6, reads the frames of the stream. Two passes over one encoder that is trained on chunks of
all sizes and on whole utterances are those of U2++ (arXiv 2106.05642), whose second pass keeps the frames of the first, too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nim4.decode.offline import write_texts
from nim4.decode.rescoring import CtcRescorer
from nim4.model.asr import SpeechLlm
from nim4.model.conformer import SUBSAMPLING

ALIKE_FRAMES = 200  # ours: features of segments that are encoded together differ by less, so that padding is at most 2 s of each


@dataclass(frozen=True)
class Rereading:
    """How the final text is written when the whole segment is heard anew.

    Attributes:
        num_beams: 1 = greedily, with the last partial as a draft.
        rescorer: chooses among the beams, of which there are then at least 2; None = the language model alone does.
    """

    num_beams: int = 1
    rescorer: CtcRescorer | None = None


def rereading_of(final_context: str, num_beams: int = 1, rescorer: CtcRescorer | None = None) -> Rereading | None:
    """That of a `final_context` (DecodeConfig): None for chunks."""
    return {"chunks": None, "whole": Rereading(num_beams, rescorer)}[final_context]


@dataclass(frozen=True, eq=False)
class EncodeWhole:
    """(T, 80) float32 features of a segment, on the CPU, that are to become encoder frames under full context; T is at least 1."""

    order: ClassVar[int] = 1

    model: SpeechLlm
    features: Tensor

    @property
    def kind(self) -> Hashable:
        """What can be done together."""
        return EncodeWhole, self.model, len(self.features) // ALIKE_FRAMES

    @staticmethod
    def together(parts: Sequence["EncodeWhole"]) -> list[Tensor]:
        """(1, S, D) frames of each."""
        frames, lens = encode_whole(parts[0].model, [part.features for part in parts])
        return [row[None, :length] for row, length in zip(frames, lens.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class WriteBest:
    """Features as of EncodeWhole that are to become a text by beam search.

    Attributes:
        hints: in the prompt.
    """

    order: ClassVar[int] = 3

    model: SpeechLlm
    features: Tensor
    hints: Sequence[str]
    rereading: Rereading

    @property
    def kind(self) -> Hashable:
        """What can be done together: as many speech tokens, since beams of one batch go on to the longest limit of an answer."""
        num_tokens = -(-len(self.features) // (SUBSAMPLING * self.model.adaptor.stack))
        return WriteBest, self.model, self.rereading, num_tokens

    @staticmethod
    def together(parts: Sequence["WriteBest"]) -> list[str]:
        """The text of each."""
        model, how = parts[0].model, parts[0].rereading
        frames, lens = encode_whole(model, [part.features for part in parts])
        return write_texts(model, frames, lens, [part.hints for part in parts], how.num_beams, how.rescorer)


def encode_whole(model: SpeechLlm, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(T, 80) float32 features each -> (B, S, D) encoder frames under full context, and (B,) int64 lengths."""
    device = model.acoustic.mean.device
    return model.encode(pad_sequence(list(features), batch_first=True).to(device), torch.tensor([len(x) for x in features], device=device))
