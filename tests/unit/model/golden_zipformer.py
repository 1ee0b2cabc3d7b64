"""What icefall's own Zipformer makes of weights and features that `numbers` gives by name: the shape, and how to make the file anew.

Run by hand, it needs the package `zipformer` 0.1.3 of the Next-gen Kaldi team (Apache-2.0), which has that code; its pins do not fit ours,
so it is unpacked and not installed:

    pip download --no-deps zipformer==0.1.3 && python -m zipfile -e zipformer-0.1.3-py3-none-any.whl FOLDER
    python tests/unit/model/golden_zipformer.py FOLDER

Offline icefall looks at an utterance with 7 more feature frames, here zeros; a stream is fed chunk by chunk, as in its streaming decoding.
"""

import contextlib
import random
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("golden_zipformer.safetensors")
SHAPE = {
    "dims": (32, 48, 40),
    "downsampling": (1, 2, 4),
    "num_layers": (1, 2, 1),
    "num_heads": (2, 2, 2),
    "ffn_dims": (32, 32, 32),
    "conv_kernels": (7, 5, 9),
    "unmasked_dims": (24, 32, 32),
    "query_head_dim": 8,
    "value_head_dim": 4,
    "pos_dim": 8,
    "subsampling_channels": (2, 2, 4),
}
CHUNK, LEFT, NUM_CHUNKS = 8, 2, 6  # encoder frames, chunks, chunks
LENS = (203, 64)
GRADIENTS = ("encoder.encoders.0.layers.0.norm.bias", "encoder.encoders.1.downsample.bias", "encoder_embed.conv.0.weight")
GRADIENTS += ("encoder.encoders.2.encoder.layers.0.conv_module1.depthwise_conv.chunkwise_conv_scale",)


def numbers(name, shape):
    """Normal numbers, the same everywhere and always: NumPy has frozen this generator."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))).float()


def give_weights(parameters):
    """Fills named parameters with weights far from their first values, of which many are zero or small."""
    with torch.no_grad():
        for name, parameter in parameters:
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * numbers(name, parameter.shape))


def features():
    """(2, T, 80) of utterances, whose lengths are LENS, and of streams, with their look-ahead."""
    return numbers("x", (len(LENS), max(LENS), 80)), numbers("stream", (2, 4 * CHUNK * NUM_CHUNKS + 13, 80))


def original(folder):
    """The classes of the unpacked package, without what else it imports."""
    torch.compile = lambda function, *args, **kwargs: function  # as written, and quickly
    random.random = lambda: 1.0  # it changes gradients by chance, also in evaluation
    for name, path in (("zipformer", folder / "zipformer"), ("zipformer.utils", None)):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        module.torch_autocast = lambda *args, **kwargs: contextlib.nullcontext()
        sys.modules[name] = module
    from zipformer.modules.subsampling import Conv2dSubsampling
    from zipformer.modules.zipformer import Zipformer

    return Conv2dSubsampling, Zipformer


def named(embed, encoder):
    """Parameters by the names of icefall's checkpoints."""
    return [(f"{name}.{key}", value) for name, part in (("encoder_embed", embed), ("encoder", encoder)) for key, value in part.named_parameters()]


def build(folder, causal, chunk_frames=-1):
    """encoder_embed and encoder in evaluation mode, with random weights."""
    embed_class, encoder_class = original(folder)
    shape = SHAPE
    encoder = encoder_class(
        downsampling_factor=shape["downsampling"],
        encoder_dim=shape["dims"],
        num_encoder_layers=shape["num_layers"],
        encoder_unmasked_dim=shape["unmasked_dims"],
        query_head_dim=shape["query_head_dim"],
        pos_head_dim=4,
        value_head_dim=shape["value_head_dim"],
        num_heads=shape["num_heads"],
        feedforward_dim=shape["ffn_dims"],
        cnn_module_kernel=shape["conv_kernels"],
        pos_dim=shape["pos_dim"],
        causal=causal,
        chunk_size=(2 * chunk_frames if chunk_frames > 0 else -1,),
        left_context_frames=(2 * CHUNK * LEFT,),
    )
    first, second, third = shape["subsampling_channels"]
    embed = embed_class(80, shape["dims"][0], first, second, third)
    give_weights(named(embed, encoder))
    return embed.eval(), encoder.eval()


def whole(embed, encoder, x):
    """(1, T, 80) -> (1, S, D)."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4 + 7))
    y, lens = embed(x, torch.tensor([x.shape[1]]))
    return encoder(y.transpose(0, 1), lens, torch.zeros(1, y.shape[1], dtype=torch.bool))[0].transpose(0, 1)


def streamed(embed, encoder, x):
    """(B, T, 80) -> (B, S, D), as icefall's streaming decoding goes about it."""
    frames, left, batch = 2 * CHUNK, 2 * CHUNK * LEFT, len(x)
    states, embed_state, processed, outputs = encoder.get_init_states(batch), embed.get_init_states(batch), 0, []
    for start in range(0, 2 * frames * NUM_CHUNKS, 2 * frames):
        piece = x[:, start : start + 2 * frames + 13]
        y, lens, embed_state = embed.streaming_forward(piece, torch.full((batch,), piece.shape[1]), embed_state)
        unfilled = (torch.arange(left) >= processed).flip(0).expand(batch, left)
        mask = torch.cat([unfilled, torch.zeros(batch, frames, dtype=torch.bool)], dim=1)
        output, _, states = encoder.streaming_forward(y.transpose(0, 1), lens, states, mask)
        outputs.append(output.transpose(0, 1))
        processed += frames
    return torch.cat(outputs, dim=1)


def activations():
    """(60, 6) whose channels violate every limit of a balancer, and the gradient that comes from above."""
    x = numbers("activations", (60, 6)) * torch.tensor([0.05, 1.0, 20.0, 1.0, 1.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0, -3.0, 0.0, 0.5])
    x[:, 5] += 2 * x[:, 4]
    return x, numbers("from above", (60, 6))


def regularised():
    """Gradients at those activations, as icefall changes them."""
    from zipformer.modules import scaling

    values = {}
    for name, module in (
        ("balanced", scaling.Balancer(6, -1, min_positive=0.3, max_positive=0.7, min_abs=0.2, max_abs=4.0, prob=1.0)),
        ("whitened", scaling.Whiten(2, whitening_limit=1.5, prob=1.0, grad_scale=0.1)),
    ):
        x, gradient = activations()
        x.requires_grad_()
        random.random = lambda: 0.5
        module(x).backward(gradient)
        values[name] = x.grad
    return values


def main():
    from safetensors.torch import save_file

    folder, values = Path(sys.argv[1]), {}
    utterances, streams = features()
    for kind in ("causal", "offline"):
        with torch.no_grad():
            parts = build(folder, kind == "causal")
            for number, (x, length) in enumerate(zip(utterances, LENS, strict=True)):
                values[f"{kind}.{number}"] = whole(*parts, x[None, :length])
    embed, encoder = build(folder, True)
    whole(embed, encoder, utterances[:1]).square().sum().backward()
    values |= {f"gradient.{name}": parameter.grad for name, parameter in named(embed, encoder) if name in GRADIENTS}
    values |= regularised()
    with torch.no_grad():
        values["stream"] = streamed(*build(folder, True, CHUNK), streams)
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, GOLDEN)


if __name__ == "__main__":
    main()
