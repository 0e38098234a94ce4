"""The attention kernels on a GPU, bfloat16 included, against their definition in float64 and torch's own attention.

Tests named `small` are also run under compute-sanitizer (bench/gpu.sh, stage "sanitizer").
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from compare import matmul_setting
from tolerances import TF32, TOLERANCE

pytest.importorskip("triton")

from leafkern.ops import attention_mean_pool, varlen_attention
from leafkern.ops.attention import flash, kernels, reference, sdpa, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

needs_flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn, an optional package")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = {
    "one": [1],
    "short": [3, 0, 1, 17, 1, 30],
    "ragged": [0, 130, 4, 4, 0, 65, 1, 70, 0],
    "long": [700, 0, 300],
    "many": [5, 0, 70, 1, 33, 128, 300] * 60,
}
HEADS = {32: (12, 12), 64: (14, 2), 128: (8, 2)}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def make(tokens, heads, width, dtype):
    """Leaves q (T, H, D), k and v (T, H_kv, D)."""
    shapes = [(tokens, n, width) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def truth(qkv, cu, grad, scale, left, right):
    """Result and gradients in float64, by the blocked reference, which its own tests hold to the definition."""
    q, k, v = (x.detach().double() for x in qkv)
    out, lse = reference.blocked_attention(q, k, v, cu, scale, left, right)
    return out, *reference.blocked_attention_backward(grad.double(), q, k, v, out, lse, cu, scale, left, right)


def pool_truth(qkv, cu, grad, scale):
    q, k, v = (x.detach().double() for x in qkv)
    pooled, lse = reference.blocked_attention_mean_pool(q, k, v, cu, scale)
    return pooled, *reference.blocked_attention_mean_pool_backward(grad.double(), q, k, v, lse, cu, scale)


def assert_close(found, expected, tolerance):
    # Terms of dq and dk cancel, for a single token entirely: dv tells the size of the terms.
    size = expected[3].norm()
    for place, (mine, right) in enumerate(zip(found, expected, strict=True)):
        bound = tolerance * (right.norm() if place == 0 else 2 * torch.maximum(size, right.norm()))
        assert (mine.double() - right).norm() <= bound, place


def hold_attention(lengths, heads, width, dtype, *, causal=False, window=(-1, -1), tolerance=None):
    cu, qkv = bounds(lengths), make(sum(lengths), heads, width, dtype)
    out = varlen_attention(*qkv, cu, max(lengths), causal=causal, window=window)
    grad = torch.randn_like(out)
    right = 0 if causal else window[1]
    expected = truth(qkv, cu, grad, width**-0.5, window[0], right)
    assert_close((out, *torch.autograd.grad(out, qkv, grad)), expected, tolerance or TOLERANCE[dtype])


def hold_pool(lengths, heads, width, dtype):
    cu, qkv = bounds(lengths), make(sum(lengths), heads, width, dtype)
    pooled = attention_mean_pool(*qkv, cu, max(lengths))
    grad = torch.randn_like(pooled)
    expected = pool_truth(qkv, cu, grad, width**-0.5)
    assert_close((pooled, *torch.autograd.grad(pooled, qkv, grad)), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 32, 40, 64, 128])
@pytest.mark.parametrize("lengths", ["one", "short", "ragged"])
def test_small_attention(lengths, width, dtype):
    hold_attention(LENGTHS[lengths], (4, 2), width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 32, 40, 64, 128])
@pytest.mark.parametrize("lengths", ["one", "short", "ragged"])
def test_small_mean_pool(lengths, width, dtype):
    hold_pool(LENGTHS[lengths], (4, 2), width, dtype)


@pytest.mark.parametrize("window", [(-1, -1), (0, 3), (20, -1), (-1, 5), (64, 64)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.bfloat16, 32), (torch.bfloat16, 64)])
def test_small_windows(dtype, width, causal, window):
    hold_attention(LENGTHS["ragged"], (2, 1), width, dtype, causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", HEADS)
@pytest.mark.parametrize("lengths", ["long", "many"])
def test_batches_that_fill_the_gpu(lengths, width, dtype):
    hold_attention(LENGTHS[lengths], HEADS[width], width, dtype)
    hold_attention(LENGTHS[lengths], HEADS[width], width, dtype, causal=True)
    hold_pool(LENGTHS[lengths], HEADS[width], width, dtype)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 5)])
@pytest.mark.parametrize("lengths", ["one", "ragged", "long"])
@pytest.mark.parametrize("width", [32, 96, 128, 192])
@pytest.mark.parametrize("backend", [pytest.param(flash, marks=needs_flash, id="flash"), pytest.param(sdpa, id="sdpa")])
def test_kernels_of_others(monkeypatch, backend, width, lengths, window):
    assert backend.missing() is None
    monkeypatch.setenv("LEAFKERN_BACKEND", f"attention={backend.__name__.rpartition('.')[2]}")
    for dtype in (torch.float16, torch.bfloat16):
        hold_attention(LENGTHS[lengths], (4, 2), width, dtype, window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", HEADS)
def test_error_is_at_most_twice_that_of_torch(width, dtype):
    lengths = [512] * 4
    cu, qkv = bounds(lengths), make(sum(lengths), (4, 4), width, dtype)
    grad = torch.randn(sum(lengths), 4, width, device="cuda", dtype=dtype)
    expected = truth(qkv, cu, grad, width**-0.5, -1, -1)
    ours = varlen_attention(*qkv, cu, 512)
    padded = [x.unflatten(0, (4, 512)).transpose(1, 2) for x in qkv]
    torchs = F.scaled_dot_product_attention(*padded).transpose(1, 2).flatten(0, 1)
    ours, torchs = ((out, *torch.autograd.grad(out, qkv, grad)) for out in (ours, torchs))
    for mine, theirs, right in zip(ours, torchs, expected, strict=True):
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("share", [2, 4])
def test_small_polynomial_exponentials(monkeypatch, share, width, dtype):
    configure = kernels.configure
    monkeypatch.setattr(kernels, "configure", lambda *shape: replace(configure(*shape), share=share))
    for lengths in ("short", "ragged"):
        hold_attention(LENGTHS[lengths], (4, 2), width, dtype)
        hold_attention(LENGTHS[lengths], (4, 2), width, dtype, window=(20, 5))
        hold_pool(LENGTHS[lengths], (4, 2), width, dtype)


@pytest.mark.parametrize("width", [32, 128])
def test_autotuned(monkeypatch, width):
    monkeypatch.setenv("LEAFKERN_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_found", {})
    lengths, dtype = LENGTHS["many"], torch.bfloat16
    hold_attention(lengths, HEADS[width], width, dtype)
    hold_pool(lengths, HEADS[width], width, dtype)
    assert {key[0] for key in tuning._found} == set(kernels.KERNELS)
    # What was found serves while a graph is captured, where nothing can be timed.
    qkv, cu = make(sum(lengths), HEADS[width], width, dtype), bounds(lengths)
    with torch.no_grad():
        expected, graph = varlen_attention(*qkv, cu, max(lengths)), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = varlen_attention(*qkv, cu, max(lengths))
        graph.replay()
    assert torch.equal(captured, expected)


def test_tf32_where_torch_allows_it():
    with matmul_setting("fp32_precision", "tf32"):
        hold_attention(LENGTHS["ragged"], (4, 2), 64, torch.float32, tolerance=TF32)


def test_views_of_a_packed_tensor():
    cu, packed = bounds([300, 0, 70]), torch.randn(370, 3, 12, 32, device="cuda", dtype=torch.bfloat16)
    views, dense = packed.unbind(1), [x.contiguous() for x in packed.unbind(1)]
    assert torch.equal(varlen_attention(*views, cu, 300), varlen_attention(*dense, cu, 300))


def test_nan_stays_in_its_sequence():
    cu, others = bounds([17, 90, 2]), [*range(17), 107, 108]
    for place in range(3):
        clean = [x.detach() for x in make(109, (2, 2), 32, torch.bfloat16)]
        dirty = [x.clone() for x in clean]
        dirty[place][106, 1, 2] = torch.nan
        clean, dirty = ([x.requires_grad_() for x in qkv] for qkv in (clean, dirty))
        for function, kept in ((varlen_attention, others), (attention_mean_pool, [0, 2])):
            found, right = (function(*qkv, cu, 90) for qkv in (dirty, clean))
            assert torch.equal(found[kept], right[kept])
            assert found.isnan().any()
            grad = torch.randn_like(found)
            grads = (torch.autograd.grad(out, qkv, grad) for out, qkv in ((found, dirty), (right, clean)))
            for mine, good in zip(*grads, strict=True):
                assert torch.equal(mine[others], good[others])


def test_the_same_bits_every_time():
    lengths = LENGTHS["many"]
    cu, qkv = bounds(lengths), make(sum(lengths), (12, 12), 32, torch.bfloat16)
    for function in (varlen_attention, attention_mean_pool):
        runs = []
        for _ in range(3):
            out = function(*qkv, cu, max(lengths))
            runs.append((out, *torch.autograd.grad(out.float().square().sum(), qkv)))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_under_graph_capture():
    lengths = LENGTHS["many"]
    cu, qkv = bounds(lengths), make(sum(lengths), (12, 12), 32, torch.bfloat16)
    with torch.no_grad():
        for function in (varlen_attention, attention_mean_pool):
            expected = function(*qkv, cu, max(lengths))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = function(*qkv, cu, max(lengths))
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, expected)


def test_inputs_beyond_two_to_the_31_entries():
    # 64-bit addresses: rows so far apart that the last lies past what 32 bits reach.
    near = torch.randn(9, 4, 128, device="cuda", dtype=torch.float16)
    memory = torch.zeros((1 << 31) + near[0].numel(), device="cuda", dtype=torch.float16)
    far = memory.as_strided(near.shape, (1 << 28, 128, 1)).copy_(near)
    cu = bounds([3, 6])
    assert torch.equal(varlen_attention(far, far, far, cu, 6), varlen_attention(near, near, near, cu, 6))


def test_results_beyond_two_to_the_31_entries():
    # All tokens are one and the same in memory; equal values average to themselves.
    tokens, heads, width = (1 << 31) // 4096 + 1024, 32, 128
    one = torch.randn(heads, width, device="cuda", dtype=torch.float16)
    x = one.expand(tokens, heads, width)
    out = varlen_attention(x, x, x, bounds([*[512] * (tokens // 512), tokens % 512]), 512)
    torch.testing.assert_close(out[-8:], x[-8:], rtol=2e-3, atol=2e-3)


def test_compiled_equals_eager():
    cu, qkv = bounds([12, 0, 300]), make(312, (12, 12), 32, torch.bfloat16)

    def both(q, k, v):
        return varlen_attention(q, k, v, cu, 300), attention_mean_pool(q, k, v, cu, 300)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*qkv), both(*qkv)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads = (torch.autograd.grad(sum(x.float().square().sum() for x in out), qkv) for out in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
