"""Text on a terminal, or in a file, while it is still changing."""

import shutil
import sys
from typing import Any

from nim4.score.table import display_width


def show(update: Any, no_punctuation: bool = False) -> None:
    """One partial or final text: on a terminal in the place of the one before, elsewhere as a line."""
    hypothesis = update.hypothesis
    if hypothesis is None:
        return
    hypothesis = hypothesis.unpunctuated() if no_punctuation else hypothesis
    text, num_settled = hypothesis.text, hypothesis.settled_chars
    if not sys.stdout.isatty():
        kind, text = ("final", text) if hypothesis.is_final else ("partial", f"{text[:num_settled]}|{text[num_settled:]}")
        print(f"{update.audio_s:.2f}", kind, text, sep="\t", flush=True)
        return
    if hypothesis.is_final:
        print(f"\r\x1b[K{text}", end="\n" if text else "", flush=True)
        return
    start = 0  # the end of a text that is too long for a line
    while display_width(text[start:]) >= shutil.get_terminal_size().columns:
        start += 1
    print(f"\r\x1b[K{text[start : max(num_settled, start)]}\x1b[2m{text[max(num_settled, start) :]}\x1b[0m", end="", flush=True)
