"""Quantising beside numpy, torch and sentence-transformers' quantize_embeddings, against the bandwidth of a copy.

N = 1M clustered unit vectors of width 384 in float32, with the ranges given where codes need some ("own ranges": found
in the same call, a second pass). The vectors are read once and the codes written once: all else is overhead.
"""

import gc
from functools import cache

import numpy as np
import pytest
import torch

from leafkern.ops import calibrate, quantize
from leafkern.ops.quantization import code_width

from .harness import Case, Contestant, Work
from .search_data import clustered, clustered_blocks, reference_only

DIM = 384
ROWS = {"tiny": 2_000, "small": 50_000, "full": 1_000_000}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PRECISIONS = ("int8", "int4", "float16", "binary")
RANGED = ("int8", "int4")
ELEMENT_BYTES = {"int8": 1, "int4": 1, "float16": 2, "binary": 1}


@cache
def _vectors(rows: int, device: str) -> torch.Tensor:
    return clustered(rows, DIM, 0) if device == "cpu" else torch.cat(list(clustered_blocks(rows, DIM, 0, device)))


def _same(codes, right: torch.Tensor) -> str | None:
    codes = torch.as_tensor(codes).view(right.dtype)
    return None if torch.equal(codes, right) else f"{int((codes != right).sum())} codes differ from the definition"


def _numpy(precision: str, x: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
    """The formulas of the reference as a plain program would write them."""
    if precision == "float16":
        return x.astype(np.float16)
    if precision == "binary":
        return (np.packbits(x > 0, axis=1) - 128).astype(np.int8)
    low, high = ranges
    if precision == "int8":
        return (np.floor((x - low) / ((high - low) / 255)).clip(0, 255) - 128).astype(np.int8)
    level = np.rint((x - low) / ((high - low) / 15)).clip(0, 15).astype(np.uint8)
    return level[:, ::2] | (level[:, 1::2] << 4)


def _peers(precision: str, x: torch.Tensor, ranges: torch.Tensor | None, given: bool, right) -> list[Contestant]:
    array, known = x.numpy(), None if ranges is None else ranges.numpy()

    def check(codes, i):
        return _same(codes, right)

    def with_numpy(i):
        return _numpy(precision, array, known if given or known is None else np.stack([array.min(0), array.max(0)]))

    found = [Contestant("numpy", with_numpy, check)]
    if precision in ("int8", "binary"):
        try:
            from sentence_transformers import quantize_embeddings
        except ImportError:
            return found
        options = {"ranges": known} if given and known is not None else {}
        name = "sentence-transformers"
        found.append(Contestant(name, lambda i: quantize_embeddings(array, precision, **options), check))
    return found


def _case(precision: str, rows: int, given: bool, device: str, peers: bool) -> Case:
    x = _vectors(rows, device)
    ranges = calibrate(x, precision) if precision in RANGED else None

    def run(i):
        return quantize(x, precision, ranges=ranges if given else None).codes

    def by_reference(i):
        with reference_only("quantization"):
            return run(i)

    right = by_reference(0)
    ours = Contestant("leafkern", run, lambda codes, i: _same(codes, right), ours=True)
    definition = Contestant("torch (the reference)", by_reference, lambda codes, i: _same(codes, right))
    contestants = [ours, definition, *(_peers(precision, x, ranges, given, right) if peers and device == "cpu" else [])]
    written = rows * code_width(precision, DIM) * ELEMENT_BYTES[precision]
    # One subtraction, one division and one rounding each: far below what the bandwidth asks for.
    work = Work(0, "FLOP", ("fp32_gemm",), 4 * x.numel() + written, "copy", rows, "vector")
    shape = {"N": rows, "D": DIM}
    name = precision + ("" if given else "/own ranges")
    return Case("quantization", name, shape, work, contestants, device=device)


CELLS = [(precision, given) for precision in PRECISIONS for given in (True, False) if given or precision in RANGED]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "given"), CELLS, ids=[f"{p}-{'given' if g else 'own'}" for p, g in CELLS])
def test_quantization(bench, bench_session, precision, given, device):
    bench(_case(precision, ROWS[bench_session.size], given, device, bench_session.peers))
    gc.collect()
