"""Which implementation serves a call.

LEAFKERN_BACKEND forces one: a bare name ("reference") binds every operation that has such a backend, pairs
("retrieval=native,pooling=reference") bind one operation each. A forced backend that can't serve a case raises;
only automatic choice falls back, with one warning per case.
"""

import functools
import os
import warnings
from collections.abc import Mapping

from leafkern.errors import BackendError, InputError, unknown_name

BACKENDS = ("reference", "native", "triton", "flash", "sdpa")

# The backends that exist today, per operation (folder name), best first.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("triton", "flash", "sdpa", "reference"),
    "pooling": ("triton", "reference"),
    "norm": ("triton", "reference"),
    "distill": ("triton", "native", "reference"),
    "relative": ("triton", "native", "reference"),
    "contrastive": ("triton", "native", "reference"),
    "quantization": ("native", "reference"),
    "retrieval": ("triton", "native", "reference"),
}


class FallbackWarning(UserWarning):
    """A slower backend serves because a faster one can't."""


@functools.lru_cache(maxsize=64)
def _parse(setting: str) -> dict[str, str]:
    forced: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        operation, _, name = part.rpartition("=")
        if name not in BACKENDS:
            raise unknown_name("LEAFKERN_BACKEND", name, BACKENDS)
        if not operation:
            forced.update({known: name for known, backends in OPERATIONS.items() if name in backends})
        elif operation not in OPERATIONS:
            raise unknown_name("LEAFKERN_BACKEND", operation, OPERATIONS)
        elif name not in OPERATIONS[operation]:
            has = ", ".join(OPERATIONS[operation])
            raise InputError(f"LEAFKERN_BACKEND: {operation} has no backend {name!r} (it has: {has})")
        else:
            forced[operation] = name
    return forced


def forced_backend(operation: str) -> str | None:
    """The backend that LEAFKERN_BACKEND binds to `operation`, or None."""
    setting = os.environ.get("LEAFKERN_BACKEND", "")
    return _parse(setting).get(operation) if setting else None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


def choose(operation: str, candidates: Mapping[str, str | None]) -> str:
    """The backend for this call.

    `candidates`: backends that could serve this device, best first; the value is None, or why it can't serve
    this case. At least one ("reference") must be able to.
    """
    forced = forced_backend(operation)
    if forced is not None:
        reason = candidates.get(forced, "it has no kernel for this device and these types")
        if reason is not None:
            raise BackendError(f"LEAFKERN_BACKEND forces {operation}={forced}, which can't serve this call: {reason}")
        return forced
    for name, reason in candidates.items():
        if reason is None:
            return name
        _warn_once(f"leafkern.{operation}: a slower backend serves, not {name}: {reason}")
    raise BackendError(f"{operation}: no backend can serve this call: {dict(candidates)}")
