"""alignment_loss and distill_loss against their definitions, their gradients, their edge cases, and torch.compile."""

import itertools

import pytest
import torch
from compare import backend, poisoned_memory, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import DistillTerms, alignment_loss, distill_loss, relative_similarity_loss, similarity_loss
from leafkern.ops._core.native import library
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops.distill import native, reference
from leafkern.ops.distill.reference import KINDS, brute_alignment_loss, brute_distill_loss

OP = torch.ops.leafkern.distill_loss.default
JASPER = (10.0, 200.0, 20.0)

NATIVE = ["native"] if library()[0] else []


@pytest.fixture(autouse=True, scope="module", params=[*NATIVE, "reference"])
def served_by(request):
    with backend(f"distill={request.param}"):
        yield request.param


def pair(rows, width, dtype=torch.float64):
    student = torch.randn(rows, width, dtype=dtype).requires_grad_()
    return student, torch.randn(rows, width, dtype=dtype)


def alignment_near(student, teacher, weight, kind, normalize):
    """Value and gradients of alignment_loss beside the definition's, by the table's tolerance."""
    dtype = student.dtype
    tensors = [x for x in (student, weight) if x is not None]
    loss = alignment_loss(student, teacher, kind=kind, normalize=normalize, weight=weight)
    grads = torch.autograd.grad(loss, tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = brute_alignment_loss(exact[0], teacher.double(), kind, normalize, *exact[1:])
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [grad.dtype for grad in grads] == [x.dtype for x in tensors]
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, exact)):
        assert (grad.double() - expected_grad).norm() <= TOLERANCE[dtype] * expected_grad.norm() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 13), (32, 384)])
def test_alignment_equals_definition(kind, dtype, normalize, rows, width):
    alignment_near(*pair(rows, width, dtype), None, kind, normalize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("rows", "width", "out"), [(0, 3, 4), (1, 2, 3), (7, 13, 20), (20, 40, 17)])
def test_alignment_with_a_head_equals_definition(kind, dtype, normalize, rows, width, out):
    student = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(out, width) / width**0.5).to(dtype).requires_grad_()
    alignment_near(student, torch.randn(rows, out, dtype=dtype), weight, kind, normalize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_alignment_gradcheck(kind, normalize):
    student, teacher = pair(5, 4)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    options = {"kind": kind, "normalize": normalize}
    assert torch.autograd.gradcheck(lambda s: alignment_loss(s, teacher, **options), student)
    wide = torch.randn(5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, w: alignment_loss(s, wide, weight=w, **options), (student, weight))


@pytest.mark.parametrize("trained", ["student", "weight"])
def test_alignment_gradients_not_asked_for_are_not_computed(trained):
    student, weight = torch.randn(4, 3), torch.randn(5, 3)
    needs = [trained == "student", trained == "weight"]
    _, *grads = torch.ops.leafkern.alignment_loss(student, torch.randn(4, 5), weight, 0, False, needs)
    assert [len(grad) > 0 for grad in grads] == needs
    teacher = torch.randn(4, 5)
    (student if trained == "student" else weight).requires_grad_()
    alignment_loss(student, teacher, weight=weight).backward()
    assert [x.grad is not None for x in (student, weight)] == needs


def test_alignment_of_strided_rows():
    student, teacher = torch.randn(6, 14), torch.randn(5, 6).T
    views = student[:, ::3], teacher
    for kind, normalize in itertools.product(KINDS, (False, True)):
        expected = alignment_loss(*(x.contiguous() for x in views), kind=kind, normalize=normalize)
        assert torch.equal(alignment_loss(*views, kind=kind, normalize=normalize), expected)
    wide = student[:, 4:9].requires_grad_()
    (grad,) = torch.autograd.grad(alignment_loss(wide, teacher), wide)
    torch.testing.assert_close(grad, (wide.detach() - teacher) / 3)


def test_unit_vectors_relation():
    student, teacher = (torch.nn.functional.normalize(x, dim=1) for x in pair(9, 20))
    torch.testing.assert_close(alignment_loss(student, teacher), 2 * alignment_loss(student, teacher, kind="cosine"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_finite_where_the_formula_is_not_smooth(kind, normalize):
    teacher = normalize_rows(torch.randn(3, 6))
    student = teacher.clone()
    student[1] = 0
    student.requires_grad_()
    loss = alignment_loss(student, teacher, kind=kind, normalize=normalize)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    if kind != "l2" or not normalize:
        assert (student.grad[[0, 2]].abs() < 1e-6).all()
    if kind == "cosine" or normalize:
        assert (student.grad[1] == 0).all()


@pytest.mark.parametrize(("kind", "normalize"), [("cosine", False), ("l2sq", True), ("l2", True), ("mse", True)])
def test_normalised_below_the_clamp(kind, normalize):
    teacher = torch.randn(1, 3, dtype=torch.float64)
    student = torch.tensor([[1e-13, 2e-13, -1e-13]], dtype=torch.float64, requires_grad=True)
    alignment_loss(student, teacher, kind=kind, normalize=normalize).backward()
    other = student.detach().clone().requires_grad_()
    brute_alignment_loss(other, teacher, kind, normalize).backward()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.ones(3, 5)}, r"weight: shape \(3, 5\); expected \(D_t, D_s\) = \(5, 3\)"),
        ({"weight": torch.ones(5)}, "weight: expected 2 dimensions"),
        ({"weight": torch.ones(5, 3, dtype=torch.int64)}, "weight: expected a floating-point tensor"),
        ({"weight": torch.ones(5, 3, device="meta")}, "student on cpu, teacher on cpu, weight on meta"),
        ({"weight": torch.ones(5, 3), "normalize": 1}, "normalize: expected True or False; got 1"),
        ({}, r"student, teacher: shapes \(2, 3\) and \(2, 5\) differ.*Dense head"),
    ],
)
def test_alignment_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        alignment_loss(torch.ones(2, 3), torch.ones(2, 5), **options)


def test_alignment_of_one_process_is_that_of_all_ranks():
    student, teacher = pair(4, 5)
    assert torch.equal(alignment_loss(student, teacher, gather="ranks"), alignment_loss(student, teacher))
    with pytest.raises(InputError, match=r"gather.*did you mean 'ranks'"):
        alignment_loss(student, teacher, gather="rank")


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_alignment_opcheck(kind, head, wanted):
    student, teacher = pair(5, 6, torch.float32)
    student = student.detach().requires_grad_(wanted)
    weight = torch.randn(6, 6, requires_grad=wanted) if head else None
    arguments = (student, teacher, weight, kind, kind % 2 == 0, [wanted, wanted and head])
    torch.library.opcheck(torch.ops.leafkern.alignment_loss.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_alignment_compiled_equals_eager(kind, normalize):
    student, teacher = pair(6, 7, torch.float32)
    weight = torch.randn(7, 7, requires_grad=True)
    options = {"kind": kind, "normalize": normalize}
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t, w: alignment_loss(s, t, **options) + alignment_loss(s, t, weight=w, **options),
        fullgraph=True,
        backend="aot_eager",
    )
    both = alignment_loss(student, teacher, **options) + alignment_loss(student, teacher, weight=weight, **options)
    grads = [torch.autograd.grad(x, (student, weight)) for x in (both, compiled(student, teacher, weight))]
    assert torch.equal(both, compiled(student, teacher, weight))
    assert all(torch.equal(x, y) for x, y in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_autocast_changes_nothing(dtype):
    student, teacher = pair(6, 16, dtype)
    weight = torch.randn(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(student, teacher, weight=weight, normalize=True)
    assert torch.equal(found, alignment_loss(student, teacher, weight=weight, normalize=True))


def assert_near(actual, expected, dtype):
    """Values and gradients within the table's relative error; where they vanish, within rounding of numbers near 1."""
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm() + floor


def brute(student, teacher, dims, weights=JASPER, margin=0.015, ties="skip", min_gap=0.0):
    """brute_distill_loss and its gradient in float64."""
    target, ties = normalize_rows(teacher.double()), ties == "reference"
    return value_and_gradient(
        lambda s: brute_distill_loss(s, target, dims, weights, margin, ties, min_gap), student.double()
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [None, [10, 4, 1]])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8])
def test_equals_definition(dtype, dims, rows):
    student, teacher = pair(rows, 10, dtype)
    options = {"margin": 0.1, "ties": "reference", "min_gap": 0.05} if rows % 2 else {}
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, dims=dims, **options), student)
    assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in actual[:4])
    assert actual[4].dtype == dtype
    assert_near(actual, brute(student, teacher, dims or [10], **options), dtype)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.integers(0, 7),
    width=st.integers(1, 12),
    weights=st.tuples(*(st.sampled_from([0.0, 0.5, 20.0]),) * 3),
    data=st.data(),
)
def test_any_shape_and_weights(dtype, rows, width, weights, data):
    dims = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=3, unique=True).map(sorted))[::-1]
    student, teacher = pair(rows, width, dtype)
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, dims=dims, weights=weights), student)
    assert_near(actual, brute(student, teacher, dims, weights), dtype)


@pytest.mark.parametrize("ties", ["skip", "reference"])
def test_exact_ties(ties):
    # One-hot teachers' scores are exactly 0 or 1, so most pairs tie.
    teacher = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1, 0]]
    student = torch.randn(6, 3, dtype=torch.float64)
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, ties=ties), student)
    assert_near(actual, brute(student, teacher, [3], ties=ties), torch.float64)
    other = distill_loss(student, teacher, ties="skip" if ties == "reference" else "reference")
    assert (other.relative - actual[3]).abs() > 1e-6


@pytest.mark.parametrize("weights", list(itertools.product([0.0, 3.0], repeat=3)))
def test_gradcheck(weights):
    student, teacher = pair(6, 4)
    assert torch.autograd.gradcheck(
        lambda s: distill_loss(s, teacher, dims=[4, 2], weights=weights).total, student, atol=1e-6
    )


def test_equals_the_separate_functions():
    student, teacher = pair(9, 12)
    shared = {"dims": [12, 5], "teacher_weights": [1.0, 2.0]}
    relative = {"margin": 0.1, "ties": "reference", "min_gap": 0.01}
    teachers = [teacher[:, :8], teacher[:, 8:]]
    side_by_side = torch.cat([normalize_rows(teachers[0]), 2**0.5 * normalize_rows(teachers[1])], dim=1)

    def separate(s):
        cosine = alignment_loss(s, side_by_side, kind="cosine")
        similarity = similarity_loss(s, teachers, **shared)
        relatives = relative_similarity_loss(s, teachers, **shared, **relative)
        return 3 * cosine + 50 * similarity + 7 * relatives, cosine, similarity, relatives

    actual = value_and_gradient(lambda s: distill_loss(s, teachers, weights=(3, 50, 7), **shared, **relative), student)
    assert_near(actual, value_and_gradient(separate, student), torch.float64)


@pytest.mark.parametrize("weights", list(itertools.product([0.0, 3.0], repeat=3)))
def test_a_weight_of_zero_skips_its_term(weights, monkeypatch):
    student, teacher = pair(6, 4)

    def refuse(*_):
        raise AssertionError("a skipped term was computed")

    if not weights[1] or weights[2]:
        monkeypatch.setattr(reference, "_similarity_by_blocks", refuse)
        monkeypatch.setattr(native._Batch, "similarity", refuse)
        monkeypatch.setattr(native, "gram_similarity", refuse)
    if not weights[2]:
        monkeypatch.setattr(reference, "relative_scores", refuse)
        monkeypatch.setattr(native, "relative_scores", refuse)
    full = brute(student, teacher, [4])
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, weights=weights), student)
    total = sum(weight * term for weight, term in zip(weights, full[1:4]))
    torch.testing.assert_close(actual[0], torch.as_tensor(total, dtype=torch.float64))
    for weight, term, expected in zip(weights, actual[1:4], full[1:4]):
        torch.testing.assert_close(term, expected if weight else torch.zeros_like(expected))
    if not any(weights):
        assert (actual[4] == 0).all()


def test_terms_are_unweighted_and_detached():
    student, teacher = pair(6, 4)
    terms = distill_loss(student, teacher)
    assert isinstance(terms, DistillTerms)
    assert terms._fields == ("total", "cosine", "similarity", "relative")
    assert [term.requires_grad for term in terms] == [True, False, False, False]
    torch.testing.assert_close(terms.total, 10 * terms.cosine + 200 * terms.similarity + 20 * terms.relative)
    assert not distill_loss(student.detach(), teacher).total.requires_grad


def test_teacher_as_student(served_by):
    student = torch.randn(7, 9)
    *terms, grad = value_and_gradient(lambda s: distill_loss(s, student, weights=(10, 200, 0)), student)
    # The kernels' cosines come of raw rows, the teacher's of unit rows.
    assert terms[2] <= (0 if served_by == "reference" else 1e-12)
    assert terms[1].abs() <= 1e-6
    assert grad.norm() <= 1e-5
    # Scores that already lie in the teacher's order by more than the margin add nothing.
    assert distill_loss(torch.eye(3), torch.eye(3), margin=0.0).relative == 0


def test_independent_heads():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    with pytest.raises(InputError, match=r"student, teacher: widths 4 and 9.*weights\[0\] = 0"):
        distill_loss(student, teacher)
    with pytest.raises(InputError, match="student, teacher: widths 9 and 18"):
        distill_loss(teacher, [teacher, teacher])
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, weights=(0, 200, 20)), student)
    assert actual[1] == 0
    assert_near(actual, brute(student, teacher, [4], (0.0, 200.0, 20.0)), torch.float64)


@pytest.mark.parametrize("weights", [JASPER, (10.0, 200.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_targets_are_one_side_by_side(weights, dtype):
    student, teacher = pair(9, 12, dtype)
    student, target = student.detach(), normalize_rows(teacher)
    options = (0, [12, 5], weights, 0.015, False, 0.0, [True])
    whole = OP(student, None, [target], *options)
    parts = [target[:, :3], target[:, 3:4].clone(), target[:, 4:]]
    assert_near(OP(student, None, parts, *options), whole, dtype)
    # Float targets of a double student, and the other way round, are computed in double.
    mixed = [parts[0].double(), *parts[1:]]
    assert OP(student, None, mixed, *options)[0].dtype == torch.float64
    assert_near(OP(student, None, mixed, *options), whole, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_teacher_in_a_list(dtype):
    student, teacher = pair(6, 5, dtype)
    both = [distill_loss(student, t, teacher_weights=w) for t, w in ((teacher, None), ([teacher], [0.7]))]
    assert all(torch.equal(x, y) for x, y in zip(*both))


def test_prefixes_equal_slices():
    student, teacher = pair(7, 12)
    weights = (0.0, 200.0, 20.0)
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[9, 4], weights=weights).total, student)
    expected = value_and_gradient(
        lambda s: sum(distill_loss(s[:, :d].contiguous(), teacher, weights=weights).total for d in (9, 4)) / 2, student
    )
    assert (actual[1][:, 9:] == 0).all()
    assert_near(actual, expected, torch.float64)


def test_cosine_ignores_dims():
    student, teacher = pair(7, 12)
    full = value_and_gradient(lambda s: distill_loss(s, teacher, weights=(1, 0, 0)), student)
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[3], weights=(1, 0, 0)), student)
    # Squares of a prefix are summed first.
    assert_near(actual, full, torch.float64)


def test_permutation_of_the_batch():
    student, teacher = pair(8, 6)
    order = torch.randperm(8)
    *terms, grad = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[6, 3]), student)
    permuted = value_and_gradient(lambda s: distill_loss(s, teacher[order], dims=[6, 3]), student[order])
    assert_near(permuted, (*terms, grad[order]), torch.float64)


@pytest.mark.parametrize("weights", [JASPER, (10.0, 200.0, 0.0), (0.0, 0.0, 20.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [(8,), (3, 5), (1, 0, 5, 2), (0, 8, 0)])
def test_shares_of_rows_add_up(weights, dtype, counts):
    student, teacher = pair(8, 6, dtype)
    student, target = student.detach(), normalize_rows(teacher.to(torch.promote_types(dtype, torch.float32)))
    options = ([6, 2], weights, 0.015, False, 0.0, [True])
    ends = list(itertools.accumulate(counts))
    shares = [OP(student[e - c : e], student, [target], e - c, *options) for c, e in zip(counts, ends)]
    sums = [sum(values) for values in list(zip(*shares))[:4]]
    whole = OP(student, None, [target], 0, *options)
    assert_near((*sums, torch.cat([share[4] for share in shares])), whole, dtype)


def test_uninitialised_memory_is_never_read():
    student, teacher = pair(7, 6)
    expected = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[6, 2]), student)
    with poisoned_memory():
        actual = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[6, 2]), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))


def test_zero_and_tiny_student_rows():
    student, teacher = pair(5, 6)
    with torch.no_grad():
        student[1] = 0
        student[3] *= 1e-14
        student[4, :2] = 0
    *terms, grad = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[6, 2]), student)
    *expected, expected_grad = brute(student, teacher, [6, 2])
    assert (grad[1] == 0).all()
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    assert_near((*terms, *grad), (*expected, *expected_grad), torch.float64)
    cosine = value_and_gradient(lambda s: distill_loss(s, teacher, weights=(1, 0, 0)), student)
    alignment = value_and_gradient(lambda s: alignment_loss(s, teacher, kind="cosine"), student)
    assert_near((cosine[0], *cosine[4]), (alignment[0], *alignment[1]), torch.float64)


def test_nan_of_the_student_propagates():
    student, teacher = pair(4, 5)
    with torch.no_grad():
        student[2, 1] = torch.nan
    terms = distill_loss(student, teacher)
    assert all(term.isnan() for term in terms)
    terms.total.backward()
    assert student.grad.isnan().any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_bad_teacher_row_is_named(bad):
    student, teacher = pair(4, 5)
    teacher[3] = bad
    with pytest.raises(InputError, match=r"teacher\[1\]: row 3"):
        distill_loss(student, [torch.ones(4, 2), teacher[:, :3]])


def test_teacher_gets_no_gradient():
    student, teacher = pair(4, 5)
    teacher.requires_grad_()
    distill_loss(student, teacher).total.backward()
    assert teacher.grad is None


def test_one_process_is_all_ranks():
    student, teacher = pair(5, 4)
    alone = value_and_gradient(lambda s: distill_loss(s, teacher), student)
    actual = value_and_gradient(lambda s: distill_loss(s, teacher, gather="ranks"), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, alone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1, 2)}, "weights: expected 3 finite numbers"),
        ({"weights": 1.0}, "weights: expected 3 finite numbers"),
        ({"weights": (1, -2, 3)}, r"weights\[1\]: expected a finite number of at least 0; got -2"),
        ({"weights": (1, 2, float("nan"))}, r"weights\[2\]: expected a finite number"),
        ({"weights": (float("inf"), 2, 0)}, r"weights\[0\]: expected a finite number"),
        ({"weights": ("1", 2, 0)}, r"weights\[0\]: expected a finite number"),
        ({"dims": [2, 4]}, "dims: expected descending, unique"),
        ({"dims": [5]}, "dims: expected prefix widths from 1 to 4"),
        ({"ties": "skipped"}, "ties: unknown name 'skipped'; did you mean 'skip'"),
        ({"margin": float("nan")}, "margin: expected a finite number"),
        ({"margin": -0.1}, "margin: expected a finite number of at least 0"),
        ({"min_gap": -0.1}, "min_gap: expected a finite number of at least 0"),
        ({"teacher_weights": [1, 1]}, "teacher_weights: expected 1 finite numbers"),
        ({"gather": "all"}, "gather: unknown name 'all'"),
    ],
)
def test_wrong_arguments(options, message):
    student, teacher = pair(3, 4)
    with pytest.raises(InputError, match=message):
        distill_loss(student, teacher, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    student, teacher = pair(8, 16, dtype)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return value_and_gradient(lambda s: distill_loss(s, teacher, dims=[16, 4]), student)

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False)))


@pytest.mark.parametrize("weights", [JASPER, (10.0, 200.0, 0.0)])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_opcheck(weights, wanted, share):
    student, teacher = pair(5, 6, torch.float32)
    student = student.detach()
    own = (student[1:3].clone() if share else student).requires_grad_(wanted)
    everyone = student.detach().clone() if share else None
    torch.library.opcheck(
        OP, (own, everyone, [teacher[:, :4], teacher[:, 4:]], int(share), [6, 2], weights, 0.015, False, 0.0, [wanted])
    )


@pytest.mark.parametrize("weights", [JASPER, (10.0, 200.0, 0.0)])
def test_compiled_equals_eager(weights):
    student, teacher = pair(6, 7, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda s, t: distill_loss(s, t, dims=[7, 3], weights=weights), fullgraph=True, backend="aot_eager"
    )
    eager = value_and_gradient(lambda s: distill_loss(s, teacher, dims=[7, 3], weights=weights), student)
    actual = value_and_gradient(lambda s: compiled(s, teacher), student)
    assert all(torch.equal(x, y) for x, y in zip(actual, eager))
    assert [term.requires_grad for term in compiled(student, teacher)] == [True, False, False, False]
