"""The index on disk: exact against the operation, whole after a crash at any step, strict about its files."""

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import leafkern
from leafkern import Index, files
from leafkern.errors import DamagedFileError, InputError
from leafkern.index import PRECISIONS, ClippedWarning
from leafkern.ops import calibrate, quantize, search
from leafkern.textio import safetensors_header

pytestmark = pytest.mark.filterwarnings("ignore::leafkern.ops._core.backend.FallbackWarning")


def unit(n, d=24, seed=None):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def segment_of(path):
    (file,) = path.glob("segment-*")
    return file


def tensors_of(index):
    (part,) = index._state.segments
    return part.tensors


@pytest.mark.parametrize("width", [1, 7, 24])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_the_operation(tmp_path, precision, width):
    x, queries = unit(211, width), unit(9, width)
    for rescore in (None, "float16"):
        index = Index.build(tmp_path / f"{rescore}", x, precision=precision, rescore=rescore)
        fine = None
        if rescore and precision not in ("float32", "float16"):
            fine = quantize(torch.from_numpy(x), rescore)
        coarse = quantize(torch.from_numpy(x), precision)
        scores, rows = search(torch.from_numpy(queries), coarse, 5, rescore=fine, oversample=3)
        for opened in (index, Index.open(tmp_path / f"{rescore}", width=width, precision=precision)):
            got_scores, got_ids = opened.search(queries, 5, oversample=3)
            np.testing.assert_array_equal(got_ids, rows.numpy())
            np.testing.assert_array_equal(got_scores, scores.numpy())
        index.verify()


@pytest.mark.parametrize("rescore", ["float32", "int8", "int4"])
def test_rescore_precisions(tmp_path, rescore):
    x = unit(150)
    index = Index.build(tmp_path / "i", x, precision="binary", rescore=rescore)
    base, fine = quantize(torch.from_numpy(x), "binary"), quantize(torch.from_numpy(x), rescore)
    _, rows = search(torch.from_numpy(x[:7]), base, 4, rescore=fine)
    np.testing.assert_array_equal(index.search(x[:7], 4)[1], rows.numpy())


@pytest.mark.parametrize("rows", [1, 2, 99, 100])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_rows_do_not_collapse(tmp_path, precision, rows):
    x = unit(rows, 300)
    index = Index.build(tmp_path / "i", x, precision=precision, rescore=None)
    assert len(np.unique(tensors_of(Index.open(tmp_path / "i"))["codes"][0])) > 3
    np.testing.assert_array_equal(index.search(x, 1)[1][:, 0], np.arange(rows))


def test_blocks_give_the_same_file_content(tmp_path):
    x = unit(230)
    Index.build(tmp_path / "whole", x)
    Index.build(tmp_path / "blocks", (x[start : start + 50] for start in range(0, 230, 50)))
    for ours, other in zip(
        tensors_of(Index.open(tmp_path / "whole")).items(), tensors_of(Index.open(tmp_path / "blocks")).items()
    ):
        assert ours[0] == other[0]
        assert torch.equal(ours[1], other[1])
    with pytest.raises(InputError, match="row 61 holds NaN"):
        Index.build(tmp_path / "bad", (np.full((1, 24), np.nan, np.float32) if i == 61 else x[:1] for i in range(70)))
    assert not (tmp_path / "bad").exists()


def test_too_large_values_are_named_among_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("leafkern.index.vectors.BLOCK_VALUES", 240)
    x = unit(230).astype(np.float64)
    for value, message in ((1e5, "vectors: row 157 does not fit float16"), (1e39, "vectors: row 157 holds NaN or inf")):
        x[157, 3] = value
        for given in (x, iter(np.split(x, 23))):
            with pytest.raises(InputError, match=message):
                Index.build(tmp_path / "i", given)
            assert not (tmp_path / "i").exists()
    x[157, 3] = 6e4
    index = Index.build(tmp_path / "i", x)
    x[157, 3] = 1e5
    with pytest.raises(InputError, match="row 157 does not fit float16"):
        index.add(x)
    assert len(Index.open(tmp_path / "i")) == 230
    assert len(list((tmp_path / "i").iterdir())) == 2


def test_ranges_given(tmp_path):
    x = unit(300) * 5
    ranges = calibrate(torch.from_numpy(x), "int8")
    with pytest.raises(InputError, match=r"vectors: row 0 has norm 5 .* give ranges=calibrate"):
        Index.build(tmp_path / "i", x[:9])
    mapped = ranges.numpy().copy()
    mapped.flags.writeable = False
    for given in (ranges, ranges.numpy().astype(np.float64), mapped):
        index = Index.build(tmp_path / "i", x[:9], ranges=given)
        expected = quantize(torch.from_numpy(x[:9]), "int8", ranges=ranges)
        assert torch.equal(tensors_of(index)["codes"], expected.codes)
    index.add(x[9:])
    for part in Index.open(tmp_path / "i")._state.segments:
        assert torch.equal(part.tensors["codes_ranges"], ranges)
    for options, message in (
        ({"ranges": "abc"}, "ranges: expected a numpy array or torch tensor"),
        ({"ranges": ranges[:, :3]}, r"ranges: expected shape \(2, 24\)"),
        ({"ranges": ranges, "precision": "binary"}, "ranges: an index of binary has no int8 or int4 codes"),
        ({"ranges": ranges, "vectors": x[:0]}, "ranges: an empty index"),
    ):
        with pytest.raises(InputError, match=message):
            Index.build(tmp_path / "j", **{"vectors": x, **options})
    assert not (tmp_path / "j").exists()


def test_ids_texts_and_order(tmp_path):
    x = unit(5)
    x[3] = x[1]
    names = ["ä", "", "c" * 300, "d", "e"]
    texts = ["one", "zwei ✓", "", "four", "five"]
    index = Index.build(tmp_path / "i", x, ids=names, texts=texts, precision="float32")
    scores, ids = index.search(x[1:2], 9)
    assert scores.shape == ids.shape == (1, 5)
    assert list(ids[0, :2]) == ["", "d"]  # equal scores: the lower insertion number first
    for array in (np.array(texts), np.array(texts, object)):
        other = Index.build(tmp_path / "array", x, texts=array)
        assert list(other.texts_at(np.arange(5))) == texts
    _, rows = index.search_rows(x[1:2], 2)
    assert list(index.texts_at(rows)[0]) == ["zwei ✓", "four"]
    index.add(unit(1), ids=["f"], texts=["six"])
    assert index.remove(["ä", "d"]) == 2
    index = Index.open(tmp_path / "i")
    for rows in ([1, 2, 4, 5], [0, 1, 2, 3]):
        assert index.rows().tolist() == rows
        assert list(index.ids_at(index.rows())) == ["", "c" * 300, "e", "f"]
        assert list(index.texts_at(index.rows())) == ["zwei ✓", "", "five", "six"]
        index.verify()
        index.compact()


def test_nothing_added_to_string_ids(tmp_path):
    index = Index.build(tmp_path / "i", unit(3), ids=["a", "b", "c"])
    assert index.add(unit(0)) == 0
    with pytest.raises(InputError, match="ids: the index has string ids"):
        index.add(unit(1))


def test_integer_ids_number_on(tmp_path):
    index = Index.build(tmp_path / "i", unit(3), ids=np.array([-5, 10, 2**40]))
    index.add(unit(2))
    assert list(index.ids_at(np.arange(5))) == [-5, 10, 2**40, 2**40 + 1, 2**40 + 2]
    index.remove([2**40 + 2])
    index.compact()
    index.add(unit(1))
    assert index.ids_at(np.array([4]))[0] == 2**40 + 3  # an id is never given twice


def test_empty(tmp_path):
    index = Index.build(tmp_path / "i", np.zeros((0, 24), np.float32))
    for opened in (index, Index.open(tmp_path / "i")):
        scores, ids = opened.search(unit(4), 10)
        assert scores.shape == ids.shape == (4, 0)
        assert scores.dtype == np.float32
    x = unit(120) * 3
    assert index.add(x, ids=[f"n{i}" for i in range(120)]) == 0  # the first vectors set the ranges
    assert index.search(x[:3], 1)[1][:, 0].tolist() == ["n0", "n1", "n2"]
    assert index.search(np.zeros((0, 24), np.float32), 10)[1].shape == (0, 10)
    assert index.remove([f"n{i}" for i in range(120)]) == 120
    assert len(Index.open(tmp_path / "i")) == 0
    index.add(unit(2))
    index.verify()


def test_add_reports_clipped_values(tmp_path):
    x = unit(200)
    index = Index.build(tmp_path / "i", x)
    new = x[:4].copy()
    new[1, 3], new[2, 5] = 9, -9
    with pytest.warns(ClippedWarning, match="2 of 96 values"):
        assert index.add(new) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.add(x[:3]) == 0


def test_refusals(tmp_path):
    x = unit(120)
    index = Index.build(tmp_path / "i", x, encoder="abc", prompt="query: ")

    def refused(message, call, *args, **options):
        with pytest.raises(InputError, match=message):
            call(*args, **options)

    refused("unknown name 'int9'; did you mean 'int8'", Index.build, tmp_path / "j", x, precision="int9")
    refused("unknown name 'binary'", Index.build, tmp_path / "j", x, rescore="binary")
    refused("int8 is not finer than the precision int8", Index.build, tmp_path / "j", x, rescore="int8")
    refused("7 for 120 vectors", Index.build, tmp_path / "j", x, ids=range(7))
    refused("ids: 3 is given more than once", Index.build, tmp_path / "j", x[:3], ids=[3, 1, 3])
    refused("entry 1 is 2; expected all int or all str", Index.build, tmp_path / "j", x[:2], ids=["a", 2])
    refused("expected a sequence of int or str", Index.build, tmp_path / "j", x[:2], ids="ab")
    refused("floating-point matrix", Index.build, tmp_path / "j", x[0])
    refused("no index here", Index.open, tmp_path / "j")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused("holds 'thesis.txt'", Index.build, tmp_path / "mine", x)
    bad = x.copy()
    bad[77, 2] = np.inf
    refused("vectors: row 77 holds NaN or infinity", Index.build, tmp_path / "i", bad)
    refused("vectors: row 77", index.add, bad)
    refused("queries: row 77", index.search, bad, 3)
    refused("queries: row 1 holds", index.search, np.array([[0.0], [1e39]]) * np.ones(24), 3)
    refused("width: .* built with width 24, not 23", index.add, x[:, :23])
    refused("width: .* built with width 24, not 23", index.search, x[:, :23], 3)
    refused("width", Index.open, tmp_path / "i", width=12)
    refused("precision: .* 'int8', not 'binary'", Index.open, tmp_path / "i", precision="binary")
    refused("encoder: .* 'abc', not 'xyz'", index.search, x, 3, encoder="xyz")
    refused("prompt: .* 'query: ', not ''", index.add, x, prompt="")
    refused("ids: 5 is already in the index", index.add, x[:2], [500, 5])
    refused("the index has int64 ids, got 'a'", index.add, x[:1], ["a"])
    refused("ids: 999 is not in the index", index.remove, [3, 999])
    refused("'a' is not in the index", index.remove, ["a"])
    refused("texts: row 1 is int, not str", Index.build, tmp_path / "j", x[:2], texts=["a", 3])
    refused("texts: row 1 holds a lone surrogate", Index.build, tmp_path / "j", x[:2], texts=["a", "b\ud800"])
    refused("texts: row 0 is list, not str", Index.build, tmp_path / "j", x[:1], texts=np.array([["a"]]).tolist())
    refused("texts: expected a sequence of str, got str", Index.build, tmp_path / "j", x[:3], texts="abc")
    refused("texts: expected a sequence of str, got gen", Index.build, tmp_path / "j", x[:1], texts=(t for t in "a"))
    for kind in (pa.string(), pa.large_string()):
        ends = pa.py_buffer(np.arange(2, dtype=np.int32 if kind == pa.string() else np.int64))
        latin = pa.Array.from_buffers(kind, 1, [None, ends, pa.py_buffer(b"\xff")])
        refused("texts: .*UTF8", Index.build, tmp_path / "j", x[:1], texts=latin)
        refused("texts: .*UTF8", Index.build, tmp_path / "j", x[:1], texts=pa.chunked_array([latin]))
        refused("ids: .*UTF8", Index.build, tmp_path / "j", x[:1], ids=latin)
    refused("texts: 1 for 2 vectors", Index.build, tmp_path / "j", x[:2], texts=np.array(["a"]))
    refused("built without texts", index.add, x[:1], texts=["a"])
    refused("k: expected an int >= 1, got 0", index.search, x, 0)
    assert not (tmp_path / "j").exists()
    assert len(Index.open(tmp_path / "i")) == 120


def test_a_stale_handle_does_not_undo_another_writer(tmp_path):
    x = unit(120)
    first = Index.build(tmp_path / "i", x)
    second = Index.open(tmp_path / "i")
    first.add(x[:2])
    assert second.search(x[:1], 1)[1].tolist() == [[0]]  # what it has mapped stays whole
    with pytest.raises(InputError, match="changed on disk since it was opened"):
        second.remove([0])
    assert len(Index.open(tmp_path / "i")) == 122


def test_added_to_what_others_made_of_it(tmp_path):
    """Vectors that took hours to encode are not lost to a change meanwhile, unless they come with a source."""
    x = unit(200)
    first = Index.build(tmp_path / "i", x[:0], rotate=True)
    second = Index.open(tmp_path / "i")
    first.add(x[:120])
    first.remove([7])
    with pytest.warns(ClippedWarning):  # the ranges are those of the first
        assert second.add(x[120:150]) > 0
    assert second.ids_at(second.rows()).tolist() == [*range(7), *range(8, 150)]
    assert second.search(x[120:150], 1)[1][:, 0].tolist() == list(range(120, 150))
    second.verify()
    with pytest.raises(InputError, match="ids: 130 is already in the index"):
        first.add(x[:2], ids=[500, 130])
    with pytest.raises(InputError, match="changed on disk since it was opened"):
        first.add(x[:2], source={"rows": 2})
    Index.build(tmp_path / "i", x[:120])
    with pytest.raises(InputError, match="changed on disk since it was opened"):
        second.add(x[150:])
    assert len(Index.open(tmp_path / "i")) == 120
    assert len(list((tmp_path / "i").iterdir())) == 2


def test_a_failing_build_beside_another(tmp_path):
    x = unit(120)

    def blocks():
        yield x
        with pytest.raises(InputError, match="row 0 holds NaN"):
            Index.build(tmp_path / "a" / "i", x * np.nan)

    assert len(Index.build(tmp_path / "a" / "i", blocks())) == 120


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    x = unit(120)
    first = Index.build(tmp_path / "i", x)
    second, refusals = Index.open(tmp_path / "i"), []

    def meanwhile(step, where):
        for write in (lambda: second.add(x[:1]), lambda: second.remove([0]), lambda: Index.build(second.path, x[:7])):
            with pytest.raises(InputError, match="another process is writing it; try again later"):
                write()
            refusals.append(step)

    with monkeypatch.context() as patch:
        patch.setattr(files, "on_step", meanwhile)
        first.add(x[:2])
    assert len(refusals) >= 3 * 8
    assert len(Index.open(tmp_path / "i")) == 122
    Index.open(tmp_path / "i").verify()
    assert Index.open(tmp_path / "i").add(x[:1]) == 0  # the lock is gone


@pytest.mark.parametrize("room", [0, 100, 3_000, 9_000])
def test_disk_full_in_the_middle_of_a_segment(tmp_path, monkeypatch, room):
    x = unit(120)
    index = Index.build(tmp_path / "i", x)
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "i").iterdir()}
    written = []

    class SmallDisk(io.FileIO):
        def write(self, data):
            if sum(written) + len(data) > room:
                super().write(data[: room - sum(written)])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(super().write(data))

    with monkeypatch.context() as patch:
        patch.setattr("leafkern.index.segment.open", SmallDisk, raising=False)
        for path, work in (("i", lambda: index.add(x)), ("new", lambda: Index.build(tmp_path / "new", x))):
            written.clear()
            with pytest.raises(OSError, match="No space left"):
                work()
            assert sum(written) <= room
            assert (tmp_path / path).exists() == (path == "i")
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "i").iterdir()} == before
    index.add(x[:3])
    Index.open(tmp_path / "i").verify()
    assert len(index) == 123


def damaged(path, message, *, verify=False):
    with pytest.raises(DamagedFileError, match=message):
        (Index.open(path).verify if verify else lambda: Index.open(path))()


def test_damaged_files(tmp_path):
    def fresh(name, **options):
        Index.build(tmp_path / name, unit(120), **options)
        return tmp_path / name, segment_of(tmp_path / name)

    path, file = fresh("truncated")
    file.write_bytes(file.read_bytes()[:-10])
    damaged(path, rf"{file.name}: .* truncated or altered")
    path, file = fresh("missing")
    file.unlink()
    damaged(path, rf"{file.name}: the manifest names this file, but it is missing")
    path, file = fresh("garbage")
    file.write_bytes(b"\xff" * file.stat().st_size)
    damaged(path, rf"{file.name}: not a segment of an index")
    path, file = fresh("foreign")
    _, other = fresh("other")
    file.write_bytes(other.read_bytes())
    assert file.stat().st_size == other.stat().st_size
    damaged(path, rf"{file.name}: not a segment of this index \(index: ")
    path, file = fresh("bit")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    Index.open(path)  # opening does not read the data
    damaged(path, rf"{file.name}: damaged: SHA-256", verify=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "other"}, DamagedFileError, "not the manifest of an index"),
        ({"version": 2}, InputError, "format version 2; this leafkern reads version 1"),
        ({"width": "24"}, DamagedFileError, "entry 'width' is missing or of the wrong type"),
        ({"width": 23}, DamagedFileError, "codes is .* expected"),
        ({"precision": "int4"}, DamagedFileError, "codes is .* expected"),
        ({"precision": "x"}, DamagedFileError, "unknown precision 'x'"),
        ({"ids": "string"}, DamagedFileError, "expected .*id_bytes"),
        ({"count": 3}, DamagedFileError, "counts 3 rows"),
        ({"segments": [3]}, DamagedFileError, "entry 'file' is missing"),
        ({"segments": []}, DamagedFileError, "ids are 'int64', segments 0"),
        ({"count": True}, DamagedFileError, "entry 'count' is missing or of the wrong type"),
        ({"next_id": 1 << 63}, DamagedFileError, "next_id 9223372036854775808 is not valid"),
        ({"segments": None}, DamagedFileError, "entry 'segments' is missing"),
    ],
)
def test_damaged_manifests(tmp_path, change, error, message):
    Index.build(tmp_path / "i", unit(120))
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    (tmp_path / "i" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(error, match=message):
        Index.open(tmp_path / "i")


def test_verify_reads_the_manifest(tmp_path):
    index = Index.build(tmp_path / "i", unit(120), prompt="query: ", source={"file": "a"})
    index.remove([119])
    index.verify()
    file = tmp_path / "i" / "manifest.json"
    whole = json.loads(file.read_text())
    for change, message in (
        ({"next_id": 20}, "manifest.json: next_id 20, but there is an id 119"),
        ({"next_id": 119}, "manifest.json: next_id 119, but there is an id 119"),
        ({"prompt": "Query: "}, "manifest.json: damaged: SHA-256"),
        ({"source": {"file": "b"}}, "manifest.json: damaged: SHA-256"),
    ):
        file.write_text(json.dumps(whole | change))
        damaged(tmp_path / "i", message, verify=True)
    del whole["sha256"]  # as earlier versions wrote it
    file.write_text(json.dumps(whole))
    Index.open(tmp_path / "i").verify()
    for highest in (2**63 - 2, 2**63 - 1):
        index = Index.build(tmp_path / "j", unit(120), ids=[*range(119), highest])
        index.verify()


def test_what_no_reader_would_take_is_not_written(tmp_path):
    x = unit(120)
    Index.build(tmp_path / "i", x)
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "i").iterdir()}

    class Encoder:
        fingerprint = 7

    for options, message in (
        ({"prompt": 5}, "prompt: expected the text put before each document, or None; got 5"),
        ({"prompt": True}, "prompt: expected"),
        ({"prompt": ["query: "]}, "prompt: expected"),
        ({"prompt": b"query"}, "prompt: expected"),
        ({"prompt": "\ud800"}, "prompt: expected"),
        ({"encoder": Encoder()}, "encoder: expected an Encoder or its fingerprint"),
        ({"encoder": 5}, "encoder: expected an Encoder or its fingerprint"),
        ({"encoder": "\ud800"}, "encoder: expected an Encoder or its fingerprint"),
        ({"width": 23}, "width: 23, but the vectors have width 24"),
    ):
        with pytest.raises(InputError, match=message):
            Index.build(tmp_path / "i", x, **options)
        assert {entry.name: entry.read_bytes() for entry in (tmp_path / "i").iterdir()} == before


def test_manifest_paths_are_confined(tmp_path):
    Index.build(tmp_path / "i", unit(120))
    file, segment = tmp_path / "i" / "manifest.json", segment_of(tmp_path / "i")
    for name in ("../other.safetensors", "/etc/passwd", "../i/" + segment.name, "manifest.json", "segment-\0"):
        manifest = json.loads(file.read_text())
        manifest["segments"][0]["file"] = name
        file.write_text(json.dumps(manifest))
        with pytest.raises(DamagedFileError, match=r"names .* which is no segment file of an index"):
            Index.open(tmp_path / "i")
    manifest["segments"][0]["file"] = segment.name
    file.write_text(json.dumps(manifest))
    segment.rename(tmp_path / "elsewhere")
    segment.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFileError, match="lies outside the folder"):
        Index.open(tmp_path / "i")
    for content in ("", "[]", '{"format":', "\xff", "9" * 5000, "[" * 100_000):
        file.write_bytes(content.encode("latin1"))
        with pytest.raises(DamagedFileError, match=r"manifest\.json"):
            Index.open(tmp_path / "i")
    Index.build(tmp_path / "i", unit(3))  # building anew is the way out
    assert len(Index.open(tmp_path / "i")) == 3
    assert len(list((tmp_path / "i").iterdir())) == 2


SEGMENTS = 8
OPENING = """
import sys, time
import numpy as np, psutil
from leafkern import Index
Index.open(sys.argv[2])  # code is loaded, torch is warm
me, times = psutil.Process(), []
before = me.memory_info().rss
for _ in range(5):
    start = time.perf_counter()
    index = Index.open(sys.argv[1])
    times.append(time.perf_counter() - start)
    assert index.ids_at(np.array([index.row_count - 1])) == [0]
print(len(index), min(times), me.memory_info().rss - before)
"""


def test_opening_does_not_read_the_data(tmp_path):
    """Segments of 10 GB together, sparse on disk, with deleted rows: reading them would take seconds, and memory."""
    path, rows = tmp_path / "i", 1_250_000
    x = unit(120, 1000)
    small = Index.build(tmp_path / "small", x, precision="int8", rescore=None)
    index = Index.build(path, x, precision="int8", rescore=None)
    for _ in range(SEGMENTS - 1):
        index.add(x)
    index.remove([5])
    manifest = json.loads((path / "manifest.json").read_text())
    for part, entry in zip(index._state.segments, manifest["segments"]):
        arrays = {}
        for name, tensor in part.tensors.items():
            shape = (rows, *tensor.shape[1:]) if name in ("codes", "ids") else tuple(tensor.shape)
            arrays[name] = tensor[:0].numpy().dtype, shape
        metadata = {"format": "leafkern-index-segment", "index": manifest["index"], "segment": entry["file"]}
        _sparse(part.path, arrays, metadata, entry)
        entry["rows"] = rows
        if entry["deleted"]:
            metadata["segment"] = entry["deleted"]["file"]
            bits = {"deleted": (np.dtype(np.uint8), ((rows + 7) // 8,))}
            _sparse(path / entry["deleted"]["file"], bits, metadata, entry["deleted"])
    manifest["count"] = rows * SEGMENTS - 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    environment = os.environ | {"PYTHONPATH": str(Path(leafkern.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", OPENING, path, small.path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, seconds, memory = map(float, done.stdout.split())
    assert count == rows * SEGMENTS - 1
    assert sum(entry["bytes"] for entry in manifest["segments"]) > 10e9
    assert seconds < 0.05
    assert memory < 20e6


def _sparse(file, arrays, metadata, entry):
    """A file as a segment has it, of zeros, which take no room on disk; `entry` gets its size."""
    header = safetensors_header(dict(sorted(arrays.items(), key=lambda item: -item[1][0].itemsize)), metadata)
    entry["bytes"] = len(header) + sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in arrays.values())
    with open(file, "wb") as stream:
        stream.write(header)
        stream.truncate(entry["bytes"])
