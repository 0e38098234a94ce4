"""Native search of float bases and rescoring, held to the definition; sums of small integers are exact in any order."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import ISAS, C, before_a_guard, restore_isa, unit  # noqa: F401
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import Quantized, quantize, search
from leafkern.ops.retrieval import float_search, native, reference

pytestmark = pytest.mark.skipif(C is None, reason="leafkern._C is not built")
# Streamed one by one; panels of 8 and of 16; both; several blocks of queries.
COUNTS = [1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 24, 40]


def integers(n, dim, dtype=torch.float32, *, generator=None, largest=3):
    return torch.randint(-largest, largest + 1, (n, dim), generator=generator).to(dtype)


def expected(queries, base, k, allowed=None):
    scores, ids = reference.brute(queries, base, k, allowed)
    return scores.float(), ids


def assert_exact(queries, base, k, allowed=None, threads=1):
    found, right = native.float_search(queries, base, k, allowed, threads), expected(queries, base, k, allowed)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    q=st.sampled_from(COUNTS),
    n=st.sampled_from([1, 2, 5, 23, 25, 63, 300, 3000]),
    dim=st.sampled_from([1, 7, 8, 9, 31, 33, 100, 257, 384, 600]),
    k=st.sampled_from([1, 3, 10, 2048]),
    dtype=st.sampled_from(list(native.FLOAT_FORMS)),
    share=st.sampled_from([None, 0.0, 0.02, 0.6]),
    threads=st.integers(1, 3),
    isa=st.sampled_from(ISAS or [""]),
)
def test_equals_the_definition(seed, q, n, dim, k, dtype, share, threads, isa):
    C.select_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    base = integers(n, dim, dtype, generator=generator, largest=1 if seed % 2 else 3)
    allowed = None if share is None else torch.rand(n, generator=generator) < share
    assert_exact(integers(q, dim, generator=generator), base, k, allowed, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_many_queries_and_wide_vectors(isa, dtype):
    C.select_isa(isa)
    for q, n, dim in [(300, 700, 384), (20, 100, 5000), (1, 100, 5000), (0, 10, 8), (3, 0, 8)]:
        assert_exact(integers(q, dim), integers(n, dim, dtype), 10, threads=2)


@pytest.mark.parametrize("q", COUNTS)
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_views_and_memory_maps(tmp_path, q, dtype):
    rows = integers(200, 60, dtype)
    queries = integers(q, 60)
    for base in (rows[::3], rows[7:8].expand(1, 60), torch.cat([rows, rows], 1)[:, 60:]):
        assert_exact(queries, base, 9)
    rows.numpy().tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype=rows.numpy().dtype, mode="c", shape=(200, 60))
    assert_exact(queries, torch.from_numpy(mapped), 9)
    assert_exact(queries.repeat(1, 2)[:, ::2], rows[:, ::2].contiguous().repeat(1, 2), 9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mprotect is POSIX")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*native.FLOAT_FORMS, torch.int8])
def test_reads_nothing_beyond_the_last_row(isa, dtype):
    C.select_isa(isa)
    for n, dim in [(700, 41), (31, 384), (1, 3)]:
        base = before_a_guard(integers(n, dim, dtype))
        for q in COUNTS if dtype != torch.int8 else ():
            assert_exact(integers(q, dim), base, 5, threads=2)
        level = Quantized(base, torch.ones(dim), torch.zeros(dim), "int8", dim) if dtype == torch.int8 else base
        queries, ids = integers(3, dim), candidates(3, n, n)
        found, right = native.rescore(queries, level, ids, 5), reference.rescore(queries, level, ids, 5)
        assert all(torch.equal(a, b) for a, b in zip(found, right))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q", COUNTS)
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_any_vectors_within_rounding(isa, q, dtype):
    C.select_isa(isa)
    for dim in (50, 700):
        queries, base = unit(q, dim), unit(500, dim, dtype)
        scores, ids = native.float_search(queries, base, 10)
        exact = queries.double() @ base.double().T
        assert ((exact.gather(1, ids) - scores).norm() / scores.norm()) <= TOLERANCE[torch.float32]
        # No row that is left out is better than the last found by more than rounding.
        left_out = exact.scatter(1, ids, -torch.inf).amax(1)
        assert (left_out <= scores[:, -1] + TOLERANCE[torch.float32]).all()


@pytest.mark.parametrize("q", COUNTS)
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_equal_rows_score_equally_wherever_they_stand(q, dtype):
    different = unit(40, 333, dtype)
    which = torch.randint(0, 40, (997,))
    base = different[which]
    scores, ids = native.float_search(unit(q, 333), base, 997)
    for query in range(q):
        for row in range(40):
            mine = which[ids[query]] == row
            assert len(scores[query][mine].unique()) <= 1
            assert (ids[query][mine].diff() > 0).all()


@pytest.mark.parametrize("q", [1, 5, 40, 300])
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_every_number_of_threads(q, dtype):
    queries, base = unit(q, 130), unit(5000, 130, dtype)
    alone = native.float_search(queries, base, 100, None, 1)
    for threads in (2, 3, 7):
        shared = native.float_search(queries, base, 100, None, threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared))


def test_number_of_threads_and_k_change_no_block_of_queries():
    # What is left of these queries by one more per thread, or by k, would be scored by another kernel.
    queries, base = unit(1366, 8), unit(2100, 8)
    alone = native.float_search(queries, base, 2048, None, 1)
    for threads in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(alone, native.float_search(queries, base, 2048, None, threads)))
    few = native.float_search(queries, base, 7, None, 3)
    assert all(torch.equal(a[:, :7], b) for a, b in zip(alone, few))


def test_zeros_are_equal_whatever_their_sign():
    base = torch.tensor([[-0.0], [0.0], [-1.0], [0.0]])
    for q in COUNTS:
        scores, ids = native.float_search(torch.ones(q, 1), base, 4)
        assert ids.tolist() == [[0, 1, 3, 2]] * q
        assert scores.signbit().tolist() == [[False, False, False, True]] * q


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q", COUNTS)
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_what_is_not_finite_is_named_unless_it_is_not_allowed(isa, q, dtype):
    C.select_isa(isa)
    queries = unit(q, 40).abs()
    for row, place, bad in [(0, 0, "nan"), (77, 39, "inf"), (200, 8, "-inf"), (299, 39, "nan"), (150, 31, "-inf")]:
        base = unit(300, 40, dtype)
        base[row, place] = float(bad)
        with pytest.raises(InputError, match=f"base: row {row} holds NaN or infinity"):
            search(queries, base, 3)
        allowed = torch.ones(300, dtype=torch.bool)
        allowed[row] = False
        base[row, place] = 0
        clean = search(queries, base, 3, allowed=allowed)
        base[row, place] = float(bad)
        # The kernels' own word, so that the reference need not serve.
        found = native.float_search(queries, base, 3, allowed)
        assert all(torch.equal(a, b) for a, b in zip(found, clean))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q", COUNTS)
def test_infinity_beside_other_rows_that_are_not_allowed(isa, q):
    C.select_isa(isa)
    # Neither the selection nor the NaN of another row hides it.
    for rows in (6, 40):
        base, allowed = torch.ones(rows, 4), torch.ones(rows, dtype=torch.bool)
        base[1], base[2], allowed[2] = -torch.inf, torch.nan, False
        assert native.float_search(torch.ones(q, 4), base, 1, allowed) is None
        base[1] = 1
        assert native.float_search(torch.ones(q, 4), base, 1, allowed) is not None


def test_lazily_negated_views():
    x, other = torch.randn(30, 16), torch.randn(4, 16)
    negated, negated_other = torch._neg_view(x), torch._neg_view(other)
    for query, base in ((other, negated), (negated_other, x)):
        right = search(query.resolve_neg(), base.resolve_neg(), 5)
        assert all(torch.equal(a, b) for a, b in zip(search(query, base, 5), right))
        ids = candidates(4, 30, 9)
        right = native.rescore(query.resolve_neg(), base.resolve_neg(), ids, 5)
        assert all(torch.equal(a, b) for a, b in zip(native.rescore(query, base, ids, 5), right))


@pytest.mark.parametrize("q", COUNTS)
def test_sums_that_overflow_are_named(q):
    base = unit(30, 64)
    base[11] = -3e38
    with pytest.raises(InputError, match="base: row 11"):
        search(torch.ones(q, 64), base, 2)


@pytest.mark.parametrize("precision", ["", "int8", "int4"])
def test_rescoring_is_registered(precision):
    base, ids = unit(120, 9), candidates(4, 120, 8)
    level = quantize(base, precision or "float32")
    given = (unit(4, 9), level.codes, level.scale, level.offset, precision, ids, 3)
    torch.library.opcheck(torch.ops.leafkern.rescore.default, given)
    for wrong in (ids + 120, ids[:3]):
        with pytest.raises(InputError, match="ids: expected numbers of 120 rows for 4 queries"):
            torch.ops.leafkern.rescore(*given[:5], wrong, 3)
    with pytest.raises(InputError, match="keep: expected an int >= 1, got -1"):
        torch.ops.leafkern.rescore(*given[:6], -1)


def test_registered():
    queries, base = unit(5, 24), unit(40, 24)
    allowed = torch.rand(40) < 0.5
    torch.library.opcheck(torch.ops.leafkern.float_search.default, (queries, base, 3, allowed))
    compiled = torch.compile(float_search, backend="aot_eager", fullgraph=True)
    for found, right in zip(compiled(queries, base, 3), search(queries, base, 3)):
        assert torch.equal(found, right)


def test_fp8_is_registered():
    queries, base = unit(5, 24), quantize(unit(40, 24), "fp8")
    given = queries, base.codes, base.scale, 3
    # The other checks compare the inputs before and after, which torch can't do with e4m3 on a CPU.
    operation, masked = torch.ops.leafkern.fp8_search.default, (*given, torch.rand(40) < 0.5)
    torch.library.opcheck(operation, masked, test_utils="test_faketensor")
    compiled = torch.compile(lambda x: search(x, base, 3), backend="aot_eager", fullgraph=True)
    for found, right in zip(compiled(queries), torch.ops.leafkern.fp8_search(*given)):
        assert torch.equal(found, right)


# ---- Rescoring.


def candidates(q, n, count):
    """(q, count) different rows each, in any order, some of them -1."""
    ids = torch.stack([torch.randperm(n)[:count] for _ in range(q)])
    return ids.masked_fill(torch.rand(ids.shape) < 0.2, -1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*native.FLOAT_FORMS, torch.int8])
@pytest.mark.parametrize("threads", [1, 3])
def test_rescoring_equals_the_reference(poisoned, isa, dtype, threads):
    C.select_isa(isa)
    for q, n, dim, count, keep in [(1, 50, 33, 40, 10), (70, 300, 384, 40, 40), (3, 9, 1, 9, 4), (2, 5, 8, 1, 1)]:
        level = integers(n, dim, dtype)
        if dtype == torch.int8:
            level = Quantized(level, torch.ones(dim) * 2, torch.arange(dim) % 3 - 1.0, "int8", dim)
        queries, ids = integers(q, dim), candidates(q, n, count)
        found = native.rescore(queries, level, ids, keep, threads)
        right = reference.rescore(queries, level, ids, keep)
        assert all(torch.equal(a, b) for a, b in zip(found, right))


@pytest.mark.parametrize("isa", ISAS)
def test_rescoring_orders_by_the_scores_that_it_returns(isa):
    C.select_isa(isa)
    # The offset's share swallows the difference of the codes.
    level = Quantized(torch.tensor([[3], [5]], dtype=torch.int8), torch.tensor([1e-9]), torch.tensor([1e3]), "int8", 1)
    scores, ids = native.rescore(torch.ones(1, 1), level, torch.tensor([[0, 1]]), 2)
    assert scores.tolist() == [[1000, 1000]]
    assert ids.tolist() == [[0, 1]]
    codes = torch.randint(-128, 127, (384,)) + (torch.rand(200, 384) < 0.5).long()
    for size in (0.02, 0.5, 5.0):
        level = Quantized(codes.to(torch.int8), torch.full((384,), 0.6 / 255), torch.randn(384) * size, "int8", 384)
        ids = candidates(50, 200, 150)
        scores, found = native.rescore(unit(50, 384), level, ids, 120)
        equal = scores.diff(dim=1) == 0
        assert (scores.nan_to_num(neginf=-1e9).diff(dim=1) <= 0).all()
        assert (found.diff(dim=1)[equal & (found[:, 1:] >= 0)] > 0).all()


@pytest.mark.parametrize("q", [0, 1, 20])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_rescored_search_equals_the_reference_within_rounding(monkeypatch, q, precision):
    base = unit(500, 70)
    queries, coarse, level = unit(q, 70), quantize(base, "binary"), quantize(base, precision)
    for allowed in (None, torch.rand(500) < 0.02):
        found = search(queries, coarse, 5, rescore=[level, base], allowed=allowed)
        monkeypatch.setenv("LEAFKERN_BACKEND", "retrieval=reference")
        right = search(queries, coarse, 5, rescore=[level, base], allowed=allowed)
        monkeypatch.delenv("LEAFKERN_BACKEND")
        torch.testing.assert_close(found[0], right[0], rtol=1e-5, atol=1e-5)
        # Rows whose scores differ by rounding alone may change places.
        products = (queries[:, None] * base[found[1]]).sum(2).masked_fill(found[1] < 0, -torch.inf)
        torch.testing.assert_close(found[0], products, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", native.FLOAT_FORMS)
def test_rescoring_names_what_is_not_finite(dtype, bad):
    base = unit(60, 16)
    level = base.to(dtype).clone()
    level[41, 3] = float(bad)
    # All rows are candidates; the score of this one is not the lowest, which would only not be found.
    queries = unit(3, 16).abs() * (-1 if bad == "-inf" else 1)
    with pytest.raises(InputError, match="rescore: row 41 holds NaN or infinity"):
        search(queries, quantize(base, "int8"), 15, rescore=level)
