"""What the fuzzers feed: bytes in, and either what opens right or an error that names the file.

A target says whether its file was read; False: refused, by DamagedFileError or InputError. Nothing else may happen.
"""

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from leafkern import Index
from leafkern.errors import DamagedFileError, InputError
from leafkern.index import exchange

WIDTH = 16
REFUSALS = (DamagedFileError, InputError)
Target = Callable[[bytes], bool]


def unit(rows: int) -> np.ndarray:
    x = np.random.default_rng().normal(size=(rows, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_indexes(folder: Path) -> list[Path]:
    """Indexes that have everything: texts, string and integer ids, deleted rows, several segments, a rotation, none."""
    x = unit(30)
    names, texts = [f"id{i}" for i in range(30)], [f"text {i}" for i in range(30)]
    index = Index.build(folder / "strings", x[:20], ids=names[:20], texts=texts[:20])
    index.add(x[20:], ids=names[20:], texts=texts[20:])
    index.remove(["id3", "id25"])
    index = Index.build(folder / "integers", x, precision="ubinary", rescore="int8", rotate=True)
    index.remove([0, 7, 8])
    Index.build(folder / "empty", x[:0])
    for name in ("strings", "integers", "empty"):  # without their checksum, so that what they say is judged
        file = folder / name / "manifest.json"
        manifest = json.loads(file.read_bytes())
        del manifest["sha256"]
        file.write_text(json.dumps(manifest))
    return [folder / name for name in ("strings", "integers", "empty")]


def use(folder: Path) -> None:
    """Everything that reads an index."""
    index = Index.open(folder)
    if index.width <= 4096:
        _, rows = index.search_rows(np.ones((2, index.width), np.float32), 5)
        index.ids_at(rows)
        if index.has_texts:
            index.texts_at(rows)
    index.verify()
    index.info()


def extend(folder: Path, copy: Path) -> None:
    """Everything that writes, on a copy."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    index = Index.open(copy)
    if index.width == WIDTH:
        strings = index.info()["ids"] == "string"
        index.add(unit(1), ids=["new"] if strings else None, texts=["text"] if index.has_texts else None)
        index.remove(index.ids_at(index.rows()[-1:]))
        index.compact()
        use(copy)


def _sealed(name: str, folder: Path) -> None:
    """Brings size and checksum of a file up to date in the manifest, so that its content alone is judged."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    content = (folder / name).read_bytes()
    entries = [*manifest["segments"], *(entry["deleted"] for entry in manifest["segments"]), manifest["rotation"]]
    for entry in entries:
        if entry is not None and entry["file"] == name:
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def split_header(content: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header, and its data."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


class Targets:
    """Targets by name, and what is valid for each. folder: for scratch files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seeds: dict[str, bytes] = {}
        self.targets: dict[str, Target] = {}
        for index in make_indexes(folder):
            self._add(f"manifest-{index.name}", self._manifest(index), (index / "manifest.json").read_bytes())
            for file in sorted(index.glob("*.safetensors")):
                kind = file.name.split("-")[0]
                content = file.read_bytes()
                self._add(f"{kind}-{index.name}", self._data(index, file.name, header=False), content)
                self._add(f"{kind}-header-{index.name}", self._data(index, file.name), split_header(content)[0])
        opened = Index.open(folder / "strings")
        for suffix in (".npy", ".parquet", ".safetensors", ".faiss"):
            path = folder / f"vectors{suffix}"
            exchange.export(opened, path)
            if suffix == ".npy":  # with a header of 128 bytes: numpy takes seconds to give up one of 8 KiB
                np.save(path, np.load(path))
            self._add(suffix[1:], self._file(folder / f"fuzzed{suffix}"), path.read_bytes())
        self._add("ids", self._ids(folder), (folder / "vectors.npy.ids.json").read_bytes())

    def _add(self, name: str, target: Target, seed: bytes) -> None:
        if name not in self.targets:  # of several segments, the first
            self.targets[name], self.seeds[name] = target, seed

    def _manifest(self, index: Path) -> Target:
        def run(data: bytes) -> bool:
            (index / "manifest.json").write_bytes(data)
            return _judged(lambda: use(index)) and _judged(lambda: extend(index, self.folder / "extended"))

        return run

    def _data(self, index: Path, name: str, header: bool = True) -> Target:
        original = (index / name).read_bytes()
        copy = self.folder / f"{index.name}-{name}-{header}"
        shutil.copytree(index, copy)

        def run(data: bytes) -> bool:
            content = struct.pack("<Q", len(data)) + data + split_header(original)[1] if header else data
            (copy / name).write_bytes(content)
            _sealed(name, copy)
            return _judged(lambda: use(copy))

        return run

    def _file(self, path: Path) -> Target:
        def run(data: bytes) -> bool:
            path.write_bytes(data)

            def read() -> None:
                if exchange.holds_vectors(path):
                    source = exchange.read(path, ids_field="id" if path.suffix == ".parquet" else None, binary=True)
                    for block in [source.vectors] if isinstance(source.vectors, np.ndarray) else source.vectors:
                        assert np.isfinite(block).all()

            return _judged(read)

        return run

    def _ids(self, folder: Path) -> Target:
        def run(data: bytes) -> bool:
            (folder / "vectors.npy.ids.json").write_bytes(data)
            return _judged(lambda: exchange.read(folder / "vectors.npy"))

        return run


def _judged(call: Callable[[], None]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except REFUSALS:
            return False
    return True
