"""Embeddings in fewer bits: `quantize`, `dequantize`, `calibrate` and the container `Quantized`."""

from dataclasses import dataclass

import torch

from leafkern.errors import InputError, unknown_name
from leafkern.ops._core.backend import choose
from leafkern.ops._core.checks import check_finite_rows, check_floating, check_same_device, check_tensor, values_checked
from leafkern.ops._core.native import unavailable
from leafkern.ops._core.registration import without_autocast
from leafkern.ops.quantization import native, reference

PRECISIONS = ("float32", "float16", "int8", "int4", "fp8", "binary", "ubinary")
CALIBRATION_ROWS = 100

_CODES_PER_BYTE = {"int4": 2, "binary": 8, "ubinary": 8}


def code_width(precision: str, dim: int) -> int:
    """Columns of the codes of vectors of width `dim`."""
    per = _CODES_PER_BYTE.get(precision, 1)
    return (dim + per - 1) // per


@dataclass(frozen=True, eq=False)
class Quantized:
    """N vectors of width `dim` as codes.

    codes: float32, float16 (N, D) of that type; int8 (N, D) int8; fp8 (N, D) float8_e4m3fn; int4 (N, ceil(D/2))
    uint8, even dimension in the low nibble, nibble = c + 8; ubinary (N, ceil(D/8)) uint8, first dimension in the
    highest bit; binary the same bytes - 128, int8. Unused nibbles and bits at a row's end are 0.
    scale: float32, (D,) for int8 and int4, (N,) for fp8, else None. offset: float32 (D,) for int8 and int4, else None.
    Codes may be memory-mapped: nothing here reads them all.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    precision: str
    dim: int

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        check_tensor("codes", self.codes, ndim=2, dtypes=(reference.CODE_DTYPES[self.precision],))
        width = code_width(self.precision, self.dim)
        if self.dim < 1 or self.codes.shape[1] != width:
            raise InputError(
                f"codes: {self.precision} vectors of width {self.dim} take {width} columns, got {self.codes.shape[1]}"
            )
        per_dimension = self.precision in ("int8", "int4")
        self._check_factor("scale", self.scale, self.dim if per_dimension else len(self), self.precision == "fp8")
        self._check_factor("offset", self.offset, self.dim, False)
        check_same_device(codes=self.codes, scale=self.scale, offset=self.offset)

    def _check_factor(self, name: str, factor: object, size: int, also: bool) -> None:
        if not also and self.precision not in ("int8", "int4"):
            if factor is not None:
                raise InputError(f"{name}: {self.precision} has none, got {type(factor).__name__}")
            return
        check_tensor(name, factor, ndim=1, dtypes=(torch.float32,))
        if len(factor) != size:
            raise InputError(f"{name}: expected {size} entries, got {len(factor)}")

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows) -> "Quantized":
        """The vectors of `rows`: a slice, or a 1-D tensor of row numbers or booleans."""
        if isinstance(rows, int):
            raise InputError("rows: expected a slice or a 1-D tensor, got an int; use q[i : i + 1] for one row")
        scale = self.scale[rows] if self.precision == "fp8" else self.scale
        return Quantized(self.codes[rows], scale, self.offset, self.precision, self.dim)

    def prefix(self, dim: int) -> "Quantized":
        """The first `dim` dimensions of each vector: views, nothing is copied (the factor of fp8 rows stays theirs).

        Errors (InputError): dim outside 1..`self.dim`, or less than all and inside a byte of int4 or binary codes.
        """
        per = _CODES_PER_BYTE.get(self.precision, 1)
        if not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= self.dim:
            raise InputError(f"dim: expected an int from 1 to {self.dim}, got {dim!r}")
        if dim < self.dim and dim % per:
            raise InputError(f"dim: {self.precision} codes end only at multiples of {per}, got {dim}")
        factors = (self.scale, self.offset)
        if self.precision in ("int8", "int4"):
            factors = tuple(factor[:dim] for factor in factors)
        return Quantized(self.codes[:, : code_width(self.precision, dim)], *factors, self.precision, dim)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their factors."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.offset) if part is not None)

    def to(self, device: torch.device | str) -> "Quantized":
        moved = (None if part is None else part.to(device) for part in (self.codes, self.scale, self.offset))
        return Quantized(*moved, self.precision, self.dim)


@without_autocast
def calibrate(x: torch.Tensor, precision: str, *, method: str = "minmax") -> torch.Tensor:
    """Ranges for `quantize`: float32 (2, D), the lowest and highest value of each dimension.

    x: floating-point (N, D). precision: "int8" or "int4" (the others need no ranges).
    method: "minmax", of the rows of x, as sentence-transformers does: at least 2 rows, better 100 or more;
    "unit", for unit-norm vectors, independent of x: -0.3 to 0.3 at 8 bits, -0.18 to 0.18 at 4 bits (the limits that
    LEAF's teacher publishes, arXiv 2509.12539).
    Errors: `InputError` for another precision or method, fewer than 2 rows for "minmax", NaN or infinity in x.
    Backends: as `quantize`.
    """
    check_floating("x", x, ndim=2)
    if precision not in reference.UNIT_LIMITS:
        raise unknown_name("precision", precision, reference.UNIT_LIMITS)
    if method == "unit":
        return reference.unit_ranges(x.shape[1], precision, x.device)
    if method != "minmax":
        raise unknown_name("method", method, ("minmax", "unit"))
    if len(x) < 2:
        raise InputError(
            f'x: "minmax" needs at least 2 rows to tell dimensions apart, got {len(x)}; use method="unit" '
            "for unit-norm vectors, or calibrate on more rows"
        )
    return _extremes(x.detach().resolve_neg(), precision, "x")


def _backend(x: torch.Tensor, precision: str) -> str:
    candidates = {"reference": None}
    # Under torch.compile the reference is traced.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if precision in native.PRECISIONS and x.dtype in native.TYPES:
            candidates = {"native": unavailable(), **candidates}
    return choose("quantization", candidates)


def _extremes(x: torch.Tensor, precision: str, name: str) -> torch.Tensor:
    found = native.extremes(x) if _backend(x, precision) == "native" else None
    if found is None:
        check_finite_rows(name, x)
        found = reference.extremes(x)
    return found


def default_ranges(x: torch.Tensor, precision: str, name: str = "x") -> torch.Tensor:
    """The ranges that `quantize` takes for x, called `name` in errors, when it is given none."""
    if len(x) >= CALIBRATION_ROWS:
        return _extremes(x, precision, name)
    check_finite_rows(name, x)
    if values_checked(x):
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        bad = ((norms - 1).abs() > 0.01).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"{name}: row {bad[0]} has norm {norms[bad[0]]:.4g} and there are fewer than {CALIBRATION_ROWS} rows "
                "to take ranges from; give ranges=calibrate(more_rows, precision), or unit-norm rows"
            )
    widening = max(1.0, (256 / x.shape[1]) ** 0.5)
    return reference.unit_ranges(x.shape[1], precision, x.device) * widening


def _checked_ranges(ranges: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    check_floating("ranges", ranges, ndim=2)
    if ranges.shape != (2, x.shape[1]):
        raise InputError(f"ranges: expected shape (2, {x.shape[1]}), min and max; got {tuple(ranges.shape)}")
    check_same_device(x=x, ranges=ranges)
    ranges = ranges.float()
    if values_checked(ranges):
        span = ranges[1] - ranges[0]
        bad = (~(span >= 0) | ~torch.isfinite(span)).nonzero().flatten().tolist()
        if bad:
            low, high = ranges[:, bad[0]].tolist()
            raise InputError(f"ranges: dimension {bad[0]} runs from {low} to {high}; expected finite min <= max")
    return ranges


def check_fits(name: str, values: torch.Tensor, precision: str, first_row: int = 0) -> None:
    """Names the first row, counted from `first_row`, of which finite vectors became infinite as `values` (N, ...)."""
    if not values_checked(values) or values.numel() == 0:
        return
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bad.any():
        row = first_row + int(bad.nonzero()[0])
        raise InputError(
            f"{name}: row {row} does not fit {precision}; scale the vectors down or take a wider precision"
        )


@without_autocast
def quantize(x: torch.Tensor, precision: str, *, ranges: torch.Tensor | None = None) -> Quantized:
    """Vectors as codes of `precision`: "float32", "float16", "int8", "int4", "fp8", "binary" or "ubinary".

    x: floating-point (N, D). ranges: (2, D), min and max of each dimension, for int8 and int4 only (`calibrate`).
    Values outside are clipped. Without ranges: at least 100 rows give their own min and max; fewer are taken as
    unit-norm vectors, with the "unit" limits of `calibrate` times max(1, sqrt(256/D)).

    int8: step = (max - min)/255, code = clip(floor((x - min)/step), 0, 255) - 128; scale = step, offset = the middle
    of the lowest bin. Codes equal those of sentence-transformers' `quantize_embeddings` for the same ranges.
    int4: step = (max - min)/15, rounded to nearest. fp8: per row, scale = max|x|/448.
    binary, ubinary: bit = x > 0. A constant dimension (max = min) gets scale 0 and offset min.

    Errors: `InputError` for NaN or infinity in x or values too large for the precision (the row is named), ranges
    that are misshapen, reversed or not needed, and fewer than 100 rows of which one's norm is not 1 +- 0.01 without
    ranges.

    Backends: native (CPU; int8, int4, float16, binary and ubinary of float32, float16 or bfloat16, however strided; one
    pass over x, and one before it for ranges of its own), else the PyTorch reference, in blocks.
    """
    check_floating("x", x, ndim=2)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if x.shape[1] < 1:
        raise InputError("x: expected at least one dimension, got shape " + str(tuple(x.shape)))
    needs_ranges = precision in reference.UNIT_LIMITS
    if ranges is not None and not needs_ranges:
        raise InputError(f"ranges: {precision} takes none; only int8 and int4 do")
    x = x.detach().resolve_neg()  # the kernels read memory
    codes, scale, offset = None, None, None
    if needs_ranges:
        ranges = _checked_ranges(default_ranges(x, precision) if ranges is None else ranges, x)
        scale, offset = reference.factors(precision, ranges)
    if _backend(x, precision) == "native":
        codes = native.codes(x, precision, ranges)
    if codes is None:
        check_finite_rows("x", x)
        if precision == "fp8":
            codes, scale = reference.fp8(x)
            check_fits("x", scale[:, None], precision)
        else:
            codes = reference.codes(x, precision, ranges)
            if codes.is_floating_point():
                check_fits("x", codes, precision)
    return Quantized(codes, scale, offset, precision, x.shape[1])


@without_autocast
def dequantize(quantized: Quantized) -> torch.Tensor:
    """The vectors that the codes stand for: float32 (N, D).

    int8, int4: offset + scale * code. fp8: scale * code. binary, ubinary: +1 for a set bit, else -1.
    """
    if not isinstance(quantized, Quantized):
        raise InputError(f"quantized: expected a Quantized, got {type(quantized).__name__}")
    values = reference.unpack(quantized.codes, quantized.precision, quantized.dim).float()
    if quantized.precision == "fp8":
        return values * quantized.scale[:, None]
    if quantized.scale is not None:
        return quantized.offset + quantized.scale * values
    return values
