"""Error lists in the layout of icefall's `errs-*.txt` and `recogs-*.txt`, so that scripts which read those read ours."""

from collections import Counter
from collections.abc import Iterator, Sequence

from nim4.score.error_rate import GAP, Pairs, ScoredUtterance

MARK = "*"  # how icefall prints the side of an error that has no unit


def error_stats(metric: str, scored: Sequence[ScoredUtterance]) -> Iterator[str]:
    """The lines of an `errs-*.txt`: summary, utterances, substitutions, deletions, insertions, units. Sorted by icefall's rule, downwards."""
    pairs = Counter(pair for utt in scored for pair in utt.pairs)
    subs = {pair: count for pair, count in pairs.items() if pair[0] != pair[1] and GAP not in pair}
    dels = {ref: count for (ref, hyp), count in pairs.items() if hyp == GAP}
    ins = {hyp: count for (ref, hyp), count in pairs.items() if ref == GAP}
    num_ref = sum(len(utt.ref) for utt in scored)
    num_correct = sum(count for (ref, hyp), count in pairs.items() if ref == hyp)
    num_ins, num_del, num_sub = (sum(table.values()) for table in (ins, dels, subs))
    yield f"%{metric} = {100 * (num_ins + num_del + num_sub) / num_ref:.2f}"
    yield f"Errors: {num_ins} insertions, {num_del} deletions, {num_sub} substitutions, over {num_ref} reference words ({num_correct} correct)"
    yield "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, PER-WORD STATS:"
    yield from ("", "PER-UTT DETAILS: corr or (ref->hyp)  ")
    for utt in scored:
        yield f"{utt.id}:\t" + " ".join(_marked(utt.pairs))
    yield from ("", "SUBSTITUTIONS: count ref -> hyp")
    yield from (f"{count}   {ref} -> {hyp}" for (ref, hyp), count in _most_first(subs))
    yield from ("", "DELETIONS: count ref")
    yield from (f"{count}   {ref}" for ref, count in _most_first(dels))
    yield from ("", "INSERTIONS: count hyp")
    yield from (f"{count}   {hyp}" for hyp, count in _most_first(ins))
    yield from ("", "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp")
    in_ref = Counter(unit for utt in scored for unit in utt.ref)
    in_hyp = Counter(unit for utt in scored for unit in utt.hyp)
    wrong = {unit: in_ref[unit] + in_hyp[unit] - 2 * pairs[unit, unit] for unit in in_ref | in_hyp}
    yield from (f"{unit}   {pairs[unit, unit]} {count} {in_ref[unit]} {in_hyp[unit]}" for unit, count in _most_first(wrong))


def recogs(scored: Sequence[ScoredUtterance]) -> Iterator[str]:
    """The lines of a `recogs-*.txt`: each utterance's reference and hypothesis as lists of units."""
    for utt in scored:
        yield f"{utt.id}:\tref={list(utt.ref)}"
        yield f"{utt.id}:\thyp={list(utt.hyp)}"


def _marked(pairs: Pairs) -> Iterator[str]:
    """Correct units as they are; each run of errors as one `(ref->hyp)`."""
    run: list[tuple[str, str]] = []
    for pair in (*pairs, None):
        if pair is not None and pair[0] != pair[1]:
            run.append(pair)
            continue
        if run:
            ref, hyp = (" ".join(filter(None, side)) or MARK for side in zip(*run, strict=True))
            yield f"({ref}->{hyp})"
            run = []
        if pair is not None:
            yield pair[0]


def _most_first(counts: dict) -> list:
    return sorted(counts.items(), key=lambda item: (item[1], item[0]), reverse=True)
