"""The page of an evaluation: what a smaller student, a shorter vector and fewer bits each cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from leafkern.evaluate import OVERSAMPLE
from leafkern.report import Html, Point, Section, Series, cards, render, scatter, table
from leafkern.report.plot import frontier

PRECISION_NAMES = {"binary@8": "binary, asymmetric", "binary@1": "binary"}

_RETRIEVAL_COLUMNS = {
    "system": ("system", "", None),
    "dim": ("width", "", None),
    "precision": ("precision", "", None),
    "bytes_per_vector": ("bytes per vector", "", "min"),
    "ndcg": ("nDCG@{k}", ".4f", "max"),
    "kept": ("of own float32", ".1%", None),
    "recall": ("recall@{k}", ".4f", "max"),
    "neighbours": ("own float32 top {k}", ".1%", None),
    "found_10": ("float32 top 10", ".1%", None),
    "found_10_rescored": ("top 10 rescored", ".1%", None),
    "found_100": ("float32 top 100", ".1%", None),
    "found_100_rescored": ("top 100 rescored", ".1%", None),
    "queries_per_s": ("queries/s", ",.0f", "max"),
}
_SIMILARITY_COLUMNS = {
    **{name: _RETRIEVAL_COLUMNS[name] for name in ("system", "dim", "precision", "bytes_per_vector")},
    "spearman": ("Spearman", ".4f", "max"),
    "kept": ("of own float32", ".1%", None),
}


def precision_name(precision: str | None) -> str | None:
    if precision is None:
        return None
    codes, _, finer = precision.partition("+")
    return PRECISION_NAMES.get(codes, codes) + (f", rescored {finer}" if finer else "")


def quality_of(result: Mapping) -> str:
    """The rows' entry that says how good they are."""
    return "ndcg" if result["task"]["kind"] == "retrieval" else "spearman"


def _quality_name(result: Mapping) -> str:
    return f"nDCG@{result['task']['k']}" if result["task"]["kind"] == "retrieval" else "Spearman"


def cells(result: Mapping) -> tuple[list[str], list[list[object]], dict[str, str], dict[str, str]]:
    """An evaluation as a table: column names, rows, formats and which end is best, by column name."""
    quality = quality_of(result)
    k = result["task"].get("k", 10)
    columns = _RETRIEVAL_COLUMNS if quality == "ndcg" else _SIMILARITY_COLUMNS
    exact = {
        (row["system"], row["dim"]): row[quality] for row in result["rows"] if row["precision"] in ("float32", None)
    }
    lines = []
    for row in result["rows"]:
        base = exact.get((row["system"], row["dim"]))
        kept = row[quality] / base if base and row["precision"] else None
        known = {**row, "kept": kept, "precision": precision_name(row["precision"])}
        lines.append([known.get(name) for name in columns])
    names = {name: label.format(k=k) for name, (label, _, _) in columns.items()}
    formats = {names[name]: form for name, (_, form, _) in columns.items() if form}
    best = {names[name]: end for name, (_, _, end) in columns.items() if end}
    return list(names.values()), lines, formats, best


def headline(result: Mapping) -> list[tuple[str, str]]:
    """Figures for cards: what the student keeps of the teacher, and each saving of the student's full width."""
    quality, name = quality_of(result), _quality_name(result)
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    full = {s: max((row["dim"] or 0 for row in result["rows"] if row["system"] == s), default=0) for s in systems}
    value = {
        (row["system"], row["precision"]): row for row in result["rows"] if row["dim"] == (full[row["system"]] or None)
    }

    def share(one: tuple[str, str], other: tuple[str, str]) -> float | None:
        if one not in value or other not in value or not value[other][quality]:
            return None
        return value[one][quality] / value[other][quality]

    facts = []
    for system in ("student", "asymmetric"):
        kept = share((system, "float32"), ("teacher", "float32"))
        if kept is not None:
            who = {"student": "student alone", "asymmetric": "student queries, teacher documents"}[system]
            facts.append((f"{kept:.1%}", f"of the teacher's {name}: {who}"))
    main = "student" if "student" in systems else systems[0]
    for precision in ("int8", "binary+int8", "binary"):
        kept = share((main, precision), (main, "float32"))
        if kept is not None and len(facts) < 4:
            saving = value[main, "float32"]["bytes_per_vector"] / value[main, precision]["bytes_per_vector"]
            facts.append(
                (f"{kept:.1%}", f"of float32's {name} with {precision_name(precision)}, {saving:.3g}× smaller")
            )
    return facts


def plots(result: Mapping) -> list[str | Html]:
    """Two plots: quality by bytes per vector of every system; quality by speed (or by width) of one of them."""
    quality, name = quality_of(result), _quality_name(result)
    rows = [row for row in result["rows"] if row["dim"] is not None]
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))

    def note(row: Mapping) -> str:
        return f"{row['system']}, width {row['dim']}, {precision_name(row['precision'])}: {name} {row[quality]:.4f}"

    def points(chosen: Sequence[Mapping], x: str, larger: bool) -> dict:
        found = [Point(row[x], row[quality], precision_name(row["precision"]), note(row)) for row in chosen]
        return {"points": found, "line": frontier([(p.x, p.y) for p in found], larger_x_better=larger)}

    sized = []
    for system in systems:
        own = [row for row in rows if row["system"] == system]
        if own:
            sized.append(Series(system, **points(own, "bytes_per_vector", False)))
        else:
            level = next(row[quality] for row in result["rows"] if row["system"] == system)
            sized.append(Series(system, level=level))
    first = scatter(
        sized,
        x="bytes per vector (log scale)",
        y=name,
        log_x=True,
        x_ticks=_bytes_ticks([row["bytes_per_vector"] for row in rows]),
        caption="Higher and further left is better. A line joins what is best of its system for the bytes it takes; "
        "pale marks are beaten in both by another of the same system. Point at a mark for its width and figure.",
    )
    main = "student" if "student" in systems else rows[0]["system"]
    own = [row for row in rows if row["system"] == main]
    widths = list(dict.fromkeys(row["dim"] for row in own))
    if quality == "ndcg":
        by_width = [
            Series(f"width {dim}", **points([row for row in own if row["dim"] == dim], "queries_per_s", True))
            for dim in widths
        ]
        second = scatter(
            by_width,
            x=f"queries per second, search alone, {result['task']['queries']} queries in one call (log scale)",
            y=f"{name}, {main}",
            log_x=True,
            caption="Higher and further right is better. Measured on this corpus and machine: rescoring costs the same "
            "for every query, so it weighs less the more documents are scanned.",
        )
    else:
        by_precision = []
        for precision in dict.fromkeys(row["precision"] for row in own):
            line = [(row["dim"], row[quality]) for row in own if row["precision"] == precision]
            marks = [Point(row["dim"], row[quality], "", note(row)) for row in own if row["precision"] == precision]
            by_precision.append(Series(precision_name(precision), marks, sorted(line)))
        second = scatter(by_precision, x="width (log scale)", y=f"{name}, {main}", log_x=True, x_ticks=sorted(widths))
    return [first, second]


def recall_plot(result: Mapping) -> Html | None:
    """How much of float32's top 10 the codes of one system find, alone and rescored, by bytes; None without figures."""
    rows = [row for row in result["rows"] if row.get("found_10") is not None]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    if not systems:
        return None
    main = "student" if "student" in systems else systems[0]
    own = [row for row in rows if row["system"] == main]

    def points(name: str) -> list[Point]:
        marks = [(row, precision_name(row["precision"])) for row in own if row[name] is not None]
        return [
            Point(row["bytes_per_vector"], row[name], label, f"width {row['dim']}, {label}: {row[name]:.4f}")
            for row, label in marks
        ]

    series = [Series("codes alone", points("found_10")), Series("rescored", points("found_10_rescored"))]
    return scatter(
        series,
        x="bytes per vector that are scanned (log scale)",
        y=f"share of float32's top 10, {main}",
        log_x=True,
        x_ticks=_bytes_ticks([row["bytes_per_vector"] for row in own]),
        caption="“A, rescored B” stands with the codes alone: it rescores by itself, from B of the same width.",
    )


def _bytes_ticks(values: Sequence[int]) -> list[int]:
    """Powers of two times the smallest, as widths halve: about seven of them."""
    ticks, tick = [], min(values)
    while tick <= max(values):
        ticks.append(tick)
        tick *= 2
    return ticks if len(ticks) <= 9 else ticks[:: -(-len(ticks) // 7)]


def sections(result: Mapping) -> list[Section]:
    """Headline, how to read it, two plots and the whole table of `leafkern.evaluate`'s dict."""
    name = _quality_name(result)
    if quality_of(result) == "ndcg":
        how = (
            f"{name} is 1 when every query's relevant documents come first, in order of their grades; “recall” is the "
            "share of them among the first results; “own float32 top” compares with the exact search of the same "
            "vectors, so it shows what the codes alone lose; “float32 top” compares with float32 at full width, so it "
            "shows what codes and width lose together, and “rescored” what is left of that after the best "
            f"{OVERSAMPLE}·k have been scored again by float16 vectors of full width. “A, rescored B” scans codes A "
            "and scores the best candidates again with B; its bytes count both. “binary, asymmetric” compares bits "
            "with 7-bit queries, and so does “binary, rescored B”, while “binary” and what is rescored of it compares "
            "bits with bits; as a system, “asymmetric” means documents by the teacher, queries by the student. "
            "Shorter widths are prefixes of the vectors, normalised again."
        )
    else:
        how = (
            "Spearman’s rank correlation between the cosine of two sentences and people’s scores: 1 is the same order. "
            "The first sentence is in float32, the second in the precision named. Shorter widths are prefixes of the "
            "vectors, normalised again."
        )
    columns, lines, formats, best = cells(result)
    facts = headline(result)
    first, second = plots(result)
    third = recall_plot(result)
    return [
        Section("", [*([cards(facts)] if facts else []), f"How to read this: {how}", *result.get("notes", ())]),
        Section(f"{name} by bytes per vector", [first]),
        Section(f"{name} by speed" if quality_of(result) == "ndcg" else f"{name} by width", [second]),
        *([Section("What the codes find of float32’s answer", [third])] if third is not None else []),
        Section("All figures", [table(columns, lines, formats=formats, best=best, group=columns[0])]),
    ]


def page(result: Mapping, title: str | None = None) -> str:
    """The HTML page of `leafkern.evaluate`'s dict."""
    task = result["task"]
    sizes = (
        f"{task['documents']:,} documents, {task['queries']:,} queries"
        if task["kind"] == "retrieval"
        else f"{task['pairs']:,} pairs of sentences"
    )
    models = "; ".join(
        f"{role}: {'/'.join(Path(model['name']).parts[-2:])}" for role, model in result.get("models", {}).items()
    )
    machine = result["machine"]
    foot = (
        f"leafkern {machine['leafkern']}, torch {machine['torch']}, {machine['threads']} threads, {machine['machine']}."
    )
    name = task["name"] or "task"
    return render(title or f"Evaluation on {name}", sections(result), lead=f"{sizes}. {models}".strip(), foot=foot)
