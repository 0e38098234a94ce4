"""The ground that all operations stand on: backend choice, checks, registration, the native library."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from compare import matmul_setting

from leafkern.errors import BackendError, InputError
from leafkern.ops._core import backend, checks, launch
from leafkern.ops._core.native import huge, library
from leafkern.ops._core.normalize import normalize_rows, normalize_rows_backward
from leafkern.ops._core.registration import needs_gradient, register, register_loss


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
        ("quantization=flash", r"quantization has no backend 'flash' \(it has: native, reference\)"),
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
    with pytest.raises(InputError, match=r"x: row 1 has length 0 \(2 such rows\)"):
        checks.check_nonzero_rows("x", x)
    checks.check_finite_rows("x", torch.full((4, 3), 3e38))  # whose sum is not
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


def _square(x, y, needs):
    loss = x.float().square().sum() if y is None else (x.float() @ y.float().T).square().sum()
    empty = torch.empty(0)
    dx = 2 * (x.float() if y is None else x.float() @ y.float().T @ y.float()) if needs[0] else empty
    dy = 2 * (y.float() @ x.float().T @ x.float()) if needs[1] else empty.clone()
    return loss, loss / 2, dx, dy


def _square_fake(x, y, needs):
    loss, half = x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    shapes = (x.shape if needs[0] else (0,), y.shape if needs[1] else (0,))
    return loss, half, *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


square = register_loss(
    "test_square(Tensor x, Tensor? y, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _square,
    _square_fake,
    differentiable=(0, 1),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_carries_its_gradients(dtype):
    x, y = torch.randn(3, 4, dtype=dtype).requires_grad_(), torch.randn(2, 4, dtype=dtype).requires_grad_()
    for arguments in ((x, y), (x, None)):
        needs = needs_gradient(*arguments)
        torch.library.opcheck(torch.ops.leafkern.test_square.default, (*arguments, needs))
        outputs = square(*arguments, needs)
        assert [part.requires_grad for part in outputs] == [True, False, False, False]
        torch.compiler.reset()
        compiled = torch.compile(
            lambda x, y: square(x, y, needs_gradient(x, y))[0], backend="aot_eager", fullgraph=True
        )
        inputs = [a for a in arguments if a is not None]
        for loss in (outputs[0], compiled(*arguments)):
            exact = [a.detach().float().requires_grad_() for a in inputs]
            _square(*exact, *[None] * (2 - len(exact)), [False, False])[0].backward()
            for found, right, a in zip(torch.autograd.grad(3 * loss, inputs), exact, inputs):
                assert found.dtype == a.dtype
                torch.testing.assert_close(found, (3 * right.grad).to(a.dtype))


def test_a_gradient_exists_once():
    x = torch.randn(3, 4, requires_grad=True)
    outputs = square(x, None, [True, False])
    loss, made = outputs[0], outputs[2].data_ptr()
    del outputs
    loss.backward()
    assert x.grad.data_ptr() == made


def test_a_graph_that_is_kept_keeps_its_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    loss = square(x, None, [True, False])[0]
    for factor in (3, 5):
        (found,) = torch.autograd.grad(factor * loss, x, retain_graph=True)
        torch.testing.assert_close(found, 2 * factor * x.detach())
    # What a registered operation returned is its caller's.
    loss, _, gradient, _ = torch.ops.leafkern.test_square(x, None, [True, False])
    (7 * loss).backward()
    torch.testing.assert_close(gradient, 2 * x.detach())
    torch.testing.assert_close(x.grad, 14 * x.detach())


def test_a_batch_of_incoming_gradients():
    x, factors = torch.randn(3, 4, requires_grad=True), torch.tensor([1.0, -2.0, 5.0])
    loss = square(x, None, [True, False])[0]
    (found,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    torch.testing.assert_close(found, 2 * factors[:, None, None] * x.detach())


def test_gradients_that_nobody_wants_are_not_made():
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    assert needs_gradient(x, y, None) == [True, False, False]
    assert [part.numel() for part in square(x, y, needs_gradient(x, y))[2:]] == [12, 0]
    with torch.no_grad():
        assert needs_gradient(x) == [False]
    with pytest.raises(RuntimeError, match="test_square: called with needs=False"):
        square(x, y, [False, False])[0].backward()


def test_a_scaled_half_precision_loss_keeps_small_gradients():
    # 2 * 1e-6 is below half precision's smallest number; times the scale it is not.
    x = torch.full((1, 1), 1e-6, dtype=torch.float16, requires_grad=True)
    (square(x, None, [True, False])[0] * 2.0**16).backward()
    torch.testing.assert_close(x.grad.item(), 2 * x.item() * 2**16, rtol=1e-3, atol=0)


def _penalty(loss, x):
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: square(x, None, [True, False])[0],
        lambda x: torch.ops.leafkern.test_square(x, None, [True, False])[0],
        lambda x: scaled(x, 3.0).square().sum(),
    ],
    ids=["eager", "registered", "incoming gradient"],
)
def test_second_derivatives_are_refused(loss):
    # A gradient penalty must not silently count as a constant, whichever way it is differentiated.
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (x.sum() + _penalty(loss(x), x)).backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(x.sum() + _penalty(loss(x), x), x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hvp(loss, x.detach(), torch.ones(3, 4))


def test_first_derivative_of_a_function():
    x = torch.randn(3, 4)
    found = torch.func.grad(lambda x: square(x, None, [True, False])[0])(x)
    torch.testing.assert_close(found, 2 * x)


def test_autocast_does_not_reach_into_an_operation():
    x, y = torch.randn(30, 40, requires_grad=True), torch.randn(20, 40)
    plain = square(x, y, [True, False])[0]
    (expected,) = torch.autograd.grad(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = square(x, y, [True, False])[0]
        (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(loss, plain)
    assert torch.equal(found, expected)


def test_gradient_of_normalisation():
    x = torch.randn(5, 3, dtype=torch.float64)
    x[1], x[2] = 0, torch.tensor([1e-13, -2e-13, 1e-13])
    x.requires_grad_()
    weights = torch.randn(5, 3, dtype=torch.float64)
    (normalize_rows(x) * weights).sum().backward()
    torch.testing.assert_close(normalize_rows_backward(weights, x.detach()), x.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.check_dims([4, 2, 2], 8), r"dims: expected descending, unique widths; got \[4, 2, 2\]"),
        (lambda: checks.check_dims([2, 4], 8), "descending"),
        (lambda: checks.check_dims([9], 8), r"dims: expected prefix widths from 1 to 8; got \[9\]"),
        (lambda: checks.check_dims([], 8), "from 1 to 8"),
        (lambda: checks.check_dims([True], 8), "from 1 to 8"),
        (lambda: checks.check_dim_weights([1.0], [4, 2]), "dim_weights: expected 2 finite numbers"),
        (
            lambda: checks.check_dim_weights([1.0, float("nan")], [4, 2]),
            r"dim_weights\[1\]: expected a finite number; got nan",
        ),
        (lambda: checks.check_dim_weights(0.5, [4, 2]), "dim_weights: expected 2 finite numbers; got 0.5"),
        (lambda: checks.check_dim_weights(["a", "b"], [4, 2]), r"dim_weights\[0\]: expected a finite number; got 'a'"),
        (lambda: checks.check_dims(8, 8), "dims: expected prefix widths from 1 to 8; got 8"),
        (lambda: checks.check_number("margin", 10**400), "margin: expected a finite number; got 1000"),
        (lambda: checks.check_flag("causal", "no"), "causal: expected True or False; got 'no'"),
        (lambda: checks.check_floating("x", torch.ones(1).to(torch.float8_e4m3fn)), "x: expected a floating-point"),
        (lambda: checks.check_nonzero_rows("t", torch.full((2, 3), 1e-30)), "t: row 0 has length 0"),
        (lambda: checks.check_nonzero_rows("t", torch.full((2, 3), 1e30)), "t: row 0 has length inf"),
        (lambda: checks.check_number("margin", float("inf")), "margin: expected a finite number; got inf"),
        (
            lambda: checks.check_number("margin", "a", least=0),
            "margin: expected a finite number of at least 0; got 'a'",
        ),
        (lambda: checks.check_number("t", 0, above=0), "t: expected a finite number above 0; got 0"),
    ],
)
def test_numbers_and_widths(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_widths_by_default():
    assert checks.check_dims(None, 8) == [8]
    assert checks.check_dims((8, 3), 8) == checks.check_dims(np.array([8, 3]), 8) == [8, 3]
    assert checks.check_number("margin", np.float32(0.5)) == 0.5
    assert checks.check_dim_weights(None, [8, 3]) == [0.5, 0.5]
    assert checks.check_dim_weights([1, 0], [8, 3]) == [1.0, 0.0]


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


def test_huge_pages_change_nothing_but_speed():
    for count in (0, 1, 5 << 20):
        x = torch.empty(count, dtype=torch.uint8)
        assert huge(x) is x
        assert x.fill_(7).sum() == 7 * count
    assert huge(torch.empty(4, device="meta")).is_meta


def test_options_may_change_under_compile():
    def scaled_by(x, margin):
        return x * checks.check_number("margin", margin, least=0) * sum(checks.check_dim_weights([margin], [2]))

    torch.compiler.reset()
    compiled = torch.compile(scaled_by, backend="aot_eager", fullgraph=True)
    for margin in (0.5, 0.25, 0.125):
        assert torch.equal(compiled(torch.ones(2), margin), torch.full((2,), margin**2))


def test_products_of_float32_follow_torch():
    assert launch.precision(torch.float32) == "ieee"
    with matmul_setting("fp32_precision", "tf32"):
        assert launch.precision(torch.float32) == "tf32"
        assert launch.precision(torch.float16) == "ieee"
