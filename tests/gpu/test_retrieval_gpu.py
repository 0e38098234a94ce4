"""The Triton kernels of search on a GPU: the definition's integers, float scores, a base in CPU memory.

Of the tests named `small`, those of width 33 with floats or 129 rows are also run under compute-sanitizer
(bench/gpu.sh, stage "sanitizer").
"""

import pytest
import torch
from compare import matmul_setting
from retrieval_cases import FORMS, close_rows, random_codes, random_queries, unit

from leafkern.errors import InputError
from leafkern.ops import dequantize, quantize, search
from leafkern.ops.retrieval import integer_search, kernels, reference, streaming

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

PRECISIONS = ["float32", "float16", "bfloat16", "fp8"]


def of_precision(x, precision):
    return x.bfloat16() if precision == "bfloat16" else quantize(x, precision)


def hold_integers(u, codes, k, bits, query_bits, allowed=None):
    """On the GPU, from its memory and from the CPU's, what the reference gives on the CPU."""
    expected = reference.blocked(u, codes, k, bits, allowed)
    near = None if allowed is None else allowed.cuda()
    for base, mask in ((codes.cuda(), near), (codes, allowed)):
        found = integer_search(u.cuda(), base, k, bits, query_bits, mask)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def hold_floats(queries, base, k):
    """Scores within 1e-3 of those of the definition, which the returned rows have."""
    exact = base.double() if isinstance(base, torch.Tensor) else dequantize(base).double()
    q = dequantize(quantize(queries, "fp8")) if getattr(base, "precision", "") == "fp8" else queries
    scores, ids = (x.cpu() for x in search(queries.cuda(), base.to("cuda"), k))
    all_scores = q.double() @ exact.T
    best = all_scores.topk(min(k, len(exact)), dim=1).values
    length = queries.norm(dim=1, keepdim=True) * exact.norm(dim=1).max()
    assert ((scores - best).abs() <= 1e-3 * length).all()
    assert ((scores - all_scores.gather(1, ids)).abs() <= 2e-6 * length).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [33, 64, 100, 384, 1024])
@pytest.mark.parametrize(("rows", "queries", "k"), [(1, 1, 1), (129, 17, 200), (2000, 3, 10), (2000, 130, 10)])
def test_small_integers(form, dim, rows, queries, k):
    bits, query_bits = form
    codes = random_codes(rows, dim, bits, signed=rows == 129, narrow=True)
    u = random_queries(queries, dim, query_bits)
    hold_integers(u, codes, k, bits, query_bits)
    hold_integers(u, codes, k, bits, query_bits, torch.rand(rows) < 0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 100, 1024])
def test_many_rows(form, k):
    hold_integers(random_queries(40, 384, form[1]), random_codes(300_001, 384, form[0], narrow=True), k, *form)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("dim", [33, 384, 1000])
@pytest.mark.parametrize("queries", [1, 16, 20, 300])
def test_small_floats(dtype, dim, queries):
    hold_floats(torch.randn(queries, dim) * 7, of_precision(torch.randn(3000, dim), dtype), 10)


# What lies between neighbours of 1 in the type that the matrix units round a query to.
@pytest.mark.parametrize(("dtype", "step"), [("float32", 2.0**-10), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
@pytest.mark.parametrize("dim", [384, 1024])
@pytest.mark.parametrize("queries", [1, 100])
def test_the_scan_takes_the_whole_query(dtype, step, dim, queries):
    query, a, b = close_rows(dim, step)
    base = torch.rand(20_000, dim) / 4
    base[5], base[19_000] = a, b
    _, ids = search(query.cuda().expand(queries, dim), base.to("cuda", getattr(torch, dtype)), 1)
    assert (ids == 19_000).all()


def test_fp8_is_summed_in_float32():
    # Products of one sign, whose sum in few bits falls short; beside it, one that is lower by 0.2 %, made of few terms.
    base = torch.rand(20_000, 1024) / 8
    base[5] = 0
    base[5, :32] = 0.998 * 32 / 2
    base[19_000] = 0.5
    query = torch.full((100, 1024), 1.0)
    _, ids = search(query.cuda(), quantize(base, "fp8").to("cuda"), 1)
    scores = query[:1].double() @ dequantize(quantize(base, "fp8")).double().T
    assert (ids == scores.argmax()).all()


def test_tf32_when_torch_may():
    with matmul_setting("fp32_precision", "tf32"):
        hold_floats(unit(30, 384), unit(5000, 384), 10)


def test_rows_beyond_two_to_the_31_bytes():
    # 64-bit addresses: the best rows lie past what 32 bits reach.
    rows = (1 << 31) // 384 + 5000
    codes = torch.zeros(rows, 384, dtype=torch.int8, device="cuda")
    codes[-3:] = torch.tensor([1, 3, 2], dtype=torch.int8, device="cuda")[:, None]
    for number in (1, 200):
        u = torch.ones(number, 384, dtype=torch.int8, device="cuda")
        scores, ids = integer_search(u, codes, 4, 8, 8)
        assert ids[0].tolist() == [rows - 2, rows - 1, rows - 3, 0]
        assert scores[-1].tolist() == [3 * 384, 2 * 384, 384, 0]


@pytest.mark.parametrize("precision", ["int8", "ubinary", "fp8", "float16"])
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_from_cpu_memory(monkeypatch, precision, masked):
    base, queries = quantize(unit(50_000, 384), precision), unit(9, 384).cuda()
    levels = [quantize(unit(50_000, 384), "int8"), unit(50_000, 384).half()]
    allowed = torch.rand(50_000) < 0.2 if masked else None
    near = None if allowed is None else allowed.cuda()
    on_gpu = [level.to("cuda") for level in levels]
    monkeypatch.setattr(streaming, "PIECE_BYTES", 7001 * base.codes[:1].nbytes)
    # Twice, for the memory of the pieces is used again.
    for _ in range(2):
        for mine, other in ((None, None), (levels, on_gpu)):
            found = search(queries, base, 50, rescore=mine, allowed=allowed)
            expected = search(queries, base.to("cuda"), 50, rescore=other, allowed=near)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("number", [1, 1000])
def test_memory_is_bounded(number):
    codes = torch.randint(-128, 128, (4_000_000, 64), dtype=torch.int8, device="cuda")
    u = torch.randint(-63, 64, (number, 64), dtype=torch.int8, device="cuda")
    integer_search(u, codes, 10, 8, 8)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    integer_search(u, codes, 10, 8, 8)
    # All scores would be 16 GB.
    assert torch.cuda.max_memory_allocated() - before <= 2 * kernels.WORKSPACE_BYTES


def test_the_host_does_not_wait():
    base, queries = quantize(unit(5000, 384), "int8").to("cuda"), unit(9, 384).cuda()
    allowed, rows = torch.rand(5000, device="cuda") < 0.5, unit(5000, 384).cuda()
    search(queries, base, 10, rescore=rows, allowed=allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        search(queries, base, 10, rescore=rows, allowed=allowed)
        search(queries, rows, 10)
        search(queries, quantize(rows, "fp8"), 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_graph_capture():
    base, queries = quantize(unit(5000, 384), "int8").to("cuda"), unit(9, 384).cuda()
    expected = search(queries, base, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search(queries, base, 10)
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_what_is_not_finite_is_named_when_asked(monkeypatch):
    base = unit(3000, 16).cuda()
    base[2000, 3] = torch.nan
    assert torch.isnan(search(unit(2, 16).cuda(), base, 3)[0][:, 0]).all()
    monkeypatch.setenv("LEAFKERN_CHECK", "1")
    monkeypatch.delenv("LEAFKERN_BACKEND")
    with pytest.raises(InputError, match="base: row 2000 holds NaN"):
        search(unit(2, 16).cuda(), base, 3)
