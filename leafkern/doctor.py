"""What serves each operation on this machine, why, and what would be faster."""

import importlib.metadata
import os
import platform

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "sentence-transformers",
    "flash-attn",
)


def versions() -> list[tuple[str, str]]:
    """(package, version or "not installed") of leafkern and what it builds on."""
    from leafkern import __version__

    found = [("leafkern", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def machine() -> list[tuple[str, str]]:
    """What the operations run on here."""
    import torch

    from leafkern.ops._core import native

    library, reason = native.library()
    sets = f"{library.isa()} of {', '.join(library.instruction_sets())}" if library else reason
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        ("native kernels", sets),
        ("GPU", ", ".join(gpus) or "none that torch can use"),
        ("LEAFKERN_BACKEND", os.environ.get("LEAFKERN_BACKEND", "not set")),
    ]


def operations() -> list[tuple[str, str, str, str]]:
    """(operation, backend for CPU tensors, why, what would be faster)."""
    from leafkern.ops._core import native
    from leafkern.ops._core.backend import OPERATIONS, forced_backend

    reason = native.unavailable()
    rows = []
    for operation, backends in OPERATIONS.items():
        forced = forced_backend(operation)
        if forced is not None:
            faster = "" if forced == backends[0] else f"unset LEAFKERN_BACKEND to let {backends[0]} serve"
            rows.append((operation, forced, "LEAFKERN_BACKEND says so", faster))
        elif "native" not in backends:
            rows.append((operation, "reference", "PyTorch; it has no other backend on the CPU yet", ""))
        elif reason is None:
            rows.append((operation, "native", "the compiled kernels are there", ""))
        else:
            faster = f"the native kernels: {native.NEEDED}"
            rows.append((operation, "reference", reason, faster))
    return rows
