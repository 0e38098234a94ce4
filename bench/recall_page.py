"""The guide "Which precision?": words and tables around the figures of recall.json and of the search benchmark."""

import statistics
from pathlib import Path

from leafkern.evaluate import OVERSAMPLE, bytes_per_vector
from leafkern.files import atomic_file
from leafkern.report.evaluation import precision_name

from . import figures
from .figures import percent, table, times

# The search benchmark's name of each precision's case.
CASES = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "int4": "int4",
    "binary@8": "asymmetric",
    "binary": "binary",
}
# As the search benchmark calls them: beside the case itself, in the same rounds.
FLOAT32, BITS_ALONE = "leafkern, float32", "leafkern, bits alone"
MODEL = "all-MiniLM-L6-v2"  # the demo's teacher, where none is named
WANTED = (0.99, 0.97, 0.95, 0.90)
WORTH = 0.005  # recall that a rotation must add, on average, to be called a gain


def write_guide(document: dict, results: Path, path: Path) -> None:
    speeds = figures.cases(results, "search")
    with atomic_file(path) as temporary:
        temporary.write_text(guide(document, speeds), encoding="utf-8")


def guide(document: dict, speeds: dict[str, figures.Measured]) -> str:
    """Markdown; the same document and speeds always give the same text."""
    collections = document["collections"]
    timed = [speeds[name] for c in CASES.values() for q in (1, 1000) if (name := f"{c}/Q{q}") in speeds]
    width = max(one["width"] for one in collections.values())
    sizes = "; ".join(f"{name}: {one['documents']:,} and {one['queries']:,}" for name, one in collections.items())
    missing = "" if "scifact" in collections else "; SciFact was not on the machine"
    parts = [
        "# Which precision?",
        f"Written by `python -m bench.recall` from `recall.json` (commit {figures.short(document['commit'])}, "
        f"{document['date'][:10]}) and the search benchmark; no figure here is typed. Recall@10 is the share of "
        f"float32's top 10 at full width, {width} numbers, that is found, whatever the machine's speed. Vectors of "
        f"{document.get('model', MODEL)}, documents and queries: {sizes}{missing}. “docstrings” and “documentation” "
        "are made of what Python and its packages say of themselves, so their texts change with the packages "
        "installed.",
        "## Choose",
        f"The fewest bytes that are scanned per vector and still reach the recall on every collection. “Rescored” "
        f"means: the best {OVERSAMPLE}·k are scored again by float16 vectors of full width, {2 * width} bytes each, "
        "which may stay on disk, for few of them are read.",
        choices(collections),
        f"## Precisions at full width, {width}",
        "Each collection: recall@10 of the codes alone / rescored. “Asymmetric” compares the stored bits with queries "
        "of 7 bits a number (`query_bits=8`), “binary” bits with bits. Speed: how many times faster than float32 in "
        f"the same rounds, {figures.rows_and_width(timed)} clustered vectors, for one query and for 1000 at once.",
        precisions(collections, width, speeds),
        speed_origin(speeds),
        "## Shorter vectors",
        "Prefixes of vectors of a model that was not trained for them (no Matryoshka loss): recall@10 of the codes "
        "alone / rescored by float16 at full width.",
        widths(collections),
        "## When to rescore",
        rescoring_words(collections, speeds),
        oversampling(collections),
        "## When to rotate",
        rotation_words(collections),
        rotations(collections),
        "## What is lost in the end",
        "nDCG@10 as a share of float32's at full width, where there are judged answers: an answer that is not "
        "float32's may be as good.",
        judged(collections, width),
    ]
    return figures.markdown(parts)


def _row(one: dict, dim: int, precision: str) -> dict:
    return next(row for row in one["grid"] if (row["dim"], row["precision"]) == (dim, precision))


def _pair(row: dict) -> str:
    alone, again = row["found_10"], row["found_10_rescored"]
    return f"{alone:.3f}" if again is None else f"{alone:.3f} / {again:.3f}"


def choices(collections: dict) -> str:
    """For each recall wanted, the least bytes that reach it on all collections."""
    keys = [(row["dim"], row["precision"]) for row in next(iter(collections.values()))["grid"]]
    cells = []
    for wanted in WANTED:
        line = [f"≥ {wanted:.2f}"]
        for name in ("found_10", "found_10_rescored"):
            least = {
                key: min(found)
                for key in keys
                if None not in (found := [_row(one, *key)[name] for one in collections.values()])
            }
            able = [(bytes_per_vector(key[1], key[0]), -share, key) for key, share in least.items() if share >= wanted]
            if not able:
                line.append("none")
                continue
            size, share, (dim, precision) = min(able)
            line.append(f"{precision_name(precision)}, width {dim}: {size} bytes ({-share:.3f})")
        cells.append(line)
    return table(["recall@10", "codes alone (least recall)", "rescored (least recall)"], cells)


def precisions(collections: dict, width: int, speeds: dict[str, figures.Measured]) -> str:
    lines = []
    for precision, case in CASES.items():
        rows = [_row(one, width, precision) for one in collections.values()]
        speed = [_faster(speeds, case, q) for q in (1, 1000)]
        lines.append([precision_name(precision), str(rows[0]["bytes"]), *map(_pair, rows), *map(times, speed)])
    header = ["precision", "bytes", *collections, "speed, 1 query", "1000 queries"]
    return table(header, lines)


def _faster(speeds: dict[str, figures.Measured], case: str, q: int) -> float | None:
    """Against float32 in the rounds of the same case; float32 itself is 1."""
    one = speeds.get(f"{case}/Q{q}")
    if one is None or case == "float32":
        return one and 1.0
    return one.faster_than(FLOAT32)


def speed_origin(speeds: dict[str, figures.Measured]) -> str:
    names = (f"{case}/Q{q}" for case in (*CASES.values(), "rescored") for q in (1, 1000))
    used = [speeds[name].document for name in names if name in speeds]
    return f"Speeds: {figures.origin(used)}. Empty: not measured." if used else ""


def widths(collections: dict) -> str:
    rows = next(iter(collections.values()))["grid"]
    dims = list(dict.fromkeys(row["dim"] for row in rows))
    shown = [p for p in dict.fromkeys(row["precision"] for row in rows) if p != "float16"]
    lines = [
        [precision_name(precision), str(dim), str(bytes_per_vector(precision, dim))]
        + [_pair(_row(one, dim, precision)) for one in collections.values()]
        for precision in shown
        for dim in dims
    ]
    return table(["precision", "width", "bytes", *collections], lines)


def _least_and_most(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def rescoring_words(collections: dict, speeds: dict[str, figures.Measured]) -> str:
    """What the figures say, in words that follow them."""

    def recall(precision: str, count: int) -> list[float]:
        return [
            row["found_10"]
            for one in collections.values()
            for row in one["oversampling"]
            if (row["precision"], row["oversample"]) == (precision, count)
        ]

    def alone(precision: str) -> list[float]:
        return [_row(one, one["width"], precision)["found_10"] for one in collections.values()]

    bits, signs, nibbles = (recall(precision, OVERSAMPLE) for precision in ("binary@8", "binary", "int4"))
    return (
        f"int8 alone finds {_least_and_most(alone('int8'))}: rescore it only where the last percent matters. int4 "
        f"alone finds {_least_and_most(alone('int4'))}, rescored ×{OVERSAMPLE} {_least_and_most(nibbles)}. Bits are "
        f"for rescoring: alone {_least_and_most(alone('binary@8'))} by 7-bit queries and "
        f"{_least_and_most(alone('binary'))} by signs, rescored ×{OVERSAMPLE} {_least_and_most(bits)} and "
        f"{_least_and_most(signs)}. 7-bit queries take no byte more: compare signs with signs only where speed is all. "
        f"{cost_of_rescoring(speeds)}Below: recall@10 after the best oversample·10 have been scored again by float16."
    )


def cost_of_rescoring(speeds: dict[str, figures.Measured]) -> str:
    timed = {q: one for q in (1, 1000) if (one := speeds.get(f"rescored/Q{q}")) and one.faster_than(BITS_ALONE)}
    ratios = {q: 1 / one.faster_than(BITS_ALONE) for q, one in timed.items()}
    said = [f"{ratio:.2f} × for Q = {q}" for q, ratio in ratios.items()]
    noise = " (below 1: less than runs differ by)" if min(ratios.values(), default=1) < 1 else ""
    return (
        f"Of {figures.rows_and_width(timed.values())} bits rescored by int8 and then float16, in one call, took "
        f"{' and '.join(said)} the time of bits alone in the same rounds{noise}. "
        if said
        else ""
    )


def oversampling(collections: dict) -> str:
    rows = next(iter(collections.values()))["oversampling"]
    counts = sorted({row["oversample"] for row in rows})
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for name, one in collections.items():
            found = {row["oversample"]: row["found_10"] for row in one["oversampling"] if row["precision"] == precision}
            lines.append([precision_name(precision), name, *(f"{found[count]:.3f}" for count in counts)])
    return table(["precision", "collection", *(f"×{count}" for count in counts)], lines)


def _gains(one: dict, precision: str) -> tuple[float, float, list[float]]:
    """Recall@10 of the codes as they are, the mean after rotation, and each rotation's."""
    plain = _row(one, one["width"], precision)["found_10"]
    turned = [row["found_10"] for row in one["rotated"] if row["precision"] == precision]
    return plain, statistics.fmean(turned), turned


def rotation_words(collections: dict) -> str:
    gains, losses = [], []
    for precision in dict.fromkeys(row["precision"] for one in collections.values() for row in one["rotated"]):
        differences = []
        for one in collections.values():
            plain, mean, _ = _gains(one, precision)
            differences.append(mean - plain)
        said = f"{precision_name(precision)} ({min(differences):+.3f} to {max(differences):+.3f})"
        (gains if min(differences) > WORTH else losses).append(said)
    added = f"A random rotation (`Index.build(rotate=...)`) added more than {WORTH:g} to the mean recall@10"
    if gains and losses:
        first = f"{added} on every collection for {'; '.join(gains)}, and did not for {'; '.join(losses)}."
    elif gains:
        first = f"{added} on every collection for all codes: {'; '.join(gains)}."
    else:
        first = (
            f"{added} on every collection for none of the codes: {'; '.join(losses)}. These vectors gain little by it."
        )
    count = len({row["seed"] for one in collections.values() for row in one["rotated"]})
    return (
        first + " It costs one product of the query with a square matrix, and prefixes of rotated vectors mean "
        "nothing: it cannot be had together with shorter widths. Below: recall@10 of the codes alone, as they are and "
        f"after {count} random rotations (mean, least, most)."
    )


def rotations(collections: dict) -> str:
    lines = []
    for precision in dict.fromkeys(row["precision"] for one in collections.values() for row in one["rotated"]):
        for name, one in collections.items():
            plain, mean, turned = _gains(one, precision)
            cells = [plain, mean, min(turned), max(turned)]
            lines.append([precision_name(precision), name, *(f"{cell:.3f}" for cell in cells)])
    return table(["precision", "collection", "as it is", "rotated", "least", "most"], lines)


def judged(collections: dict, width: int) -> str:
    with_answers = {name: one for name, one in collections.items() if "ndcg" in one["grid"][0]}
    lines = []
    for row in next(iter(collections.values()))["grid"]:
        key = row["dim"], row["precision"]
        cells = [
            percent(_row(one, *key)["ndcg"] / _row(one, width, "float32")["ndcg"]) for one in with_answers.values()
        ]
        lines.append([precision_name(key[1]), str(key[0]), str(row["bytes"]), *cells])
    return table(["precision", "width", "bytes", *with_answers], lines) if with_answers else ""
