"""Input of the search benchmark: clustered unit vectors with many near ties, and the check of a top k."""

import numpy as np
import torch

SPREAD = 0.5  # norm of the noise around a unit cluster centre
PER_CLUSTER = 1000


def clustered(count: int, dim: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 unit vectors around count / 1000 centres, which are the same for every seed."""
    centres = _units(max(1, count // PER_CLUSTER), dim, np.random.default_rng(12345))
    return _around(centres, count, np.random.default_rng(seed))


def queries_for(count: int, dim: int, base_count: int, seed: int) -> torch.Tensor:
    """(count, dim) float32 unit vectors around the centres of `clustered(base_count, dim, ...)`."""
    centres = _units(max(1, base_count // PER_CLUSTER), dim, np.random.default_rng(12345))
    return _around(centres, count, np.random.default_rng(1_000_003 + seed))


def _units(count: int, dim: int, generator) -> torch.Tensor:
    x = torch.from_numpy(generator.standard_normal((count, dim), dtype=np.float32))
    return torch.nn.functional.normalize(x)


def _around(centres: torch.Tensor, count: int, generator) -> torch.Tensor:
    out = torch.empty(count, centres.shape[1])
    for start in range(0, count, 1 << 16):
        part = out[start : start + (1 << 16)]
        owner = torch.from_numpy(generator.integers(0, len(centres), len(part)))
        part.copy_(torch.nn.functional.normalize(centres[owner] + SPREAD * _units(*part.shape, generator)))
    return out


def exact_scores(left: torch.Tensor, codes: torch.Tensor, decode) -> torch.Tensor:
    """left (S, D) times decode(codes rows)ᵀ in float64, by blocks of rows: (S, N)."""
    parts = [left.double() @ decode(codes[start : start + 65536]).double().T for start in range(0, len(codes), 65536)]
    return torch.cat(parts, dim=1)


def wrong_top_k(ids, scores: torch.Tensor, k: int, tolerance: float) -> str | None:
    """What is wrong with ids (S, k) as the best of scores (S, N), or None; equal scores may stand in any order."""
    ids = torch.as_tensor(np.asarray(ids).astype(np.int64))
    expected = scores.topk(min(k, scores.shape[1]), dim=1).values
    if ids.shape != expected.shape:
        return f"ids of shape {tuple(ids.shape)}, expected {tuple(expected.shape)}"
    if ids.min() < 0 or ids.max() >= scores.shape[1]:
        return "an id outside the base"
    if any(len(set(row)) < len(row) for row in ids.tolist()):
        return "an id twice in one row"
    gap = (scores.gather(1, ids) - expected).abs().max().item()
    scale = max(1e-30, expected.abs().max().item())
    return None if gap <= tolerance * scale else f"scores {gap / scale:.2g} (relative) off the exact top k"
