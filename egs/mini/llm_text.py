"""The text that the language model of egs/mini is trained on: transcripts of its training splits, and phrases drawn like theirs.

Nothing of dev or test is in it, with one exception that cannot be helped: a phrase of at most `SHORT_WORDS` words is one of a few hundred
that the grammar has (or one of 400 pairs of words), and every speaker says them, in training too.
"""

import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import phrase_texts
import prepare

HERE = Path(__file__).parent
SHORT_WORDS = 5  # the longest phrase of one order: 总工，open 北京饭店 project。
WORDS = sorted((HERE / "words.txt").read_text(encoding="utf-8").split())
UNIT = re.compile(rf"[A-Za-z0-9']+|{'|'.join(word for word in WORDS if not word.isascii())}|[一-鿿]")


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
    words = UNIT.findall(text)
    return len(words) <= SHORT_WORDS and set(words) <= set(WORDS)


def source_cost(kind: str, texts: Sequence[str]) -> float:
    """Mean cost of a text in nats for somebody who knows what drew it: the floor that no model without its speech can pass."""
    if kind == "joins":
        low, high = phrase_texts.WORDS_IN_JOIN
        return sum(len(UNIT.findall(text)) * math.log(len(WORDS)) + math.log(high - low + 1) for text in texts) / len(texts)
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
