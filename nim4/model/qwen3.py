"""The fast way through Qwen3 on a GPU: tokens of many rows in one flat list, few kernels, one CUDA graph for each length of the list.

    rows    A: 1 token    B: 30 tokens    C: 1 token        a pass costs what its tokens cost: none is padded to the width of another
    list    [ a | b b b b b b ... b | c | 0 0 0 ]           padded to a length that is recorded; a token reads the keys of its row where they are

The same weights as the model's, nothing is trained here; nim4/model/rows.py has the other way, for any model and any device. Ours.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Piece:
    """What one row reads.

    Attributes:
        place, position: row of the table, and the column of the first token.
        speech: (A, D) embeddings before `ids`, or None.
        num_wanted: of the last tokens, whose hidden states are wanted.
    """

    place: int
    position: int
    ids: Sequence[int]
    speech: Tensor | None
    num_wanted: int


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
        kernels: another module than qwen3_kernels, in tests.
    """

    def __init__(self, model: nn.Module, spare: int, kernels: ModuleType | None = None):
        if kernels is None:
            from nim4.model import qwen3_kernels as kernels  # Triton is there only beside torch's CUDA builds
        config = model.config.get_text_config()
        self._model, self._spare, self._kernels, self._eps = model, spare, kernels, config.rms_norm_eps
        self._block = kernels.tokens_per_block(config.num_attention_heads // config.num_key_value_heads)
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._graphs: Graphs[int] = Graphs(self._inputs, self._pass)

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
            self._graphs.inputs(length)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """(N, D) hidden states of all tokens that are wanted, in order; keys and values of all are in the table."""
        columns, speech, wanted = self._columns(pieces)
        length = size_for(len(columns[IDS]), LENGTHS)
        ints, embeds = self._graphs.inputs(length)
        filled = np.zeros(ints.shape, np.int32)
        filled[SPEECH], filled[PLACES] = NONE, self._spare
        for row, column in zip(filled, (*columns, wanted), strict=True):
            row[: len(column)] = column
        ints.copy_(torch.from_numpy(filled), non_blocking=True)
        if speech:
            torch.cat(speech, out=embeds[: sum(map(len, speech))])
        return self._graphs.run(length)[ints[WANTED, : len(wanted)]]

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
            places += [piece.place] * length
            positions += range(piece.position, piece.position + length)
            for first in range(0, length, self._block):
                starts.append(start + first)
                counts.append(min(self._block, length - first))
            wanted += range(len(ids) - piece.num_wanted, len(ids))
        return columns, speech, wanted

    def _inputs(self, length: int) -> tuple[Tensor, Tensor]:
        weight = self._model.get_input_embeddings().weight
        ints = torch.zeros(WANTED + 1, -(-length // 4) * 4, dtype=torch.int32, device=weight.device)  # every row at 16 bytes, as kernels want it
        ints[SPEECH], ints[PLACES] = NONE, self._spare
        return ints, weight.new_zeros(length, weight.shape[1])

    def _pass(self, ints: Tensor, speech: Tensor) -> Tensor:
        """(T, D) hidden states."""
        kernels, ids, spoken, places, positions, starts, counts = self._kernels, *ints[:WANTED, : len(speech)]
        embeds = F.embedding(ids, self._model.get_input_embeddings().weight)
        x = torch.where(spoken[:, None] >= 0, speech[spoken.clamp(min=0)], embeds)
        more = None
        for layer, (keys, values) in zip(self._layers, self._table, strict=True):
            y = F.linear(kernels.add_norm(x, more, layer.norm, self._eps), layer.qkv)
            queries = kernels.take(y, layer.norms, self._cos, self._sin, places, positions, keys, values, self._eps)
            more = F.linear(kernels.attend(queries, keys, values, places, positions, starts, counts), layer.out)
            y = F.linear(kernels.add_norm(x, more, layer.second_norm, self._eps), layer.gate_up)
            more = F.linear(kernels.gate(y), layer.down)
        return kernels.add_norm(x, more, self._model.model.norm.weight, self._eps)


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
