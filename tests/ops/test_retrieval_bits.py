"""Bits by look-up tables: sums in 8 and 16 bits at the edge of what they hold, turned blocks whole and ragged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import ISAS, C, random_codes, random_queries, restore_isa  # noqa: F401

from leafkern.ops._core.native import library
from leafkern.ops.quantization.reference import pack_bits
from leafkern.ops.retrieval import native, reference

pytestmark = pytest.mark.skipif(C is None, reason=library()[1])


def assert_exact(u, codes, k, query_bits=8, threads=1):
    expected, expected_ids = reference.brute(u, reference.decode(codes, 1, u.shape[1]), k)
    scores, ids = native.search(u, codes, k, 1, query_bits, threads=threads)
    assert torch.equal(scores.double(), expected)
    assert torch.equal(ids, expected_ids)


def rows_at_the_edge(u, signed):
    """The rows that each query (Q, D) scores highest and lowest, and each with one half of the other."""
    best = u > 0
    half = torch.arange(u.shape[1]) < u.shape[1] // 2
    codes = pack_bits(torch.cat([best, ~best, best ^ half, best ^ ~half]).float())
    return (codes ^ 0x80).view(torch.int8) if signed else codes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [384, 1040, 1041, 1100, 4096])
def test_queries_of_one_size(dim, isa):
    C.select_isa(isa)
    generator = torch.Generator().manual_seed(dim)
    for size in (1, 2, 5, 7, 10, 12, 15, 21, 31, 32, 63):
        u = size * torch.where(torch.rand(3, dim, generator=generator) < 0.5, -1, 1).to(torch.int8)
        codes = rows_at_the_edge(u, signed=size % 2 == 0)
        assert_exact(u, codes, 12)
        assert_exact(u[:1], codes, 12)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    q=st.sampled_from([1, 1, 2, 5]),
    dim=st.one_of(st.integers(1, 520), st.sampled_from([768, 1040, 1044, 1536, 1540, 2100])),
    largest=st.sampled_from([1, 4, 16, 63]),
    signed=st.booleans(),
    isa=st.sampled_from(ISAS or [""]),
)
def test_uneven_queries_against_their_best_and_worst_rows(seed, q, dim, largest, signed, isa):
    C.select_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    # Of one size but for some much larger entries: runs that are safe in some places only.
    dense = torch.rand(q, dim, generator=generator) < torch.rand(q, 1, generator=generator) ** 3
    u = torch.where(dense, 63, torch.randint(0, largest + 1, (q, dim), generator=generator))
    u = (u * torch.where(torch.rand(q, dim, generator=generator) < 0.5, -1, 1)).to(torch.int8)
    assert_exact(u, rows_at_the_edge(u, signed), 4 * q)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    q=st.sampled_from([1, 2, 3, 40]),
    n=st.one_of(st.integers(1, 300), st.sampled_from([511, 512, 513, 2100])),
    dim=st.one_of(st.integers(1, 400), st.sampled_from([768, 770, 1536, 1544])),
    k=st.sampled_from([1, 10, 2048]),
    query_bits=st.sampled_from([1, 8]),
    threads=st.integers(1, 4),
    signed=st.booleans(),
    isa=st.sampled_from(ISAS or [""]),
)
def test_blocks_whole_and_ragged(seed, q, n, dim, k, query_bits, threads, signed, isa):
    C.select_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(n, dim, 1, signed=signed, generator=generator)
    assert_exact(random_queries(q, dim, query_bits, generator=generator), codes, k, query_bits, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("query_bits", [1, 8])
def test_equal_rows_and_rising_rows(query_bits, isa):
    C.select_isa(isa)
    u = random_queries(3, 96, query_bits)
    assert_exact(u, torch.zeros((700, 12), dtype=torch.uint8), 300, query_bits)
    # Each row better than the one before, for the first query.
    order = u[0].sort(stable=True).indices
    bits = (u[0] > 0)[None].logical_xor(torch.ones(97, 96, dtype=torch.bool).triu()[:, order.argsort()])
    assert_exact(u, pack_bits(bits.float()), 50, query_bits)


@pytest.mark.parametrize("query_bits", [1, 8])
def test_rows_of_a_wider_base(query_bits):
    wide = random_codes(40_000, 400, 1)
    for q in (1, 20):
        assert_exact(random_queries(q, 128, query_bits), wide[:, 5:21], 20, query_bits)
        assert_exact(random_queries(q, 100, query_bits), wide[::3, :13], 20, query_bits, threads=2)
