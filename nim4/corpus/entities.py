"""Entities: phrases of the training transcripts that may stand in a prompt as hints (paper, context SFT).

The paper parses all transcripts into phrases and lets a language model keep the names. nim4/corpus/entity_filter.py does that; the rules
here need no model. A phrase is, in this order:

- an entry of a word list, the longest that begins at a place; entries that nobody says stay as well: they can be distractors;
- in Chinese text, up to 3 Latin words in a row, without function words at their edges ("打开 Apple Pay" -> Apple Pay);
- in English with capitals, up to 3 capitalised words in a row, without function words at their edges; a single one that begins a sentence
  does not count;
- in English without capitals, each word that is no function word;
- a Chinese phrase of pypinyin's dictionary without a function character;
- 2 to 4 Chinese characters in a row that are in no phrase of the dictionary, and no function characters or numerals: people's names often are.

Where no language model decides, the most frequent phrases are left out as everyday ones (`everyday_share`), except for the capitalised.
What the rules cannot do: tell a name from a rare word (交易额 stays), find a name that phrases of the dictionary cut apart (张伟大 is read as
张, 伟大), or keep a name that the transcripts repeat as often as everyday words. A word list or a model mends that.
"""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nim4.config import EntityConfig, RecipeError
from nim4.corpus.g2p import Lexicon, split_phrases
from nim4.corpus.keywords import Keywords
from nim4.corpus.text import HAN, fold, split_tokens
from nim4.corpus.units import UNKNOWN
from nim4.stage import read_jsonl, write_jsonl

log = logging.getLogger("nim4")

MAX_LATIN_WORDS = 3
MIN_LETTERS = 3  # of an English word without capitals
HAN_RUN = (2, 4)  # characters of a name outside the dictionary
_LATIN = "A-Za-z\u00c0-\u024f\u1e00-\u1eff"
_PIECES = re.compile(rf"(?P<latin>[{_LATIN}](?:[{_LATIN}\d]|'(?=[{_LATIN}]))*)|(?P<han>[{HAN}])|(?P<gap>[^\s\-])")
_SENTENCE_ENDS = ".!?。！？…;；"

# Characters of grammar. A phrase of the dictionary with one of them is no name.
FUNCTION_CHARS = frozenset(
    "的了着过是在有和与及或也都就还又而且但不没无很更最太将把被让给对从向到于以为因所其之这那哪此每各个们我你他她它咱您谁什么怎吗呢吧啊呀嘛一两几些"
)
# Outside the dictionary, numerals and the like end a run as well.
RUN_ENDS = FUNCTION_CHARS | frozenset("二三四五六七八九十百千万亿零第年月日时点分次只种位名要会能可说来去上下里中后前")
_FUNCTION_WORDS = (
    "a an the and or but nor so if then than that this these those there here it its it's he she they we you i i'm i'll i've i'd me my mine your "
    "yours his her hers their theirs our ours us him them who whom whose which what when where why how is am are was were be been being do does "
    "did done have has had having will would shall should can could may might must not no yes of in on at to from by with for about into over "
    "under out up down off as again too very just also only even more most some any all each every both few many much other such own same one two "
    "three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety hundred thousand zero oh ok okay "
    "don't doesn't didn't isn't aren't wasn't won't can't mr mrs ms"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Entity:
    """A phrase that may be a hint; `count` is how often the training transcripts have it."""

    text: str
    count: int
    phones: tuple[str, ...]


@dataclass(frozen=True)
class Phrases:
    """Phrases of the transcripts and how often they occur: those of the word list, capitalised ones, and all others."""

    listed: Counter[str] = field(default_factory=Counter)
    capitalised: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def collect_phrases(texts: Iterable[str], listed: Sequence[str] = ()) -> Phrases:
    """All phrases of `texts`, by the rules above; `listed` are the entries of a word list. Spellings that differ in case are one phrase."""
    finder, found = Keywords(listed), Phrases()
    for text in texts:
        matches = list(_PIECES.finditer(fold(text)))
        kinds, pieces = [match.lastgroup for match in matches], [match[0] for match in matches]
        units = ["".join(split_tokens(piece)) if kind != "gap" else "" for kind, piece in zip(kinds, pieces, strict=True)]
        for start, end, phrase in finder.spans(units):
            found.listed[phrase] += 1
            kinds[start:end] = ["listed"] * (end - start)
        latin = [piece for kind, piece in zip(kinds, pieces, strict=True) if kind == "latin"]
        cased = any(word[0].isupper() for word in latin) and any(word[0].islower() for word in latin)
        start = 0
        for kind, run in itertools.groupby(kinds):
            end = start + len(list(run))
            if kind == "han":
                _han_phrases("".join(pieces[start:end]), found)
            elif kind == "latin":
                at_start = start == 0 or pieces[start - 1] in _SENTENCE_ENDS
                _latin_phrases(pieces[start:end], "han" in (match.lastgroup for match in matches), cased, at_start, found)
            start = end
    return Phrases(found.listed, _one_spelling(found.capitalised), _one_spelling(found.others))


def _han_phrases(run: str, found: Phrases) -> None:
    for piece, is_phrase in split_phrases(run):
        if is_phrase and not FUNCTION_CHARS & set(piece):
            found.others[piece] += 1
        elif not is_phrase:
            plain = "".join(" " if char in RUN_ENDS else char for char in piece)
            found.others.update(name for name in plain.split() if HAN_RUN[0] <= len(name) <= HAN_RUN[1])


def _latin_phrases(run: list[str], in_chinese: bool, cased: bool, at_start: bool, found: Phrases) -> None:
    content = _without_function_words(run)
    if in_chinese and len(content) <= MAX_LATIN_WORDS:
        found.others.update(_joined(content))
    elif cased:
        place = 0
        for is_capitalised, group in itertools.groupby(run, key=lambda word: word[0].isupper()):
            words = list(group)
            name = _without_function_words(words)
            only_begins_sentence = at_start and place == 0 and name == words[:1]
            if is_capitalised and len(name) <= MAX_LATIN_WORDS and not only_begins_sentence:
                found.capitalised.update(_joined(name))
            place += len(words)
    else:
        found.others.update(word for word in run if len(word) >= MIN_LETTERS and word.lower() not in FUNCTION_WORDS)


def _joined(words: list[str]) -> list[str]:
    """The words as one phrase; none when there are only single letters, which is spelling."""
    return [" ".join(words)] if any(len(word) > 1 for word in words) else []


def _without_function_words(run: list[str]) -> list[str]:
    content = [place for place, word in enumerate(run) if word.lower() not in FUNCTION_WORDS]
    return run[content[0] : content[-1] + 1] if content else []


def _one_spelling(counts: Counter[str]) -> Counter[str]:
    """The counts of phrases that differ in case only, added up under the most frequent spelling."""
    spelling: dict[str, str] = {}
    merged: Counter[str] = Counter()
    for phrase, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        merged[spelling.setdefault(phrase.lower(), phrase)] += count
    return merged


def choose_by_rule(found: Phrases, config: EntityConfig) -> Counter[str]:
    """The word list, and the other phrases that occur `min_count` times and are not everyday ones."""
    others = _at_least(found.others, config.min_count)
    by_rank = sorted(others.values(), reverse=True)
    most = by_rank[min(int(len(by_rank) * config.everyday_share), len(by_rank) - 1)] if by_rank else 0
    rare = Counter({phrase: count for phrase, count in others.items() if count <= most})
    return found.listed + _at_least(found.capitalised, config.min_count) + rare


def candidates(found: Phrases, config: EntityConfig) -> Counter[str]:
    """What a language model is to choose from: all phrases that occur `min_count` times, without those of the word list."""
    return _at_least(found.capitalised + found.others, config.min_count)


def _at_least(counts: Counter[str], min_count: int) -> Counter[str]:
    return Counter({phrase: count for phrase, count in counts.items() if count >= min_count})


def with_phones(counts: Counter[str], listed: Sequence[str], lexicon: Lexicon) -> list[Entity]:
    """The entities, from the most to the least frequent, with those of the word list that nobody says. What cannot be read is left out."""
    total = {phrase: counts.get(phrase, 0) for phrase in Keywords([*listed, *sorted(counts)]).texts}
    entities = [Entity(text, count, tuple(lexicon.phones(text))) for text, count in total.items()]
    readable = [entity for entity in entities if entity.phones and UNKNOWN not in entity.phones]
    if len(readable) < len(entities):
        log.info("%d phrases are left out: they cannot be read aloud", len(entities) - len(readable))
    return sorted(readable, key=lambda entity: (-entity.count, entity.text))


def read_word_list(path: Path, option: str = "--entities") -> list[str]:
    """The entries of a word list, the value of `option`, one per line; empty lines and lines that begin with # are passed over.

    Raises:
        RecipeError: if it cannot be read, has no entry, or a line holds neither a letter nor a digit.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a UTF-8 file with one word or name per line", found=error, fix=f"correct {option}") from error
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#") and not split_tokens(line):
            raise RecipeError(f"{path}, line {number}", expected="a word or name", found=repr(line), fix="remove the line")
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise RecipeError(path, expected="at least one word or name", found="none", fix=f"correct the file, or leave out {option}")
    return entries


def save_entities(entities: Sequence[Entity], path: Path) -> None:
    """One JSON object per line: text, count, phones."""
    write_jsonl(path, [{"text": entity.text, "count": entity.count, "phones": " ".join(entity.phones)} for entity in entities])


def read_entities(path: Path) -> list[Entity]:
    """What save_entities wrote. Raises RecipeError, with the line, when it is missing or broken."""
    entities = []
    for number, row in enumerate(read_jsonl(path), 1):
        is_entity = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in (("text", str), ("count", int), ("phones", str)))
        if not is_entity or not split_tokens(row["text"]):
            fix = "remove the file and run stage 7 again"
            raise RecipeError(f"{path}, line {number}", expected="an object with text, count and phones", found=str(row)[:80], fix=fix)
        entities.append(Entity(row["text"], row["count"], tuple(row["phones"].split())))
    return entities
