"""What tests of packed operations share: the bounds of sequences, and how far a result is from the right one."""

import torch


def bounds(lengths):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def relative(found, expected):
    """Frobenius error over the norm of what is right, in float64 on the CPU."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return (found - expected).norm() / expected.norm().clamp(min=1e-9)
