"""Which precision? Recall of codes against float32 on up to three collections, all-MiniLM-L6-v2's, and the guide.

    LEAFKERN_DATA=FOLDER python -m bench.recall --work FOLDER [--output bench/results/recall]
    python -m bench.recall --page           writes the guide again from recall.json and the measured speeds

Recall is exact and does not depend on the machine's speed. Writes recall.json, and guide.md, whose every figure comes
from recall.json and, for speed, from results/cpu/search*.json. --work keeps the vectors between runs: encoding takes
most of the time, about 20 minutes on one core. Without LEAFKERN_DATA (or without its scifact/) SciFact is left out.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from leafkern.console import guarded, say
from leafkern.demo.__main__ import default_teacher
from leafkern.errors import InputError
from leafkern.evaluate import RECALL_DEPTHS, Retrieval, bytes_per_vector, evaluate_vectors, float32_found
from leafkern.files import read_json, write_json
from leafkern.index.vectors import random_rotation, rotated
from leafkern.ops import search
from leafkern.ops._core.normalize import normalize_rows

from .machine import commit, results_folder, versions
from .recall_data import collections, vectors
from .recall_page import MODEL, write_guide

PRECISIONS = ("float32", "float16", "int8", "int4", "binary@8", "binary")
OVERSAMPLED, OVERSAMPLES = ("int8", "int4", "binary@8", "binary"), (1, 2, 4, 10, 20)
FOUND = [f"found_{depth}{rescored}" for depth in RECALL_DEPTHS for rescored in ("", "_rescored")]
ROTATED, ROTATIONS = ("int8", "int4", "binary@8", "binary"), 3


def measured(task: Retrieval, documents: np.ndarray, queries: np.ndarray) -> dict:
    """Recall by precision and width, by oversampling, and after random rotations."""
    left, right = (normalize_rows(torch.from_numpy(part)) for part in (documents, queries))
    width = left.shape[1]
    exact = search(right, left, max(RECALL_DEPTHS))[1]
    cells = [(dim, precision) for dim in (width, width // 2, width // 4) for precision in PRECISIONS]
    if task.qrels:
        dims = sorted({dim for dim, _ in cells})
        rows = evaluate_vectors({"model": (left, right)}, task, dims=dims, precisions=PRECISIONS)["rows"]
        found = {(row["dim"], row["precision"]): {name: row[name] for name in (*FOUND, "ndcg")} for row in rows}
    else:
        found = {cell: float32_found(left, right, cell[1], cell[0], exact) for cell in cells}
    grid = [
        {"dim": dim, "precision": precision, "bytes": bytes_per_vector(precision, dim)} | found[dim, precision]
        for dim, precision in cells
    ]
    oversampling = [
        {"precision": precision, "oversample": count, "found_10": found["found_10_rescored"]}
        for precision in OVERSAMPLED
        for count in OVERSAMPLES
        for found in [float32_found(left, right, precision, width, exact, depths=(10,), oversample=count)]
    ]
    matrices = [random_rotation(width, seed) for seed in range(ROTATIONS)]
    turned = [(rotated(left, matrix), rotated(right, matrix)) for matrix in matrices]
    after = [
        {"precision": precision, "seed": seed} | float32_found(*pair, precision, width, exact)
        for precision in ROTATED
        for seed, pair in enumerate(turned)
    ]
    return {
        "documents": len(left),
        "queries": len(right),
        "width": width,
        "grid": grid,
        "oversampling": oversampling,
        "rotated": after,
    }


def name_of(model: Path | None) -> str:
    return MODEL if model is None else model.resolve().name


def run(model: Path | None, data: Path | None, work: Path, output: Path, command: str) -> None:
    document = {
        "format": "leafkern-recall",
        "version": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "versions": versions(),
        "model": name_of(model),
        "collections": {},
    }
    for name, (task, tokens) in collections(data).items():
        documents, queries = vectors(task, tokens, model or default_teacher(), work)
        say(f"{name}: searching")
        document["collections"][name] = measured(task, documents, queries)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recall.json", document)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the vectors")
    parser.add_argument("--model", type=Path, help="folder of the model (default: that of the demo)")
    parser.add_argument("--output", type=Path, default=results_folder() / "recall", help="for recall.json and guide.md")
    parser.add_argument("--page", action="store_true", help="only write the guide, from what is there")
    parser.add_argument("--debug", action="store_true", help="a traceback with an error")
    given = parser.parse_args(arguments)
    if not given.page and given.work is None:
        parser.error("--work: a folder for the vectors is needed, outside the repository")

    def recall() -> None:
        if not given.page:
            data = os.environ.get("LEAFKERN_DATA")
            if data is not None and not Path(data).is_dir():
                raise InputError(f"LEAFKERN_DATA: {data}: no such folder")
            command = "LEAFKERN_DATA=FOLDER python -m bench.recall --work FOLDER"
            run(given.model, data and Path(data), given.work, given.output, command)
        path = given.output / "recall.json"
        if not path.is_file():
            raise InputError(f"--output: {path} is not there; run without --page first")
        write_guide(read_json(path, "recall figures"), results_folder() / "cpu", given.output / "guide.md")
        print(given.output / "guide.md")

    return guarded(recall, debug=given.debug)


if __name__ == "__main__":
    sys.exit(main())
