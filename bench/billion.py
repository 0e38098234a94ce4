"""A billion vectors of width 256: memory, shards, time and what it hangs on, from the rates that were measured.

    python -m bench.billion [--results bench/results] [--output bench/results/billion.md]

Arithmetic, not a measurement: every figure of the page follows from results/*/search*.json and the constants below.
Nothing that large was run.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from leafkern.evaluate import OVERSAMPLE, bytes_per_vector
from leafkern.report.evaluation import precision_name

from . import figures
from .figures import table

ROWS, WIDTH, K = 1_000_000_000, 256, 10
BATCHES = (1, 32, 1000)
# Of a machine's memory, what codes may fill: the rest is for queries, results, the system.
FILLED = 0.85
HOST_MEMORY = 256 * 10**9
GPU_MEMORY = 141 * 10**9  # an H200's
PRECISIONS = ("float32", "float16", "int8", "int4", "binary@8", "binary")
CASES = {"binary@8": "asymmetric"}
CANDIDATE_BYTES = 24  # as shards send them: two scores in float32, row and id in int64
CORES = (16, 64, 256)


def scan_seconds(one: figures.Measured) -> float:
    """Seconds for a pass over the billion on what was measured: time grows with rows times width."""
    shape = one.ours["shape"]
    return one.seconds * (ROWS * WIDTH) / (shape["N"] * shape["D"])


def page(cpu: Mapping[str, figures.Measured], gpu: Mapping[str, figures.Measured]) -> str:
    """Markdown; the same measurements always give the same text."""
    parts = [
        f"# A billion vectors of width {WIDTH}",
        "Written by `python -m bench.billion`: arithmetic from rates that were measured on fewer and wider vectors, "
        "scaled by rows times width. No search of this size was run; what is not in the arithmetic (stragglers, the "
        "network's delay, a cold page cache) makes it slower.",
        "## Memory and machines",
        f"Bytes of the codes that are scanned; shards are machines, or GPUs, whose memory they fill to {FILLED:.0%}. A "
        "shard is a folder; the same rows' finer codes for rescoring stay on disk, for a query reads few of them.",
        memory(),
        "## Time of a batch of queries",
        "One pass over all rows per batch, k = 10, selection included. Cores are those of the machine measured: "
        f"“core-seconds” is the time on its threads times their number; the columns after it divide that by {_cores()} "
        "cores each with its share of memory bandwidth. More cores in one machine help one query only as far as its "
        "memory bandwidth grows with them.",
        cpu_times(cpu) or "No CPU measurement of the search benchmark was found.",
        _origin(cpu),
        gpu_words(gpu),
        gpu_times(gpu),
        _origin(gpu),
        "## What it hangs on",
        drivers(cpu),
    ]
    return figures.markdown(parts)


def memory() -> str:
    lines = []
    for precision in PRECISIONS:
        size = ROWS * bytes_per_vector(precision, WIDTH)
        shards = [math.ceil(size / (FILLED * room)) for room in (HOST_MEMORY, GPU_MEMORY)]
        lines.append([precision_name(precision), f"{size / 1e9:,.0f} GB", *map(str, shards)])
    host, gpu = HOST_MEMORY // 10**9, GPU_MEMORY // 10**9
    return table(["codes", "memory", f"machines of {host} GB", f"GPUs of {gpu} GB (H200)"], lines)


def _cores() -> str:
    return ", ".join(map(str, CORES[:-1])) + f" or {CORES[-1]}"


def _case(found: Mapping[str, figures.Measured], precision: str, q: int) -> figures.Measured | None:
    return found.get(f"{CASES.get(precision, precision)}/Q{q}")


def cpu_times(cpu: Mapping[str, figures.Measured]) -> str:
    lines = []
    for precision in PRECISIONS:
        for q in BATCHES:
            one = _case(cpu, precision, q)
            if one is None:
                continue
            work = scan_seconds(one) * one.document["machine"]["threads"]
            spread = [_seconds(work / cores) for cores in CORES]
            lines.append([precision_name(precision), str(q), _count(work), *spread, _count(q * CORES[-1] / work)])
    header = ["codes", "queries", "core-seconds", *(f"{cores} cores" for cores in CORES), f"queries/s on {CORES[-1]}"]
    return table(header, lines) if lines else ""


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{_count(value)} s"


def _count(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def gpu_words(gpu: Mapping[str, figures.Measured]) -> str:
    if not gpu:
        return (
            "On a GPU: the stage `search` of `bench/gpu.sh` has left no figures here yet, so there is no measured rate "
            "to reckon with; the memory above holds all the same."
        )
    return "On one GPU, its own memory or, where the codes do not fit, as many as hold them, each scanning its share:"


def gpu_times(gpu: Mapping[str, figures.Measured]) -> str:
    lines = []
    for precision in (*PRECISIONS, "fp8"):
        for q in BATCHES:
            one = _case(gpu, precision, q)
            if one is None:
                continue
            size = ROWS * (WIDTH if precision == "fp8" else bytes_per_vector(precision, WIDTH))
            shards = math.ceil(size / (FILLED * GPU_MEMORY))
            seconds = scan_seconds(one) / shards
            lines.append([precision_name(precision), str(q), str(shards), _seconds(seconds), _count(q / seconds)])
    return table(["codes", "queries", "GPUs", "time", "queries/s"], lines) if lines else ""


def _origin(found: Mapping[str, figures.Measured]) -> str:
    used = [one.document for p in (*PRECISIONS, "fp8") for q in BATCHES if (one := _case(found, p, q)) is not None]
    return f"From: {figures.origin(used)}." if used else ""


def drivers(cpu: Mapping[str, figures.Measured]) -> str:
    """What sets the time of few and of many queries, said by the measurements."""
    said = []
    for precision in ("int8", "binary@8"):
        single, many = _case(cpu, precision, 1), _case(cpu, precision, 1000)
        if not (single and many):
            continue
        bytes_read = ROWS * bytes_per_vector(precision, WIDTH)
        floor = bytes_read / single.ceilings["read"]
        said.append(
            f"- {precision_name(precision)}: one query alone costs {scan_seconds(single):.3g} s on the threads "
            f"measured; reading {bytes_read / 1e9:,.0f} GB at the measured bandwidth alone takes {floor:.3g} s; among "
            f"1000 it costs {scan_seconds(many) / 1000:.3g} s, {scan_seconds(single) / scan_seconds(many) * 1000:.3g} "
            "times less: gather queries into batches before buying machines."
        )
    said.append(
        f"- Memory decides how many machines hold the codes, time how many answer: bits take "
        f"{bytes_per_vector('int8', WIDTH) // bytes_per_vector('binary', WIDTH)} times less of both than int8 where "
        f"bandwidth limits, and want rescoring: {OVERSAMPLE}·k rows of finer codes per query, "
        f"{OVERSAMPLE * K * bytes_per_vector('float16', WIDTH) / 1e3:.3g} kB in float16 for k = {K}, read at random."
    )
    machines = math.ceil(ROWS * bytes_per_vector("float32", WIDTH) / (FILLED * HOST_MEMORY))
    sent = CANDIDATE_BYTES * OVERSAMPLE * K
    said.append(
        f"- Merging is little beside it: each shard sends {sent} bytes a query for k = {K}, its {OVERSAMPLE}·k "
        f"candidates with both scores and int64 ids; of 1000 queries over {machines} shards "
        f"{1000 * machines * sent / 1e6:.3g} MB in all."
    )
    return "\n".join(said)


def made(results: Path) -> str:
    return page(*(figures.cases(results / machine, "search") for machine in ("cpu", "h200")))


def main(arguments: Sequence[str] | None = None) -> int:
    return figures.page_command("billion", __doc__, "billion.md", made, arguments)


if __name__ == "__main__":
    sys.exit(main())
