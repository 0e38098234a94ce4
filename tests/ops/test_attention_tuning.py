"""Autotuning of attention's kernels with times that are made up: what is timed, when, and what serves."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from leafkern.ops._core import cubin
from leafkern.ops.attention import kernels, tuning


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by choice, to be filled; a choice that is not there doesn't fit. Nothing is known before."""
    known = {}
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "milliseconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def run(choice):
        if choice not in known:
            raise OutOfResources(1, 0, "shared memory")
        return known[choice]

    return known, run


def never():
    raise AssertionError("asked for candidates again")


def test_the_fastest_serves_from_then_on(times):
    known, run = times
    known |= {"a": 3.0, "b": 1.0, "c": 2.0}
    assert tuning.fastest("key", lambda: ["a", "b", "c", "too large"], run) == "b"
    known["a"] = 0.5
    assert tuning.fastest("key", never, run) == "b"
    assert tuning.fastest("another key", lambda: ["c", "a"], run) == "a"


def test_among_equals_the_heuristic_serves(times):
    known, run = times
    known |= {"a": 1.0, "b": 1.0}
    assert tuning.fastest("key", lambda: ["a", "b"], run) == "a"
    assert tuning.fastest("nothing fits", lambda: ["too large", "larger"], run) == "too large"


def test_other_errors_are_shown(times):
    def run(choice):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        tuning.fastest("key", lambda: ["a"], run)
    assert not tuning._found


@pytest.mark.parametrize("what", ["torch.compiler.is_compiling", "torch.cuda.is_current_stream_capturing"])
def test_nothing_is_timed_under_capture(times, monkeypatch, what):
    known, run = times
    known |= {"a": 2.0, "b": 1.0}
    assert tuning.fastest("known", lambda: ["a", "b"], run) == "b"
    monkeypatch.setattr(what, lambda: True)
    assert tuning.fastest("new", lambda: ["a", "b"], never) == "a"
    assert tuning.fastest("known", never, never) == "b"
    monkeypatch.setattr(what, lambda: False)
    assert tuning.fastest("new", lambda: ["a", "b"], run) == "b"


def test_only_on_request_and_on_cuda(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.delenv("LEAFKERN_AUTOTUNE", raising=False)
    assert not tuning.requested(cuda)
    monkeypatch.setenv("LEAFKERN_AUTOTUNE", "0")
    assert not tuning.requested(cuda)
    monkeypatch.setenv("LEAFKERN_AUTOTUNE", "1")
    assert tuning.requested(cuda)
    assert not tuning.requested(cpu)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_candidates(kernel):
    for width, half, (longest, mean), architecture in itertools.product(
        (8, 32, 64, 96, 128), (False, True), kernels.LENGTHS.values(), (80, 90, 100)
    ):
        found = kernels.candidates(kernel, width, half, longest, mean, architecture)
        assert found[0] == kernels.configure(kernel, width, half, longest, mean)
        assert len(found) == len(set(found))
        assert 2 <= len(found) <= 14
        assert {config.share for config in found} == ({0, 4} if half and architecture >= 90 else {0})
        for config in found:
            assert 16 <= config.rows <= max(16, longest)
            assert 16 <= config.columns <= max(16, longest)
            assert config.warps in (1, 2, 4, 8)


def test_what_may_be_chosen_can_be_compiled_by_name():
    items = kernels.tunable()
    names = [item.name for item in (*items, *kernels.shipped())]
    assert len(names) == len(set(names))
    assert not any(item.tested for item in items)
    assert all(cubin.source(item) for item in items[::50])
