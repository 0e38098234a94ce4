"""What the result files hold, for the pages that are made from them: cases by name, tables, shares."""

import argparse
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from leafkern.console import guarded
from leafkern.errors import InputError
from leafkern.files import atomic_file, read_json

from .machine import results_folder


class Measured(NamedTuple):
    """One case of a benchmark, with the run that it comes from."""

    rows: Mapping[str, dict]  # by provider, those that were timed
    ceilings: Mapping[str, float]
    document: dict

    @property
    def ours(self) -> dict:
        return next(row for row in self.rows.values() if row["ours"])

    @property
    def seconds(self) -> float:
        return self.ours["p50_s"]

    def faster_than(self, *names: str) -> float | None:
        """Ours against the fastest of the providers whose names begin so; None where none was timed."""
        times = [row["p50_s"] for provider, row in self.rows.items() if provider.startswith(names) and not row["ours"]]
        return min(times) / self.seconds if times else None


def cases(folder: Path, op: str) -> dict[str, Measured]:
    """By name, from the full runs in OP.json and OP-*.json in `folder`; of a case measured twice, the later."""
    documents = [
        read_json(path, "benchmark result") for path in [*folder.glob(f"{op}.json"), *folder.glob(f"{op}-*.json")]
    ]
    found = {}
    for document in sorted(documents, key=lambda document: document["date"]):
        if document["size"] != "full":
            continue
        for name in dict.fromkeys(row["case"] for row in document["rows"]):
            rows = {r["provider"]: r for r in document["rows"] if r["case"] == name and r["status"] == "ok"}
            if any(row["ours"] for row in rows.values()):
                rates = {key: ceiling["rate"] for key, ceiling in document["ceilings"].items()}
                found[name] = Measured(rows, rates, document)
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g} ×"


def short(commit: str | None) -> str:
    """A commit in 12 characters, with the mark of a changed checkout."""
    if commit is None:
        return "unknown"
    name, _, mark = commit.partition("-")
    return name[:12] + (f"-{mark}" if mark else "")


def markdown(parts: Iterable[str]) -> str:
    """A page of paragraphs, which are filled, and of headings, tables and lists, which are not."""
    return "\n\n".join(part if part[0] in "#|-" else textwrap.fill(part, 120) for part in parts if part) + "\n"


def rows_and_width(measured: Iterable[Measured]) -> str:
    """The sizes of bases that were searched: "1 million × 384"."""
    sizes = {(one.ours["shape"]["N"], one.ours["shape"]["D"]): None for one in measured}
    return " and ".join(f"{rows / 1e6:g} million × {width}" for rows, width in sizes)


def origin(documents: Iterable[Mapping]) -> str:
    """Which runs figures come from: dates, commits and machines."""
    said = {}
    for one in documents:
        machine = one["machine"]
        where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
        said[f"{one['date'][:10]}, commit {short(one['commit'])}, {where}"] = None
    return "; ".join(said)


def page_command(name: str, about: str, page: str, made: Callable[[Path], str], arguments: Sequence[str] | None) -> int:
    """`python -m bench.NAME`: writes made(folder of the measurements) to `page` there, or where it is told to."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results_folder(), help="folder of the measurements")
    parser.add_argument("--output", type=Path, help=f"the page (default: {page} among the results)")
    parser.add_argument("--debug", action="store_true", help="a traceback with an error")
    given = parser.parse_args(arguments)
    path = given.output or given.results / page

    def write() -> None:
        if not given.results.is_dir():
            raise InputError(f"--results: {given.results}: no such folder")
        with atomic_file(path) as temporary:
            temporary.write_text(made(given.results), encoding="utf-8")
        print(path)

    return guarded(write, debug=given.debug)
