"""Text as tokens for the language model of egs/mini: its tokenizer, and the training documents in the format of the prompt."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from nim4.corpus import prompts
from nim4.corpus.prompts import Prompt
from nim4.corpus.units import TONES

sys.path.insert(0, str(Path(__file__).parent))
from llm_examples import PHONES, Example

DOCUMENT_END = "<|endoftext|>"
NOT_PREDICTED = -100  # label of a token that has no loss
EMPTY = -1  # id where a place has no more
FIXED = [prompts.SYSTEM, prompts.INSTRUCTION, prompts.PARTIAL_INSTRUCTION, prompts.HINTS.partition("{")[0].strip()]
# A fixed sentence is one piece, and so one token: every batch pays for the prompt. A Chinese character stands alone, so that no word or phrase of so
# small a text becomes a token; so do digits and punctuation. A Latin word takes the space before it.
_SENTENCES = "|".join(sentence.replace(".", r"\.") for sentence in FIXED)
PIECES = rf"{_SENTENCES}|\p{{Han}}| ?[\p{{L}}&&[^\p{{Han}}]]+|\p{{N}}|\s|[^\s\p{{L}}\p{{N}}]"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the pieces of PIECES: any text can be written and read back; <|im_end|> ends an answer, <|endoftext|> pads."""
    bpe = Tokenizer(models.BPE())
    isolated = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    special = [DOCUMENT_END, prompts.TURN_START, prompts.TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    fixed = [*FIXED, "system", "user", "assistant", prompts.HINT_SEPARATOR, "\n", *sorted({phone.rstrip(TONES) for phone in PHONES})]
    hinted = [word for text in texts for word in text.split()]  # without the space before it
    bpe.train_from_iterator([*(fixed * 1000), *texts, *hinted], trainer)
    turns = [prompts.TURN_START, prompts.TURN_END]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=prompts.TURN_END, pad_token=DOCUMENT_END, additional_special_tokens=turns, clean_up_tokenization_spaces=False
    )


class Encoder:
    """Examples as token ids, in the format of nim4/corpus/prompts.py."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.prompt = Prompt(tokenizer)
        self._document_end = tokenizer.convert_tokens_to_ids(DOCUMENT_END)
        self._answer, self._suffix = cache(self.prompt.answer), cache(lambda hints, partial: self.prompt.suffix(hints, partial=partial))

    def __call__(self, example: Example) -> tuple[list[tuple[int, ...]], int]:
        """A document, and how many of its places are given rather than predicted. A place holds one id, or in speech those of all its phones."""
        answer = self._places(example.answer)
        if example.plain:
            return [(self._document_end,), *answer[:-1], (self._document_end,)], 1
        spoken = [tuple(token for phone in frame or (" ",) for token in self._answer(phone)[:-1]) for frame in example.spoken]
        given = [*zip(self.prompt.prefix), *spoken, *zip(self._suffix(example.hints, example.partial))]
        return given + answer, len(given)

    def _places(self, text: str) -> list[tuple[int, ...]]:
        return [(token,) for token in self._answer(text)]

    def text(self, text: str) -> list[int]:
        """Ids of an answer and its end: what the n-gram counts."""
        return self._answer(text)


def collate(documents: Sequence[tuple[list[tuple[int, ...]], int]]) -> tuple[Tensor, Tensor]:
    """Encoded documents as x (B, L, K) int64, the ids of each place, EMPTY where it has fewer, and labels (B, L) int64: NOT_PREDICTED or the id.

    No mask is needed: a place sees only what stands before it.
    """
    longest = max(len(places) for places, _ in documents)
    most = max(len(ids) for places, _ in documents for ids in places)
    filler = (EMPTY,) * most
    x = torch.tensor([[(*ids, *filler)[:most] for ids in places] + [filler] * (longest - len(places)) for places, _ in documents])
    first = torch.arange(longest) < torch.tensor([num_given for _, num_given in documents])[:, None]
    return x, x[..., 0].masked_fill(first | (x[..., 0] == EMPTY), NOT_PREDICTED)


def embed(table: nn.Embedding, x: Tensor) -> Tensor:
    """(B, L, K) ids from `collate` -> (B, L, D): the mean of each place's embeddings, zeros where there are none."""
    known = x != EMPTY
    total = (table(x.clamp(min=0)) * known[..., None]).sum(2)
    return total / known.sum(2, keepdim=True).clamp(min=1)
