"""Errors that name what was wrong and what would be right. Imports nothing heavy; everything may use it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, recipe or input file is wrong (command line: exit 2)."""


class DamagedFileError(RuntimeError):
    """A file that leafkern wrote is truncated, altered or not leafkern's (command line: exit 1)."""


class BackendError(RuntimeError):
    """A backend forced by LEAFKERN_BACKEND can't serve this case."""


class NonFiniteLossError(RuntimeError):
    """Training met NaN or infinity (command line: exit 1).

    step: counted from 1. texts: where each text that gives no finite vector stands, else the whole batch's, as
    file:number. checkpoint: the last one saved, or None.
    """

    def __init__(self, step: int, loss: float, grad_norm: float, texts: list[str], checkpoint: object):
        self.step, self.texts, self.checkpoint = step, texts, checkpoint
        more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; texts: {', '.join(texts[:8])}{more}; "
            f"last good checkpoint: {checkpoint or 'none was saved'}; a lower optimiser.lr or an optimiser.clip_norm "
            "of 1 usually helps"
        )


def unknown_name(argument: str, name: object, valid: Iterable[str]) -> InputError:
    """An InputError for `name`, with the nearest of the `valid` names."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return InputError(f"{argument}: unknown name {name!r}; {hint}(valid: {', '.join(valid)})")
