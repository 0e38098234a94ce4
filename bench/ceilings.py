"""What this machine can do, measured in the run whose figures are set against it.

A ceiling is a rate per second with its unit. On CPU the native loops of peaks.cpp are compiled with the system's
compiler; without one, bandwidth and the float32 rate come from torch and the others are absent.
"""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

REPEATS = 8
LOOPS = {
    # name: (instruction set, unit)
    "fp32_fma": ("avx2", "FLOP"),
    "int8_maddubs": ("avx2", "OP"),
    "int8_maddubs16": ("avx2", "OP"),
    "lookups": ("avx2", "lookup"),
    "popcount_scalar": ("avx2", "bit"),
    "popcount_avx2": ("avx2", "bit"),
    "int8_vnni": ("avx512", "OP"),
    "popcount_avx512": ("avx512", "bit"),
}


@dataclass(frozen=True)
class Ceiling:
    rate: float  # units per second
    unit: str
    threads: int
    how: str


def measure(device: str, threads: int, *, quick: bool = False) -> dict[str, Ceiling]:
    """All ceilings of `device` ("cpu" or "cuda"); CPU rates for one thread (suffix "_1") and for `threads`."""
    return _cuda(quick) if device == "cuda" else _cpu(threads, quick)


def as_json(found: dict[str, Ceiling]) -> dict:
    return {name: asdict(ceiling) for name, ceiling in found.items()}


def best_rate(run: Callable[[], float], repeats: int = REPEATS) -> float:
    """The highest rate over `repeats` calls of `run`, which returns the work it did."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        work = run()
        best = max(best, work / (time.perf_counter() - start))
    return best


@functools.cache
def native_loops() -> ctypes.CDLL | None:
    """peaks.cpp, compiled into a scratch folder; None without a compiler or off POSIX."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.name != "posix":
        return None
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "peaks.so"
        source = Path(__file__).with_name("peaks.cpp")
        command = [*compiler.split(), "-O3", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        library = ctypes.CDLL(str(target))
    for name in (*LOOPS, "read_memory", "copy_memory", "sort_keyed"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_double
    return library


def _cpu(threads: int, quick: bool) -> dict[str, Ceiling]:
    import torch

    found: dict[str, Ceiling] = {}
    library = native_loops()
    side = 512 if quick else 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)
    counts = sorted({1, threads})
    before = torch.get_num_threads()
    for count in counts:
        torch.set_num_threads(count)

        def multiply() -> float:
            torch.mm(a, b, out=out)
            return 2.0 * side**3

        found[_key("fp32_gemm", count, threads)] = Ceiling(best_rate(multiply), "FLOP", count, f"torch.mm {side}³")
    torch.set_num_threads(before)
    megabytes = 32 if quick else 512
    if library is None:
        source = torch.ones(megabytes << 17, dtype=torch.int64)
        target = torch.ones_like(source)
        copy = best_rate(lambda: target.copy_(source) is not None and 2.0 * source.nbytes)
        read = best_rate(lambda: float(source.sum() * 0) + source.nbytes)
        found["copy"] = Ceiling(copy, "byte", before, "torch copy_, bytes read and written")
        found["read"] = Ceiling(read, "byte", before, "torch sum")
        return found
    found["std_sort"] = Ceiling(_sort_rate(library, 1 << (14 if quick else 19)), "step", 1, "std::sort, n log2 n steps")
    with ThreadPoolExecutor(threads) as pool:
        for count in counts:
            found.update(_bandwidth(library, pool, count, threads, megabytes))
        for name, (isa, unit) in LOOPS.items():
            if hasattr(library, name) and library.has(isa.encode()):
                for count in counts:
                    rate = _loop_rate(getattr(library, name), pool, count, 0.005 if quick else 0.05)
                    how = f"register- or L1-resident loop, {isa}"
                    found[_key(name, count, threads)] = Ceiling(rate, unit, count, how)
    for name in [name for name in found if name.startswith("lookups")]:
        # The other way to count equal bits: a look-up in a table of 16 answers for four of them.
        rate, threads_used = 4 * found[name].rate, found[name].threads
        found[name.replace("lookups", "lookups_bits")] = Ceiling(rate, "bit", threads_used, f"4 × {name}")
    return found


def _key(name: str, count: int, threads: int) -> str:
    return name if count == threads else f"{name}_1"


def _loop_rate(loop, pool: ThreadPoolExecutor, threads: int, seconds: float) -> float:
    sink = ctypes.c_uint64()
    rounds = 1000
    start = time.perf_counter()
    loop(ctypes.c_long(rounds), ctypes.byref(sink))
    rounds = max(rounds, int(rounds * seconds / (time.perf_counter() - start)))

    def one(_: int) -> float:
        return loop(ctypes.c_long(rounds), ctypes.byref(ctypes.c_uint64()))

    return best_rate(lambda: sum(pool.map(one, range(threads))))


def sort_keyed(library: ctypes.CDLL, keys, space) -> None:
    """std::sort, one thread, of float32 keys (n,) that carry an index; `space`: 8n bytes. Both numpy arrays."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (keys, space)]
    library.sort_keyed(pointers[0], ctypes.c_long(len(keys)), pointers[1])


def _sort_rate(library, count: int) -> float:
    import numpy as np

    keys = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    space = np.zeros(count, dtype=np.int64)
    return best_rate(lambda: sort_keyed(library, keys, space) or count * math.log2(count))


def _bandwidth(library, pool: ThreadPoolExecutor, count: int, threads: int, megabytes: int) -> dict[str, Ceiling]:
    import numpy as np

    words = (megabytes << 20) // 8 // count
    # Written, not only allocated: untouched pages would all be the one zero page.
    sources = [np.full(words, 1, dtype=np.uint64) for _ in range(count)]
    targets = [np.full(words, 2, dtype=np.uint64) for _ in range(count)]

    def read(i: int) -> float:
        sink = ctypes.c_uint64()
        return library.read_memory(ctypes.c_void_p(sources[i].ctypes.data), ctypes.c_long(words), ctypes.byref(sink))

    def copy(i: int) -> float:
        to, source = ctypes.c_void_p(targets[i].ctypes.data), ctypes.c_void_p(sources[i].ctypes.data)
        return library.copy_memory(to, source, ctypes.c_long(words))

    how = f"{megabytes} MiB of touched pages"
    return {
        _key("read", count, threads): Ceiling(
            best_rate(lambda: sum(pool.map(read, range(count)))), "byte", count, f"{how}, streamed"
        ),
        _key("copy", count, threads): Ceiling(
            best_rate(lambda: sum(pool.map(copy, range(count)))), "byte", count, f"{how}, read and written"
        ),
    }


def _cuda(quick: bool) -> dict[str, Ceiling]:
    import torch

    def rate(run: Callable[[], object], work: float) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(3 if quick else 20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return work / sorted(times)[len(times) // 2]

    found = {}
    count = 1 << (24 if quick else 30)
    source = torch.randint(-100, 100, (count,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = Ceiling(rate(lambda: target.copy_(source), 2.0 * count), "byte", 1, "copy_, read and written")
    words = source.view(torch.int64)
    found["read"] = Ceiling(rate(lambda: torch.sum(words), float(count)), "byte", 1, "sum of int64")
    side = 1024 if quick else 8192
    for dtype, name in ((torch.bfloat16, "bf16_gemm"), (torch.float16, "fp16_gemm"), (torch.float32, "fp32_gemm")):
        a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty(side, side, device="cuda", dtype=dtype)
        multiply = functools.partial(torch.mm, a, b, out=out)
        found[name] = Ceiling(rate(multiply, 2.0 * side**3), "FLOP", 1, f"torch.mm {side}³, random data")
    work = 2.0 * side**3
    # Not every GPU and build has these two; the others' figures must come all the same.
    with suppress(RuntimeError):
        a, b = (torch.randint(-100, 100, (side, side), dtype=torch.int8, device="cuda") for _ in range(2))
        # Column-major second operand: what the int8 matrix units take.
        found["int8_gemm"] = Ceiling(
            rate(lambda: torch._int_mm(a, b.t()), work), "OP", 1, f"torch._int_mm {side}³, random data"
        )
    with suppress(RuntimeError):
        x, y = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        scale = {"scale_a": torch.ones((), device="cuda"), "scale_b": torch.ones((), device="cuda")}
        found["fp8_gemm"] = Ceiling(
            rate(lambda: torch._scaled_mm(x, y.t(), out_dtype=torch.bfloat16, **scale), work),
            "FLOP",
            1,
            f"torch._scaled_mm e4m3 {side}³, random data",
        )
    return found
