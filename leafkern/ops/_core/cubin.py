"""Proof of Triton kernels without a GPU: what ptxas made of a configuration, read from the cubin.

Each operation's kernels.py has a function `shipped()` that lists what it launches; `shipped()` here collects the lists
of all operations. `compile_shipped` compiles one of them for one architecture on any Linux machine (the triton wheel
carries ptxas, cuobjdump and nvdisasm); `Compiled.problems` says where it breaks a limit. `make kernels` prints all.
"""

import functools
import importlib
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
# CUDA programming guide, technical specifications per compute capability: shared memory that one thread block can ask
# for, of that of a multiprocessor (the difference, 1 KiB, is taken from every resident block); 64 Ki registers, 255 per
# thread at most, handed out to warps in units of 256; 64 warps and 32 blocks resident.
SHARED_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_RESERVED = 1 << 10
REGISTERS = 65536
REGISTER_UNIT = 256
WARPS_RESIDENT = 64
BLOCKS_RESIDENT = 32


@dataclass(frozen=True)
class Shipped:
    """One kernel with everything that decides its machine code, as its launch passes it.

    signature: argument name -> Triton type ("*fp16", "i64", "fp32"), or a tuple of them; a pointer or integer with the
    suffix ":16" is divisible by 16, as Triton finds for tensors from torch. constants: constexpr arguments, and those
    that are None. options: what the launch passes besides (num_warps, num_stages, maxnreg, enable_fp_fusion). programs:
    how many the launch counts on to be resident per multiprocessor. tested: part of `make test`. architectures: those
    that can run it.
    """

    operation: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int = 1
    tested: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """What one configuration needs on one architecture; bytes per thread (spilled) and per block (shared)."""

    operation: str
    name: str
    architecture: int
    warps: int
    programs: int
    registers: int
    spilled: int
    shared: int
    wgmma: bool

    @property
    def resident(self) -> int:
        """Programs that fit on one multiprocessor together."""
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // self.warps
        whole = SHARED_PER_BLOCK[self.architecture] + SHARED_RESERVED
        return min(
            by_registers, WARPS_RESIDENT // self.warps, BLOCKS_RESIDENT, whole // (self.shared + SHARED_RESERVED)
        )

    @property
    def problems(self) -> list[str]:
        """The limits that are broken, as sentences; none when it may be shipped."""
        said = []
        if self.spilled:
            said.append(f"spills {self.spilled} bytes per thread to local memory")
        limit = SHARED_PER_BLOCK[self.architecture]
        if self.shared > limit:
            said.append(f"needs {self.shared} bytes of shared memory; sm_{self.architecture} has {limit} per block")
        elif self.resident < self.programs:
            said.append(f"only {self.resident} programs fit on a multiprocessor; its launch counts on {self.programs}")
        return said


def shipped() -> list[Shipped]:
    """Every configuration of every operation that has Triton kernels, in the order of the folders' names."""
    found = []
    folders = (module.name for module in pkgutil.iter_modules([Path(__file__).parents[1]]) if module.ispkg)
    for folder in sorted(folders):
        name = f"leafkern.ops.{folder}.kernels"
        if importlib.util.find_spec(name) is not None:
            found += importlib.import_module(name).shipped()
    return found


def source(item: Shipped):
    """What Triton compiles for `item`, as its launch would make it of the tensors and numbers it is given."""
    from triton.compiler import ASTSource

    signature = {name: "constexpr" for name in item.kernel.arg_names}
    signature |= {name: _without_suffix(kind) for name, kind in item.signature.items()}
    missing = [n for n, kind in signature.items() if kind == "constexpr" and n not in item.constants]
    if missing:
        raise ValueError(f"{item.operation}/{item.name}: neither type nor constant for {', '.join(missing)}")
    places = {name: (place,) for place, name in enumerate(item.kernel.arg_names)}
    kinds = {}
    for name, kind in item.signature.items():
        if isinstance(kind, tuple):
            kinds |= {(*places[name], place): part for place, part in enumerate(kind)}
        else:
            kinds[places[name]] = kind
    aligned = {place: [["tt.divisibility", 16]] for place, kind in kinds.items() if kind.endswith(":16")}
    constants = {places[name]: value for name, value in item.constants.items()}
    return ASTSource(fn=item.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _without_suffix(kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return tuple(map(_without_suffix, kind)) if isinstance(kind, tuple) else kind.partition(":")[0]


def compile_shipped(item: Shipped, architecture: int) -> Compiled:
    """Compiles `item` for sm_<architecture> and reads what it needs.

    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are Python functions, and whatever the compiler raises.
    """
    from leafkern.ops._core.launch import interpreting

    if interpreting():
        raise RuntimeError("kernels can't be compiled in a process with TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(source(item), target=GPUTarget("cuda", architecture, 32), options=dict(item.options))
    registers, spilled, static, wgmma = read_cubin(kernel.asm["cubin"])
    return Compiled(
        item.operation,
        item.name,
        architecture,
        kernel.metadata.num_warps,
        item.programs,
        registers,
        spilled,
        kernel.metadata.shared + static,
        wgmma,
    )


def compile_all(items: Sequence[Shipped], workers: int | None = None) -> Iterator[Compiled]:
    """Every one of `items`, all of them from `shipped()`, for each of its architectures, in order, on `workers`
    processes (default: one per CPU)."""
    jobs = [(item.operation, item.name, architecture) for item in items for architecture in item.architectures]
    # Spawned, not forked: torch has threads by now.
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_named, *zip(*jobs), chunksize=1)


@functools.cache
def _by_name() -> dict[tuple[str, str], Shipped]:
    return {(item.operation, item.name): item for item in shipped()}


def _compile_named(operation: str, name: str, architecture: int) -> Compiled:
    return compile_shipped(_by_name()[operation, name], architecture)


def read_cubin(cubin: bytes) -> tuple[int, int, int, bool]:
    """(registers per thread, bytes of local memory per thread, bytes of static shared memory, has wgmma)."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        assembly = _tool("nvdisasm", "--print-code", str(path))
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump said nothing about registers: {usage[:500]}")
    # Hopper's warp-group products are HGMMA, IGMMA, QGMMA and BGMMA in machine code.
    wgmma = re.search(r"\b[HIQB]GMMA\b", assembly) is not None
    return found["REG"], found.get("STACK", 0) + found.get("LOCAL", 0), found.get("SHARED", 0), wgmma


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    done = subprocess.run([getattr(knobs.nvidia, name).path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
