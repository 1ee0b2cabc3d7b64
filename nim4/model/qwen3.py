"""The fast way through Qwen3 on a GPU: tokens of many rows in one flat list, few kernels, CUDA graphs for each length of the list.

    rows    A: 1 token    B: 30 tokens    C: 1 token        a pass costs what its tokens cost: none is padded to the width of another
    list    [ a | b b b b b b ... b | c | 0 0 0 ]           padded to a length that is recorded; a token reads the keys of its row where they are

The same weights as the model's, nothing is trained here; nim4/model/rows.py has the other way, for any model and any device. Ours.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nim4.model.graphs import Graphs, size_for

LENGTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # of a list; from 16 on at most a third is padding
NONE, IDS, SPEECH, PLACES, POSITIONS, STARTS, COUNTS, WANTED = -1, 0, 1, 2, 3, 4, 5, 6


def why_not(model: nn.Module) -> str | None:
    """Why this model cannot go the fast way; None when it can."""
    config = model.config.get_text_config()
    if not model.get_input_embeddings().weight.is_cuda:
        return "it is not on a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with torch's CUDA builds"
    return why_not_of_shape(model, config)


def why_not_of_shape(model: nn.Module, config: Any) -> str | None:
    """The same, whatever it stands on."""
    if config.model_type != "qwen3":
        return f"it is a {config.model_type}, not a qwen3"
    if config.hidden_act != "silu" or "sliding_attention" in config.layer_types or config.rope_parameters["rope_type"] != "default":
        return "it is a qwen3 with another activation, sliding attention or scaled positions"
    if config.head_dim not in (16, 32, 64, 128, 256):
        return f"its heads are {config.head_dim} wide"
    linear = [part for name, part in model.model.named_modules() if name.endswith("_proj")]
    if any(type(part) is not nn.Linear or part.bias is not None for part in linear):
        return "its layers are not plain linear ones without bias"
    return None


class Place(Protocol):
    """A row: its place in the table, and how many tokens it has read."""

    place: int
    length: int


class Piece(Protocol):
    """What one row reads: nim4/model/rows.py, Read."""

    row: Place
    ids: Sequence[int]
    num_wanted: int
    speech: Tensor | None


@dataclass(frozen=True)
class _Layer:
    """Weights: two matrices that read the same are one."""

    norm: Tensor
    qkv: Tensor
    norms: Tensor
    out: Tensor
    second_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FlatQwen3:
    """Passes over lists of tokens.

    Args:
        model: transformers' Qwen3ForCausalLM; its weights become views of larger matrices, with the same values.
        spare: a row of the table that nobody reads, for padding.
        kernels: in tests, another module than qwen3_kernels and qwen3_products.
    """

    def __init__(self, model: nn.Module, spare: int, kernels: ModuleType | None = None):
        products = kernels
        if kernels is None:
            from nim4.model import qwen3_kernels as kernels  # Triton is there only beside torch's CUDA builds
            from nim4.model import qwen3_products as products
        config = model.config.get_text_config()
        self._model, self._spare, self._eps = model, spare, config.rms_norm_eps
        self._kernels, self._products = kernels, products
        self._block = kernels.tokens_per_block(config.num_attention_heads // config.num_key_value_heads)
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._graphs: Graphs[tuple[int, bool]] = Graphs(self._inputs, self._pass)
        self._choices: Graphs[int] = Graphs(lambda length: (self._zeros(length),), lambda x: products.first_choices(x, model.lm_head.weight))

    def stand_on(self, table: Tensor) -> None:
        """Where keys and values are from now on: (layers, 2, rows, columns, heads, width of a head), contiguous."""
        self._graphs.forget()
        self._table, half = table, table.shape[-1] // 2
        positions = torch.arange(table.shape[3], device=table.device)[None]
        rotation = self._model.model.rotary_emb(table.new_zeros(()), positions)
        self._cos, self._sin = (part[0, :, :half].contiguous() for part in rotation)

    def record(self) -> None:
        """Records all lengths."""
        for length in reversed(LENGTHS):  # the largest first: the others fit in its memory
            self._graphs.inputs((length, False))
            self._graphs.inputs((length, True))
            self._choices.inputs(length)

    def read(self, pieces: Sequence[Piece]) -> list[int]:
        """The first choices behind all tokens that are wanted, in order; keys and values of all tokens are in the table."""
        alone = all(piece.speech is None and len(piece.ids) == 1 for piece in pieces)
        columns, speech, wanted = _single(pieces) if alone else self._columns(pieces)
        size = size_for(len(columns[IDS]), LENGTHS), alone
        ints, embeds, _ = self._graphs.inputs(size)
        filled = np.zeros(ints.shape, np.int32)
        filled[SPEECH], filled[PLACES] = NONE, self._spare
        for row, column in zip(filled, (*columns, wanted), strict=True):
            row[: len(column)] = column
        ints.copy_(torch.from_numpy(filled), non_blocking=True)
        if speech:
            torch.cat(speech, out=embeds[: sum(map(len, speech))])
        made = self._graphs.run(size)
        if alone:
            chosen = made[: len(pieces)].tolist()
            return [chosen[number] for number in wanted]
        if not wanted:
            return []
        number = size_for(len(wanted), LENGTHS)
        (chosen_from,) = self._choices.inputs(number)
        torch.index_select(made, 0, ints[WANTED, : len(wanted)], out=chosen_from[: len(wanted)])
        return self._choices.run(number)[: len(wanted)].tolist()

    def _columns(self, pieces: Sequence[Piece]) -> tuple[list[list[int]], list[Tensor], list[int]]:
        """The list, token by token, but for starts and counts of its blocks; the speech in it; which tokens are wanted."""
        columns: list[list[int]] = [[] for _ in range(COUNTS + 1)]
        ids, spoken, places, positions, starts, counts = columns
        speech: list[Tensor] = []
        wanted: list[int] = []
        num_spoken = 0
        for piece in pieces:
            start = len(ids)
            if piece.speech is not None:
                ids += [0] * len(piece.speech)
                spoken += range(num_spoken, num_spoken + len(piece.speech))
                num_spoken += len(piece.speech)
                speech.append(piece.speech)
            ids += piece.ids
            length = len(ids) - start
            spoken += [NONE] * len(piece.ids)
            places += [piece.row.place] * length
            positions += range(piece.row.length, piece.row.length + length)
            for first in range(0, length, self._block):
                starts.append(start + first)
                counts.append(min(self._block, length - first))
            wanted += range(len(ids) - piece.num_wanted, len(ids))
        return columns, speech, wanted

    def _zeros(self, length: int) -> Tensor:
        weight = self._model.get_input_embeddings().weight
        return weight.new_zeros(length, weight.shape[1])

    def _inputs(self, size: tuple[int, bool]) -> tuple[Tensor, Tensor, bool]:
        speech = self._zeros(size[0])
        ints = torch.zeros(WANTED + 1, -(-size[0] // 4) * 4, dtype=torch.int32, device=speech.device)  # every row at 16 bytes, as kernels want it
        ints[SPEECH], ints[PLACES] = NONE, self._spare
        return ints, speech, size[1]

    def _pass(self, ints: Tensor, speech: Tensor, alone: bool) -> Tensor:
        """(T, D) hidden states; or, where rows are `alone`, which read one token each, (T,) first choices, since each wants to know its next one."""
        kernels, products, ids, spoken, places, positions, starts, counts = self._kernels, self._products, *ints[:WANTED, : len(speech)]
        x = kernels.embed(ids, spoken, speech, self._model.get_input_embeddings().weight)
        more = None
        for layer, (keys, values) in zip(self._layers, self._table, strict=True):
            single = len(x) == 1
            if single:
                y = products.one(x, layer.qkv, norm=layer.norm, eps=self._eps)
            else:
                y = products.whole(kernels.add_norm(x, more, layer.norm, self._eps), layer.qkv)
            if alone:
                seen = kernels.take_and_attend(y, layer.norms, self._cos, self._sin, places, positions, keys, values, self._eps)
            else:
                queries = kernels.take(y, layer.norms, self._cos, self._sin, places, positions, keys, values, self._eps)
                seen = kernels.attend(queries, keys, values, places, positions, starts, counts)
            if single:
                products.one(seen, layer.out, add_to=x, memory_is_idle=True)
                y = products.one(x, layer.gate_up, norm=layer.second_norm, eps=self._eps, gated=True)
                products.one(y, layer.down, add_to=x)
            else:
                y = kernels.add_norm(x, products.parts(seen, layer.out, memory_is_idle=True), layer.second_norm, self._eps)
                more = products.parts(products.gated(y, layer.gate_up), layer.down)
        hidden = kernels.add_norm(x, more, self._model.model.norm.weight, self._eps)
        return products.first_choices(hidden, self._model.lm_head.weight) if alone else hidden


def _single(pieces: Sequence[Piece]) -> tuple[list[list[int]], list[Tensor], list[int]]:
    """What FlatQwen3._columns returns, where all pieces are one id, and need no blocks; quickly, for there may be hundreds."""
    ids, places, positions = [piece.ids[0] for piece in pieces], [piece.row.place for piece in pieces], [piece.row.length for piece in pieces]
    return [ids, [], places, positions, [], []], [], [number for number, piece in enumerate(pieces) if piece.num_wanted]


def _layer(layer: nn.Module) -> _Layer:
    own, mlp = layer.self_attn, layer.mlp
    return _Layer(
        norm=layer.input_layernorm.weight.detach(),
        qkv=_joined(own.q_proj, own.k_proj, own.v_proj),
        norms=torch.stack([own.q_norm.weight, own.k_norm.weight]).detach(),
        out=own.o_proj.weight.detach(),
        second_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.detach(),
    )


@torch.inference_mode(False)
@torch.no_grad()
def _joined(*parts: nn.Linear) -> Tensor:
    """The weights one below the other. The parts keep theirs as views, so that memory is not taken twice, however often this is done."""
    weights = [part.weight.detach() for part in parts]
    first, size = weights[0], weights[0].element_size()
    starts = [0, *itertools.accumulate(weight.numel() for weight in weights)]
    joined = all(
        weight.data_ptr() == first.data_ptr() + start * size and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for weight, start in zip(weights, starts, strict=False)
    )
    if not joined:
        whole = torch.cat(weights)
        for part, own in zip(parts, whole.split([len(weight) for weight in weights]), strict=True):
            part.weight.data = own
        first = parts[0].weight.detach()
    return first.as_strided((starts[-1] // first.shape[1], first.shape[1]), (first.shape[1], 1))
