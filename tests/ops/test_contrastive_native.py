"""The CPU kernels of the contrastive losses: instruction sets, threads, exponentials, copies, peak memory."""

import math
import os
import subprocess
import sys

import pytest
import torch
from compare import LargestTensor, relative
from contrastive_cases import (
    MatrixWork,
    batch,
    info_nce_arguments,
    soft_label_arguments,
    soft_label_batch,
    some_ids,
)
from tolerances import TOLERANCE

from leafkern.ops._core.native import library
from leafkern.ops.contrastive import native, reference

pytestmark = [
    pytest.mark.skipif(library()[0] is None, reason="leafkern._C is not built"),
    pytest.mark.usefixtures("poisoned"),
]
EVERYTHING = {
    "temperature": 0.05,
    "gamma": 0.5,
    "detach_focal": False,
    "fn_margin": 0.3,
    "dims": [24, 9, 4],
    "dim_weights": [1.0, 0.3, 0.2],
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["info_nce", "own", "shared"])
def loss(request):
    """(native form, its blocked reference, arguments) of a loss with all its options, of `rows` rows as `dtype`."""

    def of(rows, dtype, width=24):
        prefixes = [width, width // 3, width // 6]
        if request.param == "info_nce":
            tensors = [x.detach() for x in batch(rows, width=width, dtype=dtype)]
            arguments = info_nce_arguments(tensors, some_ids(rows, 3, rows // 2), 0, EVERYTHING | {"dims": prefixes})
            return native.info_nce, reference.blocked_info_nce, arguments
        tensors = soft_label_batch(rows, rows + 3, shared=request.param == "shared", width=width, dtype=dtype)
        tensors[2][1, 2] = -torch.inf
        arguments = soft_label_arguments([x.detach() for x in tensors], rows, (True, True), prefixes, [1.0, 0.3, 0.2])
        return native.soft_label_loss, reference.blocked_soft_label_loss, arguments

    return of


def assert_close(found, expected, tolerance):
    for mine, right in zip(found, expected, strict=True):
        assert relative(mine, right) <= tolerance


def in_double(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [2, 17, 300])
def test_instruction_sets_equal_the_reference(loss, dtype, rows, isa):
    form, blocked, arguments = loss(rows, dtype)
    assert_close(form(*arguments), blocked(*in_double(arguments)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_number_of_threads_gives_the_same(loss, dtype, threads, isa):
    form, _, arguments = loss(257, dtype, width=72)
    threads(1)
    first = form(*arguments)
    for number in (2, 3, 4):
        threads(number)
        assert all(torch.equal(*pair) for pair in zip(form(*arguments), first, strict=True))


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -708.0)])
def test_exponentials_are_exact_to_a_few_ulp(dtype, lowest, isa):
    """One query whose raw products are the logits; its weights are exponentials times one number."""
    logits = torch.cat([torch.linspace(lowest, 0, 100_003, dtype=torch.float64), -torch.logspace(-9, 0, 999).double()])
    logits[:2] = 0.0  # the positive, and the maximum that is subtracted
    raw = logits.to(dtype)[None].contiguous()
    count, ones = raw.shape[1], torch.ones(raw.shape[1], dtype=dtype)
    weights, losses = torch.empty_like(raw), torch.empty(1, dtype=torch.float64)
    part = (raw.data_ptr(), weights.data_ptr(), ones.data_ptr(), count, count, 0, 0, True, 0, 0)
    nothing = (0, 0, 0, 0, 0, 0, 0, False, 0, 0)
    share = 2.0**20  # so that no weight is too small for a normal number
    arguments = (dtype == torch.float64, True, 1, 1, ones.data_ptr(), [part, nothing, nothing], 1.0, share)
    arguments += (losses.data_ptr(), 0, 1, 0, (0, 0, None, 0.0, True), 0, 1.0)
    value = library()[0].contrastive_rows(*arguments) / share
    exact = raw[0, 1:].double().exp()
    assert value == pytest.approx(math.log1p(exact.sum().item()), rel=8 * torch.finfo(dtype).eps)
    ratio = weights[0, 1:].double() / weights[0, 1].double() / exact
    # Two of the exponential, and half a one of each product with what all have in common.
    assert (ratio - 1).abs().max() <= 3 * torch.finfo(dtype).eps
    # What no normal number holds is 0.
    raw[0, 5] = 2 * lowest
    library()[0].contrastive_rows(*arguments)
    assert weights[0, 5] == 0


def test_widths_cost_no_further_products():
    """In units of B·B·D, as for one width: 4 for all similarities, 4 + 4 for the gradients."""
    tensors = [x if x is None else x.detach() for x in batch(16, mixes=None)]
    arguments = info_nce_arguments(tensors, (None, None), 0, EVERYTHING, (True, True, True, False))
    with MatrixWork() as products:
        native.info_nce(*arguments)
    assert products.total == 12 * 16 * 16 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 3000])
def test_pieces_that_are_converted_do_not_show(monkeypatch, loss, dtype, piece):
    form, _, arguments = loss(40, dtype)
    # Entries of a row apart: also what has the right type is copied.
    arguments = [x.mT.contiguous().mT if getattr(x, "ndim", 0) > 1 else x for x in arguments]
    whole = form(*arguments)
    monkeypatch.setattr(native, "PIECE_BYTES", piece)
    assert_close(form(*arguments), whole, TOLERANCE[torch.float32])


def test_expanded_and_overlapping_rows():
    queries = torch.randn(6, 5, dtype=torch.float64)
    line = torch.randn(12, dtype=torch.float64)
    for positives in (line[:5].expand(6, 5), line.unfold(0, 5, 1)[:6]):
        found = native.info_nce(*info_nce_arguments([queries, positives, None, None], (None, None), 0, {}))
        right = native.info_nce(*info_nce_arguments([queries, positives.clone(), None, None], (None, None), 0, {}))
        torch.testing.assert_close(found, right)


def test_no_input_is_copied():
    tensors = [x.detach() for x in batch(1024, width=64, number=2, mixes=None, dtype=torch.float32)[:3]]
    arguments = info_nce_arguments([*tensors, None], (None, None), 0, {}, (True, False, False, False))
    with LargestTensor() as largest:
        native.info_nce(*arguments)
    # The block of similarities; the negatives, which a view shows, take half a MiB.
    assert largest.bytes == native.MOST_ROWS * 3 * 1024 * 4


@pytest.mark.parametrize("length", [1e-30, 1e-13, 1e-6, 1e15])
def test_rows_of_any_length(length):
    tensors = [x.detach() for x in batch(6, mixes=1, dtype=torch.float32)]
    for x, place in zip(tensors, (1, 2, (0, 1))):
        x[place] *= length
    arguments = info_nce_arguments(tensors, (None, None), 0, {"gamma": 0.5, "dims": [24, 5], "dim_weights": [0.5, 0.5]})
    loss, *grads = native.info_nce(*arguments)
    expected, *right = reference.blocked_info_nce(*in_double(arguments))
    assert relative(loss, expected) <= TOLERANCE[torch.float32]
    for mine, other, x in zip(grads, right, tensors, strict=True):
        # Gradients of short rows are long: each is compared at its own length.
        size = x.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        assert relative(mine * size, other * size) <= TOLERANCE[torch.float32]


PEAK = """
import torch
from pathlib import Path
from leafkern.ops import info_nce

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) << 10

dtype, widths = getattr(torch, "{dtype}"), {widths}
small = torch.randn(300, 32, requires_grad=True)
info_nce(small, small.detach()).backward()  # libraries allocate what they keep
queries, positives = (torch.randn(4096, 48, dtype=dtype).requires_grad_() for _ in range(2))
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = status("VmRSS")
loss = info_nce(queries, positives, dims=widths)
loss.backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system doesn't tell peak memory")
@pytest.mark.parametrize(("dtype", "widths"), [("float32", [48]), ("float32", [48, 24, 8]), ("bfloat16", [48])])
def test_peak_memory_of_the_process(dtype, widths):
    """All similarities would take 64 MiB. Gradients exist once; for half precision also as they were computed."""
    command = [sys.executable, "-c", PEAK.format(dtype=dtype, widths=widths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gradients = 2 * 4096 * 48 * (4 if dtype == "float32" else 4 + getattr(torch, dtype).itemsize)
    assert int(done.stdout) - gradients <= 32 << 20
