"""The kernels of the contrastive losses on a GPU, bfloat16 included, against their definitions in float64.

Tests named `small` are also run under compute-sanitizer (bench/gpu.sh, stage "sanitizer").
"""

from functools import partial

import pytest
import torch
from compare import matmul_setting, relative
from contrastive_cases import some_ids
from contrastive_hold import batch_on, contrast, hold_contrast, hold_labels, labelled_on
from tolerances import TF32, TOLERANCE

from leafkern.ops import info_nce, mix_negatives, soft_label_loss
from leafkern.ops.contrastive.reference import blocked_info_nce, blocked_soft_label_loss

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("only_triton")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
batch, labelled = partial(batch_on, "cuda"), partial(labelled_on, "cuda")


def ids_on_gpu(rows, number, kinds):
    return tuple(x.cuda() for x in some_ids(rows, number, kinds))


def gradients_of(loss, tensors):
    return torch.autograd.grad(loss, [x for x in tensors if x is not None])


@pytest.mark.parametrize(("number", "mixes"), [(None, None), (3, 2), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
def test_small_info_nce(dtype, rows, number, mixes):
    hold_contrast(batch(rows, 48, number, mixes, dtype), temperature=0.1, gamma=0.5, detach_focal=False)


@pytest.mark.parametrize("dims", [[80], [80, 64, 16], [80, 33, 5], [48]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_masks_and_widths(dtype, dims):
    ids = ids_on_gpu(70, 2, 90)
    tensors = batch(70, 80, 2, 1, dtype)
    hold_contrast(tensors, temperature=0.1, dims=dims, ids=ids)
    # No column within a rounding of the margin.
    hold_contrast(tensors, temperature=0.1, dims=dims, ids=ids, fn_margin=-2.5)
    hold_contrast(tensors, temperature=0.1, dims=dims, ids=ids, fn_margin=2.5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "number"), [(1, 1), (17, 5), (130, 140)])
def test_small_soft_labels(dtype, rows, number, shared):
    hold_labels(*labelled(rows, number, shared, 48, dtype), dims=[48, 16], teacher_temperature=0.3)


def hold_blocked(found, expected, dtype, tolerance=None):
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert relative(mine, right) <= (tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("width", [384, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch(dtype, width):
    tensors = [x.detach() for x in batch(4096, width, 1, 2, dtype)]
    # A lower temperature magnifies what 1024 float32 products round, added one after the other, to the tolerance.
    rest = (None, None, 0, 0.1, 0.5, True, None, [width, width // 4], [1.0, 0.3], [True] * 4)
    found = torch.ops.leafkern.info_nce(*tensors, *rest)
    hold_blocked(found, blocked_info_nce(*(x.double() for x in tensors), *rest), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_labels_of_a_large_batch(dtype):
    tensors = [x.detach() for x in labelled(2048, 5000, True, 384, dtype)]
    rest = (2048, 0.05, 0.1, [384], [1.0], [True] * 2)
    found = torch.ops.leafkern.soft_label_loss(*tensors, *rest)
    hold_blocked(found, blocked_soft_label_loss(*(x.double() for x in tensors), *rest), dtype)


def test_tf32_where_torch_allows_it():
    tensors = [x.detach() for x in batch(300, 384, None, None)]
    rest = (None, None, 0, 0.5, 0.0, True, None, [384], [1.0], [True, True, False, False])
    expected = blocked_info_nce(*(None if x is None else x.double() for x in tensors), *rest)
    with matmul_setting("fp32_precision", "tf32"):
        hold_blocked(torch.ops.leafkern.info_nce(*tensors, *rest), expected, torch.float32, TF32)


def test_sums_stay_float32_where_torch_allows_float16():
    with matmul_setting("allow_fp16_accumulation", True):
        hold_contrast(batch(130, 48, 3, 2, torch.float16), temperature=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [384, 4096])
def test_memory_of_16k_queries(dtype, width):
    tensors = batch(16384, width, None, None, dtype)
    needs = [True, True, False, False]
    rest = (None, None, None, None, 0, 0.01, 0.5, True, None, [width], [1.0], needs)
    given = [x.detach() for x in tensors[:2]]
    # The library's workspace is there for all operations.
    torch.ops.leafkern.info_nce(*given, *rest)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.ops.leafkern.info_nce(*given, *rest)[1:]
    extra = torch.cuda.max_memory_allocated() - before - sum(grad.numel() * grad.element_size() for grad in grads)
    assert extra <= 64 << 20


def launched(call):
    """Names of the kernels that `call` launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    # The host's calls are events too.
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_launches(monkeypatch):
    # What fills empty memory for `poisoned` is launched too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tensors = [x.detach() for x in batch(512, 384, 1, None, torch.bfloat16)]
    rest = (None, None, 0, 0.01, 0.5, True, None, [384], [1.0], [True, True, True, False])

    def call():
        torch.ops.leafkern.info_nce(*tensors, *rest)

    call()
    names = launched(call)
    counts = {"prefix": 3, "score": 3, "row": 1, "weight": 2, "finish": 3}
    assert {name: sum(f"{name}_kernel" in each for each in names) for name in counts} == counts
    # Four products, of which some are several launches, and the sum of the rows' losses.
    assert len(names) <= sum(counts.values()) + 2 * 4 + 2


def everything():
    tensors, ids = batch(300, 384, 2, 3, torch.bfloat16), ids_on_gpu(300, 2, 300)
    queries, candidates, scores = labelled(300, 200, True, 384, torch.bfloat16)

    def step():
        loss = contrast(info_nce, tensors, ids=ids, gamma=0.5, fn_margin=0.1, dims=[384, 128], temperature=0.05)
        loss = loss + soft_label_loss(queries, candidates, scores)
        return loss.detach(), *torch.autograd.grad(loss, (*tensors, queries, candidates))

    return step


def test_the_host_waits_for_nothing():
    step = everything()
    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_every_time():
    step = everything()
    first = step()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_mixes_where_algorithms_must_be_deterministic():
    # As `poisoned` asks for.
    queries, _, negatives, _ = batch(40, 48, 5, None)
    generator, found = torch.Generator("cuda"), []
    for _ in range(2):
        mixed = mix_negatives(queries, negatives, listwise=2, generator=generator.manual_seed(3))
        found.append((mixed.detach(), *torch.autograd.grad(mixed[..., 0].sum(), negatives)))
    assert found[0][0].shape == (40, 7, 48)
    assert relative(found[0][0].norm(dim=-1), torch.ones(40, 7)) <= TOLERANCE[torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck():
    tensors = [x.detach().requires_grad_() for x in batch(20, 48, 2, 1, torch.bfloat16)]
    rest = (None, None, 0, 0.1, 0.5, True, 0.1, [48, 16], [1.0, 0.3], [True] * 4)
    found = torch.library.opcheck(torch.ops.leafkern.info_nce.default, (*tensors, *rest))
    assert set(found.values()) == {"SUCCESS"}
    tensors = labelled(20, 6, True, 48, torch.bfloat16)
    rest = (20, 0.1, 0.2, [48], [1.0], [True] * 2)
    found = torch.library.opcheck(torch.ops.leafkern.soft_label_loss.default, (*tensors, *rest))
    assert set(found.values()) == {"SUCCESS"}


def test_compiled_equals_eager():
    tensors = batch(100, 384, 2, 1, torch.bfloat16)
    compiled = torch.compile(
        lambda *t: contrast(info_nce, t, dims=[384, 64], gamma=0.5), fullgraph=True, backend="aot_eager"
    )
    found, expected = compiled(*tensors), contrast(info_nce, tensors, dims=[384, 64], gamma=0.5)
    assert torch.equal(found, expected)
    for mine, right in zip(gradients_of(found, tensors), gradients_of(expected, tensors), strict=True):
        assert torch.equal(mine, right)


def test_rows_beyond_two_to_the_31_entries():
    # 64-bit addresses: the last rows lie past what 32 bits reach.
    near = torch.randn(9, 512, device="cuda", dtype=torch.float16)
    memory = torch.zeros((1 << 31) + near[0].numel(), device="cuda", dtype=torch.float16)
    far = memory.as_strided(near.shape, (1 << 28, 1)).copy_(near)
    rest = (None, None, None, None, 0, 0.1, 0.0, True, None, [512], [1.0], [True, True, False, False])
    # Products of the library may be cut otherwise where rows lie apart.
    found, expected = (torch.ops.leafkern.info_nce(x, x, *rest) for x in (far, near))
    hold_blocked(found, expected, torch.float16)


def test_float64_falls_back(monkeypatch):
    monkeypatch.delenv("LEAFKERN_BACKEND")
    tensors = batch(9, dtype=torch.float64)
    exact = [x.detach() for x in tensors]
    expected = blocked_info_nce(*exact, None, None, 0, 0.1, 0.0, True, None, [24], [1.0], [False] * 4)[0]
    assert torch.equal(contrast(info_nce, tensors, temperature=0.1), expected)
