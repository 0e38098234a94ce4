"""A crash anywhere while an index is written: it is the old one or the new one, whole, and can be written on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import leafkern
from leafkern import Index, files
from leafkern.errors import InputError
from leafkern.index.manifest import data_files, read_manifest

pytestmark = pytest.mark.filterwarnings(
    "ignore::leafkern.ops._core.backend.FallbackWarning", "ignore::leafkern.index.ClippedWarning"
)


def vectors(n):
    x = np.random.default_rng(n).normal(size=(n, 24)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def several_segments(path):
    """Three segments, two of them with removed rows."""
    index = Index.build(path, vectors(120), texts=["first"] * 120, rotate=1)
    index.add(vectors(40), texts=["second"] * 40)
    index.add(vectors(7), texts=["third"] * 7)
    index.remove([3, 9, 125])
    return index


OPERATIONS = {
    "first build": (None, lambda path: Index.build(path, vectors(60), rotate=2)),
    "build anew": (several_segments, lambda path: Index.build(path, vectors(60), precision="binary")),
    "add": (several_segments, lambda path: Index.open(path).add(vectors(9), texts=["new"] * 9, source={"at": 9})),
    "remove": (several_segments, lambda path: Index.open(path).remove([0, 17, 163])),
    "remove all": (
        several_segments,
        lambda path: Index.open(path).remove(Index.open(path).search(vectors(1), 999)[1][0]),
    ),
    "compact": (several_segments, lambda path: Index.open(path).compact()),
    "compact the small": (several_segments, lambda path: Index.open(path).compact(smaller_than=100)),
}


def content(path):
    """All that the index at `path` holds, verified; None where there is no index."""
    if not (path / "manifest.json").exists():
        return None
    index = Index.open(path)
    index.verify()
    rows, k = index.rows(), max(1, len(index))
    found = index.search(vectors(5), k)
    return (
        index.precision,
        index.source,
        index.ids_at(rows).tolist(),
        index.texts_at(rows).tolist() if index.has_texts else None,
        index.vectors_at(rows).tobytes(),
        found[0].tobytes(),
        found[1].tolist(),
    )


class Disk:
    """Copies of a folder before each step of a writer.

    "killed": as it stands then. "torn", "cut": after a loss of power, where files lose what was not synced; renames and
    removals since the folder's last sync have come to the disk ("torn") or have not ("cut").
    """

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies, self.steps, self.states = folder, copies, [], []
        self.synced, self.pending = {file.stat().st_ino for file in self._files()}, None
        self.durable = {file.name: file.read_bytes() for file in self._files()}

    def _files(self):
        return list(self.folder.iterdir()) if self.folder.exists() else []

    def step(self, step, path):
        self._end_step()
        self.steps.append((step, Path(path).name))
        if step == "write" and path.exists():
            self.synced.discard(path.stat().st_ino)
        self.pending = step, path
        self._take()

    def _end_step(self):
        step, path = self.pending or (None, None)
        if step == "fsync":
            self.synced |= {file.stat().st_ino for file in self._files() if file == path}
        if step == "fsync-folder" and path == self.folder:
            self.durable = self._synced_files()
        self.pending = None

    def _synced_files(self):
        return {file.name: file.read_bytes() if file.stat().st_ino in self.synced else b"" for file in self._files()}

    def _take(self):
        standing = {file.name: file.read_bytes() for file in self._files()}
        for kind, held in (("killed", standing), ("torn", self._synced_files()), ("cut", self.durable)):
            same = next((copy for *_, copy, known in self.states if known == held), None)
            copy = same or self.copies / f"{len(self.steps)}-{kind}"
            if same is None:
                copy.mkdir(parents=True)
                for name, data in held.items():
                    (copy / name).write_bytes(data)
            self.states.append((len(self.steps), kind, copy, held))

    def end(self):
        self._end_step()
        self.steps.append(("end", ""))
        self._take()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_or_cut_off_at_every_step(tmp_path, monkeypatch, operation):
    prepare, work = OPERATIONS[operation]
    path = tmp_path / "i"
    if prepare:
        prepare(path)
    before = content(path)
    disk = Disk(path, tmp_path / "copies")
    with monkeypatch.context() as patch:
        patch.setattr(files, "on_step", disk.step)
        work(path)
    disk.end()
    after = content(path)
    assert before != after or operation.startswith("compact")
    renamed = disk.steps.index(("rename", "manifest.json")) + 1
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # only for speed: what follows is not cut off
    found = {copy: content(copy) for _, _, copy, _ in disk.states}
    for number, kind, copy, _ in disk.states:
        assert found[copy] == (after if number > renamed + (kind == "cut") else before), (number, kind)
    for copy, state in found.items():
        if state is None:
            Index.build(copy, vectors(5))
        else:
            index = Index.open(copy)
            index.add(vectors(2), texts=["a", "b"] if index.has_texts else None)
        assert {file.name for file in copy.iterdir()} == {"manifest.json", *data_files(read_manifest(copy))}
    assert content(path) == after
    kinds = {step for step, _ in disk.steps}
    assert {"write", "fsync", "rename", "fsync-folder"} <= kinds
    assert "remove" in kinds or operation in ("first build", "add")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_error_at_every_step(tmp_path, monkeypatch, operation):
    """An exception, unlike a kill, leaves nothing behind, unless the change is complete already."""
    prepare, work = OPERATIONS[operation]
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    original = tmp_path / "original"
    if prepare:
        prepare(original)
    before = {file.name: file.read_bytes() for file in original.iterdir()} if prepare else None
    for crash_at in range(200):
        path, steps = tmp_path / str(crash_at), []
        if prepare:
            shutil.copytree(original, path)

        def step(name, where, steps=steps, crash_at=crash_at):
            steps.append((name, where.name))
            if len(steps) - 1 == crash_at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "on_step", step)
            try:
                work(path)
            except KeyboardInterrupt:
                pass
            else:
                break
        if ("rename", "manifest.json") not in steps[:-1]:
            assert path.exists() == (prepare is not None)
            if prepare:
                assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        else:
            Index.open(path).verify()
        shutil.rmtree(path, ignore_errors=True)
    assert 9 <= crash_at == len(steps)


def driver(task, *arguments, timeout):
    script = Path(__file__).parent / "stress_driver.py"
    command = [sys.executable, "-W", "ignore", script, task, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(leafkern.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_stress_killed_while_writing(tmp_path, kills):
    """kill -9 at any moment of appending, removing and compacting: what was acknowledged is there, nothing is half."""
    ended = driver("kills", tmp_path / "i", kills, timeout=60 + 3 * kills)
    assert sum(ended["interrupted"].values()) == kills
    if kills == 200:
        assert ended["interrupted"]["add"] >= 20
        assert ended["interrupted"]["compact"] >= 20
    index = Index.open(tmp_path / "i")
    index.verify()
    index.compact()
    assert len(list((tmp_path / "i").iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("processes", "threads", "seconds"), [(2, 4, 2), pytest.param(10, 10, 20, marks=pytest.mark.slow)]
)
def test_stress_readers_beside_a_writer(tmp_path, processes, threads, seconds):
    """Each sees only whole states, later ones later; every second thread through a handle that others share."""
    ended = driver("readers", tmp_path / "i", processes, threads, seconds, timeout=300)
    assert ended["readers"] == processes * threads
    assert ended["reads"] >= 3 * ended["readers"]
    assert ended["commits"] >= seconds
    assert ended["states"] >= seconds


def test_a_writer_refuses_beside_another(tmp_path):
    index = several_segments(tmp_path / "i")
    with files.writing(index.path):
        for work in (lambda: index.compact(), lambda: index.remove([0])):
            with pytest.raises(InputError, match="another process is writing it; try again later"):
                work()
