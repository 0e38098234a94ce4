"""alignment_loss against its definition, its gradients, its edge cases, and torch.compile."""

import pytest
import torch
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import alignment_loss
from leafkern.ops.distill.reference import KINDS, brute_alignment_loss


def pair(rows, width, dtype=torch.float64):
    student = torch.randn(rows, width, dtype=dtype).requires_grad_()
    return student, torch.randn(rows, width, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 13), (32, 384)])
def test_alignment_equals_definition(kind, dtype, rows, width):
    student, teacher = pair(rows, width, dtype)
    loss = alignment_loss(student, teacher, kind=kind)
    (grad,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = brute_alignment_loss(exact, teacher.double(), kind)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    error = (grad.double() - expected_grad).norm()
    assert error <= TOLERANCE[dtype] * expected_grad.norm() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_gradcheck(kind):
    student, teacher = pair(5, 4)
    assert torch.autograd.gradcheck(lambda s: alignment_loss(s, teacher, kind=kind), student)


def test_unit_vectors_relation():
    student, teacher = (torch.nn.functional.normalize(x, dim=1) for x in pair(9, 20))
    torch.testing.assert_close(alignment_loss(student, teacher), 2 * alignment_loss(student, teacher, kind="cosine"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_finite_where_the_formula_is_not_smooth(kind):
    teacher = torch.randn(3, 6)
    student = teacher.clone()
    student[1] = 0
    student.requires_grad_()
    alignment_loss(student, teacher, kind=kind).backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[[0, 2]].abs() < 1e-6).all()
    if kind == "cosine":
        assert (student.grad[1] == 0).all()


def test_cosine_below_the_clamp():
    teacher = torch.randn(1, 3, dtype=torch.float64)
    student = torch.tensor([[1e-13, 2e-13, -1e-13]], dtype=torch.float64, requires_grad=True)
    alignment_loss(student, teacher, kind="cosine").backward()
    other = student.detach().clone().requires_grad_()
    brute_alignment_loss(other, teacher, "cosine").backward()
    torch.testing.assert_close(student.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_of_no_rows(kind):
    student = torch.zeros(0, 8, requires_grad=True)
    loss = alignment_loss(student, torch.zeros(0, 8), kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 8)


def test_alignment_teacher_gets_no_gradient():
    student, teacher = pair(4, 5)
    teacher.requires_grad_()
    alignment_loss(student, teacher).backward()
    assert teacher.grad is None


def test_alignment_nan_of_the_student_propagates():
    student, teacher = pair(4, 5)
    with torch.no_grad():
        student[2, 1] = torch.nan
    assert alignment_loss(student, teacher).isnan()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_alignment_bad_teacher_row_is_named(bad):
    student, teacher = pair(4, 5)
    teacher[3] = bad
    with pytest.raises(InputError, match="teacher: row 3"):
        alignment_loss(student, teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 4), "l2sq", r"\(2, 3\) and \(2, 4\)"),
        (torch.zeros(2), torch.ones(2), "l2sq", "student: expected 2 dimensions"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3), "l2sq", "student: expected a floating-point"),
        (torch.zeros(2, 3), [[1.0]], "l2sq", "teacher: expected a torch.Tensor"),
        (torch.zeros(2, 3), torch.ones(2, 3), "l2_sq", "did you mean 'l2sq'"),
    ],
)
def test_alignment_wrong_arguments(student, teacher, kind, message):
    with pytest.raises(InputError, match=message):
        alignment_loss(student, teacher, kind=kind)


def test_alignment_of_one_process_is_that_of_all_ranks():
    student, teacher = pair(4, 5)
    assert torch.equal(alignment_loss(student, teacher, gather="ranks"), alignment_loss(student, teacher))
    with pytest.raises(InputError, match=r"gather.*did you mean 'ranks'"):
        alignment_loss(student, teacher, gather="rank")


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_alignment_opcheck(kind):
    student, teacher = pair(5, 6, torch.float32)
    torch.library.opcheck(torch.ops.leafkern.alignment_loss.default, (student, teacher, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_compiled_equals_eager(kind):
    student, teacher = pair(6, 7, torch.float32)
    compiled = torch.compile(lambda s, t: alignment_loss(s, t, kind=kind), fullgraph=True, backend="aot_eager")
    eager_loss, loss = alignment_loss(student, teacher, kind=kind), compiled(student, teacher)
    assert torch.equal(eager_loss, loss)
    assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (eager_loss, loss)))
