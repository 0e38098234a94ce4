"""The Triton kernels of pooling, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from compare import bounds, relative, served_by_another
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

pytest.importorskip("triton")

from leafkern.ops import mean_pool, norm_mean_pool
from leafkern.ops._core import backend, launch
from leafkern.ops._core.norm import NORMS
from leafkern.ops.pooling import autograd
from leafkern.ops.pooling.reference import brute_mean_pool, brute_norm_mean_pool

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16]
RAGGED = [[1], [0], [3, 0, 1, 17, 1], [0, 0, 4], [2, 0, 0], [40, 1, 21, 0, 35]]
# One program for all tokens; several that split sequences, or hold several, or lie inside one.
SHARES = [10_000, 8, 24]


@pytest.fixture(params=SHARES)
def share(request, monkeypatch):
    """Tokens per program."""
    from leafkern.ops.pooling import kernels

    monkeypatch.setattr(
        kernels, "shares", lambda x, tokens, blocks, config: (request.param, -(-tokens // request.param))
    )
    return request.param


def norm_arguments(tokens, width, dtype, *, residual=True, bias=True):
    shapes = [(tokens, width), (tokens, width) if residual else None, (width,), (width,) if bias else None]
    return [None if shape is None else torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def exactly(arguments):
    return [None if a is None else a.detach().double().requires_grad_() for a in arguments]


def hold(found, expected, arguments, exact, dtype):
    """Values and gradients against the float64 definition, with a random gradient of the result."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert relative(found, expected) <= TOLERANCE[dtype]
    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, right in zip(arguments, exact, strict=True):
        if mine is not None:
            assert mine.grad.dtype == mine.dtype
            assert relative(mine.grad, right.grad) <= 2 * TOLERANCE[dtype]


def hold_norm(arguments, cu, kind, dtype, eps=1e-5, normalize=False):
    exact = exactly(arguments)
    found = norm_mean_pool(*arguments, cu, eps=eps, kind=kind, normalize=normalize)
    hold(found, brute_norm_mean_pool(*exact, cu, eps, kind, normalize), arguments, exact, dtype)


def test_triton_serves():
    candidates = launch.candidates("pooling", torch.device("cpu"), torch.float16)
    assert backend.choose("pooling", candidates) == "triton"


@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_pool_equals_definition(dtype, lengths, share):
    x, cu = torch.randn(sum(lengths), 19, dtype=dtype, requires_grad=True), bounds(lengths)
    (exact,) = exactly([x])
    hold(mean_pool(x, cu), brute_mean_pool(exact, cu, False), [x], [exact], dtype)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_mean_pool_equals_definition(dtype, lengths, kind, share):
    hold_norm(norm_arguments(sum(lengths), 24, dtype), bounds(lengths), kind, dtype)


@pytest.mark.parametrize("width", [1, 2, 16, 100, 129])
def test_widths(width):
    lengths = [7, 0, 30, 2]
    cu = bounds(lengths)
    for kind in NORMS:
        # One entry is its own mean: with "layer" its norm is 0 and so is the definition of a relative error.
        if (width, kind) != (1, "layer"):
            hold_norm(norm_arguments(sum(lengths), width, torch.float32), cu, kind, torch.float32, eps=1e-2)
    x = torch.randn(sum(lengths), width, requires_grad=True)
    (exact,) = exactly([x])
    hold(mean_pool(x, cu), brute_mean_pool(exact, cu, False), [x], [exact], torch.float32)


def test_widths_beyond_one_block():
    x, cu = torch.randn(20, 1100, requires_grad=True), bounds([3, 0, 17])
    (exact,) = exactly([x])
    hold(mean_pool(x, cu), brute_mean_pool(exact, cu, False), [x], [exact], torch.float32)
    hold_norm(norm_arguments(20, 1100, torch.float32), cu, "layer", torch.float32)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("residual", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", NORMS)
def test_without_residual_or_bias(kind, residual, bias, normalize):
    arguments = norm_arguments(26, 12, torch.float32, residual=residual, bias=bias)
    hold_norm(arguments, bounds([20, 0, 6]), kind, torch.float32, normalize=normalize)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_epsilon():
    # Rows beyond the end of a sequence have no deviation to divide by; they must not reach the sum.
    hold_norm(norm_arguments(13, 24, torch.float32), bounds([5, 0, 8]), "layer", torch.float32, eps=0.0)


def test_mixed_dtypes():
    x, residual, weight, bias = norm_arguments(21, 24, torch.float16)
    residual = residual.detach().float().requires_grad_()
    hold_norm([x, residual, weight, bias.detach().float().requires_grad_()], bounds([20, 1]), "layer", torch.float16)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    width=st.integers(2, 40),
    kind=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(lengths, width, kind, dtype):
    hold_norm(norm_arguments(sum(lengths), width, dtype), bounds(lengths), kind, dtype, eps=1e-2)


@pytest.mark.parametrize("tokens", [1, 17, 100, 5_000, 1_000_000])
@pytest.mark.parametrize("width", [24, 384, 1100, 5000])
def test_shares_cover_every_token_once_and_run_at_once(monkeypatch, tokens, width):
    from leafkern.ops.pooling import kernels

    monkeypatch.setattr(launch, "multiprocessors", lambda x: 132)
    for norm in (False, True):
        for backward in (False, True):
            config = kernels.configure(width, norm, backward)
            blocks = -(-width // config.columns)
            assert config.columns >= width or not norm
            chunk, programs = kernels.shares(torch.zeros(1), tokens, blocks, config)
            assert (programs - 1) * chunk < tokens <= programs * chunk
            assert chunk % config.rows == 0
            assert programs * blocks <= 132 * config.programs


def test_more_sequences_than_one_step_of_the_search(monkeypatch):
    from leafkern.ops.pooling import kernels

    lengths = [3, 0, 1, 0, 2] * 12
    x, cu = torch.randn(sum(lengths), 3), bounds(lengths)
    # 60 sequences, 4 per step: three steps, the last ones ragged. Only programs after the first have to search.
    monkeypatch.setattr(kernels, "FAN", 4)
    monkeypatch.setattr(kernels, "shares", lambda x, tokens, blocks, config: (5, -(-tokens // 5)))
    torch.testing.assert_close(mean_pool(x, cu), brute_mean_pool(x, cu, False))


def test_only_empty_sequences():
    x = torch.zeros(0, 5, requires_grad=True)
    pooled = mean_pool(x, bounds([0, 0]))
    pooled.sum().backward()
    assert torch.equal(pooled, torch.zeros(2, 5))
    assert x.grad.shape == (0, 5)
    arguments = norm_arguments(0, 5, torch.float32)
    pooled = norm_mean_pool(*arguments, bounds([0]), eps=1e-5)
    pooled.sum().backward()
    assert torch.equal(pooled, torch.zeros(1, 5))
    assert torch.equal(arguments[2].grad, torch.zeros(5))
    assert mean_pool(x, bounds([])).shape == (0, 5)


def test_nan_stays_in_its_sequence(share):
    x = torch.randn(40, 4)
    x[30, 2] = torch.nan
    pooled = norm_mean_pool(x, None, torch.ones(4), None, bounds([3, 20, 17]), eps=1e-5, normalize=False)
    assert torch.isfinite(pooled[:2]).all()
    assert pooled[2].isnan().all()


def test_half_precision_is_summed_in_float32(share):
    x = torch.full((500, 3), 0.1, dtype=torch.float16)
    torch.testing.assert_close(mean_pool(x, bounds([500])), x[:1].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["rows apart", "columns apart"])
def test_views_of_wider_tensors(layout):
    wide = torch.randn(2, 30, 48)
    views = [w[:, 5:29] if layout == "rows apart" else w[:, ::2] for w in wide]
    arguments = [views[0].detach().requires_grad_(), views[1].detach().requires_grad_()]
    weight, bias, cu = torch.randn(48)[::2].requires_grad_(), torch.randn(24).requires_grad_(), bounds([0, 11, 19])
    weight = weight.detach().requires_grad_()
    assert not arguments[0].is_contiguous()
    hold_norm([*arguments, weight, bias], cu, "layer", torch.float32)
    (exact,) = exactly(arguments[:1])
    arguments[0].grad = None
    hold(mean_pool(arguments[0], cu), brute_mean_pool(exact, cu, False), arguments[:1], [exact], torch.float32)


def test_an_expanded_gradient():
    x, cu = torch.randn(6, 4, requires_grad=True), bounds([4, 2])
    mean_pool(x, cu).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.25] * 4 + [0.5] * 2)[:, None].expand(6, 4))


def test_int64_bounds():
    x = torch.randn(9, 4)
    torch.testing.assert_close(mean_pool(x, bounds([4, 5]).long()), brute_mean_pool(x, bounds([4, 5]), False))


def test_the_same_bits_every_time(share):
    arguments, cu = norm_arguments(50, 24, torch.float32), bounds([33, 17])
    first, second = (norm_mean_pool(*arguments, cu, eps=1e-5) for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck():
    cu = bounds([2, 0, 5])
    torch.library.opcheck(torch.ops.leafkern.mean_pool.default, (torch.randn(7, 6, requires_grad=True), cu))
    x, residual, weight, bias = norm_arguments(7, 6, torch.float32)
    torch.library.opcheck(torch.ops.leafkern.norm_mean_pool.default, (x, residual, weight, bias, cu, 1e-5, True))
    grad = torch.randn(3, 6)
    torch.library.opcheck(torch.ops.leafkern.mean_pool_backward.default, (grad, cu, 7, torch.float16))
    arguments = [a.detach() for a in (grad, x, residual, weight)]
    torch.library.opcheck(torch.ops.leafkern.norm_mean_pool_backward.default, (*arguments, cu, 1e-5, True))


def test_compiled_equals_eager():
    arguments, cu = norm_arguments(20, 8, torch.float32), bounds([12, 8])

    def pooled(*arguments):
        return norm_mean_pool(*arguments, cu, eps=1e-5)

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arguments), pooled(*arguments)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape)
    grads = [torch.autograd.grad((y * weights).sum(), arguments) for y in (found, expected)]
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.bfloat16, 4, "bfloat16 arithmetic is wrong"),
        (torch.float64, 4, "no kernel for float64"),
        (torch.float32, autograd.WIDEST_NORM + 1, "takes at most"),
    ],
)
def test_what_the_kernel_cannot_serve(monkeypatch, dtype, width, reason):
    arguments, cu = norm_arguments(3, width, dtype), bounds([3])
    found = served_by_another(monkeypatch, lambda: norm_mean_pool(*arguments, cu, eps=1e-5), reason)
    assert relative(found, brute_norm_mean_pool(*exactly(arguments), cu, 1e-5, "layer", True)) <= TOLERANCE[dtype]
    found.sum().backward()


def test_the_widest_norm_that_is_let_in_is_proved():
    from leafkern.ops.pooling import kernels

    assert max(kernels.WIDTHS["fp32"]) == autograd.WIDEST_NORM
