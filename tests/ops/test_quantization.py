"""quantize, dequantize, calibrate: the formulas in numpy float64, and sentence-transformers' own codes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leafkern.errors import InputError
from leafkern.ops import Quantized, calibrate, dequantize, quantize
from leafkern.ops.quantization import PRECISIONS, code_width

WIDTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def vectors(n, dim, seed=None):
    generator = torch.Generator()
    generator.manual_seed(int(np.random.randint(1 << 31)) if seed is None else seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    dim=st.sampled_from(WIDTHS),
    seed=st.integers(0, 10**6),
    precision=st.sampled_from(["int8", "binary", "ubinary"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_codes_equal_sentence_transformers(n, dim, seed, precision, dtype):
    theirs = pytest.importorskip("sentence_transformers.util.quantization").quantize_embeddings
    x = vectors(n, dim, seed).to(dtype)
    x[:, dim // 2] = 0.25
    ranges = None
    if precision == "int8":
        ranges = calibrate(vectors(50, dim, seed + 1), "int8")
        ranges[:, dim // 2] = 0.25
        x[0] *= 3  # outside the ranges
        if n > 1:
            x[1, dim // 2] = 2.5  # not the constant that the ranges promise
    expected = theirs(x.numpy(), precision, ranges=None if ranges is None else ranges.numpy())
    codes = quantize(x, precision, ranges=ranges).codes.numpy()
    assert codes.dtype == expected.dtype
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("dim", WIDTHS)
def test_linear_codes_follow_the_formula(precision, levels, dim):
    x = vectors(150, dim)
    low, high = x.min(0).values.double(), x.max(0).values.double()
    quantized = quantize(x, precision)
    step = (high - low) / levels
    torch.testing.assert_close(quantized.scale.double(), step, rtol=1e-6, atol=0)
    offset = low + step * (128.5 if precision == "int8" else 8)
    torch.testing.assert_close(quantized.offset.double(), offset, rtol=1e-5, atol=1e-7)
    # Within half a step of the truth: both roundings are to the middle of a bin.
    assert ((dequantize(quantized) - x).abs() <= step * 0.5001 + 1e-6).all()


def test_int4_layout():
    ranges = torch.tensor([[-8.0] * 3, [7.0] * 3])
    quantized = quantize(torch.tensor([[-8.0, 7.0, 0.0], [1.4, -1.6, 99.0]]), "int4", ranges=ranges)
    assert quantized.codes.tolist() == [[0xF0, 0x08], [0x69, 0x0F]]
    assert dequantize(quantized).tolist() == [[-8.0, 7.0, 0.0], [1.0, -2.0, 7.0]]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_constant_dimension_comes_back_exactly(precision):
    x = vectors(120, 5)
    x[:, 3] = 0.125
    quantized = quantize(x, precision)
    assert quantized.scale[3] == 0
    assert quantized.offset[3] == 0.125
    assert (dequantize(quantized)[:, 3] == 0.125).all()
    if precision == "int8":
        assert (quantized.codes[:, 3] == -128).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dim", [16, 384])
@pytest.mark.parametrize("n", [1, 2, 99])
def test_few_vectors_do_not_collapse(precision, dim, n):
    x = vectors(n, dim)
    back = dequantize(quantize(x, precision))
    cosine = torch.nn.functional.cosine_similarity(back, x)
    assert (cosine > (0.99 if precision == "int8" else 0.9)).all()


def test_few_vectors_that_are_not_unit_need_ranges():
    x = vectors(5, 8)
    x[3] *= 2
    with pytest.raises(InputError, match=r"row 3 has norm 2 .* ranges=calibrate"):
        quantize(x, "int8")
    assert len(quantize(x, "int8", ranges=calibrate(x, "int8"))) == 5
    assert len(quantize(vectors(100, 8) * 7, "int8")) == 100


@each_precision
def test_empty_and_round_trip(precision):
    assert dequantize(quantize(torch.empty(0, 9), precision)).shape == (0, 9)
    x = vectors(130, 9)
    quantized = quantize(x, precision)
    assert quantized.codes.shape == (130, code_width(precision, 9))
    back = dequantize(quantized)
    assert back.dtype == torch.float32
    if precision in ("binary", "ubinary"):
        assert torch.equal(back, torch.where(x > 0, 1.0, -1.0))
    else:
        tolerance = {"float32": 0, "float16": 1e-3, "int8": 0.01, "int4": 0.1, "fp8": 0.07}[precision]
        assert (back - x).abs().max() <= tolerance
    assert torch.equal(dequantize(quantized[3:7]), back[3:7])
    rows = torch.tensor([5, 1, 5])
    assert torch.equal(dequantize(quantized[rows]), back[rows])
    assert torch.equal(dequantize(quantized[x[:, 0] > 0]), back[x[:, 0] > 0])
    assert torch.equal(dequantize(quantized.to("cpu")), back)


@each_precision
def test_prefix_is_a_view_of_the_first_dimensions(precision):
    whole = quantize(vectors(9, 20), precision)
    for dim in (8, 16, 20):
        first = whole.prefix(dim)
        assert (first.dim, len(first)) == (dim, 9)
        assert first.codes.data_ptr() == whole.codes.data_ptr()
        assert torch.equal(dequantize(first), dequantize(whole)[:, :dim])
    for dim in (0, 21, True, 8.0):
        with pytest.raises(InputError, match="dim: expected an int from 1 to 20"):
            whole.prefix(dim)
    if precision in ("int4", "binary", "ubinary"):
        with pytest.raises(InputError, match=f"dim: {precision} codes end only at multiples of"):
            whole.prefix(7)


def test_quantized_does_not_alias_its_input():
    x = vectors(3, 4)
    quantized = quantize(x, "float32")
    x.zero_()
    assert (quantized.codes != 0).any()


def test_fp8_rows_of_zeros_and_extremes():
    x = torch.stack([torch.zeros(16), torch.full((16,), 1e30), vectors(1, 16)[0] * 1e-20])
    back = dequantize(quantize(x, "fp8"))
    assert (back[0] == 0).all()
    torch.testing.assert_close(back[1:], x[1:], rtol=0.07, atol=1e-22)


def test_unit_ranges():
    x = torch.empty(0, 3)
    assert calibrate(x, "int8", method="unit").tolist() == [[pytest.approx(-0.3)] * 3, [pytest.approx(0.3)] * 3]
    assert calibrate(x, "int4", method="unit")[1].tolist() == [pytest.approx(0.18)] * 3
    # Width 64 has coordinates twice as large as width 256.
    scale = quantize(vectors(1, 64), "int8").scale
    torch.testing.assert_close(scale, torch.full((64,), 1.2 / 255))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize([1.0], "int8"), r"x: expected a torch.Tensor, got list"),
        (lambda: quantize(torch.ones(3), "int8"), r"x: expected 2 dimensions, got shape \(3,\)"),
        (lambda: quantize(torch.ones(1, 3, dtype=torch.int8), "int8"), r"x: expected a floating-point tensor"),
        (lambda: quantize(torch.ones(1, 0), "float32"), r"x: expected at least one dimension"),
        (lambda: quantize(torch.ones(1, 3), "in8"), r"unknown name 'in8'; did you mean 'int8'"),
        (lambda: quantize(torch.ones(1, 3), "binary", ranges=torch.ones(2, 3)), r"ranges: binary takes none"),
        (lambda: quantize(torch.ones(1, 3), "int8", ranges=torch.ones(2, 4)), r"ranges: expected shape \(2, 3\)"),
        (lambda: quantize(torch.ones(1, 2), "int8", ranges=torch.tensor([[0.0, 1], [1, 0]])), r"dimension 1 runs from"),
        (lambda: quantize(torch.tensor([[1.0], [float("nan")]]), "binary"), r"x: row 1 holds NaN or infinity"),
        (lambda: quantize(torch.tensor([[65504.0], [1e5]]), "float16"), r"x: row 1 does not fit float16"),
        (
            lambda: quantize(torch.tensor([[1.0], [1e39]], dtype=torch.float64), "float32"),
            r"row 1 does not fit float32",
        ),
        (lambda: quantize(torch.tensor([[1e300]], dtype=torch.float64), "fp8"), r"x: row 0 does not fit fp8"),
        (lambda: calibrate(torch.ones(1, 3), "int8"), r"at least 2 rows"),
        (lambda: calibrate(torch.ones(3, 3), "binary"), r"precision: unknown name 'binary'"),
        (lambda: calibrate(torch.ones(3, 3), "int8", method="minmx"), r"did you mean 'minmax'"),
        (lambda: calibrate(torch.tensor([[1.0], [float("inf")]]), "int8"), r"x: row 1 holds NaN or infinity"),
        (lambda: dequantize(torch.ones(1, 3)), r"expected a Quantized, got Tensor"),
        (lambda: quantize(vectors(2, 3), "float32")[0], r"use q\[i : i \+ 1\] for one row"),
        (lambda: Quantized(torch.zeros(2, 3, dtype=torch.int8), None, None, "int8", 3), r"scale: expected a torch"),
        (lambda: Quantized(torch.zeros(2, 3, dtype=torch.uint8), None, None, "ubinary", 25), r"take 4 columns, got 3"),
        (lambda: Quantized(torch.zeros(2, 3), torch.ones(3), None, "float32", 3), r"scale: float32 has none"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@each_precision
@pytest.mark.parametrize("autocast", [False, True])
def test_under_compile_and_autocast(precision, autocast):
    x = vectors(120, 9)

    def there_and_back(x):
        quantized = quantize(x * 1.0, precision)
        return quantized.codes, dequantize(quantized)

    torch.compiler.reset()
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    expected = there_and_back(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for found in (there_and_back(x), compiled(x)):
            for left, right in zip(found, expected, strict=True):
                assert left.dtype == right.dtype
                assert torch.equal(left.float(), right.float())
