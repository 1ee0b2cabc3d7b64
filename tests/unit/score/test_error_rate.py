"""Counts against hand-made alignments."""

import pytest

from nim4.score.decoded import Hypothesis, Reference
from nim4.score.error_rate import GAP, METRICS, align, score, units_of
from nim4.score.error_stats import error_stats, recogs


def reference(phones="b ei3 j ing1", text="北京"):
    return Reference("u1", phones, text, "s1", 1.0)


def hypothesis(phones, text=None, error=None):
    return Hypothesis("u1", phones, text, 1.0, 0.1, error)


def counts(utt):
    return utt.insertions, utt.deletions, utt.substitutions, utt.errors


@pytest.mark.parametrize(
    ("hyp", "expected"),
    [
        ("b ei3 j ing1", (0, 0, 0, 0)),
        ("b ei4 j ing1", (0, 0, 1, 1)),
        ("b ei3 ing1", (0, 1, 0, 1)),
        ("b ei3 j ing1 sh i4", (2, 0, 0, 2)),
        ("p ei3 ing1 0", (1, 1, 1, 3)),
        ("", (0, 4, 0, 4)),
    ],
)
def test_per_is_counted_by_hand(hyp, expected):
    (utt,) = score([reference()], {"u1": hypothesis(hyp)}, "PER")
    assert counts(utt) == expected


@pytest.mark.parametrize(
    ("hyps", "reason"),
    [
        ({}, "absent"),
        ({"u1": hypothesis("b ei3 j ing1", "北京", error="out of memory")}, "failed"),
        ({"u1": hypothesis("  ", "，")}, "empty"),
    ],
)
@pytest.mark.parametrize(("metric", "num_units"), [("PER", 4), ("MER", 2), ("CER", 2), ("WER", 1)])
def test_without_a_hypothesis_everything_is_deleted(hyps, reason, metric, num_units):
    (utt,) = score([reference()], hyps, metric)
    assert counts(utt) == (0, num_units, 0, num_units)
    assert utt.missing == reason


def test_a_null_text_is_absent_for_word_metrics_only():
    hyps = {"u1": hypothesis("b ei3 j ing1", None)}
    assert score([reference()], hyps, "MER")[0].missing == "absent"
    assert score([reference()], hyps, "PER")[0].missing is None


def test_silence_kept_silent_is_right_and_text_on_silence_is_inserted():
    silence = reference(phones="", text="")
    assert score([silence], {"u1": hypothesis("")}, "PER")[0].missing is None
    assert counts(score([silence], {"u1": hypothesis("0 a1")}, "PER")[0]) == (2, 0, 0, 2)


def test_units_of_each_metric():
    published = "打开 CarPlay，去北京!"
    assert units_of("MER", phones="", text=published) == ["打", "开", "carplay", "去", "北", "京"]
    assert units_of("CER", phones="", text=published) == list("打开carplay去北京")
    assert units_of("WER", phones="", text="Hello,  World") == ["hello", "world"]
    assert units_of("PER", phones=" k AA1  R ", text=published) == ["k", "AA1", "R"]
    with pytest.raises(ValueError, match="metric must be one of"):
        units_of("BLEU", phones="", text="")


def test_alignment_is_deterministic_and_keeps_both_sides():
    ref, hyp = list("abcde"), list("acxdfg")
    first = align(ref, hyp)
    assert all(align(ref, hyp) == first for _ in range(5))
    assert [unit for unit, _ in first if unit != GAP] == ref
    assert [unit for _, unit in first if unit != GAP] == hyp
    assert align(["*"], []) == (("*", GAP),)


def test_error_lists_have_icefalls_layout():
    refs = [Reference("u1", "a b c d", "", "s1", 1.0), Reference("u2", "a b", "", "s1", 1.0)]
    hyps = {"u1": Hypothesis("u1", "a x d d", None, 1.0, 0.1, None), "u2": Hypothesis("u2", "a b b", None, 1.0, 0.1, None)}
    scored = score(refs, hyps, "PER")
    lines = list(error_stats("PER", scored))
    assert lines[0] == "%PER = 50.00"
    assert lines[1] == "Errors: 1 insertions, 0 deletions, 2 substitutions, over 6 reference words (4 correct)"
    assert lines[2].startswith("Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:")
    assert lines[lines.index("PER-UTT DETAILS: corr or (ref->hyp)  ") + 1] == "u1:\ta (b c->x d) d"
    at = lines.index("SUBSTITUTIONS: count ref -> hyp")
    assert lines[at + 1 : at + 3] == ["1   c -> d", "1   b -> x"]
    assert lines[lines.index("INSERTIONS: count hyp") + 1] == "1   b"
    at = lines.index("PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp")
    assert lines[at + 1 :] == ["b   1 2 2 2", "x   0 1 0 1", "d   1 1 1 2", "c   0 1 1 0", "a   2 0 2 2"]
    assert list(recogs(scored))[:2] == ["u1:\tref=['a', 'b', 'c', 'd']", "u1:\thyp=['a', 'x', 'd', 'd']"]


def test_missing_utterances_show_as_deletions_in_the_lists():
    lines = list(error_stats("PER", score([reference()], {}, "PER")))
    assert lines[0] == "%PER = 100.00"
    assert "u1:\t(b ei3 j ing1->*)" in lines
    assert set(METRICS) == {"PER", "MER", "CER", "WER"}
