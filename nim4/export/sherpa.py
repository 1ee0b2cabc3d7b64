"""Graphs that sherpa-onnx runs as they are: it has fixed kinds of models, each with its own inputs, outputs and metadata.

The Zipformer is its `zipformer2`, as icefall exports it. The Conformer is written as its `wenet_ctc`: chunks of 4 C + 3 feature frames, a cache
of keys and values side by side, a cache of the convolution, and a mask of what is filled; all of that fits exactly.

sherpa-onnx makes our features (80 bins, 20 to 7600 Hz, povey windows centred on their 10 ms, no dither, natural logarithm), which the graphs
normalise. For `wenet_ctc` it makes them of samples as 16-bit counts, which the graph takes back, silence included.

Source: what is read and given is in sherpa-onnx, csrc/online-wenet-ctc-model.cc, csrc/online-zipformer2-ctc-model.cc and
csrc/online-recognizer-ctc-impl.h, and in icefall, zipformer/export-onnx-streaming-ctc.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nim4.config import RecipeError
from nim4.export.fbank import FLOOR
from nim4.export.onnx import OPSET, Step, write_graph
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Conformer, ConformerState, Context
from nim4.model.ctc import PhonemeModel
from nim4.model.zipformer import ZipformerState
from nim4.model.zipformer_layer import LayerCache

COUNTS_PER_SAMPLE = 32768.0


class WenetStep(Step):
    """A chunk of one stream as sherpa-onnx's `wenet_ctc` passes it on.

    Args:
        model: with a Conformer, in evaluation mode, float32, on the CPU.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        super().__init__()
        self.model, self.outputs, self.batch_axes = model, ["log_probs", "new_attn_cache", "new_conv_cache"], {}
        empty = model.encoder.initial_state(1, context)
        num_features, left = SUBSAMPLING * context.chunk_frames + LOOKAHEAD_FRAMES, context.chunk_frames * context.left_chunks
        self.conv_shape = empty.conv.shape[2:]
        self.examples = {
            "x": torch.zeros(1, num_features, model.config.encoder.num_mel_bins),
            "offset": torch.full((1,), left),  # frames before; the mask says all that is wanted of it
            "required_cache_size": torch.full((1,), left),
            "attn_cache": torch.cat([empty.keys, empty.values], -1)[:, 0],  # (blocks, H, left, 2 D/H)
            "conv_cache": empty.conv.flatten(2).unflatten(2, (model.config.encoder.dim, -1)),  # (blocks, 1, D, conv_expansion K // 2)
            "attn_mask": torch.ones(1, 1, left + context.chunk_frames, dtype=torch.bool),
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, offset, required_cache_size, attn_cache, conv_cache, attn_mask = tensors
        model = self.model
        x = (x - 2 * math.log(COUNTS_PER_SAMPLE)).clamp(min=math.log(FLOOR))
        keys, values = attn_cache[:, None].chunk(2, -1)
        filled = attn_mask[0, :, : keys.shape[3]].sum(-1)
        state = ConformerState(keys, values, conv_cache.flatten(2).unflatten(2, self.conv_shape), filled)
        frames, state = model.encoder.forward_chunk(model.normalise(x), state)
        unused = 0.0 * (offset + required_cache_size)  # an input that nothing reads would be left out, and the others would move up
        return model.head(frames) + unused, torch.cat([state.keys, state.values], -1)[:, 0], state.conv.flatten(2).unflatten(2, conv_cache.shape[2:])


class ZipformerStep(Step):
    """A chunk of some streams as sherpa-onnx's `zipformer2` passes it on: the caches of each layer, that of the embedding, and what is filled.

    Args:
        model: with a Zipformer, in evaluation mode, float32, on the CPU.
    """

    EMBED_CHANNELS = 128  # sherpa-onnx makes the embedding's first cache of this size, whatever the model

    def __init__(self, model: PhonemeModel, context: Context):
        super().__init__()
        self.model, self.empty = model, model.encoder.initial_state(2, context)
        num_features = SUBSAMPLING * context.chunk_frames + model.encoder.lookahead_frames
        state = self.outside(self.empty)
        self.examples = {"x": torch.zeros(2, num_features, model.config.encoder.num_mel_bins), **state}
        self.outputs = ["log_probs", *(f"new_{name}" for name in state)]
        self.batch_axes = {name: 1 if name.startswith(("cached_key", "cached_nonlin", "cached_val")) else 0 for name in ("x", "log_probs", *state)}
        self.batch_axes |= {f"new_{name}": self.batch_axes[name] for name in state}

    def outside(self, state: ZipformerState) -> dict[str, Tensor]:
        """The state as sherpa-onnx holds it."""
        made = {}
        for number, layer in enumerate(state.layers):
            seen = {"key": layer.key.transpose(0, 1), "nonlin_attn": layer.nonlin_attn[None]}
            seen |= {"val1": layer.val1.transpose(0, 1), "val2": layer.val2.transpose(0, 1), "conv1": layer.conv1, "conv2": layer.conv2}
            made |= {f"cached_{name}_{number}": tensor for name, tensor in seen.items()}
        embed = F.pad(state.embed, (0, 0, 0, 0, 0, self.EMBED_CHANNELS - self.empty.embed.shape[1]))
        return made | {"embed_states": embed, "processed_lens": state.filled}

    def inside(self, tensors: Sequence[Tensor]) -> ZipformerState:
        """The other way round."""
        *cached, embed, filled = tensors
        layers = []
        for first in range(0, len(cached), 6):
            key, nonlin_attn, val1, val2, conv1, conv2 = cached[first : first + 6]
            seen = key.transpose(0, 1), nonlin_attn[0], val1.transpose(0, 1), val2.transpose(0, 1)
            layers.append(LayerCache(*seen, conv1, conv2))
        return replace(self.empty, embed=embed[:, : self.empty.embed.shape[1]], layers=layers, filled=filled)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *state = tensors
        frames, next_state = self.model.encoder.forward_chunk(self.model.normalise(x), self.inside(state))
        return self.model.head(frames), *self.outside(next_state).values()


def export_sherpa(model: PhonemeModel, path: Path, context: Context, *, opset: int = OPSET) -> Step:
    """Writes a graph that sherpa-onnx's OnlineRecognizer loads; returns what it computes.

    Args:
        model: in evaluation mode, float32, on the CPU. A Zipformer is for from_zipformer2_ctc, a Conformer for from_wenet_ctc.
        context: with at least one chunk of left context; from_wenet_ctc must be told the same.
    Raises:
        RecipeError: if sherpa-onnx cannot run such a model.
    """
    if context.left_chunks < 1:
        raise RecipeError("--left-chunks", expected="at least 1 with --format sherpa-onnx", found=context.left_chunks, fix="leave it out")
    if isinstance(model.encoder, Conformer):
        step: Step = WenetStep(model, context)
        facts = _wenet_facts(model, context, step)
    else:
        channels = model.config.encoder.subsampling_channels[-1]
        if channels > ZipformerStep.EMBED_CHANNELS:
            expected = f"at most {ZipformerStep.EMBED_CHANNELS} with --format sherpa-onnx"
            raise RecipeError("model.encoder.subsampling_channels", expected=expected, found=channels, fix="use --format onnx")
        step = ZipformerStep(model, context)
        facts = _zipformer_facts(model, context)
    write_graph(step, path, {name: str(value) for name, value in facts.items()}, opset=opset)
    return step


def _wenet_facts(model: PhonemeModel, context: Context, step: Step) -> dict[str, object]:
    encoder = model.config.encoder
    return {
        "model_type": "wenet_ctc",
        "comment": f"NIM4-ASR phonemes; from_wenet_ctc(chunk_size={context.chunk_frames}, num_left_chunks={context.left_chunks})",
        "head": encoder.num_heads,
        "num_blocks": encoder.num_blocks,
        "output_size": encoder.dim,
        "cnn_module_kernel": step.examples["conv_cache"].shape[-1] + 1,  # of which it makes the size of the cache, and nothing else
        "right_context": SUBSAMPLING + LOOKAHEAD_FRAMES - 1,  # feature frames that the last encoder frame sees after its first
        "subsampling_factor": SUBSAMPLING,
        "vocab_size": model.config.vocab_size,
        "chunk_frames": context.chunk_frames,
        "left_chunks": context.left_chunks,
    }


def _zipformer_facts(model: PhonemeModel, context: Context) -> dict[str, object]:
    encoder, stacks = model.config.encoder, len(model.config.encoder.dims)
    chunk_features, left = SUBSAMPLING * context.chunk_frames, 2 * context.chunk_frames * context.left_chunks  # of 10 ms, of 20 ms
    lists = {
        "num_encoder_layers": encoder.num_layers,
        "encoder_dims": encoder.dims,
        "cnn_module_kernels": encoder.conv_kernels,
        "left_context_len": [left // factor for factor in encoder.downsampling],
        "query_head_dims": [encoder.query_head_dim] * stacks,
        "value_head_dims": [encoder.value_head_dim] * stacks,
        "num_heads": encoder.num_heads,
    }
    facts = {"model_type": "zipformer2", "version": "1", "comment": "NIM4-ASR phonemes, streaming CTC", "decode_chunk_len": chunk_features}
    return facts | {"T": chunk_features + model.encoder.lookahead_frames} | {name: ",".join(map(str, values)) for name, values in lists.items()}
