"""Qwen3-ASR by transformers' own class. https://github.com/QwenLM/Qwen3-ASR, Apache-2.0."""

import re

from asking import Greedy, samples

TAG = "<asr_text>"
REPEATS = 20  # more than so many of one character, or so many of a pattern of up to 20, are one: what the authors' package does to every output
SHORTEST = 40  # characters from a repetition to the end below which the authors do not look


def load(settings):
    from transformers import Qwen3ASRForConditionalGeneration

    def inputs(processor, path, language):
        return processor.apply_transcription_request(samples(path), language=language, prompt=settings["prompt"]["system"])

    return Greedy(Qwen3ASRForConditionalGeneration, settings, inputs)


def clean(raw, settings):
    """The text behind `language Chinese<asr_text>`, which the model writes unless it is told the language."""
    text = raw.strip()
    if "assistant\n" in text:  # of its own turn, sometimes
        text = text.split("assistant\n", 1)[1]
    if settings["fix_repetitions"]:
        text = without_repetitions(text)
    _, tag, behind = text.partition(TAG)
    return (behind if tag else text).strip()


def without_repetitions(text):
    text = re.sub(rf"(.)\1{{{REPEATS},}}", r"\1", text, flags=re.DOTALL)
    found = re.compile(rf"(.{{1,20}}?)\1{{{REPEATS - 1},}}", flags=re.DOTALL)
    return found.sub(lambda match: match[1] if len(text) - match.start() >= SHORTEST else match[0], text)
