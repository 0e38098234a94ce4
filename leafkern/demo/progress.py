"""One bar from start to end: each stage owns a part of it, in proportion to the seconds it is expected to take."""

import sys
import time


class Journey:
    """stages: {name: (what a person reads, expected seconds)}, in order. A context manager; plain lines when piped."""

    def __init__(self, stages: dict[str, tuple[str, float]]):
        self.stages = stages
        self.seconds: dict[str, float] = {}
        self._total = sum(seconds for _, seconds in stages.values())
        self._current: str | None = None
        self._began = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[left]}{task.fields[facts]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, facts="", left="")

    def __enter__(self) -> "Journey":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._close_stage()
        if self._bar is not None:
            if error[0] is None:
                self._bar.update(self._task, completed=self._total, left="", facts="")
            self._bar.stop()

    def expect(self, stage: str, seconds: float) -> None:
        """Corrects the seconds expected of a stage that has not begun."""
        self.stages[stage] = (self.stages[stage][0], seconds)
        self._total = sum(seconds for _, seconds in self.stages.values())
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def stage(self, name: str) -> None:
        """Everything before `name` is done."""
        if name == self._current:
            return
        self._close_stage()
        self._current, self._stage_began = name, time.monotonic()
        if self._bar is None:
            print(f"leafkern demo: {self.stages[name][0]}", file=sys.stderr, flush=True)
        self(0, 1)

    def __call__(self, done: int, total: int, facts: str = "") -> None:
        """`done` of `total` steps of the current stage."""
        if self._bar is None or self._current is None:
            return
        names = list(self.stages)
        place = names.index(self._current)
        before = sum(self.stages[name][1] for name in names[:place])
        label, expected = self.stages[self._current]
        completed = before + expected * min(done / max(total, 1), 1.0)
        minutes, seconds = divmod(int(self._total - completed), 60)
        left = f"about {minutes}:{seconds:02d} left  "
        self._bar.update(self._task, description=label, completed=completed, facts=facts, left=left)

    def _close_stage(self) -> None:
        if self._current is not None:
            self.seconds[self._current] = round(time.monotonic() - self._stage_began, 2)
            self._current = None
