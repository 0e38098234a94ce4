"""Access to the compiled extension `leafkern._C`, which may be absent (no compiler at install)."""

import functools
from types import ModuleType


@functools.cache
def library() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is missing."""
    try:
        from leafkern import _C
    except ImportError as error:
        return None, f"leafkern._C is not built ({error}); install a C++ compiler and reinstall leafkern"
    return _C, ""


def unavailable() -> str | None:
    """Why the native backend can't be used at all; None when it can."""
    module, reason = library()
    return reason if module is None else None
