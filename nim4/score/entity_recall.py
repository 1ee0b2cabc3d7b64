"""Entity recall: of the names that were said, how many are written, whether a decoder had them as hints or not.

A name counts once per utterance, as a whole word, the longest at each place (nim4/corpus/keywords.py). A hypothesis that is missing, failed
or without words has written none. The paper reports CER alone on its sets of names; this is ours, as a name is right or wrong as a whole.
"""

from nim4.corpus.keywords import Keywords, contains
from nim4.corpus.text import split_tokens
from nim4.score.decoded import DecodedSet
from nim4.score.hotword import Share, share_of


def entity_recall(decoded: DecodedSet, names: Keywords) -> tuple[Share, Share]:
    """(names that were said and are written, of those said), (names written that were not said, of those written).

    The intervals are over utterances, or speakers where there are at least 10; a share of nothing has none.
    """
    said, right, written, wrong = [], [], [], []
    for ref in decoded.refs:
        hyp = decoded.hyps.get(ref.id)
        units = split_tokens((hyp.text or "") if hyp is not None else "")
        in_ref, in_hyp = names.within(ref.text), names.within("" if hyp is None else hyp.text or "")
        said.append(len(in_ref))
        right.append(sum(contains(units, split_tokens(name)) for name in in_ref))
        written.append(len(in_hyp))
        wrong.append(sum(not contains(split_tokens(ref.text), split_tokens(name)) for name in in_hyp))
    speakers = [ref.speaker for ref in decoded.refs]
    return share_of(right, said, speakers), share_of(wrong, written, speakers)
