"""The target of one teacher or several, in parts."""

import pytest
import torch

from leafkern.errors import InputError
from leafkern.ops._core.normalize import normalize_rows
from leafkern.ops._core.teachers import unit_targets


def teachers(rows, *widths, dtype=torch.float64):
    return [torch.randn(rows, width, dtype=dtype) for width in widths]


def cosines(x):
    x = x / x.norm(dim=1, keepdim=True)
    return x @ x.T


def test_cosines_of_the_target_are_the_weighted_mean_of_the_teachers():
    first, second, third = teachers(6, 5, 9, 2)
    targets = unit_targets(first, [first, second, third], [1, 3, 0.5])
    assert [target.shape for target in targets] == [(6, 5), (6, 9), (6, 2)]
    target = torch.cat(targets, dim=1)
    expected = (cosines(first) + 3 * cosines(second) + 0.5 * cosines(third)) / 4.5
    torch.testing.assert_close(target @ target.T, expected)
    equal, given = unit_targets(first, [first, second]), unit_targets(first, (first, second), [7.0, 7.0])
    torch.testing.assert_close(equal, given, rtol=1e-12, atol=1e-12)


def test_rows_below_the_clamp_are_unit_rows_all_the_same():
    first, second = teachers(3, 4, 5)
    first[1] *= 1e-13
    second[2] *= 1e-14
    first[2] *= 1e-14
    target = torch.cat(unit_targets(first, [first, second], [1, 2]), dim=1)
    units = [normalize_rows(x) for x in (first, second)]
    torch.testing.assert_close(target, normalize_rows(torch.cat([units[0], 2**0.5 * units[1]], dim=1)))


def test_one_teacher_alone_or_in_a_list():
    (teacher,) = teachers(4, 7)
    expected = teacher / teacher.norm(dim=1, keepdim=True)
    for given, weights in ((teacher, None), ([teacher], None), ([teacher], [0.3])):
        (target,) = unit_targets(teacher, given, weights)
        torch.testing.assert_close(target, expected)


def test_half_precision_is_normalised_in_float32_and_autocast_changes_nothing():
    half = teachers(5, 8, 8, dtype=torch.float16)
    half[1] = half[1].double()
    plain = unit_targets(half[0], half, [1, 2])
    assert [target.dtype for target in plain] == [torch.float32, torch.float64]
    with torch.autocast("cpu", torch.bfloat16):
        again = unit_targets(half[0], half, [1, 2])
    assert all(torch.equal(x, y) for x, y in zip(again, plain, strict=True))
    assert not unit_targets(half[0], half[0].requires_grad_(), None)[0].requires_grad


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        (None, None, "teacher: expected a tensor or a list of tensors, got NoneType"),
        ([], None, "teacher: expected a tensor or a list"),
        ([torch.ones(3, 2), torch.ones(2, 2)], None, r"student, teacher\[1\]: 3 and 2 rows"),
        ([torch.ones(3, 2), torch.eye(3)[:, 1:]], None, r"teacher\[1\]: row 0 has length 0"),
        (torch.full((3, 2), torch.nan), None, "teacher: row 0 holds NaN"),
        (torch.ones(3, 2, dtype=torch.int64), None, "teacher: expected a floating-point tensor"),
        (torch.ones(3, 2), [1, 2], r"teacher_weights: expected 1 finite numbers; got \[1, 2\]"),
        ([torch.ones(3, 2)] * 2, [1, -1], r"teacher_weights\[1\]: expected a finite number of at least 0; got -1"),
        ([torch.ones(3, 2)] * 2, [0, 0], "teacher_weights: all are 0"),
    ],
)
def test_wrong_arguments(given, weights, message):
    with pytest.raises(InputError, match=message):
        unit_targets(torch.ones(3, 4), given, weights)
