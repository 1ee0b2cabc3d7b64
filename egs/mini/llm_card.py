"""README.md of egs/mini/llm, from record.json beside it: no number in it is typed."""

from collections.abc import Mapping
from typing import Any

KINDS = {"grammar": "phrases of the grammar", "joins": "random joins of the 20 words", "sentences": "read sentences (dev)"}

CARD = """# The language model of egs/mini

{parameters:,} parameters in Qwen3's shape ({num_layers} layers of width {dim}, tied embeddings, bf16), {vocabulary:,} byte-level BPE tokens,
{megabytes:.1f} MB in Hugging Face layout. It stands where Qwen3-1.7B stands in the paper, so that the whole method can run on two CPU cores.

**For**: the stages of `egs/mini` that need a language model, and tests. It knows the 20 words, the phrases that the grammar makes of them, and
the prompt.

**Not for**: anything else. It is no general language model: it has seen {sentences} sentences of Mandarin and hardly any English, it cannot
converse, and its vocabulary holds the characters of those texts only; others are written as bytes. In fine-tuning load it as float32.

## Text

{texts:,} texts, {different:,} of them different, {chars:,} characters:

- transcripts of the training splits: {train_words:,} single words and {train_phrases:,} phrases joined from DSPSpeech-20 (MIT),
  {sentences} sentences of AISHELL-1 S0150 (Apache-2.0), {an4} utterances of AN4 (free, Carnegie Mellon University); see NOTICE;
- {drawn:,} of {num_drawn:,} phrases drawn by the program from `egs/mini/grammar.txt` ({num_grammar:,}) and as random joins ({num_joins:,}),
  Apache-2.0; the others were left out, because they are texts of dev or test.

No text of dev or test was trained on, except phrases of at most {short_words} words: there are so few of those that every speaker says them,
in training too.

{plain:.0%} of the documents are bare texts; the others are prompts (`nim4/corpus/prompts.py`), {hints:.0%} of them with hints, {partial:.0%} with the
instruction for unfinished speech and the text as far as it was heard. In {spoken:.0%} of the prompts the pronunciation stands where speech will, as
the recipe's own G2P writes it: the phones of every 160 ms, their tokens' embeddings averaged, most places empty, up to a third of the phones
wrong or missing. An adaptor can only be aligned to a frozen model that already reads that place; larger ones have read pinyin and phonetic script.

## Perplexity

On texts that are not in the training text, with the prompt, without hints; the ends of texts count. *model*: nothing stands in the speech's place.
*n-gram*: interpolated Kneser-Ney over the same tokens of the same training texts, at the best order from 2 to 6, chosen on these very texts.
*source*: what drew the texts, told which kind it draws, about the best there can be. *heard*: the model, with the pronunciation in the speech's
place, with errors. Read sentences are far too few to learn from, so an n-gram, which is more cautious, can be better there.

{tables}

## How it was made

`{command}`

{steps:,} steps of {batch} documents, {minutes:.1f} minutes on {trained_on}, commit {trained_commit}; measured on
{measured_on}, commit {measured_commit}. A prompt has {prefix_tokens} tokens before the speech and {suffix_tokens} behind it,
without hints. Forward and backward of 16 sequences of 70 tokens take {ms_per_batch} ms of one thread there. The embeddings have a root mean
square of {embedding_rms}: what an adaptor has to match.

This page is made by `egs/mini/train_llm.py` from `record.json`; no number in it is typed.
"""


def card(record: Mapping[str, Any]) -> str:
    """The page for a record of egs/mini/train_llm.py."""
    settings, text, model = record["settings"], record["text"], record["model"]
    return CARD.format(
        **{key: settings[key] for key in ("num_layers", "dim", "num_grammar", "num_joins", "plain", "spoken", "hints", "partial", "steps", "batch")},
        **{key: text[key] for key in ("texts", "different", "chars", "train_words", "train_phrases", "drawn", "short_words")},
        **{key: model[key] for key in ("parameters", "vocabulary", "prefix_tokens", "suffix_tokens", "ms_per_batch", "embedding_rms")},
        num_drawn=settings["num_grammar"] + settings["num_joins"],
        sentences=text["train_sent"],
        an4=text["train_an4"],
        megabytes=model["bytes"] / 1e6,
        tables="\n\n".join(_table(record["held_out"], unit) for unit in ("token", "char")),
        command=record["command"],
        minutes=record["training"]["seconds"] / 60,
        trained_on=record["training"]["hardware"],
        trained_commit=record["training"]["commit"],
        measured_on=record["measured"]["hardware"],
        measured_commit=record["measured"]["commit"],
    )


def _table(held_out: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Perplexities per token or per character, one row for each kind of text."""
    name = {"token": "token", "char": "character"}[unit]
    lines = [f"| perplexity per {name} | texts | {name}s | source | n-gram (order) | model | heard |", "| --- |" + " ---: |" * 6]
    for kind, row in held_out.items():
        source, ngram, model, heard = (_number(row.get(f"{name}_per_{unit}")) for name in ("source", "ngram", "model", "heard"))
        lines.append(f"| {KINDS[kind]} | {row['texts']:,} | {row[unit + 's']:,} | {source} | {ngram} ({row['ngram_order']}) | {model} | {heard} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"
