"""The convolution's GPU kernel equals torch's own convolution of windows, values and gradients, for every chunk size.

It runs on a GPU, or on a CPU under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/unit/model/test_depthwise.py
"""

import os

import pytest
import torch
from tiny import ENCODER

from nim4.config import ConformerConfig
from nim4.model.conformer import ChunkConvolution

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_frames", [0, 4, 16, 200])
@pytest.mark.parametrize(("num_frames", "kernel", "width"), [(75, 33, 8), (40, 7, 130), (5, 33, 8)])
def test_kernel_equals_windows(num_frames, kernel, width, chunk_frames, dtype):
    from nim4.model.depthwise import chunk_depthwise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    module = ChunkConvolution(ConformerConfig(**(ENCODER | {"dim": width, "conv_expansion": 1, "conv_kernel": kernel}))).to(device)
    module.gate, module.finish, module._on_gpu = (lambda x: x.transpose(1, 2)), (lambda x: x.transpose(1, 2)), None
    x = torch.randn(3, num_frames, width, device=device)
    back = torch.randn(3, num_frames, width, device=device)
    if dtype == torch.bfloat16:
        x, back = x.to(dtype).float(), back.to(dtype).float()  # the reference then sees the same numbers
    valid = torch.ones(3, num_frames, dtype=torch.bool, device=device)
    weight, bias = module.depthwise.weight, module.depthwise.bias
    seen = []
    for run in (
        lambda x: module(x, valid, chunk_frames),
        lambda x: chunk_depthwise(x.to(dtype), weight[:, 0], bias, chunk_frames).float(),
    ):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = run(leaf)
        y.backward(back)
        seen.append((y.detach(), leaf.grad, weight.grad.clone(), bias.grad.clone()))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for expected, found in zip(*seen, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_kernel_traces():
    """So that compiled blocks have no break where it stands."""
    from nim4.model.depthwise import chunk_depthwise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(2, 20, 16, device=device, requires_grad=True)
    weight, bias = torch.randn(16, 7, device=device, requires_grad=True), torch.randn(16, device=device, requires_grad=True)
    torch.library.opcheck(chunk_depthwise, (x, weight, bias, 4), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
