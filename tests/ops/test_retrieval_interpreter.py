"""The Triton kernels of search, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import pytest
import torch
from compare import LargestTensor, recorded_launches, served_by_another
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from retrieval_cases import FORMS, close_rows, random_codes, random_queries, unit

pytest.importorskip("triton")

from leafkern.errors import InputError
from leafkern.ops import dequantize, quantize, search
from leafkern.ops._core import launch
from leafkern.ops.retrieval import integer_search, kernels, reference, streaming

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

INTEGER_MIN = -(1 << 31)
FLOATS = [torch.float32, torch.float16]


@pytest.fixture
def launches(monkeypatch):
    return recorded_launches(monkeypatch, kernels)


def hold_integers(u, codes, k, bits, query_bits, allowed=None):
    """Equal to the definition over the allowed rows, then -2^31 and -1."""
    rows = torch.arange(len(codes)) if allowed is None else allowed.nonzero().flatten()
    scores, places = reference.brute(u, reference.decode(codes[rows], bits, u.shape[1]), k)
    missing = min(k, len(codes)) - scores.shape[1]
    found, ids = integer_search(u, codes, k, bits, query_bits, allowed)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), torch.nn.functional.pad(scores, (0, missing), value=INTEGER_MIN))
    assert torch.equal(ids, torch.nn.functional.pad(rows[places], (0, missing), value=-1))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    q=st.sampled_from([1, 2, 3, 17]),
    n=st.sampled_from([1, 2, 127, 128, 129, 300, 700]),
    dim=st.sampled_from([1, 7, 32, 33, 64, 100, 128, 384, 520]),
    k=st.sampled_from([1, 3, 10, 1024]),
    form=st.sampled_from(FORMS),
    share=st.sampled_from([None, 0.0, 0.02, 0.5]),
    narrow=st.booleans(),
    signed=st.booleans(),
)
def test_integers_equal_the_definition(seed, q, n, dim, k, form, share, narrow, signed):
    bits, query_bits = form
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(n, dim, bits, signed=signed, generator=generator, narrow=narrow)
    allowed = None if share is None else torch.rand(n, generator=generator) < share
    hold_integers(random_queries(q, dim, query_bits, generator=generator), codes, k, *form, allowed)


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_tiles_and_blocks_of_queries(form, monkeypatch, launches):
    # Nine groups of two tiles, of which k are looked into; queries in two blocks, the second of which is not full.
    monkeypatch.setattr(kernels, "GROUP", 2)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 80_000)
    codes = random_codes(17 * 128 + 5, 24 if form[0] == 8 else 64, form[0], narrow=True)
    u = random_queries(20, 24 if form[0] == 8 else 64, form[1])
    hold_integers(u, codes, 2, *form)
    assert launches == ["scan", "key", "key", "score"] * 2


@pytest.mark.parametrize("sign", [-1, 1])
def test_groups_of_tiles_of_floats(sign, monkeypatch):
    monkeypatch.setattr(kernels, "GROUP", 2)
    # One tie between tiles of different groups, scores all of one sign.
    base = torch.rand(9 * 128 + 1, 16)
    base[1100] = base[70] = 2 if sign > 0 else 0.001
    scores, ids = search(sign * torch.rand(3, 16), base, 2)
    assert torch.equal(ids, torch.tensor([[70, 1100]]).expand(3, 2))
    assert torch.equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 130])
def test_ties_go_to_the_lower_id(form, k):
    # The same rows again and again, best ones in every tile.
    codes = random_codes(7, 32, form[0]).repeat(60, 1)
    hold_integers(random_queries(2, 32, form[1]), codes, k, *form)


@pytest.mark.parametrize(
    ("dim", "queries", "form", "kernel"),
    [
        (64, 16, (1, 1), "bits"),
        (64, 17, (1, 1), "scan"),
        (64, 2, (1, 8), "bits"),
        (64, 3, (1, 8), "scan"),
        (1056, 1, (1, 1), "scan"),
        (40, 1, (1, 1), "scan"),
        (64, 1, (4, 8), "scan"),
    ],
)
def test_which_kernel_scans(dim, queries, form, kernel, launches):
    hold_integers(random_queries(queries, dim, form[1]), random_codes(140, dim, form[0], signed=True), 4, *form)
    assert launches == [kernel, "key", "score"]


@pytest.mark.parametrize("form", FORMS)
def test_extremes(form):
    dim = 4096 if form[0] == 8 else 1024
    u = torch.full((3, dim), 63, dtype=torch.int8)
    u[1].neg_()
    u[2, ::2] = -63
    codes = torch.full((6, -(-dim * form[0] // 8)), -128, dtype=torch.int8)
    codes[1::2], codes[2] = 127, 0x55
    u = u.sign() if form[1] == 1 else u
    hold_integers(u, codes.view(torch.uint8) if form[0] == 4 else codes, 6, *form)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_lie_apart(form):
    # A prefix of wider rows, from the middle of their memory, for bits also where no word of 32 bits begins.
    for first, width in ((0, 64), (8, 64)):
        whole = random_codes(201, 136, form[0])
        at = first * form[0] // 8
        hold_integers(random_queries(2, width, form[1]), whole[1:, at : at + width * form[0] // 8], 3, *form)
    # Queries whose entries are not adjacent.
    hold_integers(random_queries(128, 16, form[1]).t(), random_codes(140, 128, form[0]), 3, *form)
    # One row, and a tail of bits that are not zero.
    hold_integers(random_queries(1, 35, form[1]), random_codes(1, 35, form[0]), 3, *form)


@pytest.mark.parametrize("precision", ["int8", "int4", "binary", "ubinary", "fp8", "float16", "float32"])
def test_search_equals_the_definition(precision):
    queries, x = unit(3, 40), unit(300, 40)
    base = quantize(x, precision)
    allowed = torch.rand(300) < 0.3
    for mask in (None, allowed):
        scores, ids = search(queries, base, 12, allowed=mask)
        exact = dequantize(base)
        if precision in ("float16", "float32", "fp8"):
            q = dequantize(quantize(queries, "fp8")) if precision == "fp8" else queries
            expected, expected_ids = reference.brute(q, exact, 12, mask)
            assert (scores - expected).abs().max() <= 1e-5
            assert torch.equal(ids, expected_ids)
        assert ids.shape == (3, 12)
        assert mask is None or mask[ids].all()
        # In another order none scores more than the least that was found, but for the rounding of the query.
        rescored, again = search(queries, base, 12, rescore=x, oversample=25, allowed=mask)
        best, best_ids = reference.brute(queries, x, 12, mask)
        assert torch.equal(again, best_ids[:, : again.shape[1]])
        assert (rescored - best).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 33, 384, 600])
def test_floats_equal_the_definition(dtype, dim):
    x = torch.randn(270, dim).to(dtype)
    # Queries beyond the range of half precision, and one of zeros.
    queries = torch.randn(3, dim) * torch.tensor([1e-6, 1e6, 0.0])[:, None]
    scores, ids = search(queries, x, 40)
    expected, expected_ids = reference.brute(queries, x, 270)
    length = queries.norm(dim=1, keepdim=True).double() * x.double().norm(dim=1).max()
    assert ((scores - expected[:, :40]).abs() <= 1e-6 * length).all()
    assert torch.equal(scores.double().sort(dim=1, descending=True).values, scores.double())
    assert ((expected.gather(1, expected_ids.argsort(1).gather(1, ids)) - scores).abs() <= 1e-6 * length).all()
    assert torch.equal(ids[2], torch.arange(40))


@pytest.mark.parametrize("precision", ["float32", "float16", "fp8"])
def test_equal_float_rows_in_order_of_ids(precision):
    base = quantize(unit(5, 24).repeat(80, 1), precision)
    _, ids = search(unit(4, 24), base, 80)
    assert ((ids[:, 1:] - ids[:, :-1]) == 5).all()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dim", [33, 384])
def test_fp8_with_and_without_matrix_units_for_it(monkeypatch, native, dim):
    monkeypatch.setattr(kernels, "_takes_fp8", lambda device: native)
    queries, base = torch.randn(3, dim), quantize(torch.randn(200, dim), "fp8")
    scores, ids = search(queries, base, 30)
    expected, expected_ids = reference.brute(dequantize(quantize(queries, "fp8")), dequantize(base), 30)
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_named(dtype, value):
    base = unit(300, 8).to(dtype)
    base[200, 3] = value
    with pytest.raises(InputError, match="base: row 200 holds NaN or infinity"):
        search(unit(2, 8), base, 3)
    assert torch.isfinite(search(unit(2, 8), base, 3, allowed=torch.arange(300) != 200)[0]).all()


def test_empty():
    base = quantize(unit(20, 8), "int8")
    assert search(unit(2, 8), base[:0], 3)[0].shape == (2, 0)
    assert search(unit(2, 8)[:0], base, 3)[1].shape == (0, 3)
    scores, ids = search(unit(2, 8), base, 30, allowed=torch.zeros(20, dtype=torch.bool))
    assert (scores == -torch.inf).all()
    assert (ids == -1).all()


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1 << 17)
    u, codes = random_queries(200, 16, 8), random_codes(300, 16, 8)
    with LargestTensor() as largest:
        kernels.search(u, codes, 1, 8, 8)
    assert largest.bytes <= 1 << 17 < 200 * 128 * 8


class Reused:
    """Stands in for pinned memory and streams: each piece overwrites the last but one."""

    def __init__(self, base, step, device):
        self.sources = base.tensors()
        self.near = [None if x is None else torch.empty((step, *x.shape[1:]), dtype=x.dtype) for x in self.sources]

    def filled(self, first, stop):
        return [
            near if near is None else near[: stop - first].copy_(source[first:stop])
            for source, near in zip(self.sources, self.near)
        ]

    def release(self):
        for near in self.near:
            if near is not None:
                near.view(torch.uint8).fill_(255)


@pytest.mark.parametrize("precision", ["int8", "ubinary", "fp8", "float16"])
def test_a_base_in_pieces(monkeypatch, precision):
    base, queries, allowed = quantize(unit(700, 32), precision), unit(2, 32), torch.rand(700) < 0.1
    expected = [search(queries, base, 90, allowed=mask) for mask in (None, allowed)]
    pieces, best_keys = [], kernels._best_keys

    def streamed(queries, whole, k, dtype):
        def piece(part):
            pieces.append(len(part))
            return best_keys(queries, part, k, dtype)

        return streaming.best_keys(whole, k, whole.rows.device, piece)

    monkeypatch.setattr(kernels, "_best_keys", streamed)
    monkeypatch.setattr(streaming, "_Slot", Reused)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 150 * base.codes[:1].nbytes)
    for mask, right in zip((None, allowed), expected):
        assert all(torch.equal(a, b) for a, b in zip(search(queries, base, 90, allowed=mask), right))
    assert pieces == [150, 150, 150, 150, 100] * 2


def test_left_to_the_others(monkeypatch):
    base = quantize(unit(1100, 8), "int8")
    found = served_by_another(monkeypatch, lambda: search(unit(2, 8), base, 1025), "k = 1025, above 1024")
    assert found[0].shape == (2, 1025)
    monkeypatch.setenv("LEAFKERN_BACKEND", "triton")
    turned = unit(8, 50).t()
    found = served_by_another(monkeypatch, lambda: search(unit(2, 8), turned, 4), "entries are not adjacent")
    assert found[0].shape == (2, 4)


def test_bfloat16_is_left_to_the_reference():
    assert "bfloat16" in launch.candidates("retrieval", torch.device("cpu"), torch.bfloat16)["triton"]


@pytest.mark.parametrize("dim", [64, 384])
def test_the_scan_takes_the_whole_query(dim):
    # One tile is chosen, of three.
    query, a, b = close_rows(dim, 2.0**-10)
    base = torch.zeros(300, dim, dtype=torch.float16)
    base[5], base[290] = a, b
    assert (query.half() @ base.T).argmax() == 5
    assert search(query[None], base, 1)[1].item() == 290


@pytest.mark.parametrize("dim", [33, 100, 300])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_query_is_no_other_s_concern(dim, rows):
    # NaN beside it, which only a GPU lets in unchecked.
    queries, base = torch.randn(3, dim), torch.randn(rows, dim)
    expected = kernels.float_search(queries, base, 3)
    queries[1] = torch.nan
    found = kernels.float_search(queries, base, 3)
    for mine, theirs in zip(found, expected):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])


def test_one_row_of_a_wider_base():
    codes = torch.randint(0, 256, (9, 13), dtype=torch.uint8)[:1, :4]
    hold_integers(random_queries(1, 32, 1), codes, 1, 1, 1)


@pytest.mark.parametrize("form", FORMS)
def test_little_shared_memory(form, monkeypatch):
    monkeypatch.setattr(kernels, "shared_memory", lambda x: 99 << 10)
    hold_integers(random_queries(17, 384, form[1]), random_codes(300, 384, form[0]), 5, *form)


@pytest.mark.parametrize("queries", [1, 16, 17, 34, 100, 1000])
@pytest.mark.parametrize("bytes_each", [1 << 12, 5 << 20, 1 << 30])
def test_blocks_of_queries_keep_the_bound(queries, bytes_each):
    step = kernels.queries_at_once(queries, bytes_each)
    assert step % kernels.BLOCK == 0
    assert step == kernels.BLOCK or step * bytes_each <= kernels.WORKSPACE_BYTES
