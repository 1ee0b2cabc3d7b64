"""Joint decoding: the language model proposes several texts, and the phoneme head says how well each fits what was heard.

The language model alone writes words that nobody said and leaves out others; CTC counts every phoneme, but knows no words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import PhonemeInventory
from nim4.model.ctc import BLANK


class CtcRescorer:
    """Chooses among the language model's candidates.

    Args:
        inventory: of the phoneme head.
        weight: of CTC, from 0 to 1; the language model has the rest.
    Source: joint CTC / attention decoding (arXiv 1609.06773, equation 11), here over the candidates of a beam search and over phonemes instead of
        characters. ours: the paper decodes greedily.
    """

    def __init__(self, inventory: PhonemeInventory, weight: float):
        self._inventory, self._weight, self._lexicon = inventory, weight, Lexicon("zh-en")

    def best(self, candidates: Sequence[tuple[str, float]], log_probs: Tensor) -> str:
        """The text with the highest score.

        Args:
            candidates: different texts with their log-probabilities, at least one.
            log_probs: (S, V) float32 phoneme log-probabilities of the utterance.
        Returns:
            the first of the best; of texts with more phonemes than S has room for only when all are such.
        """
        heard = self.log_likelihoods([text for text, _ in candidates], log_probs)
        scores = [(1 - self._weight) * written + self._weight * likely for (_, written), likely in zip(candidates, heard, strict=True)]
        return candidates[max(range(len(scores)), key=scores.__getitem__)][0]

    def log_likelihoods(self, texts: Sequence[str], log_probs: Tensor) -> list[float]:
        """ln P of each text's phonemes given the utterance, summed over all CTC paths; minus infinity where there is none."""
        phones = [torch.tensor(self._inventory.encode(self._lexicon.phones(text)), dtype=torch.int64) for text in texts]
        num_frames, num_texts = len(log_probs), len(texts)
        losses = functional.ctc_loss(
            log_probs.float().cpu()[:, None].expand(-1, num_texts, -1),
            pad_sequence(phones, batch_first=True) if any(map(len, phones)) else torch.zeros(num_texts, 1, dtype=torch.int64),
            torch.full((num_texts,), num_frames),
            torch.tensor([len(ids) for ids in phones]),
            blank=BLANK,
            reduction="none",
        )
        return (-losses).tolist()
