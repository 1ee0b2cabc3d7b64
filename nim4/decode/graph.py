"""CTC decoding in graphs: H (the alignments of phonemes), HL (of words of a lexicon), HLG (under an n-gram). The only door to k2, which is optional.

The graphs of lexicon and n-gram are written here as text, and the best paths of a lattice are read here; k2 composes the graphs and intersects
them with log-probabilities, on a GPU if there is one. `BeamSearch` with `sum_paths=False` is the reference: the same words and scores.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nim4.config import DecodeConfig, RecipeError
from nim4.corpus.ngram import NgramStates
from nim4.corpus.units import PhonemeInventory

INSTALL = "python -m pip install --no-build-isolation git+https://github.com/k2-fsa/k2"
SEARCH_BEAM, OUTPUT_BEAM, MIN_ACTIVE, MAX_ACTIVE = 20.0, 8.0, 30, 10_000  # icefall's


@dataclass(frozen=True)
class Lattice:
    """The paths of one utterance that a search has kept; states are numbered along them, 0 is the start.

    Attributes:
        src, dst: (A,) int64, states of each arc; the arcs into the last state end the utterance.
        phone: (A,) int64, the phoneme that begins on an arc, 0 where none does.
        words: for each arc the ids of the words on it; none where the graph has no words.
        score: (A,) float64, nats.
    """

    src: np.ndarray
    dst: np.ndarray
    phone: np.ndarray
    words: Sequence[Sequence[int]]
    score: np.ndarray


@dataclass(frozen=True)
class LatticePath:
    """A path of a lattice: phoneme ids, word ids, and nats."""

    phones: tuple[int, ...]
    words: tuple[int, ...]
    score: float


def best_paths(lattice: Lattice, num_paths: int = 1) -> list[LatticePath]:
    """The best paths that differ in phonemes or words, the best first; an empty lattice has none."""
    if not len(lattice.src):
        return []
    last = int(lattice.dst.max())
    kept: list[dict[tuple[tuple[int, ...], tuple[int, ...]], float]] = [{} for _ in range(last + 1)]
    kept[0][(), ()] = 0.0
    order = np.argsort(lattice.src, kind="stable")
    at = -1
    for arc in order.tolist():
        src, dst = int(lattice.src[arc]), int(lattice.dst[arc])
        if src != at:  # all arcs into it have been seen
            at = src
            kept[src] = dict(sorted(kept[src].items(), key=lambda item: -item[1])[:num_paths])
        phone, words, score = int(lattice.phone[arc]), tuple(lattice.words[arc]), float(lattice.score[arc])
        for (phones_before, words_before), before in kept[src].items():
            key = (phones_before + (phone,) * (phone > 0), words_before + words)
            if before + score > kept[dst].get(key, -np.inf):
                kept[dst][key] = before + score
    found = sorted(kept[last].items(), key=lambda item: -item[1])[:num_paths]
    return [LatticePath(phones, words, score) for (phones, words), score in found]


def names_on_paths(paths: Sequence[LatticePath], search: Callable[[Sequence[int]], Sequence[Any]]) -> dict[str, float]:
    """Hotwords on the best paths of a lattice: text -> nats that the first path with it costs beyond the best, in the order of that.

    Args:
        search: of phonemes, `HotwordIndex.search`.
    """
    found: dict[str, float] = {}
    for path in paths:
        for hit in search(path.phones):
            for name in hit.names:
                found.setdefault(name.text, paths[0].score - path.score)
    return found


def lexicon_text(entries: Sequence[tuple[int, Sequence[int]]], num_symbols: int, num_words: int, word_bonus: float = 0.0) -> str:
    """L as k2's text, lines of `from to phoneme word score`: a loop of words, each with its reading.

    Args:
        entries: (word id from 0 on, its phoneme ids). In the graph words count from 1, since 0 is nothing.
        num_symbols: V; the symbols from V on tell words of one sound apart: V is the n-gram's step to a shorter context, V + k ends the k-th
            of them. In the same way word num_words + 1 is that step.
        word_bonus: nats for each word.
    """
    lines, state, alike = [(0, 0, num_symbols, num_words + 1, 0.0)], 1, Counter[tuple[int, ...]]()
    for word, phones in entries:
        alike[tuple(phones)] += 1
        before = 0
        for place, phone in enumerate(phones):
            lines.append((before, state, phone, 0 if place else word + 1, 0.0 if place else word_bonus))
            before, state = state, state + 1
        lines.append((before, 0, num_symbols + alike[tuple(phones)], 0, 0.0))
    return _text([*lines, (0, state, -1, -1, 0.0)], state)


def ngram_text(ngram: NgramStates, lm_weight: float = 1.0) -> str:
    """G as k2's text, lines of `from to word word score`: see `lexicon_text` for the numbers of words. State 0 is the start of a text."""
    number = np.arange(len(ngram.backoff))
    number[[0, ngram.start]] = number[[ngram.start, 0]]  # k2 begins in state 0
    final, num_words, lines = len(number), len(ngram.words) - 1, []
    for state in range(len(number)):
        for arc in range(int(ngram.first[state]), int(ngram.first[state + 1])):
            word, score = int(ngram.word[arc]), lm_weight * float(ngram.logp[arc])
            end = word == num_words
            lines.append((number[state], final if end else number[ngram.to[arc]], *((-1, -1) if end else (word + 1, word + 1)), score))
        if ngram.backoff_to[state] >= 0:
            lines.append((number[state], number[ngram.backoff_to[state]], num_words + 1, 0, lm_weight * float(ngram.backoff[state])))
    return _text(lines, final)


def _text(lines: Sequence[tuple[Any, ...]], final: int) -> str:
    ordered = sorted(lines, key=lambda line: line[0])
    return "".join(f"{src} {dst} {label} {aux} {score:.6f}\n" for src, dst, label, aux, score in ordered) + f"{final}\n"


class GraphSearch:
    """The best path of log-probabilities through a graph.

    Args:
        num_symbols: V, blank included.
        readings: word -> readings, of which L is made; None = H alone.
        ngram: of which G is made; None = every word may follow every word, at no cost.
        lm_weight, word_bonus: see BeamSearch.
    Raises:
        RecipeError: if k2 is not installed, or was built for another torch.
    """

    def __init__(
        self,
        num_symbols: int,
        readings: Mapping[str, Sequence[Sequence[int]]] | None = None,
        ngram: NgramStates | None = None,
        *,
        lm_weight: float = 1.0,
        word_bonus: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self._k2, self._device, self.words = load_k2(), torch.device(device), tuple(ngram.words[:-1] if ngram else readings or ())
        graph = self._k2.ctc_topo(num_symbols - 1, modified=False, device="cpu")
        if readings is not None:
            ids = {word: number for number, word in enumerate(self.words)}
            entries = [(ids[word], phones) for word, variants in readings.items() if word in ids for phones in variants]
            text = lexicon_text(entries, num_symbols, len(self.words), word_bonus)
            graph = self._composed(graph, text, ngram_text(ngram, lm_weight) if ngram else None, num_symbols)
        else:
            graph.tokens = graph.aux_labels.clone()
        self._graph, self._has_words = self._k2.arc_sort(graph).to(self._device), readings is not None

    @classmethod
    def of_config(
        cls, config: DecodeConfig, inventory: PhonemeInventory, arpa: Path | None = None, lexicon: Path | None = None, *, device: torch.device
    ) -> "GraphSearch":
        """The search of a decode config, see BeamSearch.of_config; without an n-gram H alone."""
        from nim4.decode.beam import readings_of_config  # which needs more than this module does

        load_k2()  # before anything that takes time
        if arpa is None:
            return cls(len(inventory), device=device)
        ngram = NgramStates.of_arpa(arpa)
        readings = readings_of_config(config, inventory, ngram, arpa, lexicon)
        return cls(len(inventory), readings, ngram, lm_weight=config.lm_weight, word_bonus=config.word_bonus, device=device)

    def _composed(self, topology: Any, lexicon: str, ngram: str | None, num_symbols: int) -> Any:
        k2 = self._k2
        graph = k2.arc_sort(k2.Fsa.from_str(lexicon, acceptor=False))
        if ngram is not None:
            graph = k2.connect(k2.compose(graph, k2.arc_sort(k2.Fsa.from_str(ngram, acceptor=False))))
            graph = k2.connect(k2.determinize(graph))
        labels = graph.labels.clone()
        labels[labels >= num_symbols] = 0
        graph.labels = labels
        graph.__dict__["_properties"] = None  # they were of the old labels
        values = graph.aux_labels.values if isinstance(graph.aux_labels, k2.RaggedTensor) else graph.aux_labels
        values[values > len(self.words)] = 0
        graph = k2.connect(k2.remove_epsilon(graph))
        if isinstance(graph.aux_labels, k2.RaggedTensor):
            graph.aux_labels = graph.aux_labels.remove_values_eq(0)
        return k2.connect(k2.compose(topology, k2.arc_sort(graph), inner_labels="tokens"))

    def lattice(self, log_probs: np.ndarray) -> Lattice:
        """(S, V) float32 log-probabilities -> the paths within OUTPUT_BEAM nats of the best."""
        k2, whole = self._k2, torch.tensor([[0, 0, len(log_probs)]], dtype=torch.int32)
        dense = k2.DenseFsaVec(torch.from_numpy(np.ascontiguousarray(log_probs, np.float32))[None].to(self._device), whole)
        fsa = k2.intersect_dense_pruned(self._graph, dense, SEARCH_BEAM, OUTPUT_BEAM, MIN_ACTIVE, MAX_ACTIVE)
        fsa = k2.top_sort(k2.connect(fsa.to("cpu")))[0]
        arcs = fsa.arcs.values()[:, :2].numpy().astype(np.int64) if len(fsa.scores) else np.zeros((0, 2), np.int64)
        if not self._has_words:
            words: list[list[int]] = [[]] * len(arcs)
        elif isinstance(fsa.aux_labels, k2.RaggedTensor):
            words = fsa.aux_labels.tolist()
        else:
            words = [[word] for word in fsa.aux_labels.tolist()]
        words = [[word - 1 for word in listed if word > 0] for listed in words]
        phone = np.maximum(fsa.tokens.numpy().astype(np.int64), 0)
        return Lattice(arcs[:, 0], arcs[:, 1], phone, words, fsa.scores.detach().numpy().astype(np.float64))

    def search(self, log_probs: np.ndarray) -> tuple[list[int], list[str]]:
        """(S, V) float32 log-probabilities -> phoneme ids, and the words that they spell; neither when nothing fits."""
        paths = best_paths(self.lattice(log_probs)) if len(log_probs) else []
        return (list(paths[0].phones), [self.words[word] for word in paths[0].words]) if paths else ([], [])


def k2_ctc_loss(log_probs: Tensor, x_lens: Tensor, phones: Sequence[Sequence[int]]) -> Tensor:
    """CTC loss by k2, summed over the batch: equal to `nim4.model.ctc.ctc_loss`, which training uses, to 1e-4.

    Args:
        log_probs: (B, S, V) float32. x_lens: (B,) int64. phones: ids of each utterance.
    """
    k2, order = load_k2(), torch.argsort(x_lens, descending=True, stable=True)  # as DenseFsaVec wants them
    segments = torch.stack([order, torch.zeros_like(order), x_lens[order]], dim=1).to(torch.int32).cpu()
    graph = k2.ctc_graph([list(phones[number]) for number in order.tolist()], modified=False, device=log_probs.device)
    return k2.ctc_loss(graph, k2.DenseFsaVec(log_probs, segments), output_beam=10.0, reduction="sum")


def load_k2() -> ModuleType:
    """The module. Raises RecipeError, with the line that installs it, when it is missing or was built for another torch."""
    spec = importlib.util.find_spec("k2")
    if spec is None:
        raise RecipeError("k2", expected="it to be installed", found="no such package", fix=INSTALL)
    built_for = _built_for(Path(spec.origin or "").parent / "torch_version.py")
    if built_for not in (None, torch.__version__):
        raise RecipeError("k2", expected=f"one built for the installed torch {torch.__version__}", found=f"one for torch {built_for}", fix=INSTALL)
    try:
        import k2
    except (ImportError, OSError) as error:
        found = " ".join(str(error).split())[:200]
        raise RecipeError("k2", expected=f"one that can be imported with torch {torch.__version__}", found=found, fix=INSTALL) from error
    return k2


def _built_for(path: Path) -> str | None:
    """The torch that k2 says it was built for; None when it does not say."""
    match = re.search(r'^k2_torch_version = "(.+)"$', path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    return match[1] if match else None
