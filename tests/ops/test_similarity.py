"""similarity_loss against its definition: values, gradients, teachers, prefixes, blocks, shares of rows, edge cases."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import LargestTensor, backend, poisoned_memory, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCE

from leafkern.errors import InputError
from leafkern.ops import distill_loss, similarity_loss
from leafkern.ops._core.native import library
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops.distill import autograd, gram, native, reference
from leafkern.ops.distill.reference import brute_similarity_loss

OP = torch.ops.leafkern.similarity_loss.default
ROOT = Path(__file__).parents[2]

NATIVE = ["native"] if library()[0] else []


@pytest.fixture(autouse=True, scope="module", params=[*NATIVE, "reference"])
def served_by(request):
    with backend(f"distill={request.param}"):
        yield request.param


def pair(rows, width, teacher_width, dtype=torch.float64):
    student = torch.randn(rows, width, dtype=dtype).requires_grad_()
    return student, torch.randn(rows, teacher_width, dtype=dtype)


def assert_near(actual, expected, dtype):
    """Values and gradients within the table's relative error; where they vanish, within rounding of numbers near 1."""
    floor = 1e-13 if dtype == torch.float64 else 1e-6
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm() + floor


@pytest.fixture
def three_rows_a_block(monkeypatch):
    monkeypatch.setitem(reference._BLOCK, "cpu", (3, 1 << 20))
    monkeypatch.setattr(native, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(native, "gram_is_cheaper", lambda *_: False)


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
    by_gram=st.booleans(),
    data=st.data(),
)
def test_any_shape_and_block(dtype, rows, widths, block, by_gram, data):
    dims = data.draw(st.lists(st.integers(1, widths[0]), min_size=1, max_size=3, unique=True).map(sorted))[::-1]
    student, teacher = pair(rows, *widths, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference._BLOCK, "cpu", (block, 1 << 20))
        patch.setattr(native, "_BLOCK_ROWS", block)
        patch.setattr(native, "gram_is_cheaper", lambda *_: by_gram)
        patch.setattr(gram, "_ROWS", block)
        actual = value_and_gradient(lambda s: similarity_loss(s, teacher, dims=dims), student)
    target = normalize_rows(teacher.double())
    expected = value_and_gradient(lambda s: brute_similarity_loss(s, target, dims), student.double())
    assert_near(actual, expected, dtype)


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
def test_teacher_as_student_is_zero(rows, served_by):
    student = torch.randn(rows, 24)
    loss, grad = value_and_gradient(lambda s: similarity_loss(s, student), student)
    # The kernels' cosines come of raw rows, the teacher's of unit rows.
    assert loss <= (0 if served_by == "reference" else 1e-13)
    assert (grad.abs() <= (0 if served_by == "reference" else 1e-7)).all()
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


@pytest.mark.parametrize("by_gram", [False, True])
def test_no_square_matrix_in_memory(by_gram, served_by, monkeypatch):
    monkeypatch.setattr(native, "gram_is_cheaper", lambda *_: by_gram)
    student, teacher = pair(3000, 8, 8, torch.float32)
    share = (student.detach()[:2900], student.detach(), [teacher], 0, [8], [False])
    functions = (
        (2, lambda: similarity_loss(student, teacher, dims=[8, 4])),
        (1, lambda: distill_loss(student, teacher, weights=(10, 200, 0)).total),
        (1, lambda: autograd.similarity_loss(*share)[0]),
    )
    for widths, function in functions:
        with LargestTensor() as seen:
            loss = function()
            if loss.requires_grad:
                loss.backward()
        # The kernels' block is one tensor for all widths and the teacher.
        block = 256 * 3000 * 4 if served_by == "reference" else 128 * 3000 * 4 * (widths + 1)
        assert seen.bytes == (3000 * 8 * 4 if served_by == "native" and by_gram else block)
    # The measurement would see one.
    with LargestTensor() as seen:
        distill_loss(student[:60], teacher[:60])
    assert seen.bytes >= 60 * 60 * 4


@pytest.mark.parametrize(("rows", "expected"), [(0, 256), (100, 256), (1 << 15, 128), (1 << 22, 1), (1 << 30, 1)])
def test_blocks_are_bounded(rows, expected):
    x = torch.empty(rows, 1, device="meta")
    assert reference._block_rows(x) == expected
    # Twice the bytes for the scores of three widths and the teacher's.
    assert native._block_rows(x, 3) == max(1, min(128, expected // 2))


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


CASES = [
    (0, 3, [3], [2]),
    (1, 1, [1], [1]),
    (3, 40, [40], [7]),
    (150, 33, [33, 16, 15, 1], [5, 20]),
    (600, 17, [9], [4]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (3.0, 20.0, 0.0), (3.0, 20.0, 5.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_the_blocked_form(dtype, weights, case, isa, monkeypatch):
    rows, width, dims, widths = case
    monkeypatch.setattr(native, "gram_is_cheaper", lambda *_: False)
    # Wider than both blocks and stripes of the kernels; each share of rows too.
    targets = [0.5 * normalize_rows(torch.randn(rows, each, dtype=torch.float64)) for each in widths]
    if weights[0]:
        targets = list(normalize_rows(torch.randn(rows, width, dtype=torch.float64)).split([1, width - 1], dim=1))
    everyone = torch.randn(rows, width + 2, dtype=torch.float64)[:, 1 : width + 1]
    options = (dims, weights, 0.015, False, 0.0)
    for start, stop in [(0, rows), (rows // 3, rows // 2)]:
        arguments = (everyone[start:stop], None if start == 0 else everyone, targets, start)
        wide = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
        wide[2] = [target.to(dtype) for target in targets]
        expected = reference.blocked_distill_loss(*arguments, *options, [True])
        first = None
        for threads in (1, 2, 5):
            found = native.distill_loss(*wide, *options, [True], threads=threads)
            assert all(torch.equal(x, y) for x, y in zip(found, first or found))
            first = found
            if start == 0:
                assert_near(found, expected, dtype)
        # Without the gradient the values stay; of a share, all ranks' shares are what has a meaning.
        assert all(torch.equal(x, y) for x, y in zip(native.distill_loss(*wide, *options, [False]), first[:4]))


@pytest.mark.parametrize("widths", [[9], [4, 1, 7]])
@pytest.mark.parametrize("dims", [[13], [13, 6, 1]])
@pytest.mark.parametrize("own", [slice(0, 30), slice(7, 20), slice(5, 5)])
def test_gram_form_equals_the_direct_one(widths, dims, own, monkeypatch):
    monkeypatch.setattr(gram, "_ROWS", 8)
    everyone = torch.randn(30, 13, dtype=torch.float64)
    everyone[3] = 0
    everyone[8] *= 1e-13
    targets = list(normalize_rows(torch.randn(30, sum(widths), dtype=torch.float64)).split(widths, dim=1))
    loss, grad = gram.gram_similarity(everyone, targets, own, dims, True)
    target = torch.cat(targets, dim=1)
    expected, exact = value_and_gradient(lambda s: brute_similarity_loss(s, target, dims), everyone)
    # Each row by itself: the tiny row's gradient is 1e12 times the others'.
    assert_near((loss, *grad), (expected, *exact[own]), torch.float64)
    assert torch.equal(gram.gram_similarity(everyone, targets, own, dims, False)[0], loss)


def test_gram_form_of_float_rows_near_the_teacher():
    teacher = torch.randn(400, 8)
    student = (teacher + 1e-3 * torch.randn(400, 8)).requires_grad_()
    assert gram.gram_is_cheaper(student, student, [teacher], [8], True)
    loss, grad = gram.gram_similarity(student.detach(), [normalize_rows(teacher)], slice(0, 400), [8], True)
    exact = student.detach().double().requires_grad_()
    units = [normalize_rows(x) for x in (exact, teacher.double())]
    expected = (units[0] @ units[0].T - units[1] @ units[1].T).square().mean()
    assert_near((loss, grad), (expected, torch.autograd.grad(expected, exact)[0]), torch.float32)


@pytest.mark.parametrize(
    ("rows", "batch", "dims", "teacher", "wanted", "expected"),
    [
        (4096, 4096, [384], [384], True, True),
        (1024, 1024, [384], [384], True, False),
        (16384, 16384, [1024], [1024], True, True),
        (4096, 4096, [1024], [1024], True, False),
        (4096, 4096, [1024, 512, 256, 128, 64], [1024], True, False),
        (512, 16384, [1024], [1024], True, False),
    ],
)
def test_gram_form_is_chosen_by_the_operations(rows, batch, dims, teacher, wanted, expected):
    student, everyone = torch.empty(rows, dims[0], device="meta"), torch.empty(batch, dims[0], device="meta")
    targets = [torch.empty(batch, width, device="meta") for width in teacher]
    assert gram.gram_is_cheaper(student, everyone, targets, dims, wanted) == expected


PEAK = """
import re, torch
from pathlib import Path
from leafkern.ops import {function}
torch.manual_seed(0)
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def run(rows):
    student, teacher = torch.randn(rows, {width}, requires_grad=True), torch.randn(rows, {width})
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loss = {function}(student, teacher, {options})
    getattr(loss, "total", loss).backward()
    return status("VmHWM") - before
run(64)
print(run({rows}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process's memory")
@pytest.mark.parametrize(
    ("function", "rows", "width", "options", "most"),
    [
        # A matrix of 8192·8192 takes 256 MiB; blocks take 32, the target, gradient and its copy 6.
        ("similarity_loss", 8192, 64, "dims=[64, 32]", 64 << 20),
        # The eager form takes 2.9 GiB.
        ("distill_loss", 128, 1024, "dims=[1024, 512, 256, 128, 64]", 29 << 20),
    ],
)
def test_peak_memory_of_the_process(function, rows, width, options, most):
    code = PEAK.format(function=function, rows=rows, width=width, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) <= most
