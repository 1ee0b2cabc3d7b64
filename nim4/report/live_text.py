"""Text on a terminal, or in a file, while it is still changing."""

import shutil
from typing import Any

from nim4.score.table import display_width


def shown(update: Any, on_terminal: bool) -> str:
    """What to write for one partial or final text: on a terminal in the place of the one before, elsewhere a line; nothing for other updates.

    Args:
        update: of a Listener (nim4/decode/listening.py).
    """
    hypothesis = update.hypothesis
    if hypothesis is None:
        return ""
    text, num_settled = hypothesis.text, hypothesis.settled_chars
    if not on_terminal:
        kind, text = ("final", text) if hypothesis.is_final else ("partial", f"{text[:num_settled]}|{text[num_settled:]}")
        return f"{update.audio_s:.2f}\t{kind}\t{text}\n"
    if hypothesis.is_final:
        return f"\r\x1b[K{text}" + ("\n" if text else "")
    start = 0  # the end of a text that is too long for a line
    while display_width(text[start:]) >= shutil.get_terminal_size().columns:
        start += 1
    return f"\r\x1b[K{text[start : max(num_settled, start)]}\x1b[2m{text[max(num_settled, start) :]}\x1b[0m"
