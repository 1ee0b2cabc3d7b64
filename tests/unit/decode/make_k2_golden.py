"""Writes k2_golden.json, what k2 makes of a few small cases, so that tests can compare with it where there is no k2:

    python tests/unit/decode/make_k2_golden.py

Run it in an environment with k2; it was made with k2 1.23.4 and torch 1.13.1, which need Python 3.11 and numpy before 2.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that it also runs alone
from nim4.corpus.ngram import NgramStates, count_ngrams
from nim4.decode.graph import GraphSearch, k2_ctc_loss, lexicon_text, load_k2, ngram_text

GOLDEN = Path(__file__).with_suffix("").with_name("k2_golden.json")
NUM_SYMBOLS = 5
READINGS = {"x": [[2]], "xy": [[2, 3]], "twice": [[4, 4]], "two": [[3], [3, 4]], "alike": [[2, 3]]}
TEXTS = [["x", "two"], ["x", "two", "twice"], ["xy"], ["alike", "x"], ["twice", "xy"], ["two"], ["x", "x"], []]
WEIGHTS = {"lm_weight": 0.7, "word_bonus": 0.4}
LENS, PHONES = [9, 12, 7], [[2, 3, 3], [4, 2], [1, 4, 4]]


def ngram():
    """The n-gram of TEXTS."""
    with tempfile.TemporaryDirectory() as folder:
        model, names = count_ngrams(TEXTS, 3)
        model.save_arpa(Path(folder) / "words.arpa", names)
        return NgramStates.of_arpa(Path(folder) / "words.arpa")


def searches(words):
    """The three graphs; `words` is the n-gram."""
    hl = GraphSearch(NUM_SYMBOLS, READINGS, word_bonus=WEIGHTS["word_bonus"])
    return {"H": GraphSearch(NUM_SYMBOLS), "HL": hl, "HLG": GraphSearch(NUM_SYMBOLS, READINGS, words, **WEIGHTS)}


def shortest(k2, search, log_probs):
    """k2's own best path: symbols of the frames, words, score."""
    segment = torch.tensor([[0, 0, len(log_probs)]], dtype=torch.int32)
    dense = k2.DenseFsaVec(torch.tensor(log_probs)[None], segment)
    best = k2.shortest_path(k2.intersect_dense_pruned(search._graph, dense, 20.0, 8.0, 30, 10_000), use_double_scores=True)
    aux = best.aux_labels.values if isinstance(best.aux_labels, k2.RaggedTensor) else best.aux_labels
    words = [search.words[word - 1] for word in aux.tolist() if word > 0] if search.words else []
    labels = [label for label in best.labels.tolist() if label >= 0]
    return {"labels": labels, "words": words, "score": float(best.scores.double().sum())}


def main():
    k2, words, rng = load_k2(), ngram(), np.random.default_rng(7)
    made = {"graphs": {"L": lexicon_text([(words.words.index(word), phones) for word in READINGS for phones in READINGS[word]], 5, 5, 0.4)}}
    made["graphs"]["G"] = ngram_text(words, 0.7)
    made["cases"] = []
    for _ in range(6):
        logits = 2.5 * rng.standard_normal((8, NUM_SYMBOLS)) - [0, 9, 0, 0, 0]
        log_probs = torch.tensor(logits).log_softmax(-1).float().numpy()
        case = {"log_probs": log_probs.round(5).tolist(), "best": {}, "lattice": {}}
        log_probs = np.array(case["log_probs"], np.float32)
        for name, search in searches(words).items():
            lattice = search.lattice(log_probs)
            case["best"][name] = shortest(k2, search, log_probs)
            arrays = {field: getattr(lattice, field).tolist() for field in ("src", "dst", "phone")}
            case["lattice"][name] = arrays | {"words": lattice.words, "score": lattice.score.round(4).tolist()}
        made["cases"].append(case)
    log_probs = torch.tensor(rng.standard_normal((3, 12, NUM_SYMBOLS))).log_softmax(-1).float()
    made["ctc"] = {"log_probs": log_probs.tolist(), "loss": float(k2_ctc_loss(log_probs, torch.tensor(LENS), PHONES))}
    GOLDEN.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
