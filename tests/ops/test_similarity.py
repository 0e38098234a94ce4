"""similarity_loss against its definition: values, gradients, teachers, prefixes, blocks, shares of rows, edge cases."""

import itertools

import pytest
import torch
from compare import LargestTensor, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import distill_loss, similarity_loss
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops.distill import reference
from leafkern.ops.distill.reference import brute_similarity_loss

OP = torch.ops.leafkern.similarity_loss.default


def pair(rows, width, teacher_width, dtype=torch.float64):
    student = torch.randn(rows, width, dtype=dtype).requires_grad_()
    return student, torch.randn(rows, teacher_width, dtype=dtype)


def value_and_gradient(function, student):
    student = student.detach().clone().requires_grad_()
    loss = function(student)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def assert_near(actual, expected, dtype):
    """Values and gradients within the table's relative error; where they vanish, within rounding of numbers near 1."""
    floor = 1e-13 if dtype == torch.float64 else 1e-6
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm() + floor


@pytest.fixture
def three_rows_a_block(monkeypatch):
    monkeypatch.setitem(reference._BLOCK, "cpu", (3, 1 << 20))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [None, [13], [13, 7, 1], [5]])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 17])
def test_equals_definition(dtype, dims, rows):
    student, teacher = pair(rows, 13, 9, dtype)
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=dims), student)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    target = normalize_rows(teacher.double())
    expected = value_and_gradient(lambda s: brute_similarity_loss(s, target, dims or [13]), student.double())
    assert_near((loss, grad), expected, dtype)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(0, 12),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.integers(1, 13),
    data=st.data(),
)
def test_any_shape_and_block(dtype, rows, widths, block, data):
    dims = data.draw(st.lists(st.integers(1, widths[0]), min_size=1, max_size=3, unique=True).map(sorted))[::-1]
    student, teacher = pair(rows, *widths, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference._BLOCK, "cpu", (block, 1 << 20))
        actual = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=dims), student)
    target = normalize_rows(teacher.double())
    assert_near(actual, value_and_gradient(lambda s: brute_similarity_loss(s, target, dims), student.double()), dtype)


@pytest.mark.parametrize("dims", [None, [4, 2]])
def test_gradcheck(dims, three_rows_a_block):
    student, teacher = pair(7, 4, 6)
    assert torch.autograd.gradcheck(lambda s: similarity_loss(s, [teacher, teacher[:, :2]], dims=dims), student)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [0.3, 2.0], [0.0, 1.0]])
def test_teachers_scores_are_averaged(weights):
    student, first = pair(6, 5, 9)
    second = torch.randn(6, 3, dtype=torch.float64)
    u, v = weights or (1.0, 1.0)
    scores = [x @ x.T for x in (normalize_rows(first), normalize_rows(second))]
    s = normalize_rows(student)
    expected = (s @ s.T - (u * scores[0] + v * scores[1]) / (u + v)).square().mean()
    torch.testing.assert_close(similarity_loss(student, [first, second], teacher_weights=weights), expected)


def test_teacher_weights_are_relative():
    student, first = pair(6, 5, 9)
    teachers = [first, torch.randn(6, 3, dtype=torch.float64)]
    losses = [similarity_loss(student, teachers, teacher_weights=w) for w in ([1.0, 3.0], [0.25, 0.75], [3.0, 1.0])]
    torch.testing.assert_close(losses[0], losses[1])
    assert (losses[0] - losses[2]).abs() > 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_teacher_in_a_list(dtype):
    student, teacher = pair(6, 5, 9, dtype)
    assert torch.equal(similarity_loss(student, [teacher], teacher_weights=[0.7]), similarity_loss(student, teacher))


@pytest.mark.parametrize("rows", [2, 40, 600])
def test_teacher_as_student_is_exactly_zero(rows):
    student = torch.randn(rows, 24)
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, student), student)
    assert loss == 0
    assert (grad == 0).all()
    assert similarity_loss(student, student, dims=[23]) > 0


def test_prefixes_equal_slices():
    student, teacher = pair(8, 12, 7)
    actual = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=[9, 4, 1]), student)
    expected = value_and_gradient(
        lambda s: sum(similarity_loss(s[:, :d].contiguous(), teacher) for d in (9, 4, 1)) / 3, student
    )
    assert (actual[1][:, 9:] == 0).all()
    assert_near(actual, expected, torch.float64)


def test_permutation_of_the_batch(three_rows_a_block):
    student, teacher = pair(11, 6, 5)
    order = torch.randperm(11)
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=[6, 3]), student)
    permuted = value_and_gradient(lambda s: similarity_loss(s, teacher[order], dims=[6, 3]), student[order])
    assert_near(permuted, (loss, grad[order]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [(10,), (4, 6), (1, 0, 7, 2), (0, 10, 0)])
def test_shares_of_rows_add_up(dtype, counts, three_rows_a_block):
    student, teacher = pair(10, 8, 5, dtype)
    target, dims = normalize_rows(teacher.to(torch.promote_types(dtype, torch.float32))), [8, 3]
    student = student.detach()
    ends = list(itertools.accumulate(counts))
    shares = [OP(student[e - c : e], student, [target], e - c, dims, [True]) for c, e in zip(counts, ends)]
    loss, grad = OP(student, None, [target], 0, dims, [True])
    assert_near((sum(share[0] for share in shares), torch.cat([s[1] for s in shares])), (loss, grad), dtype)
    exact = value_and_gradient(lambda s: brute_similarity_loss(s, target.double(), dims), student.double())
    assert_near((loss, grad), exact, dtype)


def test_no_square_matrix_in_memory():
    student, teacher = pair(3000, 8, 8, torch.float32)
    functions = (
        lambda: similarity_loss(student, teacher, dims=[8, 4]),
        lambda: distill_loss(student, teacher, weights=(10, 200, 0)).total,
        lambda: reference.blocked_similarity_loss(student[:2900], student, [teacher], 0, [8], [False])[0],
    )
    for function in functions:
        with LargestTensor() as seen:
            loss = function()
            if loss.requires_grad:
                loss.backward()
        assert seen.bytes == 256 * 3000 * 4
    # The measurement would see one.
    with LargestTensor() as seen:
        distill_loss(student[:60], teacher[:60])
    assert seen.bytes >= 60 * 60 * 4


@pytest.mark.parametrize(("rows", "expected"), [(0, 256), (100, 256), (1 << 15, 128), (1 << 22, 1), (1 << 30, 1)])
def test_blocks_are_bounded(rows, expected):
    assert reference._block_rows(torch.empty(rows, 1, device="meta")) == expected


def test_uninitialised_memory_is_never_read():
    student, teacher = pair(7, 6, 5)
    expected = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=[6, 2]), student)
    with poisoned_memory():
        actual = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=[6, 2]), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_and_tiny_student_rows(dtype):
    student, teacher = pair(5, 6, 4, dtype)
    with torch.no_grad():
        student[1] = 0
        student[3] *= 1e-14
        student[4, :2] = 0
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=[6, 2]), student)
    target = normalize_rows(teacher.double())
    expected = value_and_gradient(lambda s: brute_similarity_loss(s, target, [6, 2]), student.double())
    assert (grad[1] == 0).all()
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    for x, y in zip((loss, *grad), (expected[0], *expected[1])):
        assert_near([x], [y], dtype)


def test_duplicate_rows():
    student, teacher = pair(6, 5, 5)
    with torch.no_grad():
        student[4] = student[1]
        teacher[4] = teacher[1]
    _, grad = value_and_gradient(lambda s: similarity_loss(s, teacher), student)
    torch.testing.assert_close(grad[4], grad[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_of_the_student_propagates(bad):
    student, teacher = pair(4, 5, 5)
    with torch.no_grad():
        student[2, 1] = bad
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, teacher), student)
    assert loss.isnan()
    assert grad.isnan().any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_bad_teacher_row_is_named(bad):
    student, teacher = pair(4, 5, 5)
    other = teacher.clone()
    other[3] = bad
    with pytest.raises(InputError, match="teacher: row 3"):
        similarity_loss(student, other)
    with pytest.raises(InputError, match=r"teacher\[1\]: row 3"):
        similarity_loss(student, [teacher, other])


def test_teacher_gets_no_gradient():
    student, teacher = pair(4, 5, 5)
    teacher.requires_grad_()
    similarity_loss(student, [teacher, teacher]).backward()
    assert teacher.grad is None
    assert not similarity_loss(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not similarity_loss(student, teacher).requires_grad


def test_unwanted_gradient_is_not_computed():
    student, teacher = pair(4, 5, 5, torch.float32)
    loss, gradient = OP(student.detach(), None, [teacher], 0, [5, 2], [False])
    assert gradient.shape == (0,)
    assert torch.equal(loss, OP(student.detach(), None, [teacher], 0, [5, 2], [True])[0])


def test_one_process_is_all_ranks():
    student, teacher = pair(4, 5, 5)
    alone = value_and_gradient(lambda s: similarity_loss(s, teacher), student)
    actual = value_and_gradient(lambda s: similarity_loss(s, teacher, gather="ranks"), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, alone))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (torch.ones(2), torch.ones(2, 4), {}, "student: expected 2 dimensions"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3), {}, "student: expected a floating-point"),
        ([[1.0]], torch.ones(1, 3), {}, "student: expected a torch.Tensor"),
        (torch.ones(2, 3), torch.ones(3, 3), {}, "student, teacher: 2 and 3 rows"),
        (torch.ones(2, 3), [torch.ones(2, 3), torch.ones(1, 3)], {}, r"student, teacher\[1\]: 2 and 1 rows"),
        (torch.ones(2, 3), [], {}, "teacher: expected a tensor or a list"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), {}, "student on cpu, teacher on meta"),
        (torch.ones(2, 3), torch.ones(2, 3), {"dims": [4]}, "dims: expected prefix widths from 1 to 3"),
        (torch.ones(2, 3), torch.ones(2, 3), {"dims": []}, "dims: expected prefix widths from 1 to 3"),
        (torch.ones(2, 3), torch.ones(2, 3), {"dims": [1, 3]}, "dims: expected descending, unique"),
        (torch.ones(2, 3), torch.ones(2, 3), {"dims": [2, 2]}, "dims: expected descending, unique"),
        (torch.ones(2, 3), torch.ones(2, 3), {"teacher_weights": [1, 2]}, "teacher_weights: expected 1 finite numbers"),
        (torch.ones(2, 3), torch.ones(2, 3), {"teacher_weights": [-1]}, r"teacher_weights\[0\]: expected a finite"),
        (torch.ones(2, 3), torch.ones(2, 3), {"teacher_weights": [0]}, "teacher_weights: all are 0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"gather": "rank"}, "gather.*did you mean 'ranks'"),
    ],
)
def test_wrong_arguments(student, teacher, options, message):
    with pytest.raises(InputError, match=message):
        similarity_loss(student, teacher, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    student, teacher = pair(9, 16, 8, dtype)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return value_and_gradient(lambda s: similarity_loss(s, [teacher, teacher], dims=[16, 4]), student)

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_opcheck(dtype, wanted, share):
    student, teacher = pair(5, 6, 4, dtype)
    student = student.detach()
    own = student[1:3].clone() if share else student
    arguments = (
        own.requires_grad_(wanted),
        student if share else None,
        [teacher.float()],
        int(share),
        [6, 2],
        [wanted],
    )
    torch.library.opcheck(OP, arguments)


def test_strides_do_not_matter():
    student, teacher = pair(6, 5, 4, torch.float32)
    wide = torch.randn(6, 10)
    wide[:, ::2] = student.detach()
    for strided in (student.detach().T.contiguous().T, wide[:, ::2]):
        arguments = (strided.requires_grad_(), None, [normalize_rows(teacher)], 0, [5, 2], [True])
        torch.library.opcheck(OP, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
        assert_near(OP(*arguments), OP(student, *arguments[1:]), torch.float32)


def test_compiled_equals_eager():
    student, teacher = pair(6, 7, 7, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, *t: similarity_loss(s, list(t), dims=[7, 3]), fullgraph=True, backend="aot_eager"
    )
    eager = value_and_gradient(lambda s: similarity_loss(s, [teacher, teacher[:, :2]], dims=[7, 3]), student)
    actual = value_and_gradient(lambda s: compiled(s, teacher, teacher[:, :2]), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, eager))


def test_values_are_not_checked_when_compiled():
    student, teacher = pair(4, 5, 5)
    teacher[2] = 0
    torch.compiler.reset()
    compiled = torch.compile(lambda s: similarity_loss(s, teacher), fullgraph=True, backend="aot_eager")
    expected = value_and_gradient(lambda s: brute_similarity_loss(s, normalize_rows(teacher), [5]), student)
    assert_near(value_and_gradient(compiled, student), expected, torch.float64)
