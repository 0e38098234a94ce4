"""varlen_attention and attention_mean_pool against their definitions and torch's own attention, with gradients."""

import itertools
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from compare import bounds, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leafkern.errors import BackendError, InputError
from leafkern.ops import attention_mean_pool, mean_pool, varlen_attention
from leafkern.ops.attention import reference, sdpa
from leafkern.ops.attention.reference import brute_attention, brute_attention_mean_pool

RAGGED = [[1], [5], [0], [], [3, 0, 1, 17, 1], [0, 0, 4], [2, 0, 0], [33, 1, 0, 64]]
HEADS = [(1, 1), (3, 3), (4, 2), (6, 1)]
WINDOWS = [(-1, -1), (0, 0), (2, -1), (-1, 1), (0, 3), (5, 0), (2, 3), (1000, 1000)]
OPS = torch.ops.leafkern


def make(tokens, heads=(4, 2), width=8, dtype=torch.float64):
    """Leaves q (T, H, D), k and v (T, H_kv, D)."""
    return [torch.randn(tokens, n, width, dtype=dtype).requires_grad_() for n in (heads[0], heads[1], heads[1])]


def exactly(qkv):
    return [x.detach().double().requires_grad_() for x in qkv]


def value_and_grads(function, qkv, weights, **options):
    """The result and the gradients of q, k and v for the incoming gradient `weights`."""
    out = function(*qkv)
    return out, *torch.autograd.grad(out, qkv, weights.to(out.dtype), **options)


def attend(cu, **options):
    longest = int(cu.diff().max()) if cu.numel() > 1 else 0
    return lambda q, k, v: varlen_attention(q, k, v, cu, longest, **options)


def pool(cu, **options):
    longest = int(cu.diff().max()) if cu.numel() > 1 else 0
    return lambda q, k, v: attention_mean_pool(q, k, v, cu, longest, **options)


def brute(cu, scale=None, causal=False, window=(-1, -1)):
    return lambda q, k, v: brute_attention(q, k, v, cu, q.shape[2] ** -0.5 if scale is None else scale, causal, window)


def brute_pool(cu, scale=None):
    return lambda q, k, v: brute_attention_mean_pool(q, k, v, cu, q.shape[2] ** -0.5 if scale is None else scale)


def assert_equal_to_definition(function, definition, qkv, result_dtype, tolerance=None):
    dtype = qkv[0].dtype
    tolerance = tolerance or 2 * TOLERANCE[dtype]
    exact = exactly(qkv)
    weights = torch.randn_like(definition(*exact)).to(result_dtype)
    found = value_and_grads(function, qkv, weights)
    # With no sequence at all, the definition uses neither k nor v.
    expected = value_and_grads(definition, exact, weights, materialize_grads=True)
    assert [x.dtype for x in found] == [result_dtype, dtype, dtype, dtype]
    assert relative(found[0], expected[0]) <= tolerance
    # Terms of dq and dk cancel, for a single token entirely: dv tells the size of the terms.
    size = expected[3].norm()
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert mine.is_contiguous()
        assert (mine.double() - right).norm() <= tolerance * torch.maximum(size, right.norm())


@contextmanager
def forced(backend):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAFKERN_BACKEND", f"attention={backend}")
        yield


BACKENDS = ("sdpa", "reference")


def assert_attention_equals_definition(cu, qkv, *, tolerance=None, **options):
    """Each backend of varlen_attention on the CPU."""
    for backend in BACKENDS:
        with forced(backend):
            function, definition = attend(cu, **options), brute(cu, **options)
            assert_equal_to_definition(function, definition, qkv, qkv[0].dtype, tolerance)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_equals_definition(dtype, lengths, heads):
    assert_attention_equals_definition(bounds(lengths), make(sum(lengths), heads, 24, dtype))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_mean_pool_equals_definition(dtype, lengths, heads):
    cu = bounds(lengths)
    assert_equal_to_definition(pool(cu), brute_pool(cu), make(sum(lengths), heads, 24, dtype), wide(dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_equal_definition(window, causal):
    cu = bounds([1, 9, 0, 2, 20])
    for dtype in (torch.float64, torch.bfloat16):
        assert_attention_equals_definition(cu, make(32, dtype=dtype), causal=causal, window=window)


@pytest.mark.parametrize("width", [1, 3, 32, 64, 96, 128, 200])
def test_any_width(width):
    cu = bounds([7, 30])
    for dtype in (torch.float32, torch.float16):
        assert_attention_equals_definition(cu, make(37, width=width, dtype=dtype))
        assert_equal_to_definition(pool(cu), brute_pool(cu), make(37, width=width, dtype=dtype), torch.float32)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1, -2.5])
def test_scale(scale):
    cu = bounds([4, 13])
    assert_attention_equals_definition(cu, make(17), scale=scale)
    assert_equal_to_definition(pool(cu, scale=scale), brute_pool(cu, scale), make(17), torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=5),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    width=st.integers(1, 17),
    window=st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
    causal=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_shape(lengths, group, kv_heads, width, window, causal, dtype):
    cu, heads = bounds(lengths), (group * kv_heads, kv_heads)
    qkv = make(sum(lengths), heads, width, dtype)
    assert_attention_equals_definition(cu, qkv, causal=causal, window=window)
    assert_equal_to_definition(pool(cu), brute_pool(cu), qkv, wide(dtype))


def torch_attention(q, k, v, **options):
    """torch's own on one sequence, (n, H, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[0].transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 16, 77])
def test_equals_torch_on_one_sequence(length, causal):
    qkv, weights = make(length, (6, 2), 16), torch.randn(length, 6, 16, dtype=torch.float64)
    found = value_and_grads(attend(bounds([length]), causal=causal), qkv, weights)
    expected = value_and_grads(lambda q, k, v: torch_attention(q, k, v, is_causal=causal), qkv, weights)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def eager_attention(q, k, v, causal):
    """What plain PyTorch makes of one sequence, every step in the dtype of q."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q * q.shape[2] ** -0.5, k)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_that_of_torch(dtype, causal, spread):
    length = 150
    qkv = [(spread * x.detach()).requires_grad_() for x in make(length, (4, 2), 32, dtype)]
    weights = torch.randn(length, 4, 32).to(dtype)
    exact = value_and_grads(brute(bounds([length]), causal=causal), exactly(qkv), weights)
    found = value_and_grads(attend(bounds([length]), causal=causal), qkv, weights)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = value_and_grads(lambda q, k, v: torch_attention(q, k, v, is_causal=causal), qkv, weights)
    eager = value_and_grads(lambda q, k, v: eager_attention(q, k, v, causal), qkv, weights)
    for mine, right, *peers in zip(found, exact, fused, eager, strict=True):
        for theirs in peers:
            assert relative(mine, right) <= 2 * relative(theirs, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooled_error_is_at_most_twice_that_of_torch(dtype):
    qkv, weights = make(150, (4, 2), 32, dtype), torch.randn(1, 4, 32)
    exact = value_and_grads(brute_pool(bounds([150])), exactly(qkv), weights)
    found = value_and_grads(pool(bounds([150])), qkv, weights)
    peer = value_and_grads(lambda q, k, v: torch_attention(q, k, v).float().mean(0, keepdim=True), qkv, weights)
    for mine, theirs, right in zip(found, peer, exact, strict=True):
        assert relative(mine, right) <= 2 * relative(theirs, right)


def test_pooled_is_the_mean_of_attention():
    cu = bounds([3, 0, 1, 17, 1])
    qkv, weights = make(22), torch.randn(5, 4, 8, dtype=torch.float64)
    found = value_and_grads(pool(cu, scale=0.7), qkv, weights)
    expected = value_and_grads(
        lambda *x: mean_pool(attend(cu, scale=0.7)(*x).flatten(1), cu).view(5, 4, 8), qkv, weights
    )
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    assert (found[0][1] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_own_token_only_gives_its_value(dtype):
    qkv, cu = make(9, dtype=dtype), bounds([4, 0, 5])
    weights = torch.randn(9, 4, 8).to(dtype)
    out, dq, dk, dv = value_and_grads(attend(cu, window=(0, 0)), qkv, weights)
    assert torch.equal(out, qkv[2].repeat_interleave(2, dim=1))
    assert relative(dv, weights.double().unflatten(1, (2, 2)).sum(2)) <= TOLERANCE[dtype]
    tiny = TOLERANCE[dtype] * weights.norm()
    assert dq.norm() <= tiny
    assert dk.norm() <= tiny


def test_window_as_wide_as_the_sequence_is_no_window():
    qkv, cu = make(12), bounds([5, 7])
    whole = attend(cu)(*qkv)
    assert torch.equal(attend(cu, window=(6, 6))(*qkv), whole)
    assert torch.equal(attend(cu, window=(2**62, 2**62))(*qkv), whole)
    assert not torch.equal(attend(cu, window=(5, 6))(*qkv), whole)


def test_causal_is_right_zero_in_addition():
    qkv, cu = make(12), bounds([5, 7])
    for left, right in itertools.product((-1, 0, 2), (-1, 0, 3)):
        found = attend(cu, causal=True, window=(left, right))(*qkv)
        assert torch.equal(found, attend(cu, window=(left, 0))(*qkv))


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_depend_on_its_neighbours(dtype, heads):
    lengths = [3, 0, 17, 17, 0, 17, 1, 40]
    qkv, cu = make(95, heads, dtype=dtype), bounds(lengths)
    for function, rows in ((attend, 95), (pool, 8)):
        weights = torch.randn(rows, heads[0], 8)
        packed = value_and_grads(function(cu), qkv, weights)
        for number, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
            part = slice(start, end) if rows == 95 else slice(number, number + 1)
            own = [x.detach()[start:end].clone().requires_grad_() for x in qkv]
            alone = value_and_grads(function(bounds([end - start])), own, weights[part])
            assert torch.equal(packed[0][part], alone[0])
            for mine, right in zip(packed[1:], alone[1:], strict=True):
                assert torch.equal(mine[start:end], right)


def test_permuted_sequences_give_permuted_results():
    lengths, order = [3, 0, 17, 1, 40], [4, 1, 0, 3, 2]
    qkv = [x.detach() for x in make(61, dtype=torch.float32)]
    pieces = [x.split(lengths) for x in qkv]
    moved = [torch.cat([piece[b] for b in order]) for piece in pieces]
    cu, moved_cu = bounds(lengths), bounds([lengths[b] for b in order])
    expected = torch.cat([attend(cu, causal=True)(*qkv).split(lengths)[b] for b in order])
    assert torch.equal(attend(moved_cu, causal=True)(*moved), expected)
    assert torch.equal(pool(moved_cu)(*moved), pool(cu)(*qkv)[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 5), (0, 0)])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_row_blocks_show_within_rounding_only(monkeypatch, rows, window, backend):
    cu, qkv = bounds([50, 0, 1, 23]), make(74)
    weights, pooled_weights = torch.randn(74, 4, 8), torch.randn(4, 4, 8)
    with forced(backend):
        whole = value_and_grads(attend(cu, window=window), qkv, weights)
    whole_pool = value_and_grads(pool(cu), qkv, pooled_weights)
    # Rows of 50 keys, 4 heads and 8 bytes.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", {"cpu": rows * 50 * 4 * 8})
    blocks = list(reference.row_blocks(slice(0, 50), torch.empty(4, 74, dtype=torch.float64), *window))
    assert len(blocks) > 1
    assert [row for part, _, _ in blocks for row in range(part.start, part.stop)] == list(range(50))
    with forced(backend):
        found = value_and_grads(attend(cu, window=window), qkv, weights)
    found_pool = value_and_grads(pool(cu), qkv, pooled_weights)
    for mine, right in zip(found + found_pool, whole + whole_pool, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most elements that the memory of any tensor made inside holds."""

    def __init__(self, inputs):
        super().__init__()
        self.elements, self.inputs = 0, {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (20, 30)])
def test_scores_never_exist_as_a_whole(monkeypatch, window):
    tokens, cells = 1500, 40_000
    monkeypatch.setattr(reference, "_BLOCK_BYTES", {"cpu": cells * 4})
    qkv, cu = make(tokens, (2, 1), 4, torch.float32), bounds([tokens])
    with forced("reference"), Largest(qkv) as largest:
        attend(cu, window=window)(*qkv).sum().backward()
    assert cells / 2 < largest.elements <= cells
    # Masks of a window, and the result.
    with forced("sdpa"), Largest(qkv) as largest:
        attend(cu, window=window)(*qkv).sum().backward()
    assert largest.elements <= cells


def test_pooling_makes_no_output_per_token(monkeypatch):
    tokens, heads, width = 600, 8, 16
    monkeypatch.setattr(reference, "_BLOCK_BYTES", {"cpu": 4 * heads * tokens * 4})
    qkv, cu = make(tokens, (heads, 1), width, torch.float32), bounds([tokens])
    with Largest(qkv) as largest:
        pooled = pool(cu)(*qkv)
    assert largest.elements < tokens * heads * width / 2
    # The gradient of q itself has that size.
    with Largest(qkv) as largest:
        torch.autograd.grad(pooled.sum(), qkv)
    assert largest.elements == tokens * heads * width


def test_window_costs_its_width_not_the_length(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_BYTES", {"cpu": 1 << 16})
    lse = torch.empty(2, 5000)
    for left, right in ((16, 16), (0, 0), (100, 0)):
        for rows, span, hidden in reference.row_blocks(slice(0, 5000), lse, left, right):
            assert span.stop - span.start <= rows.stop - rows.start + left + right
            assert hidden.shape == (rows.stop - rows.start, span.stop - span.start)
            assert hidden.numel() * 2 * 4 <= 1 << 16


@pytest.mark.parametrize("window", [(-1, -1), (2, 3)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lse_is_the_log_sum_exp_of_the_scores(dtype, window):
    q, k, v = (x.detach() for x in make(16, (4, 2), 8, dtype))
    cu = bounds([9, 0, 7])
    _, lse = OPS.varlen_attention(q, k, v, cu, 9, 0.6, False, *window)
    assert lse.dtype == wide(dtype)
    assert lse.shape == (4, 16)
    rows = []
    for start, end in ((0, 9), (9, 16)):
        scores = 0.6 * torch.einsum(
            "ihd,jhd->hij", q[start:end].double(), k[start:end].double().repeat_interleave(2, 1)
        )
        ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]
        if window[0] >= 0:
            scores = scores.masked_fill((ahead < -window[0]) | (ahead > window[1]), -torch.inf)
        rows.append(scores.logsumexp(-1))
    torch.testing.assert_close(lse.double(), torch.cat(rows, 1), rtol=1e-5, atol=1e-5)
    if window == (-1, -1):
        torch.testing.assert_close(OPS.attention_mean_pool(q, k, v, cu, 9, 0.6)[1], lse)


def test_lse_has_no_gradient():
    qkv, cu = make(7), bounds([7])
    for out, lse in (OPS.varlen_attention(*qkv, cu, 7, 0.5, False, -1, -1), OPS.attention_mean_pool(*qkv, cu, 7, 0.5)):
        assert out.requires_grad
        assert not lse.requires_grad


@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (False, (1, 2)), (True, (2, -1))])
def test_gradcheck(causal, window):
    cu = bounds([2, 0, 1, 4])
    qkv = make(7, width=3)
    assert torch.autograd.gradcheck(attend(cu, scale=0.8, causal=causal, window=window), qkv)


def test_gradcheck_pooled():
    assert torch.autograd.gradcheck(pool(bounds([2, 0, 1, 4]), scale=0.8), make(7, width=3))


@pytest.mark.parametrize("through_dispatcher", [False, True])
def test_second_derivative_is_refused(through_dispatcher):
    q, k, v = make(5)
    cu = bounds([5])
    function = OPS.varlen_attention if through_dispatcher else attend(cu)
    out = function(q, k, v, cu, 5, 0.5, False, -1, -1)[0] if through_dispatcher else function(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        dq.sum().backward()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_gradient_of_one_argument_alone(place):
    qkv, cu = make(9), bounds([4, 5])
    for function in (attend(cu), pool(cu)):
        every = torch.autograd.grad(function(*qkv).sum(), qkv)
        some = [x if number == place else x.detach() for number, x in enumerate(qkv)]
        function(*some).sum().backward()
        assert torch.equal(qkv[place].grad, every[place])
        qkv[place].grad = None


def test_no_tokens():
    qkv = make(0)
    for lengths in ([], [0], [0, 0, 0]):
        out = attend(bounds(lengths))(*qkv)
        pooled = pool(bounds(lengths))(*qkv)
        assert out.shape == (0, 4, 8)
        assert pooled.shape == (len(lengths), 4, 8)
        assert (pooled == 0).all()
        for x in (out, pooled):
            assert all(grad.shape[0] == 0 for grad in torch.autograd.grad(x.sum(), qkv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    # Whole numbers up to 100: scores of up to 80,000, far beyond exp's range in float32 and float16's own, yet exact.
    q, k = (torch.randint(-100, 101, (20, 2, 8)).to(dtype).requires_grad_() for _ in range(2))
    qkv = [q, k, torch.randn(20, 2, 8).to(dtype).requires_grad_()]
    cu = bounds([8, 12])
    for function, definition in ((attend(cu, scale=1.0), brute(cu, 1.0)), (pool(cu, scale=1.0), brute_pool(cu, 1.0))):
        out = function(*qkv)
        assert relative(out, definition(*exactly(qkv))) <= TOLERANCE[dtype]
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), qkv))


@pytest.mark.parametrize("factor", [3, 30])
def test_gradients_at_large_scores(factor):
    # Scores up to about 100 and 10,000. The weights are recomputed from lse, which is rounded to a part in 2^24 of its
    # own size; the terms of dq and dk have the size of k and q.
    qkv = [(x.detach() * size).requires_grad_() for size, x in zip((factor, factor, 1), make(20, dtype=torch.float32))]
    cu, tolerance = bounds([8, 12]), 2**-24 * 8 * factor**3
    assert_attention_equals_definition(cu, qkv, scale=1.0, tolerance=tolerance)
    assert_equal_to_definition(pool(cu, scale=1.0), brute_pool(cu, 1.0), qkv, torch.float32, tolerance=tolerance)


def test_equal_values_leave_nothing_to_queries_and_keys():
    # The weights add up to 1, so they don't matter when all values are the same. At scores of some 1,000 the rounding
    # of lse moves recomputed weights by about 1e-4 of themselves; it must cancel.
    q, k, _ = (30 * x.detach() for x in make(90, dtype=torch.float32))
    qkv = [x.requires_grad_() for x in (q, k, torch.randn(1, 2, 8).repeat(90, 1, 1))]
    cu = bounds([40, 50])
    for function, rows in ((attend(cu, scale=1.0), 90), (pool(cu, scale=1.0), 2)):
        _, dq, dk, dv = value_and_grads(function, qkv, torch.randn(rows, 4, 8))
        bound = 3e-7 * dv.norm() / 90**0.5
        assert dq.norm() <= bound * k.norm()
        assert dk.norm() <= bound * q.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_in_its_sequence(place, backend):
    cu, weights = bounds([3, 4, 2]), torch.randn(9, 4, 8)
    clean = make(9, dtype=torch.float32)
    dirty = [x.detach().clone() for x in clean]
    dirty[place][4, 1, 2] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    others = [0, 1, 2, 7, 8]
    with forced(backend):
        results = [value_and_grads(attend(cu), qkv, weights) for qkv in (dirty, clean)]
    for found, right in zip(*results, strict=True):
        assert torch.equal(found[others], right[others])
    # torch's kernel may lose a NaN of q on the way forward, not on the way back.
    assert any(x[3:7].isnan().any() for x in results[0])
    assert results[0][0][3:7].isnan().any() or (backend, place) == ("sdpa", 0)
    found, right = pool(cu)(*dirty), pool(cu)(*clean)
    assert torch.equal(found[[0, 2]], right[[0, 2]])
    assert found[1].isnan().any()


def test_views_of_a_packed_tensor():
    cu = bounds([4, 0, 7])
    packed = torch.randn(11, 3, 4, 8, dtype=torch.float64)
    transposed = torch.randn(8, 4, 11, dtype=torch.float64).permute(2, 1, 0)
    expanded = torch.randn(11, 1, 8, dtype=torch.float64).expand(11, 4, 8)
    for views in (packed.unbind(1), (transposed, packed[:, 0], transposed), (expanded,) * 3):
        dense = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
        views = [x.detach().requires_grad_() for x in views]
        for function, rows in ((attend(cu, causal=True), 11), (pool(cu), 3)):
            weights = torch.randn(8, 4, rows).permute(2, 1, 0)
            for mine, right in zip(*(value_and_grads(function, x, weights) for x in (views, dense)), strict=True):
                assert mine.is_contiguous()
                torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)


def test_gradient_of_a_packed_tensor():
    cu = bounds([4, 0, 7])
    packed = torch.randn(11, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(f(*packed.unbind(1)).square().sum(), packed)[0] for f in (attend(cu), brute(cu))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_every_entry_is_written(poisoned):
    qkv, cu = make(22, dtype=torch.float32), bounds([3, 0, 1, 17, 1])
    assert torch.empty(3).isnan().all()
    for function, rows in ((attend(cu, window=(2, 1)), 22), (pool(cu), 5)):
        for x in value_and_grads(function, qkv, torch.randn(rows, 4, 8)):
            assert torch.isfinite(x).all()
    with torch.no_grad():
        assert torch.isfinite(OPS.varlen_attention(*qkv, cu, 17, 0.5, True, -1, -1)[1]).all()
        assert torch.isfinite(OPS.attention_mean_pool(*qkv, cu, 17, 0.5)[1]).all()


def test_opcheck():
    cu = bounds([3, 0, 5])
    for dtype, options in ((torch.float32, (False, -1, -1)), (torch.bfloat16, (True, 2, -1))):
        qkv = make(8, dtype=dtype)
        plain = [x.detach() for x in qkv]
        torch.library.opcheck(OPS.varlen_attention.default, (*qkv, cu, 5, 0.3, *options))
        out, lse = OPS.varlen_attention(*plain, cu, 5, 0.3, *options)
        arguments = (torch.randn_like(out), *plain, out, lse, cu, 5, 0.3, *options)
        torch.library.opcheck(OPS.varlen_attention_backward.default, arguments)
        torch.library.opcheck(OPS.attention_mean_pool.default, (*qkv, cu, 5, 0.3))
        pooled, lse = OPS.attention_mean_pool(*plain, cu, 5, 0.3)
        arguments = (torch.randn_like(pooled), *plain, lse, cu, 5, 0.3)
        torch.library.opcheck(OPS.attention_mean_pool_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_equals_eager(dynamic):
    def both(q, k, v, cu, longest, scale):
        attention = varlen_attention(q, k, v, cu, longest, scale=scale, causal=True, window=(3, -1))
        return attention, attention_mean_pool(q, k, v, cu, longest)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths, scale in (([2, 0, 5], 0.4), ([4, 4, 9, 0], 0.3), ([3], 0.2)):
        qkv, cu = make(sum(lengths), dtype=torch.float32), bounds(lengths)
        found, expected = (f(*qkv, cu, max(lengths), scale) for f in (compiled, both))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        grads = (torch.autograd.grad(sum(x.square().sum() for x in out), qkv) for out in (found, expected))
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(dtype):
    qkv, cu = make(12, dtype=dtype), bounds([5, 0, 7])
    for function, rows in ((attend(cu, causal=True), 12), (pool(cu), 3)):
        weights = torch.randn(rows, 4, 8)
        plain = value_and_grads(function, qkv, weights)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = value_and_grads(function, qkv, weights)
        for mine, right in zip(mixed, plain, strict=True):
            assert mine.dtype == right.dtype
            assert torch.equal(mine, right)


def test_backend_can_be_forced(monkeypatch):
    qkv, cu = make(5), bounds([5])
    definition = reference.blocked_attention(*qkv, cu, 8**-0.5, -1, -1)[0]
    with forced("reference"):
        assert torch.equal(attend(cu)(*qkv), definition)
    with forced("sdpa"):
        assert torch.equal(attend(cu)(*qkv), sdpa.varlen_attention(*qkv, cu, 5, 8**-0.5, -1, -1)[0])
        with pytest.raises(BackendError, match=r"attention=sdpa.*attention_mean_pool has no such backend"):
            pool(cu)(*qkv)
    monkeypatch.setenv("LEAFKERN_BACKEND", "attention=nonesuch")
    for function in (attend(cu), pool(cu)):
        with pytest.raises((InputError, BackendError), match="nonesuch"):
            function(*qkv)


@pytest.mark.parametrize("function", [varlen_attention, attention_mean_pool])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 4)}, "q: expected 3 dimensions"),
        ({"q": [[1.0]]}, "q: expected a torch.Tensor"),
        ({"q": torch.zeros(6, 4, 8, dtype=torch.int32)}, "q: expected a floating-point tensor, got int32"),
        ({"k": torch.zeros(6, 2, 8, dtype=torch.float16)}, "k: dtype float16; expected that of q, float32"),
        ({"v": torch.zeros(6, 2, 8, dtype=torch.float64)}, "v: dtype float64"),
        ({"k": torch.zeros(5, 2, 8)}, r"k: shape \(5, 2, 8\); expected .* T = 6 and D = 8"),
        ({"k": torch.zeros(6, 2, 4)}, r"k: shape \(6, 2, 4\); expected"),
        ({"v": torch.zeros(6, 2, 4)}, r"v: shape \(6, 2, 4\); expected that of k, \(6, 2, 8\)"),
        ({"v": torch.zeros(6, 4, 8)}, r"v: shape \(6, 4, 8\); expected that of k"),
        ({"q": torch.zeros(6, 3, 8)}, "q: 3 heads; expected a positive multiple of the 2 heads of k and v"),
        ({"q": torch.zeros(6, 1, 8)}, "q: 1 heads; expected"),
        ({"q": torch.zeros(6, 0, 8)}, "q: 0 heads; expected"),
        ({"k": torch.zeros(6, 0, 8), "v": torch.zeros(6, 0, 8)}, "q: 4 heads; expected a positive multiple of the 0"),
        ({name: torch.zeros(6, 2, 0) for name in "qkv"}, "q: width D = 0"),
        ({"v": torch.zeros(6, 2, 8, device="meta")}, "q on cpu, k on cpu, v on meta"),
        ({"cu_seqlens": bounds([2, 3])}, "cu_seqlens: must run from 0 to T = 6; got 0 to 5"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens: expected dtype int32"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "cu_seqlens: must never fall"),
        ({"max_seqlen": 3}, "max_seqlen: 3; expected at least 4, the longest sequence's length"),
        ({"max_seqlen": -1}, "max_seqlen: expected an int that is not negative, got -1"),
        ({"max_seqlen": 4.0}, "max_seqlen: expected an int"),
        ({"max_seqlen": True}, "max_seqlen: expected an int"),
        ({"scale": math.nan}, "scale: expected a finite number; got nan"),
        ({"scale": math.inf}, "scale: expected a finite number"),
        ({"scale": "1"}, "scale: expected a finite number"),
    ],
)
def test_wrong_arguments(function, change, message):
    arguments = {
        "q": torch.zeros(6, 4, 8),
        "k": torch.zeros(6, 2, 8),
        "v": torch.zeros(6, 2, 8),
        "cu_seqlens": bounds([2, 4]),
        "max_seqlen": 4,
    }
    with pytest.raises(InputError, match=message):
        function(**(arguments | change))


@pytest.mark.parametrize("window", [(-2, 0), (0, -3), (1, 2, 3), 4, None, (1.0, 2), (True, 2)])
def test_wrong_window(window):
    with pytest.raises(
        InputError, match=r"window: expected \(left, right\), each an int of at least -1 \(no limit\); got"
    ):
        varlen_attention(*make(6), bounds([2, 4]), 4, window=window)


def test_max_seqlen_is_looked_at_only_where_values_are_checked(monkeypatch):
    qkv, cu = make(6), bounds([2, 4])
    expected = varlen_attention(*qkv, cu, 4)
    monkeypatch.setattr("leafkern.ops.attention.values_checked", lambda x: False)
    assert torch.equal(varlen_attention(*qkv, cu, 1), expected)


def test_max_seqlen_may_be_larger_and_cu_seqlens_int64():
    qkv, cu = make(6), bounds([2, 4])
    for function in (varlen_attention, attention_mean_pool):
        expected = function(*qkv, cu, 4)
        assert torch.equal(function(*qkv, cu, 999), expected)
        assert torch.equal(function(*qkv, cu.long(), 4), expected)
