"""The door to Triton: the depthwise convolution of the encoder as one kernel per pass, on a GPU.

torch's own depthwise convolution of long kernels takes a fifth of the encoder's training step, and it wants windows of chunks copied out.
Here a frame reads its neighbours where they are, those to the right as far as its chunk reaches; sums are in float32.
Letters: B batch, S encoder frames, E channels, K taps, R = K // 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_S, BLOCK_E = 32, 128
TAPS = 3  # summed by one program of the weights' gradient
SPLITS = 32  # programs that share the frames of the weights' gradient


@triton.jit
def _convolve(x, weight, bias, y, S, E, chunk, K: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    # Forward: y[s] = bias + sum_k w[k] x[s + k - R]. Backward: y[s] = sum_k w[k] x[s - k + R], x being the gradient of the output.
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    start = tl.program_id(1).to(tl.int64) * S * E
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    if not BACKWARD:
        total += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    for k in range(K):
        shift = k - K // 2
        other = s - shift if BACKWARD else s + shift
        reader = other if BACKWARD else s  # the frame of the output, whose chunk decides
        seen = (other >= 0) & (other < S) & (s < S) & (shift <= chunk - 1 - reader % chunk)
        value = tl.load(x + start + other[:, None] * E + e[None, :], mask=seen[:, None] & (e < E)[None, :], other=0.0)
        total += value.to(tl.float32) * tl.load(weight + k * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    tl.store(y + start + s[:, None] * E + e[None, :], total, mask=(s < S)[:, None] & (e < E)[None, :])


@triton.jit
def _weight_gradient(x, dy, out, B, S, E, chunk, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    # out[split, k, e] = sum over the split's frames of dy[s] x[s + k - R], for three neighbouring k.
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    shift = tl.program_id(1) * 3 - K // 2
    sum0 = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    sum1 = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    sum2 = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    blocks = tl.cdiv(S, BLOCK_S)
    for number in range(tl.program_id(2), B * blocks, tl.num_programs(2)):
        start = (number // blocks).to(tl.int64) * S * E
        s = (number % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        ahead = chunk - 1 - s % chunk
        inside = (e < E)[None, :]
        gradient = tl.load(dy + start + s[:, None] * E + e[None, :], mask=(s < S)[:, None] & inside, other=0.0).to(tl.float32)
        at = x + start + (s + shift)[:, None] * E + e[None, :]
        seen0 = (s + shift >= 0) & (s + shift < S) & (shift <= ahead)
        seen1 = (s + shift + 1 >= 0) & (s + shift + 1 < S) & (shift + 1 <= ahead)
        seen2 = (s + shift + 2 >= 0) & (s + shift + 2 < S) & (shift + 2 <= ahead)
        sum0 += gradient * tl.load(at, mask=seen0[:, None] & inside, other=0.0).to(tl.float32)
        sum1 += gradient * tl.load(at + E, mask=seen1[:, None] & inside, other=0.0).to(tl.float32)
        sum2 += gradient * tl.load(at + 2 * E, mask=seen2[:, None] & inside, other=0.0).to(tl.float32)
    k = tl.program_id(1) * 3
    row = out + (tl.program_id(2) * K + k) * E + e
    tl.store(row, tl.sum(sum0, 0), mask=e < E)
    tl.store(row + E, tl.sum(sum1, 0), mask=(e < E) & (k + 1 < K))
    tl.store(row + 2 * E, tl.sum(sum2, 0), mask=(e < E) & (k + 2 < K))


def _run(x: Tensor, weight: Tensor, bias: Tensor, chunk_frames: int, backward: bool) -> Tensor:
    x, taps = x.contiguous(), weight.t().contiguous()  # neighbouring channels beside each other
    batch_size, num_frames, width = x.shape
    y, grid = torch.empty_like(x), (triton.cdiv(num_frames, BLOCK_S), batch_size, triton.cdiv(width, BLOCK_E))
    _convolve[grid](x, taps, bias, y, num_frames, width, chunk_frames or num_frames, len(taps), backward, BLOCK_S, BLOCK_E)
    return y


@torch.library.custom_op("nim4::chunk_depthwise", mutates_args=())
def chunk_depthwise(x: Tensor, weight: Tensor, bias: Tensor, chunk_frames: int) -> Tensor:
    """The convolution of (B, S, E) with (E, K), K odd, and (E,); frames see R to the left, and as far right inside their chunk.

    Args:
        x: float32 or bfloat16; the result has its dtype.
        chunk_frames: 0 = the whole utterance is one chunk.
    """
    return _run(x, weight, bias, chunk_frames, False)


@torch.library.custom_op("nim4::chunk_depthwise_backward", mutates_args=())
def chunk_depthwise_backward(dy: Tensor, x: Tensor, weight: Tensor, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `weight`."""
    dy, x = dy.contiguous(), x.contiguous()
    batch_size, num_frames, width = x.shape
    num_taps = weight.shape[1]
    sums = torch.empty(SPLITS, num_taps, width, device=x.device)
    grid = (triton.cdiv(width, BLOCK_E), triton.cdiv(num_taps, TAPS), SPLITS)
    _weight_gradient[grid](x, dy, sums, batch_size, num_frames, width, chunk_frames or num_frames, num_taps, BLOCK_S, BLOCK_E)
    return _run(dy, weight, weight, chunk_frames, True), sums.sum(0).t().to(weight.dtype)


@chunk_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, chunk_frames: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@chunk_depthwise_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, chunk_frames: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[1], weight.shape[0]).t()


def _keep(ctx, inputs, output) -> None:
    x, weight, _, ctx.chunk_frames = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    dx, dw = chunk_depthwise_backward(dy, x, weight, ctx.chunk_frames)
    return dx, dw, dy.sum((0, 1), dtype=torch.float32).to(weight.dtype), None


chunk_depthwise.register_autograd(_backward, setup_context=_keep)
