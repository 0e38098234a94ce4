"""What the compiler makes of exponentials by polynomial, read from the machine code: pytest -m compile."""

import collections
import dataclasses
import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from leafkern.ops._core import cubin
from leafkern.ops.attention import kernels

pytestmark = pytest.mark.compile


def instructions(item, architecture, scratch):
    """How often each instruction stands in the machine code, by the first part of its name."""
    target = GPUTarget("cuda", architecture, 32)
    path = scratch / "kernel.cubin"
    path.write_bytes(triton.compile(cubin.source(item), target=target, options=dict(item.options)).asm["cubin"])
    code = cubin._tool("nvdisasm", "--print-code", str(path))
    return collections.Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?(\w+)", code, re.M))


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_polynomials_move_nothing_between_threads(kernel, architecture, tmp_path):
    (item,) = (i for i in kernels.shipped() if i.name == f"{kernel} bf16 D=32 mixed")
    shared = dataclasses.replace(item, constants=dict(item.constants) | {"SHARE": 4})
    plain, mixed = (instructions(i, architecture, tmp_path) for i in (item, shared))
    # A quarter of the weights' exponentials is gone; those that fade the sum of a row are none of them.
    assert 0.7 * plain["MUFU"] < mixed["MUFU"] < 0.85 * plain["MUFU"]
    # sm_100 has one for two numbers at once.
    assert mixed["FFMA"] + 2 * mixed["FFMA2"] > plain["FFMA"] + 2 * plain["FFMA2"]
    for moves in ("SHFL", "LDS", "LDSM", "STS", "STSM", "PRMT", "BAR"):
        assert mixed[moves] == plain[moves], moves


def test_what_autotuning_may_choose_compiles():
    items = kernels.tunable()
    # The largest block with polynomials: rows and warps of the heuristic doubled.
    (item,) = (i for i in items if i.name.startswith("attend bf16 D=32 mixed rows=128") and i.constants["SHARE"] == 4)
    found = cubin.compile_shipped(item, 90)
    assert not found.problems
    assert found.wgmma
