"""Packs an English pronouncing dictionary and trains the letter-to-sound model for words outside it.

    python utils/train_letter_to_sound.py --dictionary cmudict-en-us.dict

The dictionary is in CMUdict's layout, one `word PHONE PHONE ...` per line. Kept of it: words of letters and inner apostrophes, first
reading, no stress. One word in 20 (chosen by a hash of its spelling) is held out of the training; the model that is written is the
one that was measured on them. Three to six minutes on one core.
Method: letters and phones are aligned by expectation-maximisation over graphones (Bisani and Ney 2008; many-to-many limits as in
Jiampojamarn et al. 2007), then an n-gram of graphones with interpolated Kneser-Ney smoothing (Chen and Goodman 1999) is counted.
"""

import argparse
import hashlib
import json
import logging
import lzma
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import nim4.stage
from nim4.config import RecipeError
from nim4.corpus.letter_to_sound import END, LOG_STEP, START, LetterToSound

log = logging.getLogger("nim4")
LEXICON_DIR = Path(__file__).resolve().parent.parent / "nim4" / "corpus" / "lexicon"
SHAPES = ((1, 1), (1, 0), (1, 2), (2, 1))  # (letters, phones) of a graphone
Graphone = tuple[str, str]  # letters, phones joined by spaces
Lexicon = dict[str, tuple[str, ...]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", type=Path, required=True, help="pronouncing dictionary in CMUdict's layout")
    parser.add_argument("--out", type=Path, default=LEXICON_DIR, help="folder for cmudict.tsv.xz and letter_to_sound.npz (default: %(default)s)")
    parser.add_argument("--order", type=int, default=7, help="graphones in the longest n-gram (default: %(default)s)")
    parser.add_argument("--cutoffs", default="1 1 1 2 2 2 2", help="smallest count of an n-gram that is kept, for each order (default: %(default)s)")
    parser.add_argument("--align-words", type=int, default=15000, help="words used by the alignment's iterations (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=6, help="iterations of the alignment (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="use about this many words only, for a trial; 0 = all (default: %(default)s)")
    return parser


def read_dictionary(path: Path) -> Lexicon:
    """First reading, without stress, of each word spelled with letters and inner apostrophes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a pronouncing dictionary", found=error, fix="correct --dictionary") from error
    lexicon: Lexicon = {}
    for line in lines:
        word, *phones = line.lower().split() or [""]
        if re.fullmatch(r"[a-z]+('[a-z]+)*", word) and phones and word not in lexicon:
            lexicon[word] = tuple(phone.rstrip("012").upper() for phone in phones)
    if not lexicon:
        raise RecipeError(path, expected="lines such as `apple AE P AH L`", found="none", fix="correct --dictionary")
    return lexicon


def pack(lexicon: Lexicon, path: Path) -> None:
    """Writes `word<TAB>phones` lines, sorted and compressed."""
    text = "".join(f"{word}\t{' '.join(phones)}\n" for word, phones in sorted(lexicon.items()))
    with nim4.stage.atomic_write(path, "wb") as file:
        file.write(lzma.compress(text.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))


def bucket(word: str, num: int) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % num


def arcs(word: str, phones: Sequence[str]) -> Iterator[tuple[int, int, int, int, Graphone]]:
    """Every graphone that can stand at every place of the alignment grid, in topological order: (i, j, i', j', graphone)."""
    for i in range(len(word)):
        for j in range(len(phones) + 1):
            for num_letters, num_phones in SHAPES:
                if i + num_letters <= len(word) and j + num_phones <= len(phones):
                    yield i, j, i + num_letters, j + num_phones, (word[i : i + num_letters], " ".join(phones[j : j + num_phones]))


def expected_counts(word: str, phones: Sequence[str], prob: Mapping[Graphone, float]) -> dict[Graphone, float]:
    """How often each graphone is used, averaged over all alignments of the word; empty when there is none."""
    grid = [(*arc, prob.get(arc[4], 0.0)) for arc in arcs(word, phones)]
    forward: dict[tuple[int, int], float] = defaultdict(float, {(0, 0): 1.0})
    for i, j, next_i, next_j, _, p in grid:
        forward[next_i, next_j] += forward[i, j] * p
    end = (len(word), len(phones))
    if forward[end] <= 0.0:
        return {}
    backward: dict[tuple[int, int], float] = defaultdict(float, {end: 1.0})
    counts: dict[Graphone, float] = defaultdict(float)
    for i, j, next_i, next_j, graphone, p in reversed(grid):
        backward[i, j] += backward[next_i, next_j] * p
        counts[graphone] += forward[i, j] * p * backward[next_i, next_j] / forward[end]
    return counts


def best_alignment(word: str, phones: Sequence[str], prob: Mapping[Graphone, float]) -> list[Graphone]:
    """The likeliest graphone sequence of the word; empty when there is none."""
    best: dict[tuple[int, int], tuple[float, list[Graphone]]] = {(0, 0): (1.0, [])}
    for i, j, next_i, next_j, graphone in arcs(word, phones):
        if (i, j) in best and graphone in prob:
            score = best[i, j][0] * prob[graphone]
            if score > best.get((next_i, next_j), (0.0, []))[0]:
                best[next_i, next_j] = (score, [*best[i, j][1], graphone])
    return best.get((len(word), len(phones)), (0.0, []))[1]


def learn_graphones(lexicon: Lexicon, num_iterations: int, min_count: float = 2.0) -> dict[Graphone, float]:
    """Probability of each graphone, by expectation-maximisation from a flat start that prefers 1-1 pairs.

    After each iteration, graphones expected less than `min_count` times are dropped; those of one letter at a quarter of it.
    """
    prob: dict[Graphone, float] = {arc[4]: 1.0 for word, phones in lexicon.items() for arc in arcs(word, phones)}
    prob = {graphone: (1.0 if graphone[1] and len(graphone[0]) == 1 and " " not in graphone[1] else 0.1) for graphone in prob}
    total = sum(prob.values())
    prob = {graphone: p / total for graphone, p in prob.items()}
    for iteration in range(num_iterations):
        counts: dict[Graphone, float] = defaultdict(float)
        for word, phones in lexicon.items():
            for graphone, count in expected_counts(word, phones, prob).items():
                counts[graphone] += count
        counts = {graphone: count for graphone, count in counts.items() if count >= min_count / (4 if len(graphone[0]) == 1 else 1)}
        total = sum(counts.values())
        prob = {graphone: count / total for graphone, count in counts.items()}
        log.info("alignment: iteration %d of %d, %d graphones", iteration + 1, num_iterations, len(prob))
    return prob


def kneser_ney(sequences: list[list[int]], order: int, cutoffs: Sequence[int]) -> dict[tuple[int, ...], list[float]]:
    """N-gram -> [probability of its last symbol, back-off weight when it is a context], for all n-grams kept by `cutoffs`."""
    raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
    for sequence in sequences:
        for n in range(1, order + 1):
            raw[n].update(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))
    counts = [Counter() for _ in range(order)] + [raw[order]]
    for n in range(1, order):  # below the highest order: in how many different left contexts, or the count itself at a word's start
        for ngram in raw[n + 1]:
            counts[n][ngram[1:]] += 1
        for ngram, count in raw[n].items():
            if ngram[0] == START:
                counts[n][ngram] = count
    del counts[1][START,]  # never predicted
    num_symbols = len(counts[1])
    model: dict[tuple[int, ...], list[float]] = {(): [1.0, 1.0], (START,): [0.0, 1.0]}

    def lower(context: tuple[int, ...], symbol: int) -> float:
        weight = 1.0
        while True:
            if (*context, symbol) in model:
                return weight * model[(*context, symbol)][0]
            weight *= model[context][1] if context in model else 1.0
            context = context[1:]

    for n in range(1, order + 1):
        ones, twos = (sum(1 for count in counts[n].values() if count == value) for value in (1, 2))
        discount = ones / (ones + 2 * twos)
        totals: Counter[tuple[int, ...]] = Counter()
        kept: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for ngram, count in counts[n].items():
            totals[ngram[:-1]] += count
            if raw[n][ngram] >= cutoffs[n - 1]:
                kept[ngram[:-1]].append(ngram[-1])
        for context, symbols in kept.items():
            share = {symbol: max(counts[n][(*context, symbol)] - discount, 0.0) / totals[context] for symbol in symbols}
            spare = 1.0 - sum(share.values())
            below = {symbol: lower(context[1:], symbol) if n > 1 else 1.0 / num_symbols for symbol in symbols}
            for symbol in symbols:
                model[(*context, symbol)] = [share[symbol] + spare * below[symbol], 1.0]
            left = 1.0 - sum(share[symbol] + spare * below[symbol] for symbol in symbols)
            model[context][1] = max(left, 1e-6) / max(1.0 - sum(below.values()), 1e-6) if n > 1 else 1.0
    return model


def as_arrays(model: Mapping[tuple[int, ...], Sequence[float]]) -> dict[str, np.ndarray]:
    """The n-grams as the breadth-first tree that LetterToSound reads."""
    nodes = sorted(model, key=lambda ngram: (len(ngram), ngram))
    num_children: Counter[tuple[int, ...]] = Counter(ngram[:-1] for ngram in nodes if ngram)
    costs = np.array([[-math.log(max(value, 1e-7)) for value in model[ngram]] for ngram in nodes])
    costs = np.clip(np.rint(costs / LOG_STEP), 0, 255).astype(np.uint8)
    return {
        "symbol": np.array([ngram[-1] if ngram else 0 for ngram in nodes], dtype=np.uint16),
        "num_children": np.array([num_children[ngram] for ngram in nodes], dtype=np.uint16),
        "cost": costs[:, 0],
        "backoff": costs[:, 1],
    }


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def measure(model: LetterToSound, lexicon: Lexicon) -> dict[str, object]:
    """Phone and word error rate, in percent, against the first reading of each word."""
    errors = [edit_distance(phones, model.phones(word)) for word, phones in lexicon.items()]
    num_phones = sum(map(len, lexicon.values()))
    return {
        "held_out_words": len(lexicon),
        "held_out_phones": num_phones,
        "phone_error_percent": round(100 * sum(errors) / num_phones, 2),
        "word_error_percent": round(100 * sum(error > 0 for error in errors) / len(errors), 2),
    }


def train(lexicon: Lexicon, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """Arrays of the model, and how many words could be aligned."""
    by_hash = sorted(lexicon, key=lambda word: hashlib.sha256(word.encode()).digest())
    prob = learn_graphones({word: lexicon[word] for word in by_hash[: options.align_words]}, options.iterations)
    alignments = [aligned for word in sorted(lexicon) if (aligned := best_alignment(word, lexicon[word], prob))]
    graphones = sorted({graphone for aligned in alignments for graphone in aligned})
    ids = {graphone: number for number, graphone in enumerate(graphones, END + 1)}
    sequences = [[START, *(ids[graphone] for graphone in aligned), END] for aligned in alignments]
    arrays = as_arrays(kneser_ney(sequences, options.order, [int(cutoff) for cutoff in options.cutoffs.split()]))
    arrays["letters"] = np.array(["", "", *(letters for letters, _ in graphones)])
    arrays["phones"] = np.array(["", "", *(phones for _, phones in graphones)])
    return arrays, len(alignments)


def main() -> None:
    options = build_parser().parse_args()
    if len(options.cutoffs.split()) != options.order:
        raise RecipeError("--cutoffs", expected=f"{options.order} numbers, one per order", found=options.cutoffs, fix="correct it")
    started_s = time.time()
    lexicon = read_dictionary(options.dictionary)
    if options.limit:
        share = max(len(lexicon) // options.limit, 1)
        lexicon = {word: phones for word, phones in lexicon.items() if bucket("limit " + word, share) == 0}
    held_out = {word: phones for word, phones in lexicon.items() if bucket(word, 20) == 0}
    training = {word: phones for word, phones in lexicon.items() if word not in held_out}
    log.info("%s: %d words, %d of them held out", options.dictionary, len(lexicon), len(held_out))
    arrays, num_aligned = train(training, options)
    metadata = {"order": options.order, "cutoffs": options.cutoffs, "trained_words": num_aligned, "num_ngrams": len(arrays["symbol"])}
    metadata["dictionary_sha256"] = nim4.stage.file_hash(options.dictionary)
    letters, phones = arrays["letters"].tolist(), arrays["phones"].tolist()
    tree = (arrays[name] for name in ("symbol", "num_children", "cost", "backoff"))
    metadata |= measure(LetterToSound(letters, phones, *tree, metadata=metadata), held_out)
    pack(lexicon, options.out / "cmudict.tsv.xz")
    with nim4.stage.atomic_write(options.out / "letter_to_sound.npz", "wb") as file:
        np.savez_compressed(file, metadata=np.array(json.dumps(metadata)), **arrays)
    log.info("%s", metadata)
    log.info("%s: written, %.0f s in all", options.out, time.time() - started_s)


if __name__ == "__main__":
    nim4.stage.run(main, "letter-to-sound")
