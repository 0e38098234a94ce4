"""mean_pool and norm_mean_pool, forward and with the backward pass, beside plain PyTorch on packed and padded tokens.

Lengths of the real mix. The limit is bytes over the measured copy bandwidth: x and residual read once, B·D floats
written, and for the backward pass the same reads again and one gradient of x written. On CUDA every contestant is a
captured graph, so that what is timed are kernels and not Python's launches; one row shows ours with them.
"""

import gc
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from leafkern.ops import mean_pool, norm_mean_pool
from leafkern.ops.pooling.reference import brute_mean_pool, brute_norm_mean_pool

from .harness import Case, Contestant, Work
from .lengths import lengths
from .machine import as_cuda_graph, compiled

EPS = 1e-12
# (batch, width)
SHAPES = {
    "tiny": [(3, 32)],
    "small": [(1, 384), (64, 384)],
    "full": [(1, 384), (8, 384), (64, 384), (256, 384), (1024, 384), (1024, 1024)],
}
DEVICES = [("cpu", "float32"), *([("cuda", "float32"), ("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
# Relative Frobenius error, twice that for gradients; a peer that sums in half precision gets five times as much.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CACHE_BYTES = 256 << 20  # input sets are rotated until they exceed any cache
MOST_SETS = 8


class Inputs:
    """One input set, packed, padded, and with the gradient that reaches the result."""

    def __init__(self, batch: int, width: int, device: str, dtype: str, seed: int):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.from_numpy(lengths("real", batch, seed))
        kind = getattr(torch, dtype)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, kind)

        self.lengths = counts.to(device)
        self.cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int().to(device)
        self.sequence = torch.repeat_interleave(torch.arange(batch), counts).to(device)
        tokens, longest = int(counts.sum()), int(counts.max())
        self.x, self.residual = draw(tokens, width), draw(tokens, width)
        self.weight, self.bias = draw(width), draw(width)
        self.grad = torch.randn(batch, width, generator=generator).to(device)
        self.mask = torch.arange(longest, device=device) < self.lengths[:, None]
        self.at = self.mask.flatten().nonzero().flatten()

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        out = packed.new_zeros(self.mask.numel(), packed.shape[1])
        return out.index_copy_(0, self.at, packed).view(*self.mask.shape, -1)

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.flatten(0, 1)[self.at] if padded.ndim == 3 else padded


# Implementations: (inputs, x, residual, weight, bias) -> (B, D)


def _ours(op: str):
    def run(inputs, x, residual, weight, bias):
        if op == "mean_pool":
            return mean_pool(x, inputs.cu_seqlens)
        return norm_mean_pool(x, residual, weight, bias, inputs.cu_seqlens, eps=EPS)

    return run


def _eager(op: str):
    def packed(sequence, counts, x, residual, weight, bias):
        if op == "norm_mean_pool":
            x = F.layer_norm(x + residual, x.shape[-1:], weight, bias, EPS)
        total = torch.zeros(counts.shape[0], x.shape[1], device=x.device).index_add(0, sequence, x.float())
        pooled = total / counts[:, None]
        return F.normalize(pooled) if op == "norm_mean_pool" else pooled

    return packed


def _packed(function):
    return lambda inputs, *arguments: function(inputs.sequence, inputs.lengths, *arguments)


def _padded(op: str):
    def run(inputs, x, residual, weight, bias):
        if op == "norm_mean_pool":
            x = F.layer_norm(x + residual, x.shape[-1:], weight, bias, EPS)
        weights = inputs.mask[:, :, None].to(x.dtype)
        pooled = (x * weights).sum(1) / weights.sum(1)
        return (F.normalize(pooled) if op == "norm_mean_pool" else pooled).float()

    return run


def _arguments(op: str, inputs: Inputs, padded: bool) -> list[torch.Tensor]:
    """What gets a gradient: x, and for the norm residual, weight and bias."""
    tokens = [inputs.x] if op == "mean_pool" else [inputs.x, inputs.residual]
    tokens = [inputs.padded(each) if padded else each for each in tokens]
    others = [] if op == "mean_pool" else [inputs.weight, inputs.bias]
    return [each.detach().clone().requires_grad_() for each in tokens + others]


def _call(function, op: str, inputs: Inputs, backward: bool, padded: bool):
    """A function of nothing: the result, or the result and all gradients."""
    arguments = _arguments(op, inputs, padded)
    given = arguments if op == "norm_mean_pool" else [*arguments, None, None, None]

    def forward():
        with torch.inference_mode():
            return [function(inputs, *given)]

    def both():
        pooled = function(inputs, *given)
        return [pooled.detach(), *torch.autograd.grad(pooled, arguments, inputs.grad)]

    return both if backward else forward


@cache
def _truth(op: str, backward: bool, inputs: Inputs) -> list[torch.Tensor]:
    exact = [each.detach().double().requires_grad_() for each in _arguments(op, inputs, False)]
    if op == "mean_pool":
        pooled = brute_mean_pool(exact[0], inputs.cu_seqlens, False)
    else:
        pooled = brute_norm_mean_pool(*exact, inputs.cu_seqlens, EPS, "layer", True)
    gradients = torch.autograd.grad(pooled, exact, inputs.grad.double()) if backward else []
    return [pooled.detach(), *gradients]


def _contestant(name, function, op, sets, backward, dtype, *, padded=False, captured=False, slack=1, **options):
    calls: dict = {}

    def run(i):
        # Captured at the first call, which is the one that is checked and not timed.
        if i not in calls:
            call = _call(function, op, sets[i], backward, padded)
            calls[i] = as_cuda_graph(call) if captured else call
        return calls[i]()

    def check(output, i):
        for place, (got, right) in enumerate(zip(output, _truth(op, backward, sets[i]), strict=True)):
            got = sets[i].packed(got)
            error = ((got.double() - right).norm() / right.norm()).item()
            # `not <=` rather than `>`: NaN must not pass.
            if not error <= slack * TOLERANCE[dtype] * (2 if place else 1):
                return f"output {place}: relative error {error:.2g}"
        return None

    return Contestant(name, run, check, **options)


def _work(op: str, backward: bool, inputs: Inputs) -> Work:
    tokens, width = inputs.x.shape
    entries, size = float(tokens * width), inputs.x.element_size()
    read = entries * size * (2 if op == "norm_mean_pool" else 1)
    result = 4.0 * inputs.lengths.numel() * width
    moved = read + result
    operations = entries * (8 if op == "norm_mean_pool" else 1)
    if backward:
        # The gradient of a mean needs no x; that of a norm reads x and residual again.
        moved += entries * size + result + (read if op == "norm_mean_pool" else 0)
        operations += entries * (12 if op == "norm_mean_pool" else 1)
    return Work(operations, "FLOP", ("fp32_fma", "fp32_gemm"), moved, "copy", float(tokens), "token")


def _case(op: str, part: str, batch: int, width: int, device: str, dtype: str, peers: bool) -> Case:
    backward, captured = part != "forward", device == "cuda"
    first = Inputs(batch, width, device, dtype, 0)
    work = _work(op, backward, first)
    count = min(MOST_SETS, max(2, round(CACHE_BYTES / work.bytes)))
    sets = [first, *(Inputs(batch, width, device, dtype, seed) for seed in range(1, count))]

    def contestant(name, function, **options):
        return _contestant(name, function, op, sets, backward, dtype, **({"captured": captured} | options))

    contestants = [contestant("leafkern", _ours(op), ours=True)]
    if captured:
        note = "with Python's launch cost"
        contestants.append(contestant("leafkern, no graph", _ours(op), captured=False, same_job=False, note=note))
    if peers:
        contestants.append(contestant("torch, packed", _packed(_eager(op)), slack=5))
        if captured:
            peer = _packed(compiled(_eager(op), dynamic=True))
            contestants.append(contestant("torch.compile, packed", peer, slack=5))
        contestants.append(contestant("torch, padded", _padded(op), padded=True, slack=5))
    shape = {"B": batch, "D": width, "tokens": first.x.shape[0], "mix": "real", "dtype": dtype}
    name = f"{op}/{part}/{dtype}/B{batch}xD{width}"
    return Case("pooling", name, shape, work, contestants, count, device)


def pytest_generate_tests(metafunc):
    shapes = SHAPES[metafunc.config.getoption("--size")]
    metafunc.parametrize(("batch", "width"), shapes, ids=[f"B{batch}xD{width}" for batch, width in shapes])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("part", ["forward", "forward and backward"])
@pytest.mark.parametrize("op", ["mean_pool", "norm_mean_pool"])
def test_pooling(bench, bench_session, op, part, device, dtype, batch, width):
    bench(_case(op, part, batch, width, device, dtype, bench_session.peers))
    _truth.cache_clear()
    gc.collect()
