"""W_out: the Dense head from the student's pooled states to the teacher's width, inside the saved model."""

import torch

from leafkern.errors import InputError
from leafkern.nn import Dense, SentenceModel


def add_head(module: SentenceModel, dim: int) -> None:
    """Puts a bias-free Dense, width -> `dim`, in place of whatever heads `module` has."""
    head = Dense(module.width, dim, bias=False)
    module.dense = torch.nn.ModuleList([head.to(next(module.parameters()).device)])


def least_squares(pooled: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight W (D_t, D_s) that minimises ‖pooled Wᵀ − targets‖² + λ ‖W‖², in float64.

    pooled (N, D_s), targets (N, D_t); λ = ridge · N · the mean square of `pooled`'s entries. Solved by the normal
    equations (XᵀX + λI) Wᵀ = XᵀT.
    """
    if len(pooled) != len(targets) or len(pooled) == 0:
        raise InputError(f"head: {len(pooled)} pooled states and {len(targets)} targets; expected equal, not zero")
    width = pooled.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    mixed = torch.zeros(width, targets.shape[1], dtype=torch.float64)
    for states, vectors in zip(pooled.split(4096), targets.split(4096)):
        states = states.double()
        gram += states.T @ states
        mixed += states.T @ vectors.double()
    gram.diagonal().add_(ridge * gram.trace().item() / width)
    return torch.linalg.solve(gram, mixed, left=True).T
