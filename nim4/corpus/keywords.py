"""Keywords of utterances, and the batches of stage 8: prompts with and without hints, and what the reward looks for.

What chance decides about an utterance follows from (seed, epoch, its id) alone, as in nim4/corpus/examples.py.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from nim4.config import KeywordConfig
from nim4.corpus.batch import Batch, MonoCut, RewardBatch, collate
from nim4.corpus.prompts import Prompt
from nim4.corpus.text import split_tokens
from nim4.corpus.units import PhonemeInventory


def contains(units: Sequence[str], keyword: Sequence[str]) -> bool:
    """Whether the units of a keyword stand in a row in those of a text: "art" is not in "start". False for an empty keyword."""
    width = len(keyword)
    return width > 0 and any(tuple(units[i : i + width]) == tuple(keyword) for i in range(len(units) - width + 1))


class Keywords:
    """A list of keywords that is asked which of them a text holds, as whole words; the time does not grow with the list.

    Attributes:
        texts: as they were given, without those that have no units or the units of an earlier one.
    """

    def __init__(self, texts: Iterable[str]):
        self._by_units: dict[tuple[str, ...], str] = {}
        widths: dict[str, set[int]] = {}
        for text in texts:
            units = tuple(split_tokens(text))
            if units and units not in self._by_units:
                self._by_units[units] = text
                widths.setdefault(units[0], set()).add(len(units))
        self._widths = {first: sorted(found, reverse=True) for first, found in widths.items()}
        self.texts = list(self._by_units.values())

    def spans(self, units: Sequence[str]) -> Iterator[tuple[int, int, str]]:
        """(first unit, behind the last unit, keyword) from the left, without overlap: at each place the longest that begins there."""
        start = 0
        while start < len(units):
            ends = (start + width for width in self._widths.get(units[start], ()) if start + width <= len(units))
            end = next((end for end in ends if tuple(units[start:end]) in self._by_units), None)
            if end is not None:
                yield start, end, self._by_units[tuple(units[start:end])]
            start = start + 1 if end is None else end

    def within(self, text: str) -> list[str]:
        """Those that stand in `text`, in order and without overlap, each once."""
        return list(dict.fromkeys(keyword for _, _, keyword in self.spans(split_tokens(text))))


class RewardExamples:
    """Makes the batches of stage 8.

    Args:
        inventory: of the phonemes, which the manifests bring.
        prompt: of the language model's tokenizer.
        config: how hints are drawn.
        seed: of the draws.
        entities: an utterance's keywords are those of them that stand in its transcript; None = no hints.
        important: keywords that the reward looks for wherever they were said, in the prompt or not (paper, section 3.5).
    """

    def __init__(
        self,
        inventory: PhonemeInventory,
        prompt: Prompt,
        config: KeywordConfig,
        seed: int,
        entities: Keywords | None = None,
        important: Keywords | None = None,
    ):
        self._inventory, self._prompt, self._config, self._seed = inventory, prompt, config, seed
        self._entities, self._important = entities or Keywords(()), important or Keywords(())

    def __call__(self, cuts: Sequence[MonoCut], epoch: int) -> RewardBatch:
        """The batch of `cuts` in an epoch; in epoch -1, that of validation, there are no hints."""
        batch = collate(cuts, self._inventory)
        texts = [cut.supervisions[0].text or "" for cut in cuts]
        hints: list[list[str]] = [[] for _ in cuts]
        if epoch >= 0:
            hints = [self._hints(text, random.Random(f"{self._seed} {epoch} {cut.id}")) for text, cut in zip(texts, cuts, strict=True)]
        return RewardBatch(
            **{field.name: getattr(batch, field.name) for field in fields(Batch)},
            suffixes=[self._prompt.suffix(shown) for shown in hints],
            answers=[self._prompt.answer(text) for text in texts],
            texts=texts,
            hints=hints,
            keywords=[list(dict.fromkeys([*shown, *self._important.within(text)])) for shown, text in zip(hints, texts, strict=True)],
        )

    def _hints(self, text: str, rng: random.Random) -> list[str]:
        """Some of the keywords of `text`, and at times one that is not in it, in random order."""
        found = self._entities.within(text)
        kept = rng.sample(found, min(len(found), self._config.max_keywords))
        hints = [keyword for keyword in kept if rng.random() < self._config.hint_prob]
        if self._entities.texts and rng.random() < self._config.distractor_prob:
            other, units = rng.choice(self._entities.texts), split_tokens(text)
            hints += [other] if not contains(units, split_tokens(other)) else []
        rng.shuffle(hints)
        return hints
