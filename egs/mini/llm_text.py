"""The text that the language model of egs/mini is trained on: transcripts of its training splits, and phrases drawn like theirs.

What stands where speech will is text too: the pronunciation that the recipe's own G2P gives, spread over time and with errors.

Nothing of dev or test is in it, with one exception that cannot be helped: a phrase of at most `SHORT_WORDS` words is one of a few hundred
that the grammar has (or one of 400 pairs of words), and every speaker says them, in training too.
"""

import math
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
import prepare

HERE = Path(__file__).parent
SHORT_WORDS = 5  # the longest phrase of one order: 总工，open 北京饭店 project。
WORDS = sorted((HERE / "words.txt").read_text(encoding="utf-8").split())
PHONES = symbols()[2:]  # without <blk> and <unk>
STACK = 4  # encoder frames of 40 ms in one embedding of speech, as the adaptor stacks them
_UNIT = re.compile(rf"[A-Za-z0-9']+|{'|'.join(word for word in WORDS if not word.isascii())}|[一-鿿]")


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


def training_texts(num_grammar: int, num_joins: int, seed: int) -> list[str]:
    """Every training transcript once per utterance, and phrases drawn from the grammar and as random joins; without the texts of dev and test.

    Args:
        num_grammar, num_joins: phrases drawn of each kind, equal ones included.
        seed: other seeds draw other phrases.
    """
    banned = {text for split, texts in transcripts().items() if not split.startswith("train") for text in texts}
    recorded = [text for split, texts in transcripts().items() if split.startswith("train") for text in texts]
    drawn = draw("grammar", num_grammar, seed) + draw("joins", num_joins, seed)
    return [text for text in recorded + drawn if text not in banned or is_short_phrase(text)]


def transcripts() -> dict[str, list[str]]:
    """The text of every utterance of each split of egs/mini."""
    splits, _ = prepare.plan(HERE / "audio", Path())
    return {split: [row.text for row in rows] for split, rows in splits.items()}


def held_out_texts(training: Sequence[str], count: int, seed: int) -> dict[str, list[str]]:
    """Texts of each kind that are not in `training`: `count` grammar phrases and joins, drawn until there are enough; sentences: those of dev."""
    known = set(training)
    held_out = {kind: [text for text in draw(kind, 20 * count, seed) if text not in known][:count] for kind in ("grammar", "joins")}
    return held_out | {"sentences": [text for text in transcripts()["dev_sent"] if text not in known]}


def facts(training: Sequence[str]) -> dict[str, int]:
    """What the training text consists of, for the record: texts of each origin, and how many there are in all."""
    known = set(training)
    counts = {split: sum(text in known for text in texts) for split, texts in transcripts().items() if split.startswith("train")}
    counts |= {"short_words": SHORT_WORDS, "drawn": len(training) - sum(counts.values()), "texts": len(training)}
    return counts | {"different": len(known), "chars": sum(map(len, training))}


def draw(kind: str, count: int, seed: int) -> list[str]:
    """`count` phrases of the grammar, or joins of the 20 words, as written text."""
    rng = random.Random(f"{seed} {kind}")
    grammar = phrase_texts.read_grammar(HERE / "grammar.txt")
    return [phrase_texts.draw_phrase(grammar, rng) if kind == "grammar" else phrase_texts.draw_join(WORDS, rng) for _ in range(count)]


def is_short_phrase(text: str) -> bool:
    """Whether `text` is made of at most SHORT_WORDS words, all of them among the 20."""
    words = _UNIT.findall(text)
    return len(words) <= SHORT_WORDS and set(words) <= set(WORDS)


def source_cost(kind: str, texts: Sequence[str]) -> float:
    """Mean cost of a text in nats for somebody who knows what drew it: the floor that no model without its speech can pass."""
    if kind == "joins":
        low, high = phrase_texts.WORDS_IN_JOIN
        return sum(len(_UNIT.findall(text)) * math.log(len(WORDS)) + math.log(high - low + 1) for text in texts) / len(texts)
    probs = _expand(phrase_texts.read_grammar(HERE / "grammar.txt"), "<phrase>")
    return -sum(math.log(probs[text]) for text in texts) / len(texts)


def _expand(grammar: dict[str, list[str]], option: str) -> dict[str, float]:
    """Every text that an option can become, with its probability."""
    texts = {"": 1.0}
    for piece in re.split(r"(<\w+>)", option):
        follow = {piece: 1.0}
        if piece.startswith("<"):
            rule = grammar[piece[1:-1]]
            follow = {}
            for choice in rule:
                for text, prob in _expand(grammar, choice).items():
                    follow[text] = follow.get(text, 0.0) + prob / len(rule)
        longer: dict[str, float] = {}
        for before, prob in texts.items():
            for after, share in follow.items():
                longer[before + after] = longer.get(before + after, 0.0) + prob * share
        texts = longer
    return texts


def draw_example(text: str, others: Sequence[str], rng: random.Random, *, plain: float, spoken: float, hints: float, partial: float) -> Example:
    """A document about `text`; `plain` is the share of those without a prompt, the others are shares of those with one.

    Speech is not there yet, but a model that has never looked at what stands in its place could not be aligned to it while it is frozen. So in a
    share of the prompts the pronunciation stands there, as an adaptor could give it. ours: the paper's LLM has read pinyin and phonetic script.
    """
    if rng.random() < plain:
        return Example(text, plain=True)
    units = list(_UNIT.finditer(text))
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
        words = _UNIT.findall(rng.choice([piece for piece in pieces if piece.strip()] or [text]))
        if words:
            start = rng.randrange(len(words))
            hint = phrase_texts.join_words(words[start : start + (rng.randint(1, 2) if set(words) <= set(WORDS) else rng.randint(2, 4))])
            hints += [hint] * (hint not in hints)
    return hints
