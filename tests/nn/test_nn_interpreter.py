"""The packed encoder with its Triton kernels, run by Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import copy

import pytest
import torch
from compare import relative
from encoders import Recorder, batch_of, small_model
from tolerances import TOLERANCE

pytest.importorskip("triton")

from leafkern.nn import GraphedModel

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("only_triton")]


def vectors_and_gradients(module, batch, grad):
    found = module(batch)
    (found * grad).sum().backward()
    # Query, key and value together: terms of the first two cancel, and those of the third tell their size.
    return [found.detach(), *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_and_gradients(dtype, monkeypatch):
    module, batch = small_model(normalize=True), batch_of([3, 0, 17, 1, 6])
    # Large, so that gradients are no subnormal numbers in half precision.
    grad = 100 * torch.randn(5, module.dim, dtype=torch.float64)
    found = vectors_and_gradients(copy.deepcopy(module).to(dtype), batch, grad)
    monkeypatch.setenv("LEAFKERN_BACKEND", "reference")
    plain = vectors_and_gradients(copy.deepcopy(module).to(dtype), batch, grad)
    exact = vectors_and_gradients(module, batch, grad)
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        assert relative(mine, right) <= TOLERANCE[dtype] + 2 * relative(theirs, right)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_bucket_changes_nothing(pooling):
    module = small_model(pooling=pooling).float()
    graphed = GraphedModel(module, capture=Recorder())
    for lengths in ([3, 9, 1, 6], [4, 0, 5], [3, 9, 2, 4], [16, 1, 1]):
        batch = batch_of(lengths)
        with torch.no_grad():
            torch.testing.assert_close(graphed(batch), module(batch), rtol=0, atol=1e-5)
