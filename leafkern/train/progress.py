"""Progress of a run: a rich bar on a terminal, nothing when piped, or any callable."""

import sys
import time
from collections.abc import Callable

# (stage, done, total, facts): stages are STAGES in order; facts such as {"texts/s": 61.0, "loss": 0.21}.
Report = Callable[[str, int, int, dict], None]
STAGES = ("teacher", "tokenise", "head", "train", "evaluate")


def shown_facts(facts: dict) -> str:
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in
                     facts.items())  # fmt: skip


class Bars:
    """One line per stage on stderr, with the time left; a context manager. Silent unless stderr is a terminal."""

    def __init__(self, report: Report | bool | None = None):
        self._report = report if callable(report) else None
        self._bar = None
        self._tasks: dict[str, int] = {}
        if self._report is None and report is not False and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:>9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> "Bars":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int, **facts) -> None:
        if self._report is not None:
            self._report(stage, done, total, facts)
        elif self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total, completed=done, facts="")
            self._bar.update(self._tasks[stage], completed=done, total=total, facts=shown_facts(facts))

    def texts(self, stage: str) -> Callable[[int, int], None]:
        """A (done, total) callback for texts, which adds texts/s."""
        began = time.monotonic()

        def report(done: int, total: int) -> None:
            self(stage, done, total, **{"texts/s": done / max(time.monotonic() - began, 1e-3)})

        return report

    def say(self, line: str) -> None:
        """A line for people, on stderr above the bar; not where a callable has taken over."""
        if self._report is None:
            (self._bar.console.print if self._bar else lambda text: print(text, file=sys.stderr))(line)
