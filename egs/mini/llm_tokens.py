"""Text as tokens for the language model of egs/mini: its tokenizer, and the training documents in the format of the prompt."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nim4.corpus import prompts
from nim4.corpus.prompts import Prompt

sys.path.insert(0, str(Path(__file__).parent))
import llm_text

DOCUMENT_END = "<|endoftext|>"
NOT_PREDICTED = -100  # label of a token that has no loss
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
    fixed = [*FIXED, "system", "user", "assistant", prompts.HINT_SEPARATOR, "\n"]
    spoken = [word for text in texts for word in text.split()]  # without the space before it, as in a hint or the speech's place
    bpe.train_from_iterator([*(fixed * 1000), *texts, *spoken], trainer)
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

    def __call__(self, example: llm_text.Example) -> tuple[list[int], int]:
        """Ids of a document, and how many of them are given rather than predicted."""
        answer = self._answer(example.answer)
        if example.plain:
            return [self._document_end, *answer[:-1], self._document_end], 1
        spoken = [token for piece in example.spoken for token in self._answer(piece)[:-1]]
        given = [*self.prompt.prefix, *spoken, *self._suffix(example.hints, example.partial)]
        return given + answer, len(given)

    def text(self, text: str) -> list[int]:
        """Ids of an answer and its end: what the n-gram counts."""
        return self._answer(text)


def collate(documents: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Encoded documents as x (B, L) int64, padded at the end with 0, and labels (B, L) int64: NOT_PREDICTED or the id itself.

    No mask is needed: a token sees only what stands before it.
    """
    longest = max(len(ids) for ids, _ in documents)
    x = torch.zeros(len(documents), longest, dtype=torch.long)
    labels = torch.full_like(x, NOT_PREDICTED)
    for row, (ids, num_given) in enumerate(documents):
        x[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_given : len(ids)] = x[row, num_given : len(ids)]
    return x, labels
