"""Which backend serves attention, and what those of other people are told; their kernels run on a GPU."""

import inspect
import sys
import types

import pytest
import torch
from compare import bounds, relative
from tolerances import TOLERANCE

from leafkern import doctor
from leafkern.errors import BackendError
from leafkern.ops._core import backend, launch
from leafkern.ops.attention import choice, flash, reference, sdpa

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (3, 0), (2, -1), (-1, 5), (4, 2), (16, 16), (99, 99), (15, 3)]


def on_cuda(width=128, dtype=torch.bfloat16):
    """What the choice of a backend asks of q."""
    return types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(100, 4, width))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 with triton, torch's kernel and, from `with_flash` on, flash-attn."""
    backend._warn_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(flash, "missing", lambda: "flash-attn is not installed")
    monkeypatch.setattr(sdpa, "missing", lambda: None)
    return monkeypatch


def with_flash(gpu):
    gpu.setattr(flash, "missing", lambda: None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("width", "dtype", "scale", "without", "expected"),
    [
        (32, torch.bfloat16, 1.0, "triton", "triton"),
        (88, torch.float16, 1.0, "triton", "triton"),
        (96, torch.bfloat16, 1.0, "sdpa", "flash"),
        (128, torch.float16, 1.0, "sdpa", "flash"),
        (192, torch.float16, 1.0, "sdpa", "flash"),
        # Kernels of others take neither of these.
        (128, torch.float32, 1.0, "triton", "triton"),
        (128, torch.bfloat16, 0.0, "triton", "triton"),
        (128, torch.bfloat16, -1.0, "triton", "triton"),
    ],
)
def test_choice_on_cuda(gpu, width, dtype, scale, without, expected):
    assert choice.varlen_attention(on_cuda(width, dtype), scale) == without
    with_flash(gpu)
    assert choice.varlen_attention(on_cuda(width, dtype), scale) == expected
    gpu.setattr(launch, "missing", lambda: "triton is not installed")
    if expected == "flash":
        assert choice.varlen_attention(on_cuda(width, dtype), scale) == "flash"


@pytest.mark.parametrize("installed", [False, True])
def test_without_triton_the_next_serves_with_a_warning(gpu, installed):
    gpu.setattr(launch, "missing", lambda: f"no triton here ({installed})")
    if installed:
        with_flash(gpu)
    with pytest.warns(UserWarning, match=r"not triton: no triton here"):
        assert choice.varlen_attention(on_cuda(32), 1.0) == ("flash" if installed else "sdpa")
    gpu.setattr(launch, "missing", lambda: None)
    with pytest.warns(UserWarning, match=r"not triton: D = 20"):
        assert choice.varlen_attention(on_cuda(20 if installed else 204), 1.0) == "reference"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flash", {}, "flash-attn is not installed"),
        ("sdpa", {"dtype": torch.float32}, "no kernel for float32"),
        ("sdpa", {"width": 20}, "D = 20; its kernels take multiples of 8 up to 192"),
        ("sdpa", {"width": 256}, "D = 256"),
        ("sdpa", {"scale": 0.0}, "scale = 0"),
        ("triton", {"width": 136}, "D = 136"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_why(gpu, name, change, reason):
    gpu.setenv("LEAFKERN_BACKEND", f"attention={name}")
    scale = change.pop("scale", 1.0)
    with pytest.raises(BackendError, match=f"attention={name}, which can't serve this call: {reason}"):
        choice.varlen_attention(on_cuda(**change), scale)


def test_a_forced_backend_serves_any_width(gpu):
    with_flash(gpu)
    for name in ("triton", "flash", "sdpa", "reference"):
        gpu.setenv("LEAFKERN_BACKEND", name)
        assert choice.varlen_attention(on_cuda(32), 1.0) == choice.varlen_attention(on_cuda(128), 1.0) == name


def test_old_gpus_are_left_to_the_reference(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="compute capability 8"):
        assert choice.varlen_attention(on_cuda(40), 1.0) == "reference"
    gpu.setenv("LEAFKERN_BACKEND", "sdpa")
    with pytest.raises(BackendError, match="compute capability 8"):
        choice.varlen_attention(on_cuda(40), 1.0)


@pytest.mark.parametrize("name", ["flash", "sdpa"])
def test_pooling_has_two_backends(gpu, name):
    assert choice.attention_mean_pool(on_cuda()) == "triton"
    gpu.setenv("LEAFKERN_BACKEND", name)
    with pytest.raises(BackendError, match=rf"attention={name}.*attention_mean_pool has no such backend"):
        choice.attention_mean_pool(on_cuda())


def test_cpu_is_served_by_torch(monkeypatch):
    assert choice.varlen_attention(torch.empty(3, 2, 5), -1.0) == "sdpa"
    monkeypatch.setenv("LEAFKERN_BACKEND", "attention=flash")
    with pytest.raises(BackendError, match="its kernels run on CUDA"):
        choice.varlen_attention(torch.empty(3, 2, 8), 1.0)


def test_doctor_knows_the_backends(gpu):
    rows = {operation: rest for operation, *rest in doctor.operations("cuda")}
    assert rows["attention"][0] == "triton"
    gpu.setattr(launch, "missing", lambda: "triton is not installed")
    rows = {operation: rest for operation, *rest in doctor.operations("cuda")}
    assert rows["attention"] == [
        "sdpa",
        "torch's own kernel; attention_mean_pool by the reference",
        "triton: triton is not installed",
    ]
    rows = {operation: rest for operation, *rest in doctor.operations("cpu")}
    assert rows["attention"][0] == "sdpa"


# What the kernels are told: stand-ins with the signatures of flash-attn 2.8 and of torch's operations, which compute by
# the reference.


class Interface(types.ModuleType):
    """flash_attn.flash_attn_interface."""

    deterministic = None

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0, 0, None, False)
        assert (block_table, leftpad_k, seqused_k) == (None, None, None)
        assert max_seqlen_q == max_seqlen_k
        window = window_size_left, window_size_right
        accept(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, *window)
        out, lse = reference.blocked_attention(q, k, v, cu_seqlens_q, softmax_scale, *window)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, rng_state) == (0, 0, None, None)
        assert max_seqlen_q == max_seqlen_k
        window = window_size_left, window_size_right
        accept(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, *window)
        assert dout.stride(-1) == out.stride(-1) == 1
        self.deterministic = deterministic
        arguments = (dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale, *window)
        for place, grad in zip((dq, dk, dv), reference.blocked_attention_backward(*arguments), strict=True):
            place.copy_(grad)
        return torch.empty(0)


def accept(q, k, v, bounds_q, bounds_k, longest, causal, left, right):
    """What the kernels check, and what they take for granted."""
    assert torch.equal(bounds_q, bounds_k)
    assert bounds_q.dtype == torch.int32
    assert longest >= max(2, int(bounds_q.diff().max()))
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert causal == (left < 0 and right == 0)
    assert left >= -1
    assert right >= -1


def torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    assert (dropout_p, return_debug_mask, seqused_k, alibi_slopes) == (0, False, None, None)
    assert max_q == max_k
    window = window_size_left, window_size_right
    accept(query, key, value, cum_seq_q, cum_seq_k, max_q, is_causal, *window)
    out, lse = reference.blocked_attention(query, key, value, cum_seq_q, scale, *window)
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert dropout_p == 0
    assert max_q == max_k
    assert rng_state.shape == (2,)
    assert unused.numel() == 0
    window = window_size_left, window_size_right
    accept(query, key, value, cum_seq_q, cum_seq_k, max_q, is_causal, *window)
    arguments = (grad_out, query, key, value, out, logsumexp, cum_seq_q, scale, *window)
    return reference.blocked_attention_backward(*arguments)


@pytest.fixture(params=["flash", "sdpa"])
def kernels(request, monkeypatch):
    """(forward, backward) of a backend, over a stand-in for what it calls."""
    if request.param == "sdpa":
        monkeypatch.setattr(sdpa, "_CUDA_FORWARD", torch_forward)
        monkeypatch.setattr(sdpa, "_CUDA_BACKWARD", torch_backward)
        return sdpa._packed, sdpa._packed_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", Interface("flash_attn.flash_attn_interface"))
    return flash.varlen_attention, flash.varlen_attention_backward


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", [[16, 0, 3], [1, 0, 1], [1]])
def test_arguments_mean_the_same_to_the_kernel(kernels, lengths, window):
    forward, backward = kernels
    tokens, cu = sum(lengths), bounds(lengths).long()
    # Views, one of which has no adjacent entries.
    packed = torch.randn(tokens, 4, 3, 8, dtype=torch.bfloat16)
    q, k, v = packed[:, :, 0], packed[:, :2, 1], torch.randn(8, 2, tokens, dtype=torch.bfloat16).permute(2, 1, 0)
    grad = torch.randn(1, 1, 8).expand(tokens, 4, 8)
    out, lse = forward(q, k, v, cu, max(lengths), 0.3, *window)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, tokens), torch.float32)
    grads = backward(grad, q, k, v, out, lse, cu, max(lengths), 0.3, *window)
    exact = [x.double() for x in (q, k, v)]
    right, right_lse = reference.blocked_attention(*exact, cu, 0.3, *window)
    rights = reference.blocked_attention_backward(grad.double(), *exact, right, right_lse, cu, 0.3, *window)
    assert relative(lse, right_lse) <= TOLERANCE[torch.float32]
    for mine, expected, given in zip((out, *grads), (right, *rights), (q, q, k, v), strict=True):
        assert (mine.shape, mine.dtype, mine.is_contiguous()) == (given.shape, given.dtype, True)
        assert (mine.double() - expected).norm() <= 2 * TOLERANCE[q.dtype] * torch.maximum(
            expected.norm(), rights[-1].norm()
        )


def test_no_tokens_reach_no_kernel(kernels):
    forward, backward = kernels
    q, k = torch.empty(0, 4, 8, dtype=torch.float16), torch.empty(0, 2, 8, dtype=torch.float16)
    for cu in (bounds([]), bounds([0, 0])):
        out, lse = forward(q, k, k, cu, 0, 1.0, -1, -1)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 0), torch.float32)
        assert [x.shape for x in backward(out, q, k, k, out, lse, cu, 0, 1.0, -1, -1)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_is_deterministic_where_torch_asks_for_it(monkeypatch, deterministic):
    interface = Interface("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, cu = torch.randn(5, 2, 8), bounds([5])
    out, lse = flash.varlen_attention(q, q, q, cu, 5, 1.0, -1, -1)
    flash.varlen_attention_backward(out, q, q, q, out, lse, cu, 5, 1.0, -1, -1)
    assert interface.deterministic is deterministic


def test_torch_takes_these_arguments():
    # The real operations, which check names and give shapes for tensors without memory.
    q, k = (torch.empty(20, n, 96, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = sdpa._packed(q, k, k, cu, 16, 0.3, 4, 2)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 20), torch.float32)
    grads = sdpa._packed_backward(out, q, k, k, out, lse, cu, 16, 0.3, 4, 2)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    # The stand-ins have the names of the real ones, in their order.
    for real, standin in ((sdpa._CUDA_FORWARD, torch_forward), (sdpa._CUDA_BACKWARD, torch_backward)):
        names = [argument.name for argument in real._schema.arguments]
        assert list(inspect.signature(standin).parameters) == names[: len(inspect.signature(standin).parameters)]


def test_flash_attn_says_what_is_wrong(monkeypatch):
    flash.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "not installed" in flash.missing()
    flash.missing.cache_clear()
