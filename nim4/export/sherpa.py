"""Graphs that sherpa-onnx runs as they are: it has fixed kinds of models, each with its own inputs, outputs and metadata.

Our Conformer is written as its `wenet_ctc`: chunks of 4 C + 3 feature frames, a cache of keys and values side by side, a cache of the convolution,
and a mask of what is filled. All of that fits without rounding. sherpa-onnx makes the same features (80 bins, 20 to 7600 Hz, windows centred
on their 10 ms, no dither) but of samples as 16-bit counts for this kind, which the graph takes back.

Source: what the programs read and give is in sherpa-onnx, csrc/online-wenet-ctc-model.cc and csrc/online-recognizer-ctc-impl.h.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from nim4.config import RecipeError
from nim4.export.fbank import FLOOR
from nim4.export.onnx import OPSET, Step, write_graph
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Conformer, ConformerState, Context
from nim4.model.ctc import PhonemeModel

COUNTS_PER_SAMPLE = 32768.0


class WenetStep(Step):
    """A chunk of one stream as sherpa-onnx's `wenet_ctc` passes it on.

    Args:
        model: with a Conformer, in evaluation mode, float32, on the CPU.
    """

    def __init__(self, model: PhonemeModel, context: Context):
        super().__init__()
        self.model, self.outputs = model, ["log_probs", "new_attn_cache", "new_conv_cache"]
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


def export_sherpa(model: PhonemeModel, path: Path, context: Context, *, opset: int = OPSET) -> Step:
    """Writes a graph that sherpa-onnx loads by OnlineRecognizer.from_wenet_ctc; returns what was written as a module.

    Args:
        model: in evaluation mode, float32, on the CPU.
        context: what the recogniser is told as chunk_size and num_left_chunks; at least one chunk of left context.
    Raises:
        RecipeError: if sherpa-onnx has no kind of model that fits.
    """
    if not isinstance(model.encoder, Conformer):
        found = type(model.encoder).__name__
        raise RecipeError("--format sherpa-onnx", expected="a Conformer", found=found, fix="--format onnx writes every encoder")
    if context.left_chunks < 1:
        raise RecipeError("--left-chunks", expected="at least 1 with --format sherpa-onnx", found=context.left_chunks, fix="leave it out")
    step, encoder = WenetStep(model, context), model.config.encoder
    facts = {
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
    write_graph(step, path, {name: str(value) for name, value in facts.items()}, batched=False, opset=opset)
    return step
