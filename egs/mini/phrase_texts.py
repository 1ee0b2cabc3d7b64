"""The texts of egs/mini's phrases: drawn from the grammar, or words joined at random."""

import random
import re
from pathlib import Path

WORDS_IN_JOIN = (2, 7)


def read_grammar(path: Path) -> dict[str, list[str]]:
    """The rules of a grammar file: name -> options. Lines starting with # are comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {name.strip(): [option.strip() for option in options.split("|")] for name, options in (line.split("=") for line in lines)}


def draw_phrase(grammar: dict[str, list[str]], rng: random.Random, start: str = "phrase") -> str:
    """One phrase of the grammar, options equally likely, as punctuated text."""
    return re.sub(r"<(\w+)>", lambda name: draw_phrase(grammar, rng, name[1]), rng.choice(grammar[start]))


def words_of(text: str) -> list[str]:
    """The recorded words of a phrase: Latin words, and the two-character Chinese words of egs/mini."""
    return re.findall(r"[a-z]+|[一-鿿]{2}", text)


def join_words(words: list[str]) -> str:
    """Words as written text: a space wherever a Latin word meets another word."""
    text = ""
    for word in words:
        text += " " * bool(text and (text[-1].isascii() or word.isascii())) + word
    return text


def draw_join(words: list[str], rng: random.Random) -> str:
    """Two to seven of the words, as written text."""
    return join_words([rng.choice(words) for _ in range(rng.randint(*WORDS_IN_JOIN))])
