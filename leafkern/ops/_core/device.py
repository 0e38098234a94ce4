"""What Triton kernels of several operations share. Imported by their kernels.py alone: it needs triton."""

import triton
import triton.language as tl


@triton.jit
def sequence_of(cu_seqlens, token, sequences, FAN: tl.constexpr):
    # The last sequence that begins at or before `token`: never an empty one, but where the token lies beyond them all.
    first = token * 0
    width = first + sequences
    while width > 1:
        step = (width + FAN - 1) // FAN
        probe = tl.arange(0, FAN) * step
        begin = tl.load(cu_seqlens + first + probe, mask=probe < width, other=0)
        passed = tl.sum(((probe < width) & (begin <= token)).to(tl.int32), 0)
        first += tl.maximum(passed - 1, 0) * step
        width = tl.minimum(step, sequences - first)
    return first


@triton.jit
def summed(x, residual, rows, columns, valid, x_stride, residual_stride):
    # A tile of x + residual.
    h = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=valid, other=0.0)
        h += other.to(tl.float32)
    return h


@triton.jit
def unit(h, valid, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    # The rows of a tile normed without weight and bias, their means (0 unless NORM is "layer") and 1 / deviations.
    mean = tl.zeros([h.shape[0]], tl.float32)
    inverse = tl.full([h.shape[0]], 1.0, tl.float32)
    if NORM == "layer":
        mean = tl.sum(h, 1) / WIDTH
        h = tl.where(valid, h - mean[:, None], 0.0)
    if NORM != "none":
        inverse = tl.rsqrt(tl.sum(h * h, 1) / WIDTH + eps)
        h *= inverse[:, None]
    return h, mean, inverse
