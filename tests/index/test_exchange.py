"""Vectors to and from other tools' files: whole, in order, in bounded memory; FAISS's files held to faiss itself."""

import io
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from leafkern import Index, files
from leafkern.errors import InputError
from leafkern.index import exchange, faiss_flat
from leafkern.ops import dequantize, quantize


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


def unit(n, d=24):
    x = np.random.default_rng().normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def bits(n, d=24):
    return np.random.default_rng().integers(0, 256, (n, d // 8), dtype=np.uint8)


def built(path, source, **options):
    return Index.build(path, **source._asdict(), **options)


# -- FAISS's format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("ids", [None, "IndexIDMap", "IndexIDMap2"])
@pytest.mark.parametrize("name", ["IndexFlatIP", "IndexFlatL2", "IndexBinaryFlat"])
def test_faiss_writes_we_read(tmp_path, name, ids, rows, faiss):
    binary = name == "IndexBinaryFlat"
    x, numbers = bits(rows) if binary else unit(rows), np.random.default_rng().permutation(rows) - 5
    index = getattr(faiss, name)(24)
    if ids is None:
        index.add(x)
    else:
        index = getattr(faiss, ids.replace("Index", "IndexBinary") if binary else ids)(index)
        index.add_with_ids(x, numbers)
    path = str(tmp_path / "x.faiss")
    (faiss.write_index_binary if binary else faiss.write_index)(index, path)
    found = faiss_flat.read(path)
    np.testing.assert_array_equal(found.vectors, x)
    assert (found.binary, found.l2) == (binary, name != "IndexFlatIP")
    if ids is None:
        assert found.ids is None
    else:
        np.testing.assert_array_equal(found.ids, numbers)


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_we_write_faiss_reads(tmp_path, binary, mapped, rows, faiss):
    x, queries = (bits(rows), bits(3)) if binary else (unit(rows), unit(3))
    ids = np.random.default_rng().permutation(rows) * 2**40 if mapped else None
    with open(tmp_path / "x.faiss", "wb") as stream:
        faiss_flat.write(stream, rows, 24, iter((x[:9], x[9:9], x[9:])), ids, binary=binary)
    index = (faiss.read_index_binary if binary else faiss.read_index)(str(tmp_path / "x.faiss"))
    flat = getattr(faiss, "IndexBinaryFlat" if binary else "IndexFlatIP")(24)
    flat.add(x)
    assert (index.ntotal, index.d, index.metric_type) == (rows, 24, flat.metric_type)
    scores, found = index.search(queries, 5)
    right_scores, right = flat.search(queries, 5)
    np.testing.assert_array_equal(scores, right_scores)
    np.testing.assert_array_equal(found, right if ids is None else np.where(right < 0, -1, ids[right] if rows else -1))
    again = faiss_flat.read(tmp_path / "x.faiss")
    np.testing.assert_array_equal(again.vectors, x)


def flat_file(binary=False, ids=None, rows=5):
    stream = io.BytesIO()
    x = bits(rows) if binary else unit(rows)
    faiss_flat.write(stream, rows, 24, [x], ids, binary=binary)
    return stream.getvalue()


def test_other_faiss_files_are_refused(tmp_path, faiss):
    path = tmp_path / "x.faiss"

    def refused(content, message):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            exchange.read(path, binary=True)
        assert str(path) in str(error.value)

    for content in (flat_file(), flat_file(binary=True), flat_file(ids=np.arange(5) * 3)):
        for cut in [*range(min(100, len(content))), *range(100, len(content), 31), len(content) - 1]:
            refused(content[:cut], "truncated or damaged")
        refused(content + b"\0", "1 bytes follow its end")
    pq_index = faiss.IndexPQ(24, 4, 4)
    pq_index.train(unit(200))
    refused(faiss.serialize_index(pq_index).tobytes(), r"starts with b'IxPq'; expected IndexFlatIP, IndexFlatL2 or")
    refused(faiss.serialize_index(faiss.IndexFlat(4, faiss.METRIC_L1)).tobytes(), "starts with b'IxFl'")
    refused(b"nothing of the kind", "starts with b'noth'")
    content = flat_file()
    refused(content[:33] + struct.pack("<i", 7) + content[37:], "with metric 7")
    refused(content[:4] + struct.pack("<i", -3) + content[8:], "the head is damaged")
    refused(content[:4] + struct.pack("<i", 25) + content[8:], "says 120 numbers; expected 125")
    refused(content[:8] + struct.pack("<q", 2**62) + content[16:], "says 120 numbers")
    content = flat_file(ids=np.arange(5) * 3)
    refused(content[:8] + struct.pack("<q", 6) + content[16:], "ids for 6 vectors")
    refused(content[:37] + flat_file(binary=True), "ids around b'IBxF'")
    x = unit(5)
    x[3, 2] = np.nan
    stream = io.BytesIO()
    faiss_flat.write(stream, 5, 24, [x], None, binary=False)
    refused(stream.getvalue(), r"x\.faiss: row 3 holds NaN")
    with pytest.raises(InputError, match="no such file"):
        exchange.read(tmp_path / "none.faiss")


# -- index to file and back --------------------------------------------------------------------------------------


def removed(path, precision="float32", ids="string", texts=True, rows=50, **options):
    """An index of several segments, some rows of which are removed; the vectors, ids and texts that are left."""
    x, names = unit(rows), np.random.default_rng().permutation(1000)[:rows] - 500
    names = names if ids == "int64" else np.array([f"ü{name}" for name in names], object)
    words = np.array([f"text {name}" * (1 + row % 3) for row, name in enumerate(names)], object)
    index = Index.build(
        path, x[:20], ids=names[:20], texts=words[:20] if texts else None, precision=precision, **options
    )
    index.add(x[20:], ids=names[20:], texts=words[20:] if texts else None)
    kept = np.ones(rows, bool)
    kept[[0, 7, 21, rows - 1]] = False
    index.remove(list(names[~kept]))
    return index, x[kept], names[kept], words[kept]


@pytest.mark.parametrize("ids", ["string", "int64"])
@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet", ".faiss"])
def test_round_trip(tmp_path, kind, ids, monkeypatch):
    monkeypatch.setattr(exchange, "BLOCK_ROWS", 16)
    monkeypatch.setattr("leafkern.textio.BLOCK_ROWS", 16)
    index, x, names, words = removed(tmp_path / "i", ids=ids)
    path = tmp_path / f"out{kind}"
    seen = []
    assert exchange.export(index, path, progress=lambda *step: seen.append(step)) == 46
    assert seen == [("exporting", done, 46) for done in (16, 32, 46)]
    field = "id" if kind == ".parquet" else None
    again = built(tmp_path / "again", exchange.read(path, ids_field=field), precision="float32")
    again.verify()
    np.testing.assert_array_equal(again.vectors_at(again.rows()), x)
    np.testing.assert_array_equal(again.ids_at(again.rows()), names)
    assert again.has_texts == (kind == ".parquet")
    if again.has_texts:
        assert list(again.texts_at(again.rows())) == list(words)
    beside = sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("out"))
    if kind == ".parquet" or (kind == ".faiss" and ids == "int64"):
        assert beside == [path.name]
    else:
        assert beside == sorted([path.name, f"{path.name}.ids.{'json' if ids == 'string' else 'npy'}"])
    # Over an earlier file: no ids of others stay beside it.
    other, _, names, _ = removed(tmp_path / "other", ids="int64" if ids == "string" else "string")
    exchange.export(other, path)
    source = exchange.read(path, ids_field=field)
    assert source.ids.to_pylist() == list(names)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("precision", "rescore"), [("int8", None), ("int8", "float16"), ("binary", "int8")])
def test_what_the_finest_codes_hold(tmp_path, precision, rescore, rotate):
    x = unit(300)
    index = Index.build(tmp_path / "i", x, precision=precision, rescore=rescore, rotate=rotate)
    for kind in (".npy", ".faiss"):
        exchange.export(index, tmp_path / f"v{kind}")
        found = exchange.read(tmp_path / f"v{kind}").vectors
        np.testing.assert_array_equal(found, index.vectors_at(index.rows()))
        assert np.abs(found - x).max() < (1e-3 if rescore == "float16" else 0.02)
    if not rotate:
        finest = dequantize(quantize(torch.from_numpy(x), rescore or precision)).numpy()
        np.testing.assert_array_equal(found, finest)
    exchange.export(index, tmp_path / "half.npy", precision="float16")
    half = np.load(tmp_path / "half.npy")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, np.asarray(found).astype(np.float16))


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits(tmp_path, precision, faiss):
    x = unit(70)
    index = Index.build(tmp_path / "i", x, precision=precision, rescore=None)
    codes = quantize(torch.from_numpy(x), "ubinary").codes.numpy()
    exchange.export(index, tmp_path / "b.npy", precision="ubinary")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), codes)
    exchange.export(index, tmp_path / "b.safetensors", precision="ubinary")
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        assert file.metadata() == {"precision": "ubinary", "dim": "24"}
    exchange.export(index, tmp_path / "b.faiss", precision="ubinary")
    flat = faiss.read_index_binary(str(tmp_path / "b.faiss"))
    queries = unit(5)
    distances, _ = flat.search(quantize(torch.from_numpy(queries), "ubinary").codes.numpy(), 70)
    again = built(
        tmp_path / "again", exchange.read(tmp_path / "b.faiss", binary=True), precision=precision, rescore=None
    )
    scores, _ = again.search(queries, 70)
    np.testing.assert_array_equal(24 - 2 * distances, scores)
    np.testing.assert_array_equal(again.search_rows(queries, 9)[1], index.search_rows(queries, 9)[1])
    with pytest.raises(InputError, match=r"holds bits only; choose precision ubinary \(or binary\) and rescore none"):
        exchange.read(tmp_path / "b.faiss")


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet", ".faiss"])
def test_no_rows(tmp_path, kind):
    index = Index.build(tmp_path / "i", np.zeros((0, 24), np.float32))
    path = tmp_path / f"v{kind}"
    assert exchange.export(index, path) == 0
    again = built(tmp_path / "again", exchange.read(path, ids_field="id" if kind == ".parquet" else None))
    assert (len(again), again.width) == (0, 24)


def test_l2_of_unequal_lengths_is_said(tmp_path, faiss):
    path = str(tmp_path / "x.faiss")
    flat = faiss.IndexFlatL2(24)
    flat.add(unit(30))
    faiss.write_index(flat, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange.read(path)
    flat.add(2 * unit(1))
    faiss.write_index(flat, path)
    with pytest.warns(UserWarning, match="vectors from 1 to 2 long; the index ranks by dot product"):
        exchange.read(path)


def test_parquet_of_others(tmp_path):
    path = tmp_path / "x.parquet"
    x = unit(100)

    def table(**columns):
        pq.write_table(pa.table({"vector": x.tolist(), **columns}), path, row_group_size=30)

    table(key=pa.array(np.arange(100, dtype=np.uint16)), text=pa.array(["ä", ""] * 50).dictionary_encode())
    source = exchange.read(path, ids_field="key")
    assert source.width is None
    index = built(tmp_path / "i", source)
    assert list(index.ids_at(index.rows())) == list(range(100))
    assert list(index.texts_at(np.arange(2))) == ["ä", ""]
    table(key=pa.array([f"n{i}" for i in range(100)]).dictionary_encode())
    assert exchange.read(path, ids_field="key").ids[3].as_py() == "n3"
    for columns, options, message in (
        ({"key": [1.5] * 100}, {"ids_field": "key"}, "column 'key' must hold integers or strings, got double"),
        ({"key": [None, *range(99)]}, {"ids_field": "key"}, "row 0: column 'key' holds a null"),
        ({"key": np.full(100, 2**64 - 1, np.uint64)}, {"ids_field": "key"}, "column 'key', from row 0"),
        ({"text": ["a"] * 99 + [None]}, {}, "row 99: column 'text' holds a null"),
        ({"text": [b"\xff"] * 100}, {}, "column 'text', from row 0"),
        ({"text": [[1]] * 100}, {}, "column 'text', from row 0"),
        ({}, {"ids_field": "key"}, "column: unknown name 'key'"),
        ({"key": [*range(61), *range(39)]}, {"ids_field": "key"}, "row 61: field 'key' is 0, as in a row before"),
    ):
        table(**columns)
        with pytest.raises(InputError, match=message) as error:
            exchange.read(path, **options)
        assert str(path) in str(error.value)
    x[61, 3] = np.inf
    table()
    with pytest.raises(InputError, match=r"x\.parquet: row 61 holds NaN"):
        built(tmp_path / "i", exchange.read(path))
    pq.write_table(pa.table({"vector": [[1, 2], [3, 4]]}), path)
    with pytest.raises(InputError, match="must hold lists of floats, got int64"):
        built(tmp_path / "i", exchange.read(path))
    assert len(index) == 100


def test_parquet_of_no_vectors(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"vector": pa.array([], pa.list_(pa.float32()))}), path)
    with pytest.raises(InputError, match=r"nothing says their width; .* a \.parquet of lists of a fixed size"):
        built(tmp_path / "i", exchange.read(path))
    assert built(tmp_path / "i", exchange.read(path)._replace(width=24)).width == 24
    assert Index.open(tmp_path / "i").add(exchange.read(path).vectors) == 0


def test_blocks_of_wide_vectors_have_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "BLOCK_VALUES", 24 * 7)
    index, seen = Index.build(tmp_path / "i", unit(20), precision="float32"), []
    exchange.export(index, tmp_path / "v.npy", progress=lambda _, done, total: seen.append(done))
    assert seen == [7, 14, 20]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), index.vectors_at(index.rows()))


def test_too_large_for_float16(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "BLOCK_ROWS", 16)
    x = unit(50)
    x[41, 3] = 1e5
    index = Index.build(tmp_path / "i", x, ids=[f"n{row}" for row in range(50)], precision="float32")
    index.remove(["n3", "n17"])
    for kind in (".npy", ".parquet"):
        with pytest.raises(InputError, match=r"precision: row 41 \(id 'n41'\) does not fit float16"):
            exchange.export(index, tmp_path / f"v{kind}", precision="float16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["i"]


def test_ids_beside(tmp_path):
    np.save(tmp_path / "v.npy", unit(3))
    array, strings = tmp_path / "v.npy.ids.npy", tmp_path / "v.npy.ids.json"

    def refused(file, content, message):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            exchange.read(tmp_path / "v.npy")
        assert str(file) in str(error.value)
        file.unlink()

    refused(strings, b'["a", "b"]', "2 ids for the 3 vectors of .*; expected one each")
    for content in (b'{"a": 1}', b"[1, 2, 3]", b'"abc"', b'["\\ud800", "a", "b"]'):
        refused(strings, content, "expected a list of ids")
    for content in (b"\xff", b"[", b"[" * 100_000):
        refused(strings, content, "not readable as JSON")
    refused(array, b"nothing", r"not a readable \.npy file")
    for ids in (np.zeros(3), np.zeros((3, 1), int), np.zeros(3, "U1")):
        stream = io.BytesIO()
        np.save(stream, ids)
        refused(array, stream.getvalue(), "expected a list of ids")
    np.save(array, np.arange(3))
    strings.write_text("[]")
    with pytest.raises(InputError, match=r"both v\.npy\.ids\.npy and v\.npy\.ids\.json stand beside it"):
        exchange.read(tmp_path / "v.npy")
    strings.unlink()
    np.save(array, np.array([3, 4, 3], np.int16))
    with pytest.raises(InputError, match="ids: 3 is given more than once"):
        built(tmp_path / "i", exchange.read(tmp_path / "v.npy"))


def test_export_refuses(tmp_path):
    index = Index.build(tmp_path / "i", unit(30, 20))

    def refused(name, message, **options):
        with pytest.raises(InputError, match=message):
            exchange.export(index, tmp_path / name, **options)

    refused("v.bin", r"unknown vector format '\.bin'; expected one of \.npy, \.safetensors, \.parquet, \.faiss")
    refused("no/v.npy", "does not exist")
    refused("v.npy", "unknown name 'int8'; did you mean", precision="int8")
    refused("v.parquet", r"\.parquet holds no ubinary vectors; write v\.npy", precision="ubinary")
    refused("v.faiss", r"\.faiss holds no float16 vectors", precision="float16")
    refused("v.faiss", "multiples of 8 bits, the index has 20", precision="ubinary")
    assert [entry.name for entry in tmp_path.iterdir()] == ["i"]


def test_files_of_one_stem_keep_their_own_ids(tmp_path):
    index, _, names, _ = removed(tmp_path / "i", ids="int64")
    for kind in (".npy", ".safetensors", ".faiss"):
        exchange.export(index, tmp_path / f"v{kind}")
    other = Index.build(tmp_path / "j", unit(46), ids=[f"n{row}" for row in range(46)])
    exchange.export(other, tmp_path / "v.safetensors")
    for kind in (".npy", ".faiss"):
        assert exchange.read(tmp_path / f"v{kind}").ids.to_pylist() == list(names)
    assert exchange.read(tmp_path / "v.safetensors").ids[45].as_py() == "n45"


def test_export_shows_one_state(tmp_path, monkeypatch):
    """A handle that somebody compacts or refreshes under way: the rows' vectors stay beside their own ids."""
    monkeypatch.setattr(exchange, "BLOCK_ROWS", 16)
    index, x, names, words = removed(tmp_path / "i", ids="int64")
    shown = index.pinned()
    exchange.export(index, tmp_path / "v.parquet", progress=lambda what, done, total: index.compact())
    assert (index.row_count, shown.row_count) == (46, 50)
    found = pq.read_table(tmp_path / "v.parquet")
    assert found["id"].to_pylist() == list(names)
    assert found["text"].to_pylist() == list(words)
    np.testing.assert_array_equal(np.array(found["vector"].to_pylist(), np.float32), x)
    rows = shown.search_rows(x, 1)[1][:, 0]
    assert list(shown.texts_at(rows)) == list(words)


@pytest.mark.parametrize("ids", ["string", "int64", "plain"])
@pytest.mark.parametrize("kind", [".npy", ".parquet", ".faiss"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_crash_leaves_the_files_of_before(tmp_path, kind, ids, killed, monkeypatch):
    """At every step: the file of before or the new one, each with its own ids; of a killed export perhaps a refusal."""
    path = tmp_path / f"v{kind}"
    first = removed(tmp_path / "i")[0]
    second = Index.build(tmp_path / "j", unit(60)) if ids == "plain" else removed(tmp_path / "j", ids=ids, rows=60)[0]

    def standing():
        source = exchange.read(path, ids_field="id" if kind == ".parquet" else None)
        given = None if source.ids is None else source.ids.to_pylist()
        return np.concatenate(list(source.vectors)).tobytes(), given

    def kept():
        return {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}

    exchange.export(second, path)
    after = standing()
    exchange.export(first, path)
    before, bytes_before = standing(), kept()
    assert len(bytes_before) == (1 if kind == ".parquet" else 2)
    seen = []
    for place in range(100):
        taken = []

        def crash(name, where, taken=taken, place=place):
            taken.append((name, where.name))
            if len(taken) > place:
                raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(files, "on_step", crash)
            if killed:  # nothing is put right afterwards
                patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
            try:
                exchange.export(second, path)
            except ZeroDivisionError:
                pass
            else:
                break
        renamed = ("rename", path.name) in taken[:-1]
        if not killed:
            assert renamed or kept() == bytes_before
        found, message = None, ""
        try:
            found = standing()
        except InputError as error:
            message = str(error)
        assert found or (renamed and "an export to it was cut off and its ids are missing" in message)
        seen.append(found)
        assert found in (before, after, None)
        assert renamed or found == before
        exchange.export(first, path)
        assert not killed or kept().keys() >= bytes_before.keys()
        assert standing() == before
    exchange.export(second, path)
    assert standing() == after
    assert before in seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_holds_blocks_only(tmp_path, monkeypatch):
    """Reading, building and exporting 38 MB of vectors and 45 MB of texts take a fraction of that."""
    rows, width = 150_000, 64
    monkeypatch.setattr("leafkern.index.vectors.BLOCK_VALUES", 1 << 18)
    monkeypatch.setattr(exchange, "BLOCK_ROWS", 2048)
    schema = pa.schema({"vector": pa.list_(pa.float32(), width), "text": pa.string()})
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        for start in range(0, rows, 5000):
            values = pa.FixedSizeListArray.from_arrays(pa.array(unit(5000, width).reshape(-1)), width)
            texts = [f"{row:>300}" for row in range(start, start + 5000)]
            writer.write_table(pa.table([values, pa.array(texts)], schema=schema))
    built(tmp_path / "warm", exchange.read(tmp_path / "x.parquet"))

    def anonymous():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def growth(step):
        done, seen, before = threading.Event(), [], anonymous()

        def watch():
            while not done.wait(0.003):
                seen.append(anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            step()
        finally:
            done.set()
            watcher.join()
        return max(seen) - before

    for step in (
        lambda: built(tmp_path / "i", exchange.read(tmp_path / "x.parquet", folder=tmp_path)),
        lambda: exchange.export(Index.open(tmp_path / "i"), tmp_path / "y.parquet"),
        lambda: exchange.export(Index.open(tmp_path / "i"), tmp_path / "y.faiss"),
        lambda: built(tmp_path / "j", exchange.read(tmp_path / "y.faiss")),
        lambda: exchange.export(Index.open(tmp_path / "i"), tmp_path / "y.safetensors"),
        lambda: built(tmp_path / "j", exchange.read(tmp_path / "y.safetensors")),
    ):
        assert growth(step) < 40  # MiB
