"""The benchmarks, installed as `leafkern.bench`: each operation beside its peers, set against this machine's limits.

`leafkern bench [OP...]` and `pytest bench/bench_OP.py` run the same cases; results/ keeps the figures as JSON.
"""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from leafkern.errors import InputError, unknown_name

SIZES = ("tiny", "small", "full")


def operations() -> list[str]:
    """Names that `main` takes: one per bench_NAME.py beside this file."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(
    ops: Sequence[str] = (),
    peers: bool = False,
    report: str | os.PathLike | None = None,
    *,
    size: str = "full",
    model: str | None = None,
    results: str | os.PathLike | None = None,
) -> int:
    """Runs the benchmarks of `ops` (all when empty) and returns the exit status: 0, or 1 when a check or case failed.

    peers: other libraries in the same rounds. report: an HTML page of what was measured. size: "tiny", "small" or
    "full" (the published figures). model: for the encoder (default: all-MiniLM-L6-v2 from its package).
    results: folder for the JSON; default bench/results of the checkout, or the current folder.
    Errors: `InputError` for an unknown operation or size, or without pytest-benchmark (`leafkern[bench]`).
    """
    for op in ops:
        if op not in operations():
            raise unknown_name("OP", op, operations())
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    missing = [name for name in ("pytest", "pytest_benchmark", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"bench: needs {', '.join(missing)}; install leafkern[bench]")
    import pytest

    from leafkern.files import read_json

    folder = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "written.txt"
        files = [str(folder / f"bench_{op}.py") for op in (ops or operations())]
        options = ["--size", size, "--written", str(written), "-p", "no:cacheprovider", "-o", "addopts="]
        options += ["-o", "python_files=bench_*.py", "-q", "--benchmark-quiet"]
        options += ["--peers"] if peers else []
        options += ["--model", str(model)] if model else []
        options += ["--results", str(Path(results).resolve())] if results else []
        status = int(pytest.main([*files, *options]))
        paths = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    if report is not None and paths:
        from .page import write_page

        write_page(report, [read_json(path, "benchmark result") for path in paths])
    return 0 if status == 0 else 1
