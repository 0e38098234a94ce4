"""Errors that name what was wrong and what would be right. Imports nothing heavy; everything may use it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, recipe or input file is wrong (command line: exit 2)."""


class DamagedFileError(RuntimeError):
    """A file that leafkern wrote is truncated, altered or not leafkern's (command line: exit 1)."""


class BackendError(RuntimeError):
    """A backend forced by LEAFKERN_BACKEND can't serve this case."""


def unknown_name(argument: str, name: object, valid: Iterable[str]) -> InputError:
    """An InputError for `name`, with the nearest of the `valid` names."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return InputError(f"{argument}: unknown name {name!r}; {hint}(valid: {', '.join(valid)})")
