"""Native quantize and calibrate: bit for bit what the reference gives, whatever the layout or number of threads."""

import os

import pytest
import torch
from retrieval_cases import before_a_guard

from leafkern.errors import BackendError, InputError
from leafkern.ops import calibrate, quantize
from leafkern.ops._core.native import library
from leafkern.ops.quantization import native, reference

pytestmark = pytest.mark.skipif(library()[0] is None, reason="leafkern._C is not built")
each_precision = pytest.mark.parametrize("precision", native.PRECISIONS)
each_type = pytest.mark.parametrize("dtype", native.TYPES)


def ranges_for(dim, precision):
    """Ranges that some values leave, one dimension constant; None for what takes none."""
    if precision not in reference.LEVELS:
        return None
    ranges = reference.extremes(torch.randn(4, dim))
    ranges[:, 0] = 0.25
    return ranges


def same_as_reference(x, precision, ranges, threads=1):
    found, expected = native.codes(x, precision, ranges, threads), reference.codes(x, precision, ranges)
    assert found.dtype == expected.dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@each_precision
@each_type
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (2, 32), (7, 33), (3, 65), (5, 384), (3, 1029), (2, 2050)])
def test_codes_equal_the_reference(poisoned, isa, precision, dtype, shape):
    x = torch.randn(shape).to(dtype)
    x[0, 0] = 0.0
    x[-1, -1] = -0.0
    same_as_reference(x, precision, ranges_for(shape[1], precision))


@each_precision
@each_type
def test_views(isa, precision, dtype):
    x = torch.randn(70, 90).to(dtype)
    for view in (x[3:60, 5:70], x.T, x[::3, ::2], x[:1].expand(9, 90), x[:0]):
        same_as_reference(view, precision, ranges_for(view.shape[1], precision))


@each_precision
@pytest.mark.skipif(not hasattr(os, "fork"), reason="mprotect is POSIX")
def test_reads_nothing_beyond_the_last_row(isa, precision):
    for dtype in native.TYPES:
        for shape in [(1, 1), (3, 33), (5, 384), (2, 1029)]:
            x = torch.randn(shape).to(dtype)
            x = before_a_guard(x.view(torch.int16)).view(dtype) if dtype == torch.bfloat16 else before_a_guard(x)
            same_as_reference(x, precision, ranges_for(shape[1], precision))
            assert torch.equal(native.extremes(x), reference.extremes(x))


@each_precision
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_number_of_threads(precision, threads):
    x = torch.randn(9001, 130)  # 2^17 entries are worth a thread
    same_as_reference(x, precision, ranges_for(130, precision), threads)
    assert torch.equal(native.extremes(x, threads), reference.extremes(x))


@each_type
@pytest.mark.parametrize("shape", [(2, 1), (101, 33), (5, 2050)])
def test_extremes_equal_the_reference(poisoned, isa, dtype, shape):
    x = torch.randn(shape).to(dtype)
    for view in (x, x[1:, ::2], x.T):
        assert torch.equal(native.extremes(view), reference.extremes(view))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_right(isa, dtype):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    if dtype == torch.bfloat16:
        x = x[x.abs() < 65000]
    for values in (x[:, None], x[None]):
        same_as_reference(values, "float16", None)
        same_as_reference(values, "int8", reference.unit_ranges(values.shape[1], "int8", "cpu"))


def test_every_rounding_to_half(isa):
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(side)) for side in (0.0, 1e9)]
    x = torch.cat([halves, middles, *around, torch.tensor([1e-10, 1e-45, 65519.996])])
    same_as_reference(torch.stack([x, -x]), "float16", None)
    for large in (65520.0, -65520.0, 1e38):
        assert native.codes(torch.tensor([[0.0] * 40 + [large]]), "float16", None) is None


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_bins_are_cut_where_the_reference_cuts(isa, precision):
    # Values on and one float beside each boundary, and far outside.
    low, high = torch.rand(2, 64) - 1.2, torch.rand(64) + 0.2
    ranges = torch.stack([low[0], high])
    steps = reference.divisors(precision, ranges)
    cuts = ranges[0] + steps * torch.arange(-1, reference.LEVELS[precision] + 2, 0.5)[:, None]
    x = torch.cat([cuts, torch.nextafter(cuts, torch.tensor(9.0)), torch.nextafter(cuts, torch.tensor(-9.0))])
    x = torch.cat([x, torch.full((1, 64), 3e38), torch.full((1, 64), -3e38), torch.full((1, 64), 1e-45)])
    same_as_reference(x, precision, ranges)
    widest = torch.tensor([[-1.7e38], [1.7e38]]).expand(2, 64)
    same_as_reference(x, precision, widest)
    tiny = torch.tensor([[0.0], [1e-44]]).expand(2, 64)
    same_as_reference(x, precision, tiny)


@each_precision
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, 40, 69])
def test_what_is_not_finite_is_named(isa, precision, bad, place):
    x = torch.randn(300, 70)
    ranges = ranges_for(70, precision)
    x[123, place] = bad
    for dtype in native.TYPES:
        with pytest.raises(InputError, match="x: row 123 holds NaN or infinity"):
            quantize(x.to(dtype), precision, ranges=ranges)
    if ranges is not None:
        for call in (lambda: quantize(x, precision), lambda: calibrate(x, precision)):
            with pytest.raises(InputError, match="x: row 123 holds NaN or infinity"):
                call()


@each_precision
def test_native_serves(monkeypatch, precision):
    monkeypatch.setenv("LEAFKERN_BACKEND", "quantization=native")
    x = torch.randn(120, 9)
    ranges = calibrate(x, "int8") if precision in reference.LEVELS else None
    assert torch.equal(quantize(x, precision).codes, reference.codes(x, precision, ranges))
    with pytest.raises(BackendError, match="can't serve this call"):
        quantize(x.double(), precision)


@each_precision
def test_lazily_negated_views(precision):
    # Memory holds the other sign.
    x = torch.randn(120, 24)
    negated = torch._neg_view(x)
    assert torch.equal(quantize(negated, precision).codes, quantize(-x, precision).codes)
    if precision in reference.LEVELS:
        assert torch.equal(calibrate(negated, precision), calibrate(-x, precision))
