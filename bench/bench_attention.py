"""varlen_attention, forward and with the backward pass, beside the kernels of torch and flash-attn.

Shapes of four encoders: MiniLM (12 heads of 32), BERT (12 of 64), Qwen2-0.5B (14 of 64, 2 for keys and values) and
Mistral (32 of 128, 8 for keys and values, causal); all lengths 512, and the real mix. The limit is 4·D operations per
pair of tokens that see each other (3.5 times that with the backward pass) over the measured rate of matrix products,
or q, k, v and the result over copy bandwidth; exponentials, one per pair and head, are given as a rate beside it (a
multiprocessor of compute capability 9.0 makes 16 per clock). On CUDA a contestant is a captured graph where it can be
captured, so that what is timed are kernels and not Python's launches. LEAFKERN_AUTOTUNE=1 adds ours autotuned, whose
candidates take minutes to compile.
"""

import functools
import gc
import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from leafkern.ops import varlen_attention
from leafkern.ops.attention import reference
from leafkern.ops.attention.choice import WIDE_HEAD

from .harness import Case, Contestant, Work
from .lengths import lengths
from .machine import as_cuda_graph, compiled

# heads, heads of keys and values, width, causal
MODELS = {
    "MiniLM": (12, 12, 32, False),
    "BERT": (12, 12, 64, False),
    "Qwen2": (14, 2, 64, False),
    "Mistral": (32, 8, 128, True),
}
# (model, mix, batch); the largest that leave room for every contestant's gradients
SHAPES = {
    "tiny": [("MiniLM", "real", 2)],
    "small": [("MiniLM", "real", 8), ("Mistral", "real", 2)],
    "full": [
        *((model, mix, batch) for model in MODELS for mix in ("uniform", "real") for batch in (1, 32)),
        *((model, mix, 1024) for model in MODELS if model != "Mistral" for mix in ("uniform", "real")),
    ],
}
DEVICES = [("cpu", "float32"), *([("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
# Relative Frobenius error, twice that for gradients and for peers.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CACHE_BYTES = 256 << 20  # input sets are rotated until they exceed any cache
MOST_SETS = 4
UNIFORM = 512
# FlexAttention is compiled for each shape, which takes longer than timing it: only where all input sets have one.
FLEX_BATCH = 32


class Inputs:
    """One input set: packed q, k, v and the gradient of the result, and where their tokens go when padded."""

    def __init__(self, model: str, mix: str, batch: int, device: str, dtype: str, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.heads, self.kv_heads, self.width, self.causal = MODELS[model]
        counts = torch.full((batch,), UNIFORM) if mix == "uniform" else torch.from_numpy(lengths(mix, batch, seed))
        self.lengths = counts.to(device)
        self.cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int().to(device)
        self.longest, tokens = int(counts.max()), int(counts.sum())
        self.scores = float((counts * (counts + 1) // 2 if self.causal else counts * counts).sum())

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(
                tokens, heads, self.width, generator=generator, device=device, dtype=getattr(torch, dtype)
            )

        self.qkv = [draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)]
        self.grad = draw(self.heads)
        self.mask = torch.arange(self.longest, device=device) < self.lengths[:, None]  # [B, longest]
        self.even = bool(self.mask.all())
        self.at = self.mask.flatten().nonzero().flatten()
        self.sequence = torch.repeat_interleave(torch.arange(batch, device=device), self.lengths)

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, H, D) -> (B, H, longest, D)."""
        out = packed.new_zeros(self.mask.numel(), *packed.shape[1:]).index_copy_(0, self.at, packed)
        return out.unflatten(0, self.mask.shape).transpose(1, 2)

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.transpose(1, 2).flatten(0, 1)[self.at] if padded.ndim == 4 else padded


@cache
def _truth(inputs: Inputs, backward: bool) -> list[torch.Tensor]:
    """Result and gradients, computed in float64 and kept in float32."""
    q, k, v = (x.double() for x in inputs.qkv)
    bounds, scale, right = inputs.cu_seqlens, inputs.width**-0.5, 0 if inputs.causal else -1
    out, lse = reference.blocked_attention(q, k, v, bounds, scale, -1, right)
    found = [out]
    if backward:
        grad = inputs.grad.double()
        found += reference.blocked_attention_backward(grad, q, k, v, out, lse, bounds, scale, -1, right)
    return [x.float() for x in found]


# Implementations: (inputs, q, k, v) -> result


def _ours(inputs, q, k, v):
    return varlen_attention(q, k, v, inputs.cu_seqlens, inputs.longest, causal=inputs.causal)


def _padded(backend: SDPBackend | None):
    def run(inputs, q, k, v):
        options = {"is_causal": inputs.causal, "enable_gqa": inputs.heads != inputs.kv_heads}
        # Padding behind a text needs no mask when a token sees only what stands before it.
        if not inputs.even and not inputs.causal:
            options["attn_mask"] = inputs.mask[:, None, None, :]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def _nested(inputs, q, k, v):
    group = inputs.heads // inputs.kv_heads
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    options = {"offsets": inputs.cu_seqlens.long(), "min_seqlen": 1, "max_seqlen": inputs.longest}
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, **options).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def _torch_varlen(inputs, q, k, v):
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = inputs.cu_seqlens, inputs.longest
    options = {"window_size": (-1, 0) if inputs.causal else (-1, -1)}
    # torch 2.11 knows no such flag, and takes grouped queries without.
    if inputs.heads != inputs.kv_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)


def _flash(inputs, q, k, v):
    from flash_attn import flash_attn_varlen_func

    bounds, longest = inputs.cu_seqlens, inputs.longest
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=inputs.causal)


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    fused = compiled(flex_attention, dynamic=False)

    @cache
    def blocks_of(inputs):
        def seen(b, h, i, j):
            same = inputs.sequence[i] == inputs.sequence[j]
            return same & (i >= j) if inputs.causal else same

        tokens = inputs.sequence.numel()
        return create_block_mask(seen, None, None, tokens, tokens, device=inputs.sequence.device)

    def run(inputs, q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = fused(q, k, v, block_mask=blocks_of(inputs), enable_gqa=inputs.heads != inputs.kv_heads)
        return out[0].transpose(0, 1)

    return run


def _call(function, inputs: Inputs, backward: bool, padded: bool):
    """A function of nothing: the result, or the result and all gradients."""
    place = inputs.padded if padded else torch.clone
    arguments, grad = [place(x).requires_grad_() for x in inputs.qkv], place(inputs.grad)

    def forward():
        with torch.no_grad():
            return [function(inputs, *arguments)]

    def both():
        out = function(inputs, *arguments)
        return [out.detach(), *torch.autograd.grad(out, arguments, grad)]

    return both if backward else forward


def _contestant(
    name, function, sets, backward, dtype, *, padded=False, captured=False, slack=2, settings=None, **options
):
    calls: dict = {}

    def run(i):
        # Captured at the first call, which is the one that is checked and not timed.
        if i not in calls:
            call = _call(function, sets[i], backward, padded)
            with mock.patch.dict(os.environ, settings or {}):
                calls[i] = as_cuda_graph(call) if captured else call
        return calls[i]()

    def check(output, i):
        rights = _truth(sets[i], backward)
        for place, (got, right) in enumerate(zip(output, rights, strict=True)):
            got = sets[i].packed(got)
            # Terms of dq and dk cancel; dv tells their size.
            size = torch.maximum(right.norm(), rights[-1].norm()) if place else right.norm()
            error = ((got.float() - right).norm() / size).item()
            # `not <=` rather than `>`: NaN must not pass.
            if not error <= slack * TOLERANCE[dtype] * (2 if place else 1):
                return f"output {place}: relative error {error:.2g}"
        return None

    return Contestant(name, run, check, **options)


def _work(inputs: Inputs, backward: bool, dtype: str) -> Work:
    pairs = inputs.heads * inputs.scores
    size = inputs.grad.element_size()
    moved = float(size * (sum(x.numel() for x in inputs.qkv) + inputs.grad.numel()))
    rates = ("bf16_gemm", "fp16_gemm") if dtype == "bfloat16" else ("fp32_fma", "fp32_gemm")
    return Work(
        4 * inputs.width * pairs * (3.5 if backward else 1),
        "FLOP",
        rates,
        # The backward pass reads q, k, v, the result and its gradient, and writes three gradients.
        moved * (3 if backward else 1),
        "copy",
        float(inputs.grad.shape[0]),
        "token",
        also={"exp": pairs},
    )


def _peers(inputs: Inputs, batch: int, cuda: bool, contestant) -> list[Contestant]:
    found = [contestant("torch SDPA, padded", _padded(None), padded=True)]
    if not cuda:
        return found
    if inputs.even:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found.append(contestant(f"torch SDPA {name}", _padded(backend), padded=True))
    launches = {"captured": False, "note": "with Python's launch cost"}
    if not inputs.causal:
        found.append(contestant("torch SDPA flash, nested", _nested, **launches))
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        found.append(contestant("torch.nn.attention.varlen", _torch_varlen))
    if importlib.util.find_spec("flash_attn"):
        found.append(contestant("flash-attn", _flash))
    if batch == FLEX_BATCH and inputs.even:
        found.append(contestant("FlexAttention", _flex(), **launches))
    return found


def _case(model: str, mix: str, batch: int, part: str, device: str, dtype: str, peers: bool) -> Case:
    backward, cuda = part != "forward", device == "cuda"
    first = Inputs(model, mix, batch, device, dtype, 0)
    work = _work(first, backward, dtype)
    count = min(MOST_SETS, max(1, round(CACHE_BYTES / work.bytes)))
    sets = [first, *(Inputs(model, mix, batch, device, dtype, seed) for seed in range(1, count))]
    contestant = functools.partial(_adapted, sets=sets, backward=backward, dtype=dtype, captured=cuda)
    contestants = [contestant("leafkern", _ours, ours=True, slack=1, settings={"LEAFKERN_AUTOTUNE": "0"})]
    # The settings hold while the graph is captured. Left alone, wide heads go to flash-attn or torch's kernel.
    triton = {"LEAFKERN_BACKEND": "attention=triton", "LEAFKERN_AUTOTUNE": "0"}
    if cuda and first.width >= WIDE_HEAD:
        contestants.append(contestant("leafkern, Triton", _ours, ours=True, slack=1, settings=triton))
    if cuda and os.environ.get("LEAFKERN_AUTOTUNE") == "1":
        tuned = triton | {"LEAFKERN_AUTOTUNE": "1"}
        contestants.append(contestant("leafkern, autotuned", _ours, ours=True, slack=1, settings=tuned))
    if peers:
        contestants += _peers(first, batch, cuda, contestant)
    shape = {"B": batch, "H": first.heads, "H_kv": first.kv_heads, "D": first.width, "mix": mix, "dtype": dtype}
    shape |= {"tokens": first.grad.shape[0], "causal": first.causal}
    return Case("attention", f"{model}/{mix}/{part}/{dtype}/B{batch}", shape, work, contestants, count, device)


def _adapted(name, function, *, sets, backward, dtype, **options):
    return _contestant(name, function, sets, backward, dtype, **options)


def pytest_generate_tests(metafunc):
    shapes = SHAPES[metafunc.config.getoption("--size")]
    metafunc.parametrize(("model", "mix", "batch"), shapes, ids=[f"{model}-{mix}-B{b}" for model, mix, b in shapes])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("part", ["forward", "forward and backward"])
def test_attention(bench, bench_session, model, mix, batch, part, device, dtype):
    bench(_case(model, mix, batch, part, device, dtype, bench_session.peers))
    _truth.cache_clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
