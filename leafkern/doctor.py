"""What serves each operation on this machine, why, and what would be faster."""

import importlib
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


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def operations(device: str) -> list[tuple[str, str, str, str]]:
    """(operation, backend that serves tensors on `device`, why, what would be faster); device "cpu" or "cuda"."""
    from leafkern.ops._core.backend import OPERATIONS, forced_backend

    rows = []
    for operation, backends in OPERATIONS.items():
        reasons = {name: _missing(name, device) for name in backends if _DEVICES[name] in (device, "any")}
        forced, best = forced_backend(operation), next(iter(reasons))
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if forced is not None and forced not in reasons:
            rows.append((operation, "none", f"LEAFKERN_BACKEND says {forced}, which has no kernel for {device}", ""))
        elif forced is not None:
            faster = "" if forced == best else f"unset LEAFKERN_BACKEND to let {chosen} serve"
            rows.append((operation, forced, "LEAFKERN_BACKEND says so", faster))
        elif chosen == best:
            why = _WHY[chosen] if len(reasons) > 1 else f"PyTorch; it has no other backend for {device} yet"
            rows.append((operation, chosen, why, ""))
        else:
            rows.append((operation, chosen, _WHY[chosen], f"{best}: {reasons[best]}"))
    return rows


_DEVICES = {"reference": "any", "native": "cpu", "triton": "cuda", "flash": "cuda", "sdpa": "any"}
_WHY = {
    "reference": "PyTorch",
    "native": "the compiled kernels are there",
    "triton": "Triton kernels, compiled at first use",
    "flash": "the package flash-attn",
    "sdpa": "torch's own kernel; attention_mean_pool by the reference",
}


def _missing(backend: str, device: str) -> str | None:
    """Why `backend` can't serve on `device`; None when it can."""
    from leafkern.ops._core import launch, native
    from leafkern.ops.attention import flash, sdpa

    reasons = {"native": native.unavailable, "triton": launch.missing, "flash": flash.missing}
    if device == "cuda":
        reasons["sdpa"] = sdpa.missing
    return reasons[backend]() if backend in reasons else None


def functions(operation: str) -> list[str]:
    """The public functions of an operation; of one that leafkern.ops does not export, those of its folder."""
    from leafkern.ops import _WHERE

    exported = [name for name, folder in _WHERE.items() if folder == operation and name.islower()]
    return exported or importlib.import_module(f"leafkern.ops.{operation}").__all__


# Package, the extra that brings it, what it is for.
OPTIONAL = (
    ("pydantic", "train", "leafkern train"),
    ("sentence-transformers", "bench", "leafkern's losses in its trainer; peer in leafkern bench encoder"),
    ("flash-attn", "flash", "attention with heads of 96 and wider on CUDA"),
    ("pytest-benchmark", "bench", "leafkern bench"),
    ("faiss-cpu", "bench", "peer in leafkern bench search"),
    ("ray", "ray", "encoding and search by several processes or machines"),
)


def absent() -> list[tuple[str, str]]:
    """(what to install, for what) of the optional packages that are not here."""
    missing = []
    for package, extra, purpose in OPTIONAL:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append((f"leafkern[{extra}]", f"{purpose} ({package})"))
    return missing
