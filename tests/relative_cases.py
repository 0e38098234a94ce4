"""Scores, modes and the exact comparison, for the tests of the relative similarity loss."""

import itertools

import torch
from hypothesis import strategies as st

from leafkern.ops.relative.reference import brute_relative

# (reference_ties, min_gap)
MODES = list(itertools.product([False, True], [0.0, 0.07]))


def noise(batch, dtype=torch.float64):
    return torch.randn(batch, batch, dtype=dtype) / 10


def coarse(scores):
    return (scores * 20).round() / 20


CASES = {
    "random": lambda x, y: (x, y),
    "tied_teacher": lambda x, y: (x, coarse(y)),
    "tied": lambda x, y: (coarse(x), coarse(y)),
    "constant_teacher": lambda x, y: (x, torch.full_like(y, 0.3)),
    "constant_student": lambda x, y: (torch.full_like(x, 0.3), y),
    "sorted": lambda x, y: (y.clone(), y),
    "reversed": lambda x, y: (-y, y),
    "all_violated": lambda x, y: (x * 1e-4, y),
    "none_violated": lambda x, y: (
        1e3 * torch.arange(y.numel(), dtype=y.dtype).view_as(y),
        y.view(-1).sort()[0].view_as(y),
    ),
    "signed_zeros": lambda x, y: (x, torch.where(y.abs() < 0.1, y.sign() * 0.0, y)),
    "duplicate_rows": lambda x, y: tuple(z[:, i][i] for z in (x, y) for i in [torch.arange(len(z)) // 2]),
}


def scores_of(case, batch, dtype=torch.float64):
    return CASES[case](noise(batch, dtype), noise(batch, dtype))


def brute_with_gradient(student, teacher, margin, reference_ties, min_gap):
    """Loss and integer counts of the definition, in float64."""
    exact = student.double().requires_grad_()
    loss = brute_relative(exact, teacher, margin, reference_ties, min_gap)
    (gradient,) = torch.autograd.grad(loss, exact)
    return loss.detach(), as_counts(gradient)


def as_counts(gradient):
    pairs = gradient.shape[-1] * (gradient.shape[-1] - 1) // 2
    counts = gradient.double() * max(pairs * (pairs - 1) // 2, 1)
    # float32 holds the quotient to 24 bits.
    assert ((counts - counts.round()).abs() <= 1e-6 * counts.abs() + 1e-6).all()
    return counts.round().long()


def assert_same(found, expected, dtype, what):
    loss, gradient = found
    expected_loss, expected_counts = expected
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    assert abs(loss.double() - expected_loss) <= tolerance * abs(expected_loss) + 1e-15, what
    assert torch.equal(as_counts(gradient), expected_counts), what


def any_scores(data, largest):
    """Drawn by hypothesis: student, teacher (B, B) float32, B <= largest, margin, and mode."""
    batch = data.draw(st.integers(0, largest))
    pairs = batch * (batch - 1) // 2
    value = st.sampled_from([-1.0, -0.5, -0.015, -0.0, 0.0, 0.015, 0.25, 1.0]) | st.floats(-1, 1, width=32)
    student, teacher = torch.zeros(batch, batch), torch.zeros(batch, batch)
    rows, columns = torch.triu_indices(batch, batch, 1)
    for scores in (student, teacher):
        scores[rows, columns] = torch.tensor(data.draw(st.lists(value, min_size=pairs, max_size=pairs)))
    margin = data.draw(st.sampled_from([0.0, 0.015, 0.5]) | st.floats(0, 3))
    return (
        student,
        teacher,
        margin,
        data.draw(st.tuples(st.booleans(), st.sampled_from([0.0, 0.015, 0.25]) | st.floats(0, 2))),
    )
