"""The Triton kernels on a GPU, bfloat16 included, against their definitions in float64.

Tests named `small` are also run under compute-sanitizer (bench/gpu.sh, stage "sanitizer").
"""

import pytest
import torch
from compare import BATCHES, bounds, relative
from tolerances import TOLERANCE

from leafkern.ops import mean_pool, norm_mean_pool
from leafkern.ops._core.norm import NORMS
from leafkern.ops.pooling import autograd
from leafkern.ops.pooling.reference import brute_mean_pool, brute_norm_mean_pool

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = BATCHES | {"alone": [20_000]}


def hold(arguments, cu, run, definition, dtype):
    """Value and gradients of `run` on the GPU against those of `definition` in float64 on the CPU."""
    exact = [None if a is None else a.detach().cpu().double().requires_grad_() for a in arguments]
    found, expected = run(*arguments, cu.cuda()), definition(*exact, cu)
    assert found.dtype == torch.float32
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights.cuda()).sum().backward()
    (expected * weights).sum().backward()
    for mine, right in zip(arguments, exact, strict=True):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype
            assert relative(mine.grad, right.grad) <= 2 * TOLERANCE[dtype]


def hold_mean(lengths, width, dtype):
    x = torch.randn(sum(lengths), width, device="cuda", dtype=dtype, requires_grad=True)
    hold([x], bounds(lengths), mean_pool, lambda x, cu: brute_mean_pool(x, cu, False), dtype)


def hold_norm(lengths, width, dtype, kind, *, residual=True, bias=True, normalize=False):
    tokens = (sum(lengths), width)
    shapes = [tokens, tokens if residual else None, (width,), (width,) if bias else None]
    arguments = [None if s is None else torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]

    def run(*given):
        return norm_mean_pool(*given, eps=1e-5, kind=kind, normalize=normalize)

    hold(arguments, bounds(lengths), run, lambda *given: brute_norm_mean_pool(*given, 1e-5, kind, normalize), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 100, 384])
@pytest.mark.parametrize("lengths", ["one", "ragged", "long and short"])
def test_small_mean_pool(dtype, width, lengths):
    hold_mean(LENGTHS[lengths], width, dtype)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 100, 384])
@pytest.mark.parametrize("lengths", ["one", "ragged", "long and short"])
def test_small_norm_mean_pool(dtype, width, lengths, kind):
    hold_norm(LENGTHS[lengths], width, dtype, kind)


@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_without_residual_or_bias(dtype, residual, bias):
    hold_norm([7, 0, 40], 48, dtype, "layer", residual=residual, bias=bias, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 1100])
@pytest.mark.parametrize("lengths", ["alone", "many"])
def test_batches_that_fill_the_gpu(dtype, width, lengths):
    hold_mean(LENGTHS[lengths], width, dtype)
    for kind in NORMS:
        hold_norm(LENGTHS[lengths], width, dtype, kind)


@pytest.mark.parametrize("width", [768, 1024, 2048, 4096, autograd.WIDEST_NORM])
def test_widths(width):
    hold_norm([9, 0, 300], width, torch.bfloat16, "layer")
    hold_norm([9, 0, 300], width, torch.float32, "rms")


def test_rows_beyond_two_to_the_31_entries():
    # 64-bit addresses: the last token's row lies past what 32 bits reach.
    tokens, width = (1 << 31) // 512 + 4096, 512
    x = torch.zeros(tokens, width, device="cuda", dtype=torch.float16)
    x[-3:] = 1
    cu = torch.tensor([0, tokens - 3, tokens], dtype=torch.int32, device="cuda")
    assert torch.equal(mean_pool(x, cu).cpu(), torch.tensor([[0.0], [1.0]]).expand(2, width))


def test_the_same_bits_every_time():
    lengths = LENGTHS["many"]
    x = torch.randn(sum(lengths), 384, device="cuda", requires_grad=True)
    weight, cu = torch.randn(384, device="cuda", requires_grad=True), bounds(lengths).cuda()
    runs = []
    for _ in range(3):
        pooled = norm_mean_pool(x, None, weight, None, cu, eps=1e-5)
        runs.append((pooled, *torch.autograd.grad(pooled.square().sum(), (x, weight))))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_under_graph_capture():
    lengths = LENGTHS["long and short"]
    x, cu = torch.randn(sum(lengths), 384, device="cuda"), bounds(lengths).cuda()
    expected = mean_pool(x, cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mean_pool(x, cu)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)


def test_compiled_equals_eager():
    cu = bounds([12, 0, 300]).cuda()
    x = torch.randn(312, 384, device="cuda", requires_grad=True)
    weight = torch.randn(384, device="cuda", requires_grad=True)

    def pooled(x, weight):
        return norm_mean_pool(x, x, weight, None, cu, eps=1e-5)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, weight), pooled(x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weights).sum(), (x, weight)) for y in (found, expected)]
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_float64_falls_back(monkeypatch):
    monkeypatch.delenv("LEAFKERN_BACKEND")
    x, cu = torch.randn(9, 8, device="cuda", dtype=torch.float64), bounds([4, 5]).cuda()
    assert relative(mean_pool(x, cu), brute_mean_pool(x, cu, False)) <= TOLERANCE[torch.float64]
