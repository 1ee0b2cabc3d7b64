"""Test sets as streams of the speech LLM, with simulated speakers (nim4/decode/speakers.py)."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from nim4.config import DecodeConfig
from nim4.corpus.manifest import MonoCut
from nim4.decode.encoder import context_of
from nim4.decode.hotword import HotwordIndex
from nim4.decode.hotword_lattice import DEFAULT_LIMITS
from nim4.decode.offline import Decoded
from nim4.decode.processes import in_processes
from nim4.decode.rescoring import CtcRescorer
from nim4.decode.second_pass import rereading_of
from nim4.decode.speakers import follow, in_groups, read_all
from nim4.decode.streaming import Hypothesis, Recogniser, StreamingSession
from nim4.decode.together import Work
from nim4.model.asr import SpeechLlm


def stream_llm_cuts(
    model: SpeechLlm,
    cuts: Sequence[MonoCut],
    config: DecodeConfig,
    given: Sequence[str],
    index: HotwordIndex | None,
    num_processes: int = 1,
    rescorer: CtcRescorer | None = None,
) -> Iterator[Decoded[tuple[str, list[str] | None]]]:
    """Every cut as a stream with a partial after each chunk.

    Args:
        given: hints for every cut.
        index: hotwords; the config says how they are searched.
        rescorer: of a second pass with beams; None = the language model alone chooses among them.
    Returns:
        final text, and the hints that were looked up for it, None when there is no index. `shown` is of the partials and the final text:
        (seconds of audio heard, seconds on the speaker's clock, text, characters of it that stay).
    """
    limits = DEFAULT_LIMITS if config.hotwords == "lattice" else None
    rereading = rereading_of(config.final_context, config.num_beams, rescorer)
    recogniser = Recogniser(model, context_of(config), hotwords=index, limits=limits, max_hints=config.max_hints, rereading=rereading)
    for decoded in in_processes(partial(_stream, recogniser=recogniser, given=given), in_groups(cuts, config.speakers), num_processes):
        yield from decoded


def _stream(cuts: Sequence[MonoCut], recogniser: Recogniser, given: Sequence[str]) -> list[Decoded[tuple[str, list[str] | None]]]:
    read, unreadable = read_all(cuts)
    sessions = [recogniser.session(given) for _ in read]
    decoded = [Decoded(cut, None, 0.0, reason) for cut, reason in unreadable]
    for (cut, _), heard in zip(read, follow([samples for _, samples in read], sessions, _hear), strict=True):
        final = heard[-1].result
        shown = [(row.heard_s, row.clock_s, row.result.text, row.result.settled_chars) for row in heard]
        hints = None if recogniser.hotwords is None else list(final.hints)
        decoded.append(Decoded(cut, (final.text, hints), sum(row.work_s for row in heard), None, shown))
    return decoded


def _hear(session: StreamingSession, piece: np.ndarray | None) -> Work[Hypothesis]:
    return session.hearing(np.zeros(0, np.float32) if piece is None else piece, ends=piece is None)
