"""The documents that the language model of egs/mini is trained on, made of its texts: prompts, hints, unfinished speech.

What stands where speech will is text too: the pronunciation that the recipe's own G2P gives, spread over time and with errors.
"""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import ARPABET, INITIALS, TONES, ZERO_INITIAL, symbols

sys.path.insert(0, str(Path(__file__).parent))
import phrase_texts
from llm_text import UNIT, WORDS

PHONES = symbols()[2:]  # without <blk> and <unk>
STACK = 4  # encoder frames of 40 ms in one embedding of speech, as the adaptor stacks them


@dataclass(frozen=True)
class Example:
    """One document of the training text.

    Attributes:
        answer: what the model has to write.
        plain: a document without a prompt; what follows does not apply to it.
        spoken: what stands in the speech's place, the phones of 160 ms each; empty: nothing.
        hints: hints of the prompt.
        partial: whether the prompt says that the speech is unfinished.
    """

    answer: str
    plain: bool = False
    spoken: tuple[tuple[str, ...], ...] = ()
    hints: tuple[str, ...] = ()
    partial: bool = False


def draw_example(text: str, others: Sequence[str], rng: random.Random, *, plain: float, spoken: float, hints: float, partial: float) -> Example:
    """A document about `text`; `plain` is the share of those without a prompt, the others are shares of those with one.

    Speech is not there yet, but a model that has never looked at what stands in its place could not be aligned to it while it is frozen. So in a
    share of the prompts the pronunciation stands there, as an adaptor could give it. ours: the paper's LLM has read pinyin and phonetic script.
    """
    if rng.random() < plain:
        return Example(text, plain=True)
    units = list(UNIT.finditer(text))
    answer, heard = text, len(units)
    is_partial = rng.random() < partial
    if is_partial:
        heard = rng.randint(0, len(units))
        answer = text[: units[heard - 1].end()] if heard else ""
    words = [unit[0] for unit in units[:heard]]
    return Example(
        answer,
        spoken=tuple(_as_frames(words, rng)) if rng.random() < spoken else (),
        hints=tuple(_draw_hints(text, others, rng)) if rng.random() < hints else (),
        partial=is_partial,
    )


def _as_frames(words: Sequence[str], rng: random.Random) -> list[tuple[str, ...]]:
    """Words as a phoneme recogniser hears them: the phones of every 160 ms, most of them silent, as CTC's spikes are; some are wrong or missing.

    Up to a third of the phones of an utterance are not as they should be: lost, another one, or two of which one is right.
    """
    error_rate = rng.uniform(0.0, 0.33)
    heard: list[tuple[str, ...]] = [()] * rng.randint(0, 8)  # one for each 40 ms
    for word in words:
        for phone in _phones(word):
            if rng.random() < error_rate:
                heard += rng.choice([[], [(_confused(phone, rng),)], [(_confused(phone, rng),)], [(phone, _confused(phone, rng))]])
            else:
                heard += [(phone,)] * rng.randint(1, 2)
            heard += [()] * rng.randint(0, 6)
        heard += [()] * rng.choice([0, 2, 4, 8, 16])
    return [sum(heard[start : start + STACK], ()) for start in range(0, len(heard), STACK)]


@cache
def _phones(word: str) -> list[str]:
    return Lexicon("zh-en").phones(word)


def _confused(phone: str, rng: random.Random) -> str:
    """What may be heard instead: the same final in another tone, or any phone of its kind (initial, final, English)."""
    kinds = ((ZERO_INITIAL, *INITIALS), ARPABET)
    same = next((kind for kind in kinds if phone in kind), None)
    if same is None and rng.random() < 0.5:
        return phone[:-1] + rng.choice(TONES[:4])
    return rng.choice(same or [final for final in PHONES if final[-1] in TONES])


def _draw_hints(text: str, others: Sequence[str], rng: random.Random) -> list[str]:
    """One to six hints: one or two neighbouring words each, of this text or of another."""
    hints = []
    for _ in range(rng.randint(1, 6)):
        pieces = re.split("[，。？]", text if rng.random() < 0.4 else rng.choice(others))
        words = UNIT.findall(rng.choice([piece for piece in pieces if piece.strip()] or [text]))
        if words:
            start = rng.randrange(len(words))
            hint = phrase_texts.join_words(words[start : start + (rng.randint(1, 2) if set(words) <= set(WORDS) else rng.randint(2, 4))])
            hints += [hint] * (hint not in hints)
    return hints
