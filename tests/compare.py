"""What tests of operations share: bounds of sequences, the error of a result, and what happens to memory."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from leafkern.errors import BackendError
from leafkern.ops._core.backend import FallbackWarning, _warn_once


def bounds(lengths):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def relative(found, expected):
    """Frobenius error over the norm of what is right, in float64 on the CPU."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return (found - expected).norm() / expected.norm().clamp(min=1e-9)


def value_and_gradient(function, student):
    """The terms that `function` returns, detached, and the gradient of the first."""
    student = student.detach().requires_grad_()
    terms = function(student)
    terms = terms if isinstance(terms, tuple) else (terms,)
    (grad,) = torch.autograd.grad(terms[0], student)
    return *(term.detach() for term in terms), grad


# Lengths of the sequences in a batch, for the kernels that share tokens among programs on a GPU.
BATCHES = {
    "one": [1],
    "ragged": [3, 0, 1, 17, 1],
    "long and short": [0, 512, 4, 4, 0, 300, 1, 70, 0],
    "many": [5, 0, 70, 1, 33, 128] * 200,
}


@contextmanager
def backend(setting):
    """LEAFKERN_BACKEND for fixtures of whole modules, which hypothesis wants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAFKERN_BACKEND", setting)
        yield


@contextmanager
def poisoned_memory():
    """torch.empty gives NaN (bytes: 0xFF): what is read before it is written, or never written, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def matmul_setting(name, value):
    """torch.backends.cuda.matmul.<name> is `value`. (pytest's monkeypatch fails to put such settings back.)"""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def served_by_another(monkeypatch, call, reason):
    """What `call` returns when it is left alone, with a warning that says `reason`; where LEAFKERN_BACKEND forces the
    backend that can't serve it, it must raise."""
    with pytest.raises(BackendError, match=reason):
        call()
    monkeypatch.delenv("LEAFKERN_BACKEND")
    _warn_once.cache_clear()
    with pytest.warns(FallbackWarning, match=reason):
        return call()


def recorded_launches(monkeypatch, kernels):
    """Names of the kernels of the module `kernels`, in the order of their launch."""
    done = []

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            done.append(self.name)
            return self.kernel[grid]

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorded(getattr(kernels, name), name.removesuffix("_kernel")))
    return done


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation returns: of a view of an argument, what it shows."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, min(x.numel() * x.element_size(), x.untyped_storage().nbytes()))
        return result
