"""The encoder of FireRedASR-AED (arXiv 2501.14350) and of FireRedASR-LLM, as published in `model.pth.tar` or `asr_encoder.pth.tar`.

It is a Conformer with relative positions, whose layers are ours in another order of names; where it has no bias, ours gets zeros. The
same features give the same frames (tests/unit/published/test_firered.py). What differs from an encoder that was trained here:

- its features: mel bins end at 8000 Hz, ours at 7600, so that the topmost lies 1.5 bins off; windows begin at a frame's start, ours 7.5 ms
  earlier. Its samples are 16-bit counts: that is taken into the mean.
- its convolution looks to both sides, 16 frames a block, and it knows no chunks. Streaming runs, with zeros for what is behind a chunk, but
  the weights have not learnt that: let stage 3 or 6 train them under chunks first. Norms are over channels, so batches do not matter.
- it has no phoneme head.
"""

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nim4.config import ConformerConfig, RecipeError
from nim4.model.conformer import Conformer
from nim4.published.checkpoint_file import PublishedEncoder, check_fits, read_checkpoint, size_of

FILES = ("asr_encoder.pth.tar", "model.pth.tar")  # of FireRedASR-LLM, whose model.pth.tar has no encoder, and of FireRedASR-AED
CMVN = "cmvn.ark"
EXPECTED, FIX = "model.pth.tar of FireRedASR-AED", "give the folder that was published, with cmvn.ark in it, as firered:FOLDER"
LOG_SCALE = 2 * math.log(32768)  # what 16-bit counts instead of samples in [-1, 1] add to a log-Mel energy
MIN_VARIANCE = 1e-20
NAMES = {  # theirs -> ours, after `encoder.` or `encoder.layer_stack.N.`
    **{
        "input_preprocessor.conv.0": "subsampling.conv1",
        "input_preprocessor.conv.2": "subsampling.conv2",
        "input_preprocessor.out": "subsampling.out",
    },
    **{f"ffn{n}.net.{place}": f"ffn{n}.{name}" for n in (1, 2) for place, name in ((0, "norm"), (1, "up"), (4, "down"))},
    **{f"mhsa.{theirs}": f"attention.{ours}" for theirs, ours in (("w_qs", "query"), ("w_ks", "key"), ("w_vs", "value"), ("fc", "out"))},
    **{f"mhsa.layer_norm_{part}": f"attention.norm_{part}" for part in "qkv"},
    **{"mhsa.linear_pos": "attention.relative.project", "conv.pre_layer_norm": "conv.norm", "conv.pointwise_conv1": "conv.expand"},
    **{"conv.depthwise_conv": "conv.depthwise", "conv.batch_norm": "conv.norm_out", "conv.pointwise_conv2": "conv.reduce", "layer_norm": "norm"},
}
BIASES = {"mhsa.pos_bias_u": "attention.relative.content_bias", "mhsa.pos_bias_v": "attention.relative.position_bias"}
WITHOUT_BIAS = ("conv.expand", "conv.depthwise", "conv.reduce")


def read_firered(path: Path) -> PublishedEncoder:
    """The encoder in a published folder, or a file of one. Raises RecipeError when it is not one."""
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[-1])
    package = read_checkpoint(path, EXPECTED, FIX)
    theirs = package.get("model_state_dict")
    if not isinstance(theirs, dict) or "encoder.layer_stack.0.mhsa.pos_bias_u" not in theirs:
        found = f"entries {', '.join(map(str, list(package)[:5]))}" if theirs is None else "no encoder.layer_stack in it"
        raise RecipeError(path, expected=EXPECTED, found=found, fix=FIX)
    weights = converted(theirs)
    config = _config(weights, path)
    with torch.device("meta"):
        check_fits(Conformer(config), weights, path)
    mean, std = read_cmvn(path.with_name(CMVN))
    notes = (
        "features: their mel bins end at 8000 Hz, these at 7600, and windows begin 7.5 ms earlier",
        f"convolutions look {config.conv_kernel // 2} frames ahead in each block, and know no chunks: train under chunks before streaming",
    )
    return PublishedEncoder(config, weights, mean - LOG_SCALE, std, notes=notes)


def converted(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, by our names; what is not known keeps its own."""
    weights = {}
    for name, tensor in theirs.items():
        if not name.startswith("encoder.") or name.endswith("positional_encoding.pe"):
            continue
        layer, own = re.fullmatch(r"encoder\.(?:layer_stack\.(\d+)\.)?(.+)", name).groups()
        module, _, kind = own.rpartition(".")
        ours = BIASES.get(own) or (f"{NAMES[module]}.{kind}" if module in NAMES else own)
        block = f"blocks.{layer}." if layer is not None else ""
        is_pointwise = module in ("conv.pointwise_conv1", "conv.pointwise_conv2") and tensor.ndim == 3
        weights[block + ours] = tensor[..., 0] if is_pointwise else tensor
        if NAMES.get(module) in WITHOUT_BIAS:
            weights[f"{block}{NAMES[module]}.bias"] = tensor.new_zeros(len(tensor))
    return weights


def _config(weights: dict[str, Tensor], path: Path) -> ConformerConfig:
    """The shape that fits, as far as tensors tell; check_fits finds out whether it does."""

    def size(name: str, axis: int = 0) -> int:
        return size_of(weights, name, axis, path, EXPECTED, FIX)

    dim, width = size("blocks.0.norm.weight"), size("blocks.0.conv.depthwise.weight")
    return ConformerConfig(
        dim=dim,
        num_blocks=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_heads=size("blocks.0.attention.relative.content_bias"),
        ffn_dim=size("blocks.0.ffn1.up.weight"),
        conv_expansion=width // dim,
        conv_kernel=size("blocks.0.conv.depthwise.weight", 2),
        subsampling_channels=size("subsampling.conv1.weight"),
        subsampling_norm=False,
        positions="relative",
    )


def read_cmvn(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (80,) float32 each, of a Kaldi matrix of sums, squares and the count. Raises RecipeError when it is none."""
    fix = f"put the {CMVN} that was published with the encoder beside it"
    try:
        content = path.read_bytes()
        kind, rows, columns = content[2:5], *struct.unpack("<xixi", content[5:15])
        if content[:2] != b"\0B" or kind not in (b"FM ", b"DM ") or rows != 2:
            raise ValueError(f"bytes {content[:5]!r} and {rows} rows")
        sums = np.frombuffer(content, {b"FM ": "<f4", b"DM ": "<f8"}[kind], 2 * columns, 15).reshape(2, columns).astype(np.float64)
        count = sums[0, -1]
        if count < 1:
            raise ValueError(f"{count:g} frames")
    except (OSError, ValueError, struct.error) as error:
        raise RecipeError(path, expected="a binary Kaldi matrix of sums and squares", found=error, fix=fix) from error
    mean = sums[0, :-1] / count
    std = np.sqrt(np.maximum(sums[1, :-1] / count - mean**2, MIN_VARIANCE))
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
