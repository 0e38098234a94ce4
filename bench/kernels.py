"""`make kernels`: what the compiler makes of every shipped Triton kernel, without a GPU.

    python -m leafkern.bench.kernels [--only TEXT] [--json FILE] [--workers N]

One row per configuration and architecture: registers, spilled bytes, shared memory and its limit, programs that fit on
a multiprocessor and how many the launch counts on, warp-group products. Exit status 1 when a limit is broken.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from leafkern.files import write_json
from leafkern.ops._core import cubin, launch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m leafkern.bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="configurations whose operation/name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    given = parser.parse_args(arguments)
    reason = launch.missing() or (launch.interpreting() and "TRITON_INTERPRET=1 leaves nothing to compile")
    if reason:
        print(f"kernels: {reason}", file=sys.stderr)
        return 1
    items = [item for item in cubin.shipped() if given.only is None or given.only in f"{item.operation}/{item.name}"]
    if not items:
        parser.error(f"--only: no configuration's name contains {given.only!r}")
    found = show(items, given.workers)
    if given.json:
        rows = [dataclasses.asdict(one) | {"resident": one.resident, "problems": one.problems} for one in found]
        write_json(given.json, {"triton": metadata.version("triton"), "kernels": rows})
    return 1 if any(one.problems for one in found) else 0


def show(items: list[cubin.Shipped], workers: int | None) -> list[cubin.Compiled]:
    """Compiles and prints; returns what was found."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    # Piped, a table keeps its full width; progress is talk and goes to stderr.
    talk, out = Console(stderr=True), Console()
    out = out if out.is_terminal else Console(width=200)
    total = sum(len(item.architectures) for item in items)
    compiled = cubin.compile_all(items, workers)
    found = list(track(compiled, "compiling", total, console=talk, disable=not talk.is_terminal, transient=True))
    table = Table(title=f"Triton {metadata.version('triton')}, {len(items)} configurations", title_justify="left")
    for heading in ("operation", "configuration", "target"):
        table.add_column(heading, no_wrap=True)
    for heading in ("warps", "registers", "spilled B", "shared B", "limit B", "resident", "needed", "wgmma"):
        table.add_column(heading, justify="right")
    table.add_column("problem")
    for one in found:
        limit = cubin.SHARED_PER_BLOCK[one.architecture]
        figures = one.warps, one.registers, one.spilled, one.shared, limit, one.resident, one.programs
        cells = [f"{figure:,}" for figure in figures] + ["yes" if one.wgmma else "-", "; ".join(one.problems)]
        style = "bold red" if one.problems else None
        table.add_row(one.operation, one.name, f"sm_{one.architecture}", *cells, style=style)
    out.print(table)
    bad = sum(bool(one.problems) for one in found)
    out.print(f"limits broken: {bad} of {len(found)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
