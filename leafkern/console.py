"""What the command line shows: a progress bar on a terminal, one-line errors and warnings, exit statuses."""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from leafkern.errors import InputError

INTERRUPTED = 130

# Called with what is done, how much of it, of how much.
Report = Callable[[str, int, int], None]


def unseen(what: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""


def say(message: str) -> None:
    """A line for the person, on stderr: stdout is for results."""
    print(message, file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """What to call with (what, done, total): a bar on stderr with the time left; nothing where it is no terminal."""
    if not sys.stderr.isatty():
        yield unseen
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def guarded(call: Callable[[], int | None], debug: bool) -> int:
    """Runs `call`; its status, or 2 for wrong use or input, 130 for Ctrl-C, 1 for anything else, said in one line."""
    warnings.showwarning = lambda message, *where, **more: say(f"leafkern: warning: {message}")
    try:
        status = call() or 0
        sys.stdout.flush()
        if status == INTERRUPTED:  # the command-line parser has caught Ctrl-C before us
            say("leafkern: stopped")
        return status
    except KeyboardInterrupt:
        say("leafkern: stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left: no more output, and no complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        say(f"leafkern: error: {described(error)}")
        return status_of(error)


def status_of(error: Exception) -> int:
    """2: arguments or input are wrong; 1: anything else. Errors of the command-line parser bring their own."""
    if isinstance(error, InputError):
        return 2
    return getattr(error, "exit_code", 1) if hasattr(error, "format_message") else 1


def described(error: Exception) -> str:
    """One readable line."""
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        hint = f" (try '{context.command_path} --help')" if context is not None else ""
        return " ".join(error.format_message().split()) + hint
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{place}; what stood there before is whole. Free some space and run the command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    known = type(error).__module__.startswith("leafkern")
    return text if known and text else f"{type(error).__name__}: {text} (--debug shows where)"
