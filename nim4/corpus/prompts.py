"""The prompt of the speech LLM, built piece by piece in the order the decoder needs it; nothing is ever searched for in token ids.

    prefix                       speech        suffix                                                          answer
    system message, user turn    embeddings    instruction [, hints], end of the turn, start of the answer     text, end of the turn

The prefix is the same for every utterance, so its keys and values are computed once; speech grows at its end; what can change while
someone speaks (instruction, hints, answer) stands behind it, so that speech is never computed twice.
Source: the wording is the paper's (arXiv 2604.18105, section 3.5); the paper writes the speech inside the instruction's sentence, we
before it. The instruction for unfinished speech is ours: the paper says that it differs, not how. There is no <think> block.
"""

from collections.abc import Sequence
from typing import Protocol

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a Multilingual Speech Recognition Model."
INSTRUCTION = "Transcribe the speech into text."
PARTIAL_INSTRUCTION = "Transcribe the unfinished speech into text."
HINTS = "Contextual hints: {}."
HINT_SEPARATOR = ", "


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...

    def convert_tokens_to_ids(self, token: str) -> int: ...


class Prompt:
    """Token ids of everything around the speech, for one tokenizer.

    Attributes:
        prefix: ids before the speech, the same for all utterances.
        end: id that ends an answer, `<|im_end|>`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._turn_start, self.end = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END))
        self._newline = self._encode("\n")
        self.prefix = [*self._turn("system"), *self._encode(SYSTEM), self.end, *self._newline, *self._turn("user")]

    def _encode(self, text: str) -> list[int]:
        # A turn marker inside a hint or a transcript is plain text: it must not end or begin a turn.
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _turn(self, role: str) -> list[int]:
        return [self._turn_start, *self._encode(role), *self._newline]

    def suffix(self, hints: Sequence[str] = (), *, partial: bool = False) -> list[int]:
        """Ids between the speech and the answer; without hints there is no hint line."""
        lines = [PARTIAL_INSTRUCTION if partial else INSTRUCTION]
        if hints:
            lines.append(HINTS.format(HINT_SEPARATOR.join(hints)))
        return [*self._newline, *self._encode("\n".join(lines)), self.end, *self._newline, *self._turn("assistant")]

    def answer(self, text: str) -> list[int]:
        """Ids of a transcript and its end."""
        return [*self._encode(text), self.end]
