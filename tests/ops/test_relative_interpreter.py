"""The Triton kernels of the relative similarity loss under Triton's interpreter: TRITON_INTERPRET=1 pytest -m
interpreter. Comparisons with the definition are of counts, exact."""

import itertools

import pytest
import torch
from compare import served_by_another
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relative_cases import CASES, MODES, any_scores, assert_same, brute_with_gradient, noise, scores_of

pytest.importorskip("triton")

from leafkern.ops import relative_similarity_loss
from leafkern.ops.relative import autograd
from leafkern.ops.relative.autograd import relative_scores
from leafkern.ops.relative.reference import blocked_relative

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

FORMS = ["all pairs", "sorts"]
# Every mode where it matters, and each of the other cases with one of them.
CASES_AND_MODES = [
    *itertools.product(("tied", "constant_teacher"), MODES),
    *zip([case for case in CASES if case not in ("tied", "constant_teacher")], itertools.cycle(MODES)),
]


@pytest.fixture(params=FORMS)
def form(monkeypatch, request):
    """One form at every size, cut small: several tiles, levels, blocks, and groups of blocks."""
    from leafkern.ops.relative import kernels

    monkeypatch.setattr(kernels, "BRUTE_WORK", 1 << 60 if request.param == "all pairs" else 0)
    monkeypatch.setattr(kernels, "TREE", kernels.Tree(digit=3, leaf=2, block=4, group=1))
    monkeypatch.setattr(kernels, "TILE", {"ROWS": 32, "COLUMNS": 16})
    monkeypatch.setattr(kernels, "SCAN", {"ROWS": 2, "COLUMNS": 4})
    monkeypatch.setattr(kernels, "BLOCK", 64)
    return request.param


def hold(student, teacher, margin, mode):
    """Of scores (K, B, B): every width against the definition."""
    losses, gradients = relative_scores(student, teacher, margin, *mode, True)
    assert losses.dtype == gradients.dtype == student.dtype
    for each, loss, gradient in zip(student, losses, gradients, strict=True):
        expected = brute_with_gradient(each, teacher, margin, *mode)
        assert_same((loss, gradient), expected, student.dtype, (margin, mode))
        assert (gradient.tril() == 0).all()


@pytest.mark.parametrize(("case", "mode"), CASES_AND_MODES)
def test_equals_brute(case, mode, form):
    student, teacher = scores_of(case, 10, torch.float32)
    hold(student[None], teacher, 0.015, mode)


@pytest.mark.parametrize("batch", range(5))
def test_small_batches_and_several_widths(batch, form):
    student, teacher = noise(batch, torch.float32), noise(batch, torch.float32)
    hold(torch.stack([student, -student]), teacher, 0.0, MODES[batch % 4])


@pytest.mark.parametrize("mode", MODES)
def test_as_it_is_cut_for_a_gpu(mode, monkeypatch):
    from leafkern.ops.relative import kernels

    student, teacher = scores_of("tied", 12, torch.float32)
    for work in (0, kernels.BRUTE_WORK):
        monkeypatch.setattr(kernels, "BRUTE_WORK", work)
        hold(student[None], teacher, 0.5, mode)


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]])
def test_float64(mode, form):
    student, teacher = scores_of("tied_teacher", 8)
    hold(student[None] + 1e-9 * noise(8), teacher, 0.05, mode)


def test_comparisons_are_in_float64(form):
    # Margin and differences that float32 would round to one value, on either side.
    high = torch.tensor(0.3).item()
    student, teacher = torch.zeros(4, 4), noise(4, torch.float32)
    student[0, 1:] = torch.tensor([high, high, 0.0])
    student[1, 2:] = torch.tensor([1e-9, -1e-9])
    student[2, 3] = -0.0
    student = torch.stack([student, -student])
    hold(student, teacher, high + 5e-10, MODES[0])
    hold(student, -teacher, high + 5e-10, MODES[0])
    # A window likewise.
    hold(torch.stack([teacher, -teacher]), student[0], 0.5, (False, high + 5e-10))


def test_widths_in_groups(monkeypatch, form):
    from leafkern.ops.relative import kernels

    student, teacher = torch.stack([noise(6, torch.float32) for _ in range(3)]), noise(6, torch.float32)
    together = relative_scores(student, teacher, 0.015, False, 0.0, True)
    monkeypatch.setattr(kernels, "GROUP_BYTES", 2 * kernels.WIDTH_BYTES * 15)
    for found, expected in zip(relative_scores(student, teacher, 0.015, False, 0.0, True), together):
        assert torch.equal(found, expected)
    losses, empty = relative_scores(student, teacher, 0.015, False, 0.0, False)
    assert torch.equal(losses, together[0])
    assert empty.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_scores_that_are_not_finite(bad, form):
    student, teacher = torch.stack([noise(7, torch.float32) for _ in range(2)]), noise(7, torch.float32)
    student[0].fill_diagonal_(torch.nan)
    student[1, 0, 1] = bad
    teacher[2, 0] = torch.nan
    loss, gradient = relative_scores(student, teacher, 0.015, False, 0.0, True)
    expected = brute_with_gradient(student[0], teacher, 0.015, False, 0.0)
    assert_same((loss[0], gradient[0]), expected, torch.float32, bad)
    assert loss[1].isnan()
    assert gradient[1].triu(1).isnan().sum() == 21
    assert (gradient.tril() == 0).all()
    teacher[0, 2] = bad
    loss, gradient = relative_scores(student, teacher, 0.015, True, 0.1, True)
    assert loss.isnan().all()
    assert gradient.isnan().sum() == 42


def test_strides_are_free(form):
    student, teacher = noise(9, torch.float32), noise(9, torch.float32)
    expected = relative_scores(student[None], teacher, 0.015, False, 0.0, True)
    found = relative_scores(student.triu(1).T.contiguous().T[None], teacher.triu(1), 0.015, False, 0.0, True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_scores(form, data):
    student, teacher, margin, mode = any_scores(data, 6)
    hold(student[None], teacher, margin, mode)


def test_more_rows_than_are_counted_fall_back(monkeypatch):
    monkeypatch.setattr(autograd, "MAX_BATCH", 5)
    student, teacher = noise(6, torch.float32), noise(6, torch.float32)

    def call():
        return relative_scores(student[None], teacher, 0.015, False, 0.0, True)

    loss, gradient = served_by_another(monkeypatch, call, "B = 6, above 5")
    assert_same((loss[0], gradient[0]), blocked_relative(student, teacher, 0.015, False, 0.0), torch.float32, "blocked")


@pytest.mark.parametrize("needs", [True, False])
def test_the_operation(needs, monkeypatch):
    student, teacher = torch.randn(8, 5, requires_grad=needs), torch.randn(8, 6)
    found = relative_similarity_loss(student, teacher, dims=[5, 2])
    monkeypatch.setenv("LEAFKERN_BACKEND", "reference")
    expected = relative_similarity_loss(student, teacher, dims=[5, 2])
    torch.testing.assert_close(found, expected)
    if needs:
        gradients = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
        torch.testing.assert_close(*gradients)
