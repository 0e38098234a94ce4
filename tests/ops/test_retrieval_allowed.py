"""search among allowed rows only: every backend against the definition over those rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import FORMS, ISAS, C, random_codes, random_queries, restore_isa, unit  # noqa: F401

from leafkern.errors import InputError
from leafkern.ops import quantize, search
from leafkern.ops.quantization import PRECISIONS
from leafkern.ops.retrieval import native, reference

Q = unit(2, 8)
INTEGER_MIN = -(1 << 31)


def allowed_rows(n, share, generator, *, run=1):
    """(n,) bool, `share` of them true, in runs of `run`."""
    return (torch.rand(-(-n // run), generator=generator) < share).repeat_interleave(run)[:n]


def assert_exact(u, codes, k, bits, query_bits, allowed, threads=1):
    rows = allowed.nonzero().flatten()
    scores, places = reference.brute(u, reference.decode(codes[rows], bits, u.shape[1]), k)
    missing = min(k, len(codes)) - scores.shape[1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=INTEGER_MIN)
    ids = torch.nn.functional.pad(rows[places], (0, missing), value=-1)
    found = [reference.blocked(u, codes, k, bits, allowed)]
    if C is not None and native.unsuited(u, codes, k) is None:
        found.append(native.search(u, codes, k, bits, query_bits, allowed, threads))
    for integers, found_ids in found:
        assert torch.equal(integers.double(), scores)
        assert torch.equal(found_ids, ids)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    q=st.sampled_from([1, 2, 3, 5, 9, 30]),
    n=st.sampled_from([1, 2, 63, 64, 65, 500, 3000, 20_000]),
    dim=st.sampled_from([1, 8, 33, 64, 100, 384]),
    k=st.sampled_from([1, 3, 10, 2048]),
    form=st.sampled_from(FORMS),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    run=st.sampled_from([1, 150]),
    threads=st.integers(1, 3),
    isa=st.sampled_from(ISAS or [""]),
)
def test_integers_equal_the_definition(seed, q, n, dim, k, form, share, run, threads, isa):
    if isa:
        C.select_isa(isa)
    bits, query_bits = form
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(n, dim, bits, generator=generator, narrow=seed % 2 == 0)
    allowed = allowed_rows(n, share, generator, run=run)
    assert_exact(random_queries(q, dim, query_bits, generator=generator), codes, k, *form, allowed, threads)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rescored", [False, True])
def test_scores_are_those_of_the_allowed_rows_alone(precision, rescored):
    # Equal rows, so that ties are decided by ids.
    vectors, queries = unit(100, 24).repeat(3, 1), unit(6, 24)
    base = quantize(vectors, precision)
    options = {"rescore": vectors, "oversample": 3} if rescored else {}
    for share in (0.5, 0.02, 0.0, 1.0):
        allowed = allowed_rows(300, share, None)
        rows = allowed.nonzero().flatten()
        expected, places = search(
            queries, base[rows], 7, **(options | ({"rescore": vectors[rows]} if rescored else {}))
        )
        count = expected.shape[1]
        scores, ids = search(queries, base, 7, allowed=allowed, **options)
        assert scores.shape == ids.shape == (6, 7)
        torch.testing.assert_close(scores[:, :count], expected, rtol=0, atol=1e-6)
        assert torch.equal(ids[:, :count], rows[places])
        assert (scores[:, count:] == -torch.inf).all()
        assert (ids[:, count:] == -1).all()


def test_nothing_allowed_and_no_rows():
    base = quantize(unit(20, 8), "int8")
    scores, ids = search(Q, base, 3, allowed=torch.zeros(20, dtype=torch.bool), rescore=[unit(20, 8), unit(20, 8)])
    assert (scores == -torch.inf).all()
    assert (ids == -1).all()
    assert search(Q, base[:0], 3, allowed=torch.zeros(0, dtype=torch.bool))[0].shape == (2, 0)
    assert search(Q[:0], base, 3, allowed=torch.ones(20, dtype=torch.bool))[0].shape == (0, 3)


def test_other_rows_do_no_harm():
    base = unit(20, 8)
    base[5] = torch.nan
    allowed = torch.arange(20) != 5
    assert torch.isfinite(search(Q, base, 3, allowed=allowed)[0]).all()
    assert torch.isfinite(search(Q, quantize(base[:5], "binary"), 3, rescore=base[:5])[0]).all()
    with pytest.raises(InputError, match="base: row 5 holds NaN"):
        search(Q, base, 3, allowed=~allowed)


def test_any_byte_but_0_is_true():
    allowed = torch.zeros(200, dtype=torch.uint8)
    allowed[7] = 2
    for precision in ("int8", "float32"):
        ids = search(Q, quantize(unit(200, 8), precision), 2, allowed=allowed.view(torch.bool))[1]
        assert ids.tolist() == [[7, -1]] * 2


def test_strided_allowed_rows():
    base, allowed = quantize(unit(50, 8), "int8"), torch.rand(50) < 0.5
    expected = search(Q, base, 9, allowed=allowed)
    strided = torch.stack([allowed, ~allowed], dim=1)[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(search(Q, base, 9, allowed=strided), expected))


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ([True] * 20, "allowed: expected a torch.Tensor, got list"),
        (torch.ones(20), "allowed: expected dtype bool; got float32"),
        (torch.ones(20, 1, dtype=torch.bool), "allowed: expected 1 dimensions"),
        (torch.ones(19, dtype=torch.bool), r"allowed: expected one bool per row of base, \(20,\) on cpu; got \(19,\)"),
        (torch.ones(20, dtype=torch.bool, device="meta"), r"on cpu; got \(20,\) on meta"),
    ],
)
def test_bad_input_is_named(allowed, message):
    for precision in ("int8", "float32"):
        with pytest.raises(InputError, match=message):
            search(Q, quantize(unit(20, 8), precision), 2, allowed=allowed)


def test_registered_operation():
    for bits, query_bits in FORMS:
        arguments = (random_queries(3, 20, query_bits), random_codes(50, 20, bits), 4, bits, query_bits)
        allowed = torch.rand(50) < 0.5
        torch.library.opcheck(torch.ops.leafkern.integer_search.default, (*arguments, allowed))


def test_under_compile():
    base, queries, allowed = quantize(unit(150, 16), "int8"), unit(4, 16), torch.rand(150) < 0.3

    def ranked(q):
        return search(q * 1.0, base, 5, allowed=allowed, rescore=base)

    torch.compiler.reset()
    found = torch.compile(ranked, backend="aot_eager", fullgraph=True)(queries)
    assert all(torch.equal(a, b) for a, b in zip(found, ranked(queries), strict=True))
