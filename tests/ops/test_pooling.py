"""mean_pool and norm_mean_pool against their definitions, their gradients, edge cases, and torch.compile."""

import subprocess
import sys

import pytest
import torch
from compare import bounds, relative
from tolerances import TOLERANCE

from leafkern.errors import BackendError, InputError
from leafkern.ops import mean_pool, norm_mean_pool
from leafkern.ops._core.norm import NORMS
from leafkern.ops.pooling import autograd
from leafkern.ops.pooling.reference import brute_mean_pool, brute_norm_mean_pool

RAGGED = [[1], [5], [0], [3, 0, 1, 17, 1], [0, 0, 4], [2, 0, 0], [64, 1, 33, 0, 128]]


def norm_arguments(tokens, width, dtype, *, residual=True, bias=True):
    shapes = [(tokens, width), (tokens, width) if residual else None, (width,), (width,) if bias else None]
    return [None if shape is None else torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mean_pool_equals_definition(dtype, lengths, normalize):
    x, cu = torch.randn(sum(lengths), 19, dtype=dtype, requires_grad=True), bounds(lengths)
    exact = x.detach().double().requires_grad_()
    found, expected = mean_pool(x, cu, normalize=normalize), brute_mean_pool(exact, cu, normalize)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (len(lengths), 19)
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert x.grad.dtype == dtype
    assert relative(x.grad, exact.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_mean_pool_equals_definition(dtype, lengths, normalize, kind):
    arguments, cu = norm_arguments(sum(lengths), 24, dtype), bounds(lengths)
    exact = [a.detach().double().requires_grad_() for a in arguments]
    found = norm_mean_pool(*arguments, cu, eps=1e-5, kind=kind, normalize=normalize)
    expected = brute_norm_mean_pool(*exact, cu, 1e-5, kind, normalize)
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, exactly in zip(arguments, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert relative(mine.grad, exactly.grad) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", NORMS)
def test_norm_mean_pool_without_residual_or_bias(kind, residual, bias):
    arguments, cu = norm_arguments(9, 8, torch.float64, residual=residual, bias=bias), bounds([4, 5])
    found = norm_mean_pool(*arguments, cu, eps=1e-6, kind=kind)
    torch.testing.assert_close(found, brute_norm_mean_pool(*arguments, cu, 1e-6, kind, True))


def test_blocks_do_not_show(monkeypatch):
    arguments, cu = norm_arguments(37, 8, torch.float64), bounds([0, 20, 1, 0, 16])
    whole = norm_mean_pool(*arguments, cu, eps=1e-6)
    monkeypatch.setattr(autograd, "_BLOCK", {"cpu": 5})
    torch.testing.assert_close(norm_mean_pool(*arguments, cu, eps=1e-6), whole)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    cu = bounds([2, 0, 1, 4])
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_pool(x, cu, normalize=normalize), x)
    for kind in NORMS:
        arguments = norm_arguments(7, 4, torch.float64)
        assert torch.autograd.gradcheck(
            lambda *a, kind=kind: norm_mean_pool(*a, cu, eps=1e-3, kind=kind, normalize=normalize), arguments
        )


def test_no_sequences():
    x = torch.zeros(0, 5, requires_grad=True)
    pooled = mean_pool(x, bounds([]), normalize=True)
    pooled.sum().backward()
    assert pooled.shape == (0, 5)
    assert norm_mean_pool(x, x, torch.ones(5), torch.zeros(5), bounds([]), eps=1e-5).shape == (0, 5)


def test_zero_rows_normalise_to_zero_with_zero_gradient():
    x = torch.zeros(4, 6, requires_grad=True)
    pooled = mean_pool(x, bounds([3, 0, 1]), normalize=True)
    pooled.backward(torch.randn(3, 6))
    assert (pooled == 0).all()
    assert (x.grad == 0).all()


def test_nan_stays_in_its_sequence():
    x = torch.randn(6, 4)
    x[4, 2] = torch.nan
    pooled = mean_pool(x, bounds([3, 3]), normalize=True)
    assert torch.isfinite(pooled[0]).all()
    assert pooled[1].isnan().all()


def test_half_precision_is_summed_in_float32():
    x = torch.full((5000, 3), 0.1, dtype=torch.bfloat16)
    torch.testing.assert_close(mean_pool(x, bounds([5000])), x[:1].float())


def test_triton_is_not_for_cpu_tensors(monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"pooling=triton.* only under TRITON_INTERPRET=1"):
        mean_pool(torch.randn(3, 2), bounds([3]))


def test_the_reference_serves_the_cpu_unasked(recwarn):
    mean_pool(torch.randn(3, 2), bounds([3]))
    assert not recwarn.list
    # In a process of its own: other tests import the kernels.
    code = """
import sys, torch
from leafkern.ops import mean_pool
mean_pool(torch.randn(3, 2), torch.tensor([0, 3]))
sys.exit("leafkern.ops.pooling.kernels" in sys.modules or "triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_non_contiguous_input():
    x = torch.randn(6, 10)
    torch.testing.assert_close(mean_pool(x.T, bounds([4, 6])), mean_pool(x.T.contiguous(), bounds([4, 6])))


@pytest.mark.parametrize(
    ("x", "cu", "message"),
    [
        (torch.zeros(3), bounds([3]), "x: expected 2 dimensions"),
        (torch.zeros(3, 2, dtype=torch.int64), bounds([3]), "x: expected a floating-point"),
        (torch.zeros(3, 2), bounds([4]), "from 0 to T = 3; got 0 to 4"),
        (torch.zeros(3, 2), torch.tensor([0, 4, 3], dtype=torch.int32), "never fall"),
        (torch.zeros(3, 2), torch.tensor([0.0, 3.0]), "cu_seqlens: expected dtype"),
        (torch.zeros(3, 2), torch.zeros(0, dtype=torch.int32), "B\\+1 entries"),
    ],
)
def test_wrong_arguments(x, cu, message):
    with pytest.raises(InputError, match=message):
        mean_pool(x, cu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(4, 3)}, "residual: shape"),
        ({"weight": torch.zeros(3)}, "weight: 3 entries; expected D = 2"),
        ({"weight": None}, "weight: expected a torch.Tensor"),
        ({"bias": torch.zeros(1)}, "bias: 1 entries"),
        ({"kind": "batch"}, "kind: unknown name 'batch'"),
        ({"eps": -1.0}, "eps: -1.0"),
    ],
)
def test_wrong_norm_arguments(change, message):
    arguments = {
        "x": torch.zeros(4, 2),
        "residual": torch.zeros(4, 2),
        "weight": torch.ones(2),
        "bias": torch.zeros(2),
        "cu_seqlens": bounds([4]),
        "eps": 1e-5,
    }
    with pytest.raises(InputError, match=message):
        norm_mean_pool(**(arguments | change))


def test_opcheck():
    x, cu = torch.randn(7, 6, requires_grad=True), bounds([2, 0, 5])
    torch.library.opcheck(torch.ops.leafkern.mean_pool.default, (x, cu))
    for layer, residual in ((True, True), (False, False)):
        arguments = norm_arguments(7, 6, torch.float32, residual=residual, bias=residual)
        torch.library.opcheck(torch.ops.leafkern.norm_mean_pool.default, (*arguments, cu, 1e-5, layer))
        x, other, weight, _ = (None if a is None else a.detach() for a in arguments)
        grad = torch.randn(3, 6)
        torch.library.opcheck(
            torch.ops.leafkern.norm_mean_pool_backward.default, (grad, x, other, weight, cu, 1e-5, layer)
        )
    torch.library.opcheck(torch.ops.leafkern.mean_pool_backward.default, (grad, cu, 7, torch.bfloat16))


def test_compiled_equals_eager():
    cu = bounds([2, 0, 5])
    arguments = norm_arguments(7, 6, torch.float32)

    def both(x, residual, weight, bias):
        return mean_pool(x, cu, normalize=True), norm_mean_pool(x, residual, weight, bias, cu, eps=1e-5)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arguments), both(*arguments)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads = (torch.autograd.grad(sum(x.square().sum() for x in out), arguments) for out in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
