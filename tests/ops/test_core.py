"""The ground that all operations stand on: backend choice, checks, registration, the native library."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from leafkern.errors import BackendError, InputError
from leafkern.ops._core import backend, checks
from leafkern.ops._core.native import library
from leafkern.ops._core.registration import register


@pytest.fixture
def setting(monkeypatch):
    return lambda value: monkeypatch.setenv("LEAFKERN_BACKEND", value)


def test_bare_name_binds_the_operations_that_have_it(setting):
    setting("native")
    assert backend.forced_backend("retrieval") == "native"
    assert backend.forced_backend("pooling") is None
    setting("reference")
    assert {backend.forced_backend(operation) for operation in backend.OPERATIONS} == {"reference"}
    setting("")
    assert backend.forced_backend("retrieval") is None


def test_pairs_bind_one_operation_each(setting):
    setting(" retrieval=reference , pooling=reference ")
    assert backend.forced_backend("retrieval") == backend.forced_backend("pooling") == "reference"
    assert backend.forced_backend("distill") is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nativ", r"did you mean 'native'"),
        ("retrieval=tritn", r"did you mean 'triton'"),
        ("retrieva=native", r"did you mean 'retrieval'"),
        ("quantization=flash", r"quantization has no backend 'flash' \(it has: reference\)"),
    ],
)
def test_wrong_settings_are_named(setting, value, message):
    setting(value)
    with pytest.raises(InputError, match=message):
        backend.forced_backend("retrieval")


def test_choice_and_fallback(setting):
    setting("")
    assert backend.choose("retrieval", {"native": None, "reference": None}) == "native"
    backend._warn_once.cache_clear()
    with pytest.warns(backend.FallbackWarning, match="not native: too wide"):
        assert backend.choose("retrieval", {"native": "too wide", "reference": None}) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.choose("retrieval", {"native": "too wide", "reference": None})
    setting("native")
    with pytest.raises(BackendError, match="forces retrieval=native, which can't serve this call: too wide"):
        backend.choose("retrieval", {"native": "too wide", "reference": None})
    with pytest.raises(BackendError, match="no kernel for this device"):
        backend.choose("retrieval", {"reference": None})


def test_checks_name_rows():
    x = torch.ones(4, 3)
    checks.check_finite_rows("x", x)
    checks.check_nonzero_rows("x", x)
    x[2, 1] = float("inf")
    with pytest.raises(InputError, match=r"x: row 2 holds NaN or infinity \(1 such rows\)"):
        checks.check_finite_rows("x", x)
    x[1:3] = 0
    with pytest.raises(InputError, match=r"x: row 1 is all zeros \(2 such rows\)"):
        checks.check_nonzero_rows("x", x)
    checks.check_finite_rows("x", torch.empty(0, 3))
    checks.check_nonzero_rows("x", torch.empty(3, 0))
    checks.check_finite_rows("x", torch.empty(4, 3, device="meta"))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3], r"must run from 0 to T = 4; got 0 to 3"),
        ([1, 4], r"must run from 0"),
        ([0, 3, 2, 4], r"must never fall"),
        ([], r"expected B\+1 entries"),
    ],
)
def test_cu_seqlens(cu_seqlens, message):
    checks.check_cu_seqlens(torch.tensor([0, 2, 2, 4], dtype=torch.int32), 4)
    with pytest.raises(InputError, match=message):
        checks.check_cu_seqlens(torch.tensor(cu_seqlens, dtype=torch.int32), 4)


def test_devices_must_agree():
    checks.check_same_device(a=torch.ones(1), b=None, c=torch.ones(2))
    with pytest.raises(InputError, match=r"a on cpu, b on meta"):
        checks.check_same_device(a=torch.ones(1), b=torch.ones(1, device="meta"))


def _scaled(x, factor):
    return x * factor


def _setup(ctx, inputs, output):
    ctx.factor = inputs[1]


scaled = register(
    "test_scaled(Tensor x, float factor) -> Tensor",
    _scaled,
    lambda x, factor: torch.empty_like(x),
    setup_context=_setup,
    backward=lambda ctx, grad: (grad * ctx.factor, None),
)


def test_registered_operation_is_differentiable_and_compiles():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.leafkern.test_scaled.default, (x, 3.0))
    assert torch.autograd.gradcheck(lambda x: scaled(x, 3.0), x)
    eager = torch.autograd.grad(scaled(x, 3.0).sum(), x)[0]
    compiled = torch.compile(lambda x: scaled(x, 3.0).sum(), backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], eager)


def test_eager_calls_bypass_the_dispatcher():
    calls = []
    plain = register(
        "test_plain(Tensor x) -> Tensor", lambda x: calls.append(type(x)) or x.clone(), lambda x: torch.empty_like(x)
    )
    with torch.profiler.profile() as profile:
        plain(torch.ones(2))
    assert calls == [torch.Tensor]
    assert not any("test_plain" in event.name for event in profile.events())


def isa_of(value):
    code = "from leafkern.ops._core.native import library; print(library()[0].isa())"
    environment = {**os.environ, "LEAFKERN_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(library()[0] is None, reason=library()[1])
def test_instruction_set_can_be_forced():
    available = library()[0].instruction_sets()
    assert available[0] == "portable"
    for isa in available:
        assert isa_of(isa).stdout.strip() == isa
    assert isa_of("").stdout.strip() == available[-1]
    wrong = isa_of("avx3")
    assert wrong.returncode != 0
    assert "LEAFKERN_ISA (on this CPU): unknown name 'avx3'" in wrong.stderr
    with pytest.raises(ValueError, match="no such instruction set here: sse9"):
        library()[0].select_isa("sse9")
