"""Input of the search and quantisation benchmarks: clustered unit vectors with many near ties; the check of a top k."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SPREAD = 0.5  # norm of the noise around a unit cluster centre
PER_CLUSTER = 1000
BLOCK = 1 << 16


def clustered(count: int, dim: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 unit vectors around count / 1000 centres, which are the same for every seed."""
    return _around(_centres(count, dim), count, np.random.default_rng(seed))


def queries_for(count: int, dim: int, base_count: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 unit vectors around the centres of `clustered(base_count, dim, ...)`."""
    return _around(_centres(base_count, dim), count, np.random.default_rng(1_000_003 + seed))


def clustered_blocks(
    count: int, dim: int, seed: int, device: torch.device | str, block: int = 1 << 20
) -> Iterator[torch.Tensor]:
    """Vectors as `clustered` describes them (other ones), made on `device` in blocks of rows."""
    centres = _centres(count, dim).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for start in range(0, count, block):
        rows = min(block, count - start)
        owner = torch.randint(len(centres), (rows,), generator=generator, device=device)
        noise = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, device=device))
        yield torch.nn.functional.normalize(centres[owner] + SPREAD * noise)


def _centres(count: int, dim: int) -> torch.Tensor:
    return _units(max(1, count // PER_CLUSTER), dim, np.random.default_rng(12345))


def _units(count: int, dim: int, generator) -> torch.Tensor:
    x = torch.from_numpy(generator.standard_normal((count, dim), dtype=np.float32))
    return torch.nn.functional.normalize(x)


def _around(centres: torch.Tensor, count: int, generator) -> torch.Tensor:
    out = torch.empty(count, centres.shape[1])
    for start in range(0, count, BLOCK):
        part = out[start : start + BLOCK]
        owner = torch.from_numpy(generator.integers(0, len(centres), len(part)))
        part.copy_(torch.nn.functional.normalize(centres[owner] + SPREAD * _units(*part.shape, generator)))
    return out


def exact_scores(left: torch.Tensor, codes: torch.Tensor, decode=lambda x: x) -> torch.Tensor:
    """left (S, D) times decode(codes rows)ᵀ in float64, by blocks of rows: (S, N)."""
    left = left.double()
    return torch.cat([left @ decode(part).double().T for part in codes.split(BLOCK)], dim=1)


def wrong_ids(ids, rows: int) -> str | None:
    """What is wrong with ids (S, k) as different rows of a base of `rows`, or None."""
    ids = np.asarray(ids)
    if ids.min() < 0 or ids.max() >= rows:
        return "an id outside the base"
    if any(len(set(row)) < len(row) for row in ids.tolist()):
        return "an id twice in one row"
    return None


def wrong_top_k(ids, scores: torch.Tensor, k: int, tolerance: float) -> str | None:
    """What is wrong with ids (S, k) as the best of scores (S, N), or None; equal scores may stand in any order."""
    ids = torch.as_tensor(np.asarray(ids).astype(np.int64), device=scores.device)
    expected = scores.topk(min(k, scores.shape[1]), dim=1).values
    if ids.shape != expected.shape:
        return f"ids of shape {tuple(ids.shape)}, expected {tuple(expected.shape)}"
    if wrong := wrong_ids(ids.cpu(), scores.shape[1]):
        return wrong
    gap = (scores.gather(1, ids) - expected).abs().max().item()
    scale = max(1e-30, expected.abs().max().item())
    return None if gap <= tolerance * scale else f"scores {gap / scale:.2g} (relative) off the exact top k"


def wrong_refinement(ids, coarse: torch.Tensor, fine: torch.Tensor, k: int, oversample: int, tolerance: float):
    """What is wrong with ids (S, k) as the best by `fine` of the best oversample·k by `coarse`, both (S, N); or None.

    tolerance: of the coarse scores, relative to the largest; which of two nearer ones is a candidate is left open.
    """
    if wrong := wrong_ids(ids, coarse.shape[1]):
        return wrong
    ids = torch.as_tensor(np.asarray(ids).astype(np.int64))
    edge = coarse.topk(min(oversample * k, coarse.shape[1]), dim=1).values[:, -1:]
    slack = tolerance * coarse.abs().max()
    if (coarse.gather(1, ids) < edge - slack).any():
        return "an id that the first stage does not choose"
    last = fine.gather(1, ids).amin(1, keepdim=True) + 1e-5 * fine.abs().max()
    left = (coarse > edge + slack) & (fine > last)
    return "a better candidate is left out" if left.scatter(1, ids, False).any() else None


def found_share(ids, scores: torch.Tensor, k: int) -> float:
    """The share of the exact top k of scores (S, N) that ids (S, k) holds: recall."""
    expected = scores.topk(min(k, scores.shape[1]), dim=1).indices.tolist()
    return sum(len(set(a) & set(b)) for a, b in zip(np.asarray(ids).tolist(), expected)) / sum(map(len, expected))


@contextmanager
def reference_only(operation: str) -> Iterator[None]:
    """leafkern's operation by its PyTorch reference."""
    before = os.environ.get("LEAFKERN_BACKEND")
    os.environ["LEAFKERN_BACKEND"] = f"{operation}=reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LEAFKERN_BACKEND"]
        else:
            os.environ["LEAFKERN_BACKEND"] = before
