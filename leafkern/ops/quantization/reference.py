"""Quantization in plain PyTorch, in blocks of rows."""

import torch

# LEAF's teacher's corpus-independent limits for unit vectors (arXiv 2509.12539).
UNIT_LIMITS = {"int8": 0.3, "int4": 0.18}
LEVELS = {"int8": 255, "int4": 15}
FP8_MAX = 448.0
CODE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
    "binary": torch.int8,
    "ubinary": torch.uint8,
}
_BLOCK_ELEMENTS = 1 << 22


def unit_ranges(dim: int, precision: str, device: torch.device) -> torch.Tensor:
    limit = torch.full((dim,), UNIT_LIMITS[precision], device=device)
    return torch.stack([-limit, limit])


def _steps(ranges: torch.Tensor, levels: int) -> torch.Tensor:
    # A tensor divisor: CUDA turns division by a Python number into a multiplication, which rounds differently.
    return (ranges[1] - ranges[0]) / torch.full_like(ranges[0], levels)


def factors(precision: str, ranges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) of int8 or int4 codes for ranges (2, D)."""
    low, step = ranges[0], _steps(ranges, LEVELS[precision])
    return step, torch.where(step == 0, low, low + step * (128.5 if precision == "int8" else 8.0))


def divisors(precision: str, ranges: torch.Tensor) -> torch.Tensor:
    """What distances from the lowest value are divided by: the steps, 1 for those that are 0."""
    step = _steps(ranges, LEVELS[precision])
    return torch.where(step == 0, 1, step)


def extremes(x: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value of each dimension of x (N, D), float32 (2, D)."""
    return torch.stack([x.amin(0), x.amax(0)]).float()


def _linear_codes(x: torch.Tensor, precision: str, ranges: torch.Tensor) -> torch.Tensor:
    level = (x - ranges[0]) / divisors(precision, ranges)
    level = level.floor() if precision == "int8" else level.round()
    return level.clamp(0, LEVELS[precision])


def _pack(values: torch.Tensor, per_byte: int, shifts: list[int]) -> torch.Tensor:
    """uint8 values of 8/per_byte bits, `per_byte` neighbours in each byte, zeros beyond the row's end."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % per_byte))
    packed = torch.zeros((len(values), padded.shape[1] // per_byte), dtype=torch.uint8, device=values.device)
    for place, shift in enumerate(shifts):
        packed |= padded[:, place::per_byte] << shift
    return packed


def pack_bits(x: torch.Tensor) -> torch.Tensor:
    """x > 0 as bits, first dimension highest: (N, D) -> (N, ceil(D/8)) uint8, as numpy.packbits."""
    return _pack((x > 0).to(torch.uint8), 8, [7, 6, 5, 4, 3, 2, 1, 0])


def _codes(x: torch.Tensor, precision: str, ranges: torch.Tensor | None) -> torch.Tensor:
    if precision in ("float32", "float16"):
        return x.to(getattr(torch, precision), copy=True)
    if precision == "int8":
        return (_linear_codes(x, precision, ranges) - 128).to(torch.int8)
    if precision == "int4":
        return _pack(_linear_codes(x, precision, ranges).to(torch.uint8), 2, [0, 4])
    bits = pack_bits(x)
    return bits if precision == "ubinary" else (bits ^ 0x80).view(torch.int8)


def _fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(1)
    # A tensor divisor, as in `_steps`.
    scale = scale / torch.full_like(scale, FP8_MAX)
    return (x.float() / torch.where(scale == 0, 1, scale)[:, None]).clamp(-FP8_MAX, FP8_MAX).to(
        torch.float8_e4m3fn
    ), scale


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(max(1, _BLOCK_ELEMENTS // x.shape[1]))


def fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of x (N, D), in blocks of rows."""
    codes, scales = zip(*(_fp8(block) for block in _blocks(x)))
    return torch.cat(codes), torch.cat(scales)


def codes(x: torch.Tensor, precision: str, ranges: torch.Tensor | None) -> torch.Tensor:
    """Codes of x (N, D), in blocks of rows, of any precision but fp8; ranges (2, D) float32 for int8 and int4."""
    return torch.cat([_codes(block, precision, ranges) for block in _blocks(x)])


def unpack(codes: torch.Tensor, precision: str, dim: int) -> torch.Tensor:
    """Codes as one value per dimension, (N, D): int4 in [-8, 7] and bits as +-1, int8; other codes as they are."""
    if precision == "int4":
        nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
        return nibbles[:, :dim].to(torch.int8) - 8
    if precision in ("binary", "ubinary"):
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
        # binary is ubinary - 128, which is the highest bit flipped.
        packed = codes.view(torch.uint8) ^ 0x80 if precision == "binary" else codes
        bits = ((packed[:, :, None] >> places) & 1).flatten(1)
        return bits[:, :dim].to(torch.int8) * 2 - 1
    return codes
