"""search: every backend against the definition, in exact integers and float64."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import FORMS, ISAS, C, before_a_guard, random_codes, random_queries, restore_isa, unit  # noqa: F401

from leafkern.errors import BackendError, InputError
from leafkern.ops import Quantized, dequantize, quantize, retrieval, search
from leafkern.ops._core.backend import FallbackWarning
from leafkern.ops._core.native import library
from leafkern.ops.quantization import PRECISIONS
from leafkern.ops.retrieval import fold, integer_search, native, reference

needs_native = pytest.mark.skipif(C is None, reason=library()[1])
WIDTHS = [1, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 127, 128, 250, 256, 384, 511, 512, 768]


def assert_exact(u, codes, k, bits, query_bits, threads=1):
    expected, expected_ids = reference.brute(u, reference.decode(codes, bits, u.shape[1]), k)
    for scores, ids in (
        reference.blocked(u, codes, k, bits),
        *([native.search(u, codes, k, bits, query_bits, threads=threads)] if C is not None and k <= C.MAX_K else []),
    ):
        assert scores.dtype == torch.int32
        assert torch.equal(scores.double(), expected)
        assert torch.equal(ids, expected_ids)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    q=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 33]),
    n=st.sampled_from([1, 2, 3, 5, 17, 64, 65, 500, 3000]),
    dim=st.sampled_from(WIDTHS),
    k=st.sampled_from([1, 2, 3, 10, 64, 1000, 2048]),
    form=st.sampled_from(FORMS),
    threads=st.integers(1, 4),
    limit=st.sampled_from([1, 8, 24, 63]),
    narrow=st.booleans(),
    signed=st.booleans(),
    isa=st.sampled_from(ISAS or [""]),
)
def test_integers_equal_the_definition(seed, q, n, dim, k, form, threads, limit, narrow, signed, isa):
    if isa:
        C.select_isa(isa)
    bits, query_bits = form
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(n, dim, bits, signed=signed, generator=generator, narrow=narrow)
    assert_exact(random_queries(q, dim, query_bits, limit=limit, generator=generator), codes, k, *form, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_enough_work_for_every_thread(form, threads, isa):
    C.select_isa(isa)
    codes = random_codes(20_011, 100, form[0], narrow=threads % 2 == 0)
    for q in (1, 6):
        u = random_queries(q, 100, form[1])
        # Work is counted in bytes read: few-bit rows only reach two threads with more queries.
        assert_exact(u.repeat(8, 1) if form[0] < 8 else u, codes, 10, *form, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [33, 384, 4096, 4100])
@pytest.mark.parametrize("query", ["top", "bottom", "alternating", "one"])
def test_extremes_do_not_saturate(query, dim, isa):
    C.select_isa(isa)
    u = torch.full((5, dim), 63, dtype=torch.int8)
    if query == "bottom":
        u.neg_()
    elif query == "alternating":
        u[:, ::2] = -63
    elif query == "one":
        u[:, 1:] = 0
    codes = torch.full((9, dim), -128, dtype=torch.int8)
    codes[1::3] = 127
    codes[2::3] = -127
    codes[4, ::2], codes[5, 1::2] = 127, 127
    assert_exact(u, codes, 9, 8, 8)
    for bits in (4, 1):
        packed = torch.full((6, -(-dim * bits // 8)), 255, dtype=torch.uint8)
        packed[::2], packed[3] = 0, 0x55
        assert_exact(u, packed, 6, bits, 8)


@pytest.mark.parametrize("isa", ISAS)
def test_queries_of_one_tile_that_are_safe_in_different_groups(isa):
    C.select_isa(isa)
    # Safe in sums of four vectors of 32 but not of three, beside one that is safe in threes but not in fours.
    u = torch.zeros((2, 160), dtype=torch.int8)
    u[0, [96, 97, 128, 129]] = 63
    u[1, [0, 1, 96, 97]] = 63
    assert_exact(u, torch.full((1, 160), 127, dtype=torch.int8), 1, 8, 8)


@given(seed=st.integers(0, 2**31), queries=st.integers(2, 9), dim=st.integers(1, 400), isa=st.sampled_from(ISAS))
@settings(deadline=None)
def test_sparse_extreme_queries_against_extreme_rows(seed, queries, dim, isa):
    C.select_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(0, 2, (queries, dim), generator=generator) * 126 - 63
    dense = torch.rand(queries, 1, generator=generator) ** 2
    u = (u * (torch.rand(queries, dim, generator=generator) < dense)).to(torch.int8)
    rows = torch.tensor([127, -128, 126, -127], dtype=torch.int8)[:, None].repeat(1, dim)
    assert_exact(u, rows, 4, 8, 8)


@pytest.mark.parametrize("dim", [2047, 2048, 5000, 20_000])
def test_wide_vectors_stay_exact(dim):
    u, codes = torch.full((2, dim), 63, dtype=torch.int8), torch.full((3, dim), 127, dtype=torch.int8)
    codes[1] = -128
    codes[2, -1] = 126
    assert_exact(u, codes, 3, 8, 8)
    assert_exact(u, random_codes(7, dim, 1), 3, 1, 8)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_widest_vectors_fit_32_bits(isa):
    C.select_isa(isa)
    # S is 127*63*D more than the score: 255*63*D, just below 2^31.
    codes = torch.tensor([[126], [127], [-128]], dtype=torch.int8).repeat(1, C.MAX_DIM)
    for sign in (1, -1):
        u = torch.full((2, C.MAX_DIM), sign * 63, dtype=torch.int8)
        u[1] *= torch.arange(C.MAX_DIM) % 2
        assert_exact(u, codes, 3, 8, 8)
        assert_exact(u, torch.tensor([[0], [255]], dtype=torch.uint8).repeat(1, C.MAX_DIM // 2), 2, 4, 8)
    assert "width 131073, above 131072" in native.unsuited(torch.empty(1, C.MAX_DIM + 1), codes, 1)


@pytest.mark.parametrize("form", FORMS)
def test_equal_scores_come_in_order_of_ids(form):
    # Enough rows that ties meet from several threads.
    codes = random_codes(3, 40, form[0]).repeat(7000, 1)[: 20_000 - 7]
    queries = random_queries(5 if form[0] == 8 else 20, 40, form[1])
    for threads in (1, 2, 3, 4):
        assert_exact(queries, codes, 1500, *form, threads)
    assert_exact(torch.zeros(2, 40, dtype=torch.int8) + (form[1] == 1), torch.zeros_like(codes), 10, *form)


@pytest.mark.parametrize("rising", [True, False])
def test_sorted_base(rising):
    # Rising scores replace the kept ones at every row.
    codes = torch.arange(-128, 128).repeat_interleave(200).to(torch.int8)[:, None]
    assert_exact(torch.full((2, 1), 63 if rising else -63, dtype=torch.int8), codes, 100, 8, 8, 2)


@needs_native
def test_rows_may_be_a_view():
    wide = random_codes(301, 120, 8)
    u = random_queries(6, 50, 8)
    for codes in (wide[:, 13:63], wide[::3, :50], wide[:1, 70:], wide.flatten()[:50].expand(4, 50)):
        expected = reference.brute(u, codes, 7)
        usable = native.unsuited(u, codes, 7) is None
        assert usable == (codes.stride(0) > 0)
        scores, ids = integer_search(u, codes, 7, 8, 8) if usable else reference.blocked(u, codes, 7, 8)
        assert torch.equal(scores.double(), expected[0])
        assert torch.equal(ids, expected[1])
    for wrong in (wide[:50].T, wide[:50].T[:1]):
        assert native.unsuited(u, wrong, 7).startswith("rows of strides (1, 120): expected adjacent entries")


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="mprotect is POSIX")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_reads_nothing_beyond_the_last_row(bits, isa):
    C.select_isa(isa)
    # No multiple of any kernel's step, and whole ones.
    for n, dim in [(4097, 41), (300, 384), (3, 1000), (5, 8)]:
        guarded = before_a_guard(random_codes(n, dim, bits))
        for query_bits, q in [(8, 5), (8, 1), *([(1, 5), (1, 1)] if bits == 1 else [])]:
            u = random_queries(q, dim, query_bits)
            for part in (guarded, guarded[-5:], guarded[-1:]):
                expected = reference.brute(u, reference.decode(part, bits, dim), 4)
                scores, ids = native.search(u, part, 4, bits, query_bits, threads=2)
                assert torch.equal(scores.double(), expected[0])
                assert torch.equal(ids, expected[1])


# ---- The public function.


def test_fold():
    w = torch.randn(50, 33)
    w[3] = 0
    w[4] *= 1e-44
    u, a = fold(w)
    # In float32, as numpy has it.
    largest = np.abs(w.numpy()).max(1) / np.float32(63)
    assert np.array_equal(a.numpy(), largest)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.round(w.numpy() / largest[:, None])
    normal = [i for i in range(50) if i not in (3, 4)]
    assert np.array_equal(u.numpy()[normal], expected[normal])
    assert u.abs().max() == 63
    assert (u[3] == 0).all()
    # Exact halves go to the even neighbour.
    assert fold(torch.tensor([[63.0, 0.5, 1.5, -2.5, -0.5]]))[0].tolist() == [[63, 0, 2, -2, 0]]


@pytest.mark.parametrize("isa", ISAS)
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 4), dim=st.integers(1, 70), power=st.integers(-46, 37))
def test_folds_to_the_bits_of_the_reference(isa, seed, rows, dim, power):
    C.select_isa(isa)
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, dim, generator=draw) * torch.tensor(10.0**power)
    # Halves of steps and zeros of both signs, rows of zeros alone.
    w = torch.where(
        torch.rand(rows, dim, generator=draw) < 0.3, (w / w.abs().amax(1, keepdim=True) * 126).round() / 2, w
    ).nan_to_num()
    w[torch.rand(rows, generator=draw) < 0.2] *= -0.0
    for found, expected in zip(native.fold(w), reference.fold(w)):
        assert torch.equal(found, expected)
    strided = torch.empty(rows, 2 * dim)[:, ::2].copy_(w)
    assert torch.equal(native.fold(strided)[0], native.fold(w)[0])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dim", [5, 64])
def test_scores_are_those_of_the_contract(precision, dim):
    base, queries = unit(300, dim), unit(7, dim)
    base[:, 2] = 0.1  # constant: scale 0
    quantized = quantize(base, precision)
    scores, ids = search(queries, quantized, 12)
    u, a = fold(queries * quantized.scale)
    codes = reference.decode(quantized.codes, 8 if precision == "int8" else 4, dim)
    integers, expected_ids = reference.brute(u, codes, 12)
    assert torch.equal(ids, expected_ids)
    expected = (queries.double() @ quantized.offset.double())[:, None] + a.double()[:, None] * integers
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    # A 7-bit query: within half a step of each dimension of the exact product with the dequantised rows.
    exact = (queries @ dequantize(quantized).T).gather(1, ids)
    bound = (a / 2)[:, None] * codes.double().abs().sum(1).max() + 1e-5
    assert ((scores - exact).abs() <= bound).all()


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dim", [1, 12, 384])
def test_binary_scores(precision, dim):
    base, queries = unit(90, dim), unit(5, dim)
    quantized = quantize(base, precision)
    scores, ids = search(queries, quantized, 90)
    hamming = ((queries > 0)[:, None] != (base > 0)[None]).sum(2)
    assert torch.equal(scores, (dim - 2 * hamming).float().gather(1, ids))
    assert torch.equal(ids, hamming.sort(dim=1, stable=True).indices)
    scores, ids = search(queries, quantized, 90, query_bits=8)
    u, a = fold(queries)
    integers = u.long() @ torch.where(base > 0, 1, -1).T
    assert torch.equal(ids, integers.sort(dim=1, stable=True, descending=True).indices)
    assert torch.equal(scores, a[:, None] * integers.gather(1, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 50, 7000])
def test_float_base(dtype, n):
    base, queries = unit(n, 33, dtype), unit(300, 33)
    scores, ids = search(queries, base, 9)
    expected, _ = reference.brute(queries, base.float(), 9)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close((queries @ base.float().T).gather(1, ids), scores, rtol=0, atol=1e-6)


def test_float_ties_and_signed_zeros():
    base = torch.tensor([[-0.0], [0.0], [1.0], [-1.0], [1.0], [0.0], [-1.0]])
    assert search(torch.ones(1, 1), base, 7)[1].tolist() == [[2, 4, 0, 1, 5, 3, 6]]
    assert search(-torch.ones(1, 1), base, 7)[1].tolist() == [[3, 6, 0, 1, 5, 2, 4]]


def test_float_blocks(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(reference, "_QUERY_BLOCK", 3)
    base, queries = torch.randint(-3, 4, (97, 5)).float(), torch.randint(-3, 4, (8, 5)).float()
    for k in (1, 4, 97):
        scores, ids = search(queries, base, k)
        expected, expected_ids = reference.brute(queries, base, k)
        assert torch.equal(scores.double(), expected)
        assert torch.equal(ids, expected_ids)
        codes = base.to(torch.int8)
        integers = reference.blocked(queries.to(torch.int8), codes, k, 8)
        assert torch.equal(integers[0].double(), expected)
        assert torch.equal(integers[1], expected_ids)


def test_fp8_scores():
    base, queries = unit(200, 48) * torch.rand(200, 1) * 100, unit(6, 48)
    quantized = quantize(base, "fp8")
    scores, ids = search(queries, quantized, 20)
    q = dequantize(quantize(queries, "fp8"))
    expected = reference.brute(q, dequantize(quantized), 20)[0]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-3)
    assert ids.shape == (6, 20)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_few_rows_no_rows_no_queries(precision):
    base = quantize(unit(3, 20), precision)
    scores, ids = search(unit(2, 20), base, 10)
    assert scores.shape == ids.shape == (2, 3)
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    for rescore in (None, unit(3, 20)):
        assert search(torch.empty(0, 20), base, 2, rescore=rescore)[0].shape == (0, 2)
    for rescore in (None, unit(0, 20)):
        scores, ids = search(unit(2, 20), base[:0], 2, rescore=rescore)
        assert scores.shape == ids.shape == (2, 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_query_alone_scores_as_in_a_batch(precision):
    base, queries = quantize(unit(400, 65), precision), unit(9, 65)
    scores, ids = search(queries, base, 5)
    for i in range(9):
        alone, alone_ids = search(queries[i : i + 1], base, 5)
        floats = precision in ("float32", "float16", "fp8")
        torch.testing.assert_close(alone[0], scores[i], rtol=0, atol=1e-6 if floats else 0)
        assert floats or torch.equal(alone_ids[0], ids[i])


def test_rescoring():
    base, queries, k = unit(2000, 64), unit(20, 64), 10
    exact, best = reference.brute(queries, base, k)

    def recall(ids):
        return (
            torch.isin(ids + 10**6 * torch.arange(20)[:, None], best + 10**6 * torch.arange(20)[:, None]).float().mean()
        )

    bits = quantize(base, "ubinary")
    hamming = recall(search(queries, bits, k, query_bits=1)[1])
    asymmetric = recall(search(queries, bits, k, query_bits=8)[1])
    scores, ids = search(queries, bits, k, rescore=base, oversample=10)
    assert hamming < asymmetric < recall(ids)
    torch.testing.assert_close(scores, (queries @ base.T).gather(1, ids), rtol=0, atol=1e-6)
    assert (scores.diff(dim=1) <= 0).all()
    # query_bits=8 is the default when rescoring.
    assert torch.equal(ids, search(queries, bits, k, rescore=base, oversample=10, query_bits=8)[1])
    # All rows kept: exact whatever the first stage is.
    for rescore in (base, quantize(base, "float32"), [quantize(base, "int8"), base], [base.half(), base]):
        scores, ids = search(queries, bits, k, rescore=rescore, oversample=1000)
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)
    quantized = quantize(base, "int8")
    scores, ids = search(queries, bits, k, rescore=quantized)
    torch.testing.assert_close(scores, (queries @ dequantize(quantized).T).gather(1, ids), rtol=0, atol=1e-6)


def test_each_level_keeps_half(monkeypatch):
    kept = []
    plain = retrieval.rescore_candidates
    monkeypatch.setattr(
        retrieval,
        "rescore_candidates",
        lambda *given: kept.append((given[-2].shape[1], given[-1])) or plain(*given),
    )
    base = unit(500, 16)
    levels = [quantize(base, "int8"), base.half(), base]
    search(unit(2, 16), quantize(base, "binary"), 5, rescore=levels, oversample=8)
    assert kept == [(40, 20), (20, 10), (10, 5)]
    kept.clear()
    search(unit(2, 16), quantize(base, "binary"), 5, rescore=levels, oversample=1)
    assert kept == [(5, 5), (5, 5), (5, 5)]


def test_rescore_ties_by_lower_id_and_only_candidates_are_read():
    base = unit(64, 8).repeat(4, 1)
    ids = search(base[:3], quantize(base, "binary"), 4, rescore=base, oversample=64)[1]
    assert ids.tolist() == [[i, i + 64, i + 128, i + 192] for i in range(3)]
    # NaN in a row that no query reaches does no harm; in one that is reached, it is named.
    first = torch.cat([torch.ones(10, 8), -torch.ones(10, 8)])
    fine = first.clone()
    fine[15] = float("nan")
    search(torch.ones(1, 8), quantize(first, "binary"), 2, rescore=fine)
    fine[3] = float("nan")
    with pytest.raises(InputError, match=r"rescore: row 3 holds NaN"):
        search(torch.ones(1, 8), quantize(first, "binary"), 2, rescore=fine)


BASE = quantize(unit(20, 8), "int8")
LARGE = quantize(torch.tensor([[-1e5], [1e5]]), "int8", ranges=torch.tensor([[-1e5], [1e5]]))
Q = unit(2, 8)
NAN = torch.stack([torch.ones(8), torch.full((8,), float("nan"))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search(Q, BASE, 0), r"k: expected an int >= 1, got 0"),
        (lambda: search(Q, BASE, True), r"k: expected an int"),
        (lambda: search(Q, BASE, 2.0), r"k: expected an int"),
        (lambda: search(Q, BASE, 1, oversample=0), r"oversample: expected an int >= 1, got 0"),
        (lambda: search(NAN, BASE, 1), r"queries: row 1 holds NaN or infinity"),
        (lambda: search(torch.tensor([[1.0] * 8, [1e39] * 8]).double() * 10, BASE, 1), r"queries: row 1 holds"),
        (lambda: search(torch.tensor([[1.0], [3e38]]), LARGE, 1), r"queries: row 1 is too large: its products"),
        (
            lambda: search(torch.full((1, 8), 3e38), quantize(torch.ones(1, 8), "binary"), 1, query_bits=8),
            r"row 0 .*: its scores",
        ),
        (lambda: search(Q, NAN, 1), r"base: row 1 holds NaN or infinity"),
        (lambda: search(Q, quantize(NAN[:1], "float16"), 1, rescore=NAN[1:]), r"rescore: row 0 holds NaN"),
        (lambda: search(Q[0], BASE, 1), r"queries: expected 2 dimensions"),
        (lambda: search(Q.long(), BASE, 1), r"queries: expected a floating-point tensor"),
        (lambda: search(torch.empty(2, 0), torch.empty(2, 0), 1), r"queries: expected at least one dimension"),
        (lambda: search(unit(2, 9), BASE, 1), r"base: vectors of width 8, but the queries have width 9"),
        (lambda: search(Q, BASE.codes, 1), r"base: expected a floating-point tensor, got int8"),
        (lambda: search(Q, [1], 1), r"base: expected a torch.Tensor or a Quantized, got list"),
        (lambda: search(Q, BASE, 1, rescore=unit(19, 8)), r"rescore: 19 rows, but base has 20"),
        (lambda: search(Q, BASE, 1, rescore=[BASE, unit(20, 9)]), r"rescore\[1\]: vectors of width 9"),
        (lambda: search(Q, BASE, 1, query_bits=1), r"query_bits: expected None, or 1 or 8 with a binary base"),
        (lambda: search(Q, quantize(unit(2, 8), "binary"), 1, query_bits=4), r"query_bits: .* got 4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_no_gradient():
    queries = unit(2, 8).requires_grad_()
    assert not search(queries, unit(5, 8).requires_grad_(), 2, rescore=unit(5, 8).requires_grad_())[0].requires_grad
    assert not search(queries, BASE, 2)[0].requires_grad


# ---- Backends.


def test_forced_backends(monkeypatch):
    queries, base = unit(3, 24), quantize(unit(200, 24), "int8")
    free = search(queries, base, 5)
    monkeypatch.setenv("LEAFKERN_BACKEND", "retrieval=reference")
    assert all(torch.equal(a, b) for a, b in zip(free, search(queries, base, 5)))
    if C is not None:
        monkeypatch.setenv("LEAFKERN_BACKEND", "native")
        assert all(torch.equal(a, b) for a, b in zip(free, search(queries, base, 5)))
        with pytest.raises(BackendError, match=r"above 8192"):
            search(queries, quantize(unit(9000, 24), "int8"), 8193)
        with pytest.raises(BackendError, match="retrieval=native"):
            search(queries, unit(10, 24).double(), 1)


@needs_native
def test_large_k_falls_back_with_a_warning():
    base = quantize(unit(9000, 24), "int8")
    with pytest.warns(FallbackWarning, match="k = 8500, above 8192"):
        scores, ids = search(unit(3, 24), base, 8500)
    assert scores.shape == (3, 8500)
    assert all(len(set(row.tolist())) == 8500 for row in ids)


@needs_native
@pytest.mark.parametrize("precision", ["int8", "binary", "float16"])
def test_largest_k_is_rescored_by_the_kernels(monkeypatch, precision):
    monkeypatch.setenv("LEAFKERN_BACKEND", "retrieval=native")
    base, queries = unit(9000, 24), unit(3, 24)
    coarse = quantize(base, precision)
    scores, ids = search(queries, coarse, 2048, oversample=4, rescore=base)
    if precision == "binary":  # misses some of the best, but none of its own candidates'
        candidates = search(queries, coarse, 8192, query_bits=8)[1]
        exact = (queries.double() @ base.double().T).gather(1, candidates).sort(dim=1, descending=True).values[:, :2048]
    else:
        exact = reference.brute(queries, base, 2048)[0]
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close((queries @ base.T).gather(1, ids), scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 20)}, "u: expected dtype int8"),
        ({"u": torch.zeros(20, dtype=torch.int8)}, "u: expected 2 dimensions"),
        ({"u": torch.zeros(2, 21, dtype=torch.int8)}, r"21 dimensions at 8 bits take 21 columns; got shape \(50, 20\)"),
        ({"bits": 4, "codes": random_codes(50, 20, 4).repeat(1, 2)}, "take 10 columns"),
        ({"bits": 1}, "take 3 columns"),
        ({"bits": 2}, "bits, query_bits"),
        ({"query_bits": 3}, "bits, query_bits"),
        ({"codes": torch.zeros(50, 20, dtype=torch.int32)}, "codes: expected dtype int8; got int32"),
        ({"codes": torch.zeros(1000, dtype=torch.int8)}, "codes: expected 2 dimensions"),
        ({"k": 0}, "k: expected an int >= 1"),
        ({"codes": random_codes(50, 20, 8).view(torch.uint8)}, "codes: expected dtype int8; got uint8"),
        ({"bits": 4, "codes": random_codes(50, 10, 8)}, "codes: expected dtype uint8; got int8"),
        ({"u": torch.full((2, 20), 64, dtype=torch.int8)}, r"u: expected values in \[-63, 63\], got 64 to 64"),
        ({"u": torch.full((2, 20), -128, dtype=torch.int8)}, r"u: expected values in \[-63, 63\], got -128 to -128"),
        ({"query_bits": 1}, "u: expected values 1 and -1 for query_bits=1"),
    ],
)
def test_registered_operation_refuses_what_it_would_misread(change, message):
    good = {
        "u": random_queries(2, 20, 8).masked_fill_(torch.eye(2, 20).bool(), 0),
        "codes": random_codes(50, 20, 8),
        "k": 4,
        "bits": 8,
        "query_bits": 8,
    }
    torch.ops.leafkern.integer_search(*good.values())
    with pytest.raises(InputError, match=message):
        torch.ops.leafkern.integer_search(*(good | change).values())


def test_registered_operation():
    for bits, query_bits in FORMS:
        arguments = (random_queries(3, 20, query_bits), random_codes(50, 20, bits), 4, bits, query_bits)
        torch.library.opcheck(torch.ops.leafkern.integer_search.default, arguments)
        eager = integer_search(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(eager, torch.ops.leafkern.integer_search(*arguments)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_under_compile_and_autocast(precision, autocast):
    base, queries = quantize(unit(150, 16), precision), unit(4, 16)
    rescore = unit(150, 16)

    def ranked(q):
        again = Quantized(base.codes, base.scale, base.offset, precision, 16)
        return *search(q * 1.0, again, 5), *search(q * 1.0, again, 5, rescore=rescore)

    torch.compiler.reset()
    compiled = torch.compile(ranked, backend="aot_eager", fullgraph=True)
    expected = ranked(queries)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for found in (ranked(queries), compiled(queries)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_another_default_device_changes_nothing():
    queries, base = unit(4, 16), quantize(unit(150, 16), "int8")
    expected = search(queries, base, 5)
    with torch.device("meta"):
        assert all(torch.equal(a, b) for a, b in zip(search(queries, base, 5), expected))


@needs_native
def test_several_python_threads_at_once():
    codes = random_codes(5000, 128, 8)
    queries = [random_queries(4, 128, 8) for _ in range(6)]
    expected = [native.search(u, codes, 10, 8, 8, threads=1) for u in queries]
    wrong = []

    def work(i):
        for _ in range(20):
            scores, ids = native.search(queries[i], codes, 10, 8, 8, threads=4)
            if not (torch.equal(scores, expected[i][0]) and torch.equal(ids, expected[i][1])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_search_after_fork():
    code = """
import os, signal, torch
from leafkern.ops.retrieval import native
torch.manual_seed(0)
codes = torch.randint(-128, 128, (20000, 128), dtype=torch.int8)
u = torch.randint(-63, 64, (4, 128), dtype=torch.int8)
expected = native.search(u, codes, 10, 8, 8, threads=4)
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        found = native.search(u, codes, 10, 8, 8, threads=4)
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected)) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(native.search(u, codes, 10, 8, 8, threads=4)[1], expected[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
