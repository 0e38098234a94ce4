"""The kernels around attention on a GPU, bfloat16 included, against their definitions in float64.

Tests named `small` are also run under compute-sanitizer (bench/gpu.sh, stage "sanitizer").
"""

import pytest
import torch
from compare import BATCHES, bounds, relative
from norm_cases import (
    WORDS,
    angles,
    drawn,
    embed_arguments,
    exactly,
    hold_embed,
    hold_gelu,
    hold_norm,
    hold_rotary,
    hold_unchecked,
    norm_arguments,
)
from tolerances import TOLERANCE

from leafkern.ops._core.norm import NORMS
from leafkern.ops.norm import APPROXIMATIONS, add_norm, add_norm_sum, autograd, bias_gelu, embed_norm, rotary
from leafkern.ops.norm.reference import brute_add_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def on_gpu(tensors):
    return [None if x is None else x.detach().cuda().requires_grad_() for x in tensors]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (23, 100), (700, 384)])
def test_small_add_norm(dtype, shape, kind):
    hold_norm(norm_arguments(shape, dtype, device="cuda"), kind, dtype)


@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_without_residual_or_bias(dtype, residual, bias):
    hold_norm(norm_arguments((47, 48), dtype, residual=residual, bias=bias, device="cuda"), "layer", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_mixed_dtypes(dtype):
    # Under autocast: a product in half precision, everything else in single.
    x, *others = norm_arguments((90, 384), device="cuda")
    hold_norm([x.detach().to(dtype).requires_grad_(), *others], "layer", dtype)
    hold_gelu([x.detach().to(dtype).requires_grad_(), others[-1]], "none", dtype)


@pytest.mark.parametrize("width", [2, 768, 896, 1024, 2048, 4096, autograd.WIDEST_NORM])
def test_widths(width):
    for kind, dtype in (("layer", torch.bfloat16), ("rms", torch.float32)):
        hold_norm(norm_arguments((309, width), dtype, device="cuda"), kind, dtype)
    hold_embed([9, 0, 40], width, torch.float32, device="cuda")


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (23, 100), (300, 1536)])
def test_small_bias_gelu(dtype, shape, bias, approximate):
    hold_gelu(drawn(shape, shape[-1:] if bias else None, dtype=dtype, device="cuda"), approximate, dtype)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_tails_of_gelu(approximate):
    x = torch.tensor([[-60.0, -12.0, -5.0, 0.0, 5.0, 12.0, 60.0]], device="cuda", requires_grad=True)
    hold_gelu([x, None], approximate, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv", "width"), [(0, 2, 1, 8), (1, 1, 1, 2), (90, 3, 1, 20), (300, 14, 2, 64), (70, 8, 8, 128)]
)
def test_small_rotary(dtype, tokens, heads, kv, width):
    hold_rotary(tokens, heads, kv, width, dtype, device="cuda")


def test_small_rotary_reads_slices_of_a_packed_tensor():
    packed, (cos, sin) = torch.randn(90, 3, 6, 64, device="cuda").bfloat16(), angles(90, 64, device="cuda")
    q, k, _ = packed.unbind(1)
    for mine, right in zip(rotary(q, k, cos, sin), rotary(q.clone(), k.clone(), cos, sin), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 100, 384])
@pytest.mark.parametrize("lengths", ["one", "ragged", "long and short"])
def test_small_embed_norm(dtype, width, lengths, types):
    hold_embed(BATCHES[lengths], width, dtype, types=types, device="cuda")


def test_small_embed_norm_reads_no_row_that_is_not_there(monkeypatch):
    hold_unchecked(monkeypatch, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_that_fill_the_gpu(dtype):
    tokens = sum(BATCHES["many"])
    for kind in NORMS:
        hold_norm(norm_arguments((tokens, 384), dtype, device="cuda"), kind, dtype)
    hold_gelu(drawn((tokens, 1536), (1536,), dtype=dtype, device="cuda"), "none", dtype)
    hold_rotary(tokens, 12, 12, 64, dtype, device="cuda")
    hold_embed(BATCHES["many"], 384, dtype, device="cuda")


def test_rows_beyond_two_to_the_31_entries():
    # 64-bit addresses: the last rows lie past what 32 bits reach.
    near = torch.randn(9, 512, device="cuda", dtype=torch.float16)
    memory = torch.zeros((1 << 31) + near[0].numel(), device="cuda", dtype=torch.float16)
    far = memory.as_strided(near.shape, (1 << 28, 1)).copy_(near)
    weight = torch.randn(512, device="cuda", dtype=torch.float16)
    assert torch.equal(add_norm(far, far, weight, None, eps=1e-5), add_norm(near, near, weight, None, eps=1e-5))
    assert torch.equal(bias_gelu(far, weight), bias_gelu(near, weight))
    turned = angles(9, 64, device="cuda")
    spread, close = (x.unflatten(1, (8, 64)) for x in (far, near))
    for mine, right in zip(rotary(spread, spread, *turned), rotary(close, close, *turned), strict=True):
        assert torch.equal(mine, right)


def layer(ids, cu, tables, weight, bias, turned):
    """All four operations, as an encoder joins them."""
    x = embed_norm(ids, cu, *tables, weight, bias, eps=1e-5)
    q, k = rotary(x.unflatten(1, (6, 64)), x.unflatten(1, (6, 64)), *turned)
    x, total = add_norm_sum(bias_gelu(x, bias), q.flatten(1), weight, None, eps=1e-5, kind="rms")
    return add_norm(x, total, weight, bias, eps=1e-5) + k.flatten(1)


def layer_arguments(lengths):
    ids, cu, (*tables, weight, bias), _ = embed_arguments(lengths, 384, positions=max(lengths))
    turned = angles(len(ids), 64, device="cuda")
    return ids.cuda(), cu.cuda(), on_gpu(tables), *on_gpu([weight, bias]), turned


def test_the_same_bits_every_time():
    arguments = layer_arguments(BATCHES["many"])
    _, _, tables, weight, bias, _ = arguments
    runs = []
    for _ in range(3):
        out = layer(*arguments)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [*tables, weight, bias])))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_under_graph_capture():
    # One graph for a bucket of 1000 tokens, replayed with other ids and lengths than those it was captured with.
    lengths = BATCHES["long and short"]
    arguments = layer_arguments([*lengths, 1000 - sum(lengths)])
    ids, cu, *_ = arguments
    with torch.no_grad():
        layer(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(*arguments)
        ids.copy_(torch.randint(WORDS, (1000,)))
        cu.copy_(bounds([300, 20, 0, 0, 100, 7, 7, 7, 500, 59]))
        graph.replay()
        assert torch.equal(captured, layer(*arguments))


def test_backward_under_graph_capture():
    x, residual, weight, bias = norm_arguments((300, 384), torch.bfloat16, device="cuda")
    turned = angles(300, 64, device="cuda")

    def step():
        y, total = add_norm_sum(bias_gelu(x, bias), residual, weight, bias, eps=1e-5)
        q, k = rotary(y.unflatten(1, (6, 64)), total.unflatten(1, (6, 64)), *turned)
        return torch.autograd.grad((q * k).sum(), (x, residual, weight, bias))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def test_compiled_equals_eager():
    arguments = layer_arguments([12, 0, 300])
    leaves = [*arguments[2], *arguments[3:5]]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arguments), layer(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)]
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-4)


def test_float64_falls_back(monkeypatch):
    monkeypatch.delenv("LEAFKERN_BACKEND")
    arguments = norm_arguments((9, 8), torch.float64, device="cuda")
    found, expected = add_norm(*arguments, eps=1e-5), brute_add_norm(*exactly(arguments), 1e-5, "layer")[0]
    assert relative(found, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_serves_cuda_too(monkeypatch, dtype):
    monkeypatch.setenv("LEAFKERN_BACKEND", "reference")
    for kind in NORMS:
        hold_norm(norm_arguments((40, 24), dtype, device="cuda"), kind, dtype)
    hold_gelu(drawn((40, 24), (24,), dtype=dtype, device="cuda"), "tanh", dtype)
    hold_rotary(40, 4, 2, 8, dtype, device="cuda")
    hold_embed(BATCHES["ragged"], 24, dtype, device="cuda")
