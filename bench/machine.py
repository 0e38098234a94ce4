"""The machine of a benchmark: its description, versions, commit, peak memory, and how malloc treats free memory."""

import ctypes
import functools
import gc
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGES = ("leafkern", "torch", "triton", "numpy", "transformers", "sentence-transformers", "tokenizers")
PEERS = ("faiss-cpu", "usearch", "numkong", "flash-attn")


def machine() -> dict:
    """What the figures were measured on."""
    import psutil
    import torch

    described = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return described


def machine_name(device: str) -> str:
    """Folder of the results: "cpu", or the GPU's model in short ("h200")."""
    if device == "cpu":
        return "cpu"
    import torch

    words = torch.cuda.get_device_name(0).lower().replace("nvidia", "").replace("geforce", "").split()
    return words[0] if words else "cuda"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def repository() -> Path | None:
    """The git checkout that this file stands in, or None when installed without it."""
    folder = Path(__file__).resolve().parent.parent
    return folder if (folder / ".git").exists() and (folder / "pyproject.toml").exists() else None


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with "-changed" when tracked files differ from it; LEAFKERN_COMMIT where git is absent.

    As it is when first asked for: a benchmark's own results change the checkout.
    """
    folder = repository()
    if folder is None:
        return os.environ.get("LEAFKERN_COMMIT")
    git = ["git", "-C", str(folder)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LEAFKERN_COMMIT")
    return name + ("-changed" if changed.stdout.strip() else "")


def results_folder() -> Path:
    """bench/results of the checkout, or the current folder when installed without it."""
    folder = repository()
    return Path.cwd() if folder is None else folder / "bench" / "results"


# Memory and allocator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def mallopt_function():
    if platform.system() != "Linux":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


def set_allocator(name: str) -> None:
    """How malloc treats freed memory: "reuse" keeps it, as MALLOC_TRIM_THRESHOLD_ does; "default": as glibc does."""
    mallopt = mallopt_function()
    if mallopt is None:
        return
    reuse = name == "reuse"
    mallopt(M_MMAP_MAX, 0 if reuse else 65536)
    mallopt(M_TRIM_THRESHOLD, -1 if reuse else 128 << 10)
    mallopt(M_TOP_PAD, 64 << 20 if reuse else 128 << 10)
    if not reuse and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_memory(device: str):
    """Fills {"peak": bytes above the state before}, or None where the system doesn't say."""
    memory: dict[str, int | None] = {"peak": None}
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield memory
        memory["peak"] = torch.cuda.max_memory_allocated() - before
        return
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes(status, "VmRSS")
    except OSError:
        yield memory
        return
    yield memory
    memory["peak"] = max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def synchronizer(device: str) -> Callable[[], None]:
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def compiled(function: Callable, *, dynamic: bool) -> Callable:
    """torch.compile for as many cases as a benchmark has: of one function torch compiles eight forms, and then, with no
    more than a line in the log, runs it as it is."""
    import torch
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=dynamic)


def as_cuda_graph(call: Callable) -> Callable:
    """`call`, without arguments, captured once and replayed: timed without Python's cost of launching.

    What waits for the GPU is refused beforehand: after a capture that fails, torch's allocator is not to be trusted.
    """
    import torch

    from leafkern.nn.graphs import capture

    call()  # compiles what has to be
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return capture(call)
