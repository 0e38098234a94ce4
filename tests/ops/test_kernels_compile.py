"""Shipped Triton kernels compiled for sm_80, sm_90 and sm_100 without a GPU: no spill, shared memory within limits."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from leafkern.ops._core import cubin, launch

pytestmark = pytest.mark.compile

MOST_TESTED = 60

if not launch.interpreting():
    TESTED = [item for item in cubin.shipped() if item.tested]
else:
    TESTED = []


@pytest.fixture(scope="module")
def compiled():
    return {(c.operation, c.name, c.architecture): c for c in cubin.compile_all(TESTED)}


def test_the_list_is_whole_and_short():
    items = cubin.shipped()
    names = [(item.operation, item.name) for item in items]
    assert len(names) == len(set(names))
    assert 1 <= len(TESTED) <= MOST_TESTED
    with_kernels = {item.operation for item in items}
    assert {"attention", "contrastive", "distill", "norm", "pooling", "relative", "retrieval"} <= with_kernels
    assert {item.operation for item in TESTED} == with_kernels
    # Every kernel of an operation is tested in at least one configuration.
    assert {id(item.kernel) for item in TESTED} == {id(item.kernel) for item in items}


@pytest.mark.parametrize("architecture", cubin.ARCHITECTURES)
@pytest.mark.parametrize("item", TESTED, ids=lambda item: f"{item.operation} {item.name}")
def test_fits(compiled, item, architecture):
    found = compiled[item.operation, item.name, architecture]
    assert not found.problems, found
    assert 0 < found.registers <= 255
    assert found.warps == item.options["num_warps"]


def test_what_attention_launches_is_what_is_listed(launches):
    from leafkern.ops.attention import kernels

    lengths = torch.tensor([0, 512] + [20] * 10)
    cu_seqlens, tokens = lengths.cumsum(0).int(), int(lengths.sum())
    q, k, v = (torch.randn(tokens, 12, 32).bfloat16() for _ in range(3))
    out, lse = kernels.varlen_attention(q, k, v, cu_seqlens, 512, 0.2, -1, -1)
    kernels.varlen_attention_backward(out, q, k, v, out, lse, cu_seqlens, 512, 0.2, -1, -1)
    pooled, lse = kernels.attention_mean_pool(q, k, v, cu_seqlens, 512, 0.2)
    kernels.attention_mean_pool_backward(pooled, q, k, v, lse, cu_seqlens, 512, 0.2)
    assert len(launches) == 8
    # One text of one block, from a packed tensor; causal and long with four heads to one of keys and values.
    q, k, v = torch.randn(60, 3, 12, 32).bfloat16().unbind(1)
    kernels.varlen_attention(q, k, v, torch.tensor([0, 60], dtype=torch.int32), 60, 0.2, -1, -1)
    q, k = torch.randn(512, 8, 128).bfloat16(), torch.randn(512, 2, 128).bfloat16()
    bounds = torch.tensor([0, 512], dtype=torch.int32)
    out, lse = kernels.varlen_attention(q, k, k, bounds, 512, 0.1, -1, 0)
    kernels.varlen_attention_backward(out, q, k, k, out, lse, bounds, 512, 0.1, -1, 0)
    assert len(launches) == 12
    hold_listed(launches, "attention")


@triton.jit
def many_live_values(x, y, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    first = tl.load(x + columns)
    second = tl.load(x + WIDTH + columns)
    # Both sums need all of both rows, so nothing loaded can be dropped before they are known.
    tl.store(y + columns, first * tl.sum(second, 0) + second * tl.sum(first, 0))


@triton.jit
def product(x, y, out, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    rows, inner = tl.arange(0, SIDE), tl.arange(0, DEPTH)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, 4096, DEPTH):
        a = tl.load(x + rows[:, None] * 4096 + start + inner[None, :])
        b = tl.load(y + rows[None, :] * 4096 + start + inner[:, None])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * SIDE + rows[None, :], total)


def toy(width, warps):
    pointers = {"x": "*fp32:16", "y": "*fp32:16"}
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return cubin.Shipped("toy", "many live values", many_live_values, pointers, {"WIDTH": width}, options)


def toy_product(depth, stages):
    pointers = {"x": "*fp16:16", "y": "*fp16:16", "out": "*fp32:16"}
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}
    return cubin.Shipped("toy", "product", product, pointers, {"SIDE": 128, "DEPTH": depth}, options)


@pytest.mark.parametrize("architecture", cubin.ARCHITECTURES)
def test_a_spill_is_seen(architecture):
    narrow = cubin.compile_shipped(toy(1024, warps=4), architecture)
    assert not narrow.problems
    # 32,768 values on one warp, whose threads have 255 registers each at most.
    wide = cubin.compile_shipped(toy(16384, warps=1), architecture)
    assert wide.spilled > 0
    assert "spills" in wide.problems[0]


@pytest.mark.parametrize(("architecture", "limit"), [(80, 166_912), (90, 232_448), (100, 232_448)])
def test_too_much_shared_memory_is_seen(architecture, limit):
    # Tiles of 128 x 128 halves of both factors, 64 KiB, for three steps or four.
    large = cubin.compile_shipped(toy_product(128, stages=4 if architecture == 80 else 5), architecture)
    assert large.shared > limit
    assert f"bytes of shared memory; sm_{architecture} has {limit} per block" in " ".join(large.problems)
    small = cubin.compile_shipped(toy_product(64, stages=3), architecture)
    assert 0 < small.shared <= limit
    assert not small.problems


def test_wgmma_is_seen_where_it_is():
    assert [cubin.compile_shipped(toy_product(32, 3), a).wgmma for a in cubin.ARCHITECTURES] == [False, True, False]


def test_occupancy_that_the_launch_counts_on_is_checked():
    found = cubin.compile_shipped(toy(1024, warps=4), 90)
    assert found.resident >= 2
    assert not dataclasses.replace(found, programs=found.resident).problems
    crowded = dataclasses.replace(found, programs=found.resident + 1)
    assert "programs fit on a multiprocessor" in crowded.problems[0]


def test_a_signature_that_lacks_an_argument_is_refused():
    item = dataclasses.replace(toy(64, warps=1), signature={"x": "*fp32"})
    with pytest.raises(ValueError, match="neither type nor constant for y"):
        cubin.compile_shipped(item, 90)


class NoGPU:
    """Stands in for Triton's driver of a GPU of compute capability 9.0: enough to compile, not to launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_interface(self):
        return torch.cuda


@pytest.fixture
def launches(monkeypatch):
    """Kernels as the launches of this test would compile them."""
    compiled = []

    def instead_of_launching(kernel, grid):
        return lambda *args, **kwargs: compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

    monkeypatch.setattr(JITFunction, "__getitem__", instead_of_launching)
    monkeypatch.setattr(driver, "_active", NoGPU())
    return compiled


def asked(source, warps, maxnreg):
    aligned = {place: kinds for place, kinds in source.attrs.items() if kinds}
    return source.fn, source.signature, aligned, source.constants, warps, maxnreg


def hold_listed(launches, operation):
    items = [item for item in cubin.shipped() if item.operation == operation]
    listed = [asked(cubin.source(i), i.options["num_warps"], i.options.get("maxnreg")) for i in items]
    for kernel in launches:
        assert asked(kernel.src, kernel.metadata.num_warps, kernel.metadata.maxnreg) in listed, kernel.name


def test_what_pooling_launches_is_what_is_listed(launches):
    from leafkern.ops.pooling import kernels

    x, residual, weight, bias = (torch.randn(s).bfloat16() for s in [(90, 384), (90, 384), (384,), (384,)])
    cu_seqlens = torch.tensor([0, 40, 90], dtype=torch.int32)
    kernels.mean_pool_backward(torch.randn(2, 384), cu_seqlens, 90, torch.bfloat16)
    for layer in (True, False):
        kernels.norm_mean_pool(x, residual, weight, bias, cu_seqlens, 1e-5, layer)
        kernels.norm_mean_pool_backward(torch.randn(2, 384), x, residual, weight, cu_seqlens, 1e-5, layer)
    assert len(launches) == 7
    hold_listed(launches, "pooling")


def test_what_norm_launches_is_what_is_listed(launches):
    from leafkern.ops.norm import kernels

    x, residual, weight, bias = (torch.randn(s).bfloat16() for s in [(90, 384), (90, 384), (384,), (384,)])
    _, statistics = kernels.add_norm(x, residual, weight, bias, 1e-5, True, with_sum=False)
    kernels.add_norm_backward(x, None, x, residual, weight, statistics, True)
    _, total, statistics = kernels.add_norm(x, residual, weight, bias, 1e-5, False, with_sum=True)
    kernels.add_norm_backward(x, residual, total, None, weight, statistics, False)
    # Under autocast: a product in half precision, everything else in single.
    wide, parameter = torch.randn(90, 384), torch.randn(384)
    _, statistics = kernels.add_norm(x, wide, parameter, parameter, 1e-5, True, with_sum=False)
    kernels.add_norm_backward(wide, None, x, wide, parameter, statistics, True)
    inner, inner_bias = torch.randn(90, 1536).bfloat16(), torch.randn(1536).bfloat16()
    kernels.bias_gelu(inner, inner_bias, False)
    kernels.bias_gelu_backward(inner, inner, inner_bias, False)
    q, k, _ = torch.randn(90, 3, 6, 64).bfloat16().unbind(1)
    for backwards in (False, True):
        kernels.rotary(q, k, torch.randn(90, 64), torch.randn(90, 64), backwards)
    ids, cu_seqlens = torch.zeros(90, dtype=torch.int64), torch.tensor([0, 40, 90], dtype=torch.int32)
    tables = [torch.randn(rows, 384).bfloat16() for rows in (1000, 512, 2)]
    out, statistics, rows = kernels.embed_norm(ids, cu_seqlens, *tables, weight, bias, 1e-5, None)
    kernels.embed_norm_backward(out, statistics, rows, *tables, weight)
    # Each backward pass but that of rotary joins its parts.
    assert len(launches) == 17
    hold_listed(launches, "norm")


def test_what_relative_launches_is_what_is_listed(launches, monkeypatch):
    from leafkern.ops.relative import kernels

    student, teacher = torch.rand(2, 40, 40), torch.rand(40, 40)
    # Each width alone, of 780 pairs: one level.
    for mode in ((False, 0.0), (True, 0.0), (True, 0.1)):
        kernels.relative_scores(student, teacher, 0.015, *mode, True)
    kernels.relative_scores(student, teacher, 0.015, False, 0.0, False)
    assert len(launches) == 16
    # 130816 pairs: two levels.
    monkeypatch.setattr(kernels, "BRUTE_WORK", 0)
    kernels.relative_scores(torch.rand(1, 512, 512), torch.rand(512, 512), 0.015, False, 0.0, True)
    assert len(launches) == 16 + 4 + 1 + 2 * 3
    hold_listed(launches, "relative")


def test_what_distill_launches_is_what_is_listed(launches, monkeypatch):
    from leafkern.ops.distill import kernels

    monkeypatch.setattr(kernels, "gram_is_cheaper", lambda *_: False)
    monkeypatch.setattr(kernels, "relative_scores", lambda scores, *_: (torch.zeros(len(scores)), scores.clone()))
    targets = [torch.randn(256, 1024)]
    options = 0.015, False, 0.0
    for dtype, multiprocessors in ((torch.float32, 2), (torch.bfloat16, 2), (torch.float32, 132)):
        student = torch.randn(256, 1024).to(dtype)
        # Tiles of 64 where there are some for each multiprocessor, or of 32.
        monkeypatch.setattr(kernels, "multiprocessors", lambda x, count=multiprocessors: count)
        kernels.distill_loss(student, None, targets, 0, kernels.DIMS, (10.0, 200.0, 20.0), *options, [True])
        kernels.similarity_loss(student, None, targets, 0, kernels.DIMS, [False])
        kernels.similarity_loss(student[:128], student, targets, 128, kernels.DIMS, [True])
        kernels.alignment_loss(student, targets[0], 0, False, True)
    # Blocks of 128 rows, the first of which serves the rows below.
    monkeypatch.setattr(kernels, "BLOCK", 4 * (len(kernels.DIMS) + 1) * 256 * 128)
    kernels.similarity_loss(student, None, targets, 0, kernels.DIMS, [True])
    assert len(launches) == 3 * (5 + 3 + 5 + 2) + 7
    hold_listed(launches, "distill")


def test_what_contrastive_launches_is_what_is_listed(launches):
    from leafkern.ops.contrastive import kernels

    queries, positives = torch.randn(2, 96, 384).bfloat16()
    negatives, mixed = torch.randn(96, 3, 384).bfloat16(), torch.randn(96, 4, 384).bfloat16()
    needs = [True] * 4
    # Norms of three tensors, positives, scores, rows; weights of one chunk and their finish; the queries' finish.
    kernels.info_nce(
        queries, positives, negatives, None, None, None, 0, 0.01, 0.5, True, None, [384], [1.0], [True] * 3 + [False]
    )
    assert len(launches) == 3 + 1 + 2 + 1 + 2 * 2 + 1
    launches.clear()
    kernels.info_nce(queries, positives, None, mixed, None, None, 0, 0.01, 0.0, True, None, [384], [1.0], needs)
    assert len(launches) == 3 + 1 + 1 + 1 + 2 + 2 + 1
    ids, scores = torch.arange(96), torch.randn(96, 96)
    kernels.info_nce(queries, positives, None, None, ids, None, 0, 0.01, 0.0, True, 0.1, [384], [1.0], needs)
    kernels.soft_label_loss(queries, positives, scores, 96, 0.05, 0.05, [384], [1.0], [True, True])
    kernels.soft_label_loss(queries, mixed, scores[:, :4], 96, 0.05, 0.05, [384], [1.0], [True, True])
    hold_listed(launches, "contrastive")


def test_what_search_launches_is_what_is_listed(launches, monkeypatch):
    from leafkern.ops.retrieval import kernels

    few, many = torch.ones(1, 384, dtype=torch.int8), torch.ones(1000, 384, dtype=torch.int8)
    codes = torch.zeros(300, 384, dtype=torch.int8)
    kernels.search(few, codes, 10, 8, 8)
    kernels.search(many, codes, 10, 8, 8, torch.ones(300, dtype=torch.bool))
    bits = torch.zeros(300, 48, dtype=torch.uint8)
    kernels.search(few, bits, 10, 1, 1)
    kernels.search(few, bits, 10, 1, 8)
    kernels.search(many[:, :100].contiguous(), bits[:, :13].contiguous(), 10, 1, 8)
    assert len(launches) == 15
    kernels.float_search(few.float(), codes.half(), 10)
    for native in (False, True):
        monkeypatch.setattr(kernels, "_takes_fp8", lambda device, native=native: native)
        kernels.fp8_search(many.float(), codes.to(torch.float8_e4m3fn), torch.ones(300), 10)
    assert len(launches) == 24
    # Groups of tiles.
    kernels._best_tiles(torch.zeros(1, 5000), 10)
    kernels._best_tiles(torch.zeros(1, 5000, dtype=torch.int32), 10)
    assert len(launches) == 28
    hold_listed(launches, "retrieval")


def test_search_takes_the_instructions_that_it_counts_on(compiled):
    assert compiled["retrieval", "scan int8 D=384 Q=1000", 90].wgmma
    assert compiled["retrieval", "scan bits D=384 Q=1000", 90].wgmma
    item = next(item for item in TESTED if item.name == "bits D=384 P=7")
    kernel = triton.compile(cubin.source(item), target=GPUTarget("cuda", 90, 32), options=dict(item.options))
    # Seven planes of 16 words for each thread.
    assert kernel.asm["ptx"].count("popc.b32") == 7 * 16


def test_the_table_and_its_exit_status(tmp_path, capsys, monkeypatch):
    kernels = pytest.importorskip("leafkern.bench.kernels")
    join = next(item for item in cubin.shipped() if item.name.startswith("join") and item.tested)
    report = tmp_path / "kernels.json"
    assert kernels.main(["--json", str(report), "--only", join.name]) == 0
    shown = capsys.readouterr().out
    assert "join" in shown
    assert "sm_100" in shown
    assert {row["architecture"] for row in json.loads(report.read_text())["kernels"]} == {80, 90, 100}
    bad = cubin.compile_shipped(toy(16384, warps=1), 90)
    monkeypatch.setattr(cubin, "compile_all", lambda items, workers=None: [bad])
    assert kernels.main(["--only", join.name]) == 1
    assert "spills" in capsys.readouterr().out
