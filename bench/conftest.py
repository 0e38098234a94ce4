"""Options, shared ceilings and the results file of `pytest bench/bench_*.py` and `leafkern bench`."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from leafkern.files import write_json

from . import harness, machine, targets
from .ceilings import measure

# name: seconds for the timed rounds of one case
BUDGETS = {"tiny": 0.2, "small": 3, "full": 20}


def pytest_addoption(parser):
    group = parser.getgroup("leafkern")
    group.addoption("--size", choices=sorted(BUDGETS), default="full", help="how big the benchmarks' inputs are")
    group.addoption("--peers", action="store_true", help="time other libraries in the same rounds")
    group.addoption("--results", type=Path, default=None, help="folder for the JSON (default: bench/results)")
    group.addoption("--part", default=None, help="writes OP-PART.json: one benchmark measured in several runs")
    group.addoption("--written", type=Path, default=None, help="file that gets the paths of the JSON written")
    group.addoption("--model", default=None, help="sentence-transformers folder or hub id for the encoder benchmark")


class Session:
    """What the cases of one run share: ceilings per device, and their rows."""

    def __init__(self, config):
        self.config = config
        self.size = config.getoption("--size")
        self.peers = config.getoption("--peers")
        self.model = config.getoption("--model")
        self.part = config.getoption("--part")
        self.rows: dict[tuple[str, str], list[dict]] = {}
        self._ceilings: dict[str, dict] = {}

    def ceilings(self, device: str):
        import torch

        if device not in self._ceilings:
            self._ceilings[device] = measure(device, torch.get_num_threads(), quick=self.size == "tiny")
        return self._ceilings[device]

    def options(self) -> list[str]:
        peers = ["--peers"] if self.peers else []
        model = ["--model", self.model] if self.model else []
        part = ["--part", self.part] if self.part else []
        return ["--size", self.size, *peers, *model, *part]

    def command(self, op: str, test: str = "") -> str:
        """What reproduces the rows of one test, or of the whole run, from the checkout."""
        selected = ["-k", self.config.option.keyword] if self.config.option.keyword else []
        place = f"bench/bench_{op}.py" + (f"::{test}" if test else "")
        return shlex.join(["pytest", place, *selected, *self.options()])

    def run(self, case: harness.Case, benchmark, test: str) -> list[dict]:
        if not self.peers:
            case = replace(case, contestants=[c for c in case.contestants if c.ours])
        rows = harness.measure(
            case,
            self.ceilings(case.device),
            budget=BUDGETS[self.size],
            benchmark=benchmark,
            command=self.command(case.op, test),
        )
        self.rows.setdefault((case.op, machine.machine_name(case.device)), []).extend(rows)
        benchmark.extra_info["rows"] = rows
        # After every case: a run that is stopped by its time limit keeps what it has.
        self.write()
        return rows

    def write(self) -> list[Path]:
        folder = self.config.getoption("--results") or machine.results_folder()
        written = []
        for (op, name), rows in self.rows.items():
            device = rows[0]["device"]
            path = Path(folder) / name / (f"{op}-{self.part}.json" if self.part else f"{op}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                path, harness.document(op, rows, self.ceilings(device), size=self.size, command=self.command(op))
            )
            written.append(path)
        listing = self.config.getoption("--written")
        if listing is not None:
            listing.write_text("".join(f"{path}\n" for path in written), encoding="utf-8")
        return written


SESSION = pytest.StashKey[Session]()


def pytest_configure(config):
    config.stash[SESSION] = Session(config)


@pytest.fixture
def bench(request, benchmark):
    """`bench(case)`: checks and times a case, keeps its rows, and fails if ours was not right."""
    session = request.config.stash[SESSION]

    def run(case: harness.Case) -> list[dict]:
        rows = session.run(case, benchmark, request.node.name)
        failed = [f"{row['provider']}: {row['reason']}" for row in rows if row["ours"] and row["status"] == "failed"]
        assert not failed, "; ".join(failed)
        return rows

    return run


@pytest.fixture
def bench_session(request) -> Session:
    return request.config.stash[SESSION]


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if not session.rows:
        return
    written = session.write()
    for rows in session.rows.values():
        header, body = harness.table(rows)
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        terminalreporter.write_line("")
        for row in [header, *body]:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for path in written:
        terminalreporter.write_line(f"written: {path}")
    if session.size == "full" and any(op in targets.OPERATIONS for op, _ in session.rows):
        for line in targets.reached(targets.measurements(written[0].parent.parent)):
            terminalreporter.write_line(line)
        terminalreporter.write_line("pages of these figures: see bench/README.md")
