"""The HTML page of `leafkern bench --report`: every case beside its peers and its limit, and what the limits are."""

import os
from collections.abc import Sequence
from pathlib import Path

from leafkern.files import atomic_file
from leafkern.report import Html, Point, Section, Series, render, scatter, table

_COLUMNS = ["case", "provider", "p50 ms", "p20 ms", "p80 ms", "rate", "% of limit", "ours faster ×", "peak MiB", "note"]


def write_page(path: str | os.PathLike, documents: Sequence[dict]) -> None:
    """Writes the page of benchmark results (as `harness.document` makes them) to `path`."""
    sections = []
    for document in documents:
        sections.append(Section(_heading(document), _parts(document)))
        sections.append(Section(f"Limits of this machine ({document['op']})", [_ceilings(document), _origin(document)]))
    lead = (
        "Every implementation was checked against an exact answer before it was timed; those that failed were not "
        "timed. Rounds are interleaved, ratios are of medians of this run, and the limit is the larger of operations "
        "over the measured rate and bytes over the measured bandwidth. CPU rates are those of AVX2, which leafkern's "
        "kernels use: a peer with wider instructions may pass 100 %, and so may data small enough to stay in a cache."
    )
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(render("leafkern benchmarks", sections, lead=lead), encoding="utf-8")


def _heading(document: dict) -> str:
    gpu = document["machine"]["gpu"]
    device = document["rows"][0]["device"] if document["rows"] else "cpu"
    return f"{document['op']} on {gpu['name'] if gpu and device != 'cpu' else document['machine']['cpu']}"


def _parts(document: dict) -> list[str | Html]:
    rows = document["rows"]
    cells = [_cells(row) for row in rows]
    parts: list[str | Html] = [table(_COLUMNS, cells, group="case", formats={"% of limit": ".1f", "peak MiB": ".1f"})]
    failed = [row for row in rows if row["status"] == "failed"]
    parts += [f"{row['case']}, {row['provider']}: failed its check, not timed: {row['reason']}" for row in failed]
    return parts + _plots(rows)


def _cells(row: dict) -> list[object]:
    if row["status"] != "ok":
        return [row["case"], row["provider"], *[None] * 7, f"{row['status']}: {row['reason'] or ''}"]
    rates = [f"{row['items_per_s']:,.0f} {row['item']}/s"]
    rates += [f"{rate:,.0f} {name}/s" for name, rate in row["also_per_s"].items()]
    values = [f"{name} {value:.6g}" for name, value in row["values"].items()]
    return [
        row["case"],
        row["provider"],
        *(1e3 * row[key] for key in ("p50_s", "p20_s", "p80_s")),
        ", ".join(rates),
        row["percent_of_limit"],
        None if row["ours"] else row["ours_is_faster"],
        None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
        "; ".join(filter(None, [row["note"], *values])),
    ]


def _plots(rows: list[dict]) -> list[Html]:
    """One plot of percent of the limit by queries per call for each precision that was run with several."""
    plots = []
    # "int8/Q1", not "int8/Q1/k100".
    rows = [row for row in rows if "Q" in row["shape"] and row["case"].count("/") == 1]
    for family in dict.fromkeys(row["case"].split("/")[0] for row in rows):
        timed = [row for row in rows if row["case"].startswith(f"{family}/") and row["percent_of_limit"] is not None]
        sizes = sorted({row["shape"]["Q"] for row in timed})
        if len(sizes) < 2:
            continue
        series = []
        for provider in dict.fromkeys(row["provider"] for row in timed):
            points = [
                Point(row["shape"]["Q"], row["percent_of_limit"], note=f"{provider}, Q = {row['shape']['Q']}")
                for row in timed
                if row["provider"] == provider
            ]
            series.append(Series(provider, points, line=[(point.x, point.y) for point in points]))
        caption = f"{family}: how much of this machine's limit each implementation reaches."
        plots.append(scatter(series, x="queries per call", y="% of limit", log_x=True, x_ticks=sizes, caption=caption))
    return plots


def _ceilings(document: dict) -> Html:
    lines = [
        [name, ceiling["rate"] / 1e9, f"G{ceiling['unit']}/s", ceiling["threads"], ceiling["how"]]
        for name, ceiling in document["ceilings"].items()
    ]
    return table(["ceiling", "rate", "unit", "threads", "how"], lines)


def _origin(document: dict) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"{document['date']}, commit {document['commit']}, size {document['size']}; {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['isa']}, {machine['memory_gib']} GiB; {versions}. "
        f"Reproduce: {document['command']}"
    )
