"""Opening an index of 10 GB: only the manifest and the head of each segment may be read.

The file is sparse: it takes no room on disk, and a page that is read is a page of zeros.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import safe_open

from leafkern.index import Index
from leafkern.textio import safetensors_header

from .harness import Case, Contestant, Work

DIM, SMALL = 1024, 192
ROWS = {"tiny": 100_032, "small": 1_000_000, "full": 10_000_000}


def sparse_index(folder: Path, rows: int) -> int:
    """Makes an index of `rows` int8 vectors at `folder`, nearly all of its file a hole; the file's bytes."""
    Index.build(folder, torch.nn.functional.normalize(torch.randn(SMALL, DIM)), rescore=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    (entry,) = manifest["segments"]
    with safe_open(folder / entry["file"], framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    # Rows grow; what is there once (ranges, scale) and the padding stay.
    shapes = {name: ((rows, *a.shape[1:]) if a.shape[0] == SMALL else a.shape) for name, a in arrays.items()}
    header = safetensors_header({name: (a.dtype, shapes[name]) for name, a in arrays.items()}, metadata)
    size = len(header) + sum(a.itemsize * int(np.prod(shapes[name])) for name, a in arrays.items())
    with open(folder / entry["file"], "wb") as stream:
        stream.write(header)
        stream.truncate(size)
    manifest["count"] = entry["rows"] = rows
    entry["bytes"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return size


def test_index(bench, bench_session, tmp_path):
    rows = ROWS[bench_session.size]
    folder, beside = tmp_path / "index", tmp_path / "vectors.npy"
    size = sparse_index(folder, rows)
    np.lib.format.open_memmap(beside, mode="w+", dtype=np.int8, shape=(rows, DIM)).flush()

    def check(opened, i):
        return None if len(opened) == rows else f"{len(opened)} rows, not {rows}"

    contestants = [
        Contestant("leafkern", lambda i: Index.open(folder), check, ours=True, limited=False),
        Contestant(
            "numpy.load, mapped",
            lambda i: np.load(beside, mmap_mode="r"),
            check,
            same_job=False,
            limited=False,
            note="no ids, nothing checked",
        ),
    ]
    shape = {"N": rows, "D": DIM, "bytes": size}
    bench(Case("index", "open", shape, Work(0, "FLOP", (), 0, "read", 1, "index"), contestants))
