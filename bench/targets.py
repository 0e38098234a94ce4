"""The targets of quantised search and what was measured, in one table.

    python -m bench.targets [--results bench/results] [--output bench/results/search.md]

Reads results/*/{search,quantization,index}*.json and results/recall/recall.json; a line whose figures are missing says
so. A full run of these benchmarks ends with the lines that its folder of results can fill.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from leafkern.files import read_json

from . import figures
from .figures import Measured, table

OPERATIONS = ("search", "quantization", "index")
OTHERS = ("FAISS", "USearch", "NumKong")
POPCOUNTS = ("popcount_scalar", "popcount_avx2")
Cases = Mapping[str, Measured]


class Target(NamedTuple):
    """One figure and what it must reach. value(found): from `measurements`' dict; KeyError where that is missing.

    most(found): what the machine's own limit would give, for a ratio to a peer that is itself near it.
    """

    case: str
    what: str
    bound: float
    value: Callable[[Mapping], float | None]
    unit: str = "×"
    at_most: bool = False
    most: Callable[[Mapping], float] | None = None

    def line(self, found: Mapping) -> list[str]:
        try:
            value = self.value(found)
        except KeyError:
            value = None
        sign = "≤" if self.at_most else "≥"
        cells = [self.case, self.what, f"{sign} {_shown(self.bound, self.unit)}"]
        if value is None:
            return [*cells, "not measured", ""]
        reached = value <= self.bound if self.at_most else value >= self.bound
        verdict = "reached" if reached else "missed"
        if not reached and self.most is not None:
            verdict = f"missed; at the limit {_shown(self.most(found), self.unit)}"
        return [*cells, _shown(value, self.unit), verdict]


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if unit == "" else f"{value:.3g} {unit}"


def _of_bandwidth(machine: str, case: str, ceiling: str) -> Callable[[Mapping], float]:
    def value(found):
        one = found[machine, "search"][case]
        return one.ours["bytes"] / one.ceilings[ceiling] / one.seconds

    return value


def _of_rate(machine: str, case: str, *ceilings: str) -> Callable[[Mapping], float]:
    def value(found):
        one = found[machine, "search"][case]
        return one.ours["operations"] / max(one.ceilings[name] for name in ceilings) / one.seconds

    return value


def _faster(machine: str, case: str, *providers: str) -> Callable[[Mapping], float | None]:
    return lambda found: found[machine, "search"][case].faster_than(*providers)


def _at_limit(ratio: Callable[[Mapping], float], share: Callable[[Mapping], float]) -> Callable[[Mapping], float]:
    """What `ratio` would be if `share` were 1."""
    return lambda found: ratio(found) / share(found)


def _slower_by(case: str) -> Callable[[Mapping], float | None]:
    def value(found):
        ratio = found["cpu", "search"][case].faster_than("leafkern, k = 10")
        return None if ratio is None else 1 / ratio - 1

    return value


def _quantised(case: str) -> Callable[[Mapping], float]:
    return lambda found: found["cpu", "quantization"][case].ours["percent_of_limit"] / 100


def _recall(key: str) -> Callable[[Mapping], float | None]:
    def value(found):
        one = found["recall"]["collections"]["docstrings"]
        wanted = "binary@8", one["width"]
        return next((row[key] for row in one["grid"] if (row["precision"], row["dim"]) == wanted), None)

    return value


def _targets() -> list[Target]:
    found = []
    for precision in ("int8", "binary"):
        case = f"{precision}/Q1"
        ratio, share = _faster("cpu", case, *OTHERS), _of_bandwidth("cpu", case, "read")
        found.append(Target(case, "of read bandwidth", 0.80, share, "%"))
        found.append(Target(case, "the best of FAISS, USearch, NumKong", 2.0, ratio, most=_at_limit(ratio, share)))
    many = "int8/Q1000"
    # The peak of the target widens after every product, where these kernels and others may add several first.
    ratio, share = _faster("cpu", many, "NumKong"), _of_rate("cpu", many, "int8_maddubs16")
    found += [
        Target(many, "of the maddubs + madd peak", 0.65, _of_rate("cpu", many, "int8_maddubs"), "%"),
        Target(many, "NumKong's dots, which select nothing", 1.2, ratio, most=_at_limit(ratio, share)),
        Target(many, "FAISS SQ8 direct signed", 4.0, _faster("cpu", many, "FAISS SQ8")),
        Target(many, "USearch exact i8", 4.0, _faster("cpu", many, "USearch")),
        Target(many, "FAISS IndexFlatIP (float32)", 1.5, _faster("cpu", many, "FAISS FlatIP")),
        Target("binary/Q1000", "of the best popcount peak", 0.60, _of_rate("cpu", "binary/Q1000", *POPCOUNTS), "%"),
        Target("binary/Q1000", "FAISS IndexBinaryFlat", 2.0, _faster("cpu", "binary/Q1000", "FAISS IndexBinaryFlat")),
    ]
    for q in (1, 32, 1000):
        case = f"asymmetric/Q{q}"
        found.append(Target(case, "FAISS PQFastScan 96x4", 1.0, _faster("cpu", case, "FAISS PQFastScan")))
    for key, bound, what in (
        ("found_10", 0.70, "recall@10 of docstrings, codes alone"),
        ("found_10_rescored", 0.97, "the same, rescored ×4 by float16"),
    ):
        found.append(Target("asymmetric", what, bound, _recall(key), ""))
    for precision in ("int8", "binary", "asymmetric"):
        for q in (1, 32, 1000):
            case = f"{precision}/Q{q}/k100"
            found.append(Target(case, "slower than k = 10 by", 0.15, _slower_by(case), "%", at_most=True))
    for precision in ("int8", "binary"):
        found.append(Target(f"quantise {precision}", "of copy bandwidth", 0.50, _quantised(precision), "%"))
    for machine in ("h200", "h100"):
        one, many = "int8/Q1", "int8/Q1000"
        name = machine.upper()
        peer = "torch matmul + topk"
        found += [
            Target(f"{name}, {one}", "of copy bandwidth", 0.85, _of_bandwidth(machine, one, "copy"), "%"),
            Target(f"{name}, {many}", "of the int8 product's peak", 0.40, _of_rate(machine, many, "int8_gemm"), "%"),
            Target(f"{name}, {one}", "fp16 torch matmul + topk", 2.0, _faster(machine, one, peer)),
            Target(f"{name}, {many}", "fp16 torch matmul + topk", 2.0, _faster(machine, many, peer)),
        ]
    found += [
        Target("open 10 GB", "milliseconds", 50, _index("p50_s", 1e3), "ms", at_most=True),
        Target("open 10 GB", "resident memory, of its size", 0.01, _resident, "%", at_most=True),
    ]
    return found


def _index(key: str, factor: float) -> Callable[[Mapping], float]:
    return lambda found: factor * found["cpu", "index"]["open"].ours[key]


def _resident(found: Mapping) -> float | None:
    row = found["cpu", "index"]["open"].ours
    return None if row["peak_bytes"] is None else row["peak_bytes"] / row["shape"]["bytes"]


def measurements(folder: Path) -> dict:
    """By (machine, benchmark) the cases; under "recall" the document of bench.recall. What is not there is left out."""
    found: dict = {}
    for machine in ("cpu", "h100", "h200"):
        for op in OPERATIONS:
            if cases := figures.cases(folder / machine, op):
                found[machine, op] = cases
    path = folder / "recall" / "recall.json"
    if path.is_file():
        found["recall"] = read_json(path, "recall figures")
    return found


def reached(found: Mapping) -> list[str]:
    """A line for every target that these measurements can be held to."""
    lines = [target.line(found) for target in _targets()]
    return [f"target: {' '.join(filter(None, line))}" for line in lines if line[4]]


def page(found: Mapping) -> str:
    lines = [target.line(found) for target in _targets()]
    # No GPU but one: the lines of the other say nothing.
    lines = [line for line in lines if line[3] != "not measured" or not line[0].startswith("H100")]
    missed = sum(line[4].startswith("missed") for line in lines)
    absent = sum(line[3] == "not measured" for line in lines)
    searched = [(key, cases) for key, cases in found.items() if key != "recall"]
    documents = [one.document for _, cases in searched for one in cases.values()]
    sizes = "; ".join(
        f"{machine}: {figures.rows_and_width(cases.values())}" for (machine, op), cases in searched if op == "search"
    )
    lead = (
        "Written by `python -m bench.targets` from the result files; the targets are typed, what was measured is not. "
        f"Search of clustered unit vectors ({sizes or 'not measured'}), k = 10 where nothing else is said. Ratios are "
        "how many times faster leafkern is, medians of one run; of a peer slower than 8 s, its one checked call. "
        "Percentages are of rates measured in the same run."
    )
    count = f"{len(lines) - missed - absent} of {len(lines)} reached, {missed} not, {absent} not measured here."
    origin = f"From: {figures.origin(documents)}." if documents else "No result files were found."
    parts = ["# Quantised search: targets and figures", lead, count]
    parts += [table(["case", "", "target", "measured", ""], lines), origin]
    return figures.markdown(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    return figures.page_command("targets", __doc__, "search.md", lambda folder: page(measurements(folder)), arguments)


if __name__ == "__main__":
    sys.exit(main())
