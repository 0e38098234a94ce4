"""The Triton kernels of the relative similarity loss, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m
interpreter."""

import itertools

import pytest
import torch
from compare import served_by_another
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relative_cases import CASES, MODES, assert_same, brute_with_gradient, scores_of

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from leafkern.ops import relative_similarity_loss
from leafkern.ops.relative import autograd
from leafkern.ops.relative.autograd import relative_scores
from leafkern.ops.relative.reference import blocked_relative

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]

FORMS = ["all pairs", "sorts", "deep"]


@pytest.fixture
def form(monkeypatch):
    """Chooses a form; "deep": several levels, blocks, groups and tiles at sizes that the interpreter can do."""
    from leafkern.ops.relative import kernels

    def chosen(name):
        monkeypatch.setattr(kernels, "BRUTE_WORK", 1 << 60 if name == "all pairs" else 0)
        if name != "sorts":
            monkeypatch.setattr(kernels, "TREE", kernels.Tree(digit=2, leaf=2, block=3, group=1))
            monkeypatch.setattr(kernels, "TILE", {"ROWS": 32, "COLUMNS": 8})
            monkeypatch.setattr(kernels, "SCAN", {"ROWS": 4, "COLUMNS": 4})
            monkeypatch.setattr(kernels, "BLOCK", 64)
        return name

    return chosen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMS)
def test_equals_brute(name, case, mode, form):
    form(name)
    for batch in (3, 4, 21):
        student, teacher = scores_of(case, batch, torch.float32)
        for margin in (0.0, 0.015):
            loss, gradient = relative_scores(student[None], teacher, margin, *mode, True)
            assert loss.dtype == gradient.dtype == torch.float32
            expected = brute_with_gradient(student, teacher, margin, *mode)
            assert_same((loss[0], gradient[0]), expected, torch.float32, (batch, margin))
