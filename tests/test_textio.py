"""Texts and vectors from and to files: round trips, and every kind of bad file refused by name and line."""

import errno
import gzip
import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from leafkern import files, parquet, textio
from leafkern.errors import InputError


def write(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_lines(tmp_path, name):
    path = write(tmp_path / name, "\ufefffirst\r\n\nthird \u2028 line\nlast".encode())
    assert textio.read_texts(path) == (None, ["first", "", "third \u2028 line", "last"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write(tmp_path / name, b'{"_id": "x", "body": "one"}\n\n{"_id": 7, "body": "two", "more": 1}\n')
    assert textio.read_texts(path, "body") == (None, ["one", "two"])
    assert textio.read_texts(path, "body", "_id") == (["x", 7], ["one", "two"])


def test_parquet_texts(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two", ""], "id": [3, 1, 2]}), path)
    assert textio.read_texts(path, id_field="id") == ([3, 1, 2], ["one", "two", ""])


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert textio.read_texts("-").texts == ["one", "two"]


def test_blocks_cover_the_file_in_order(tmp_path):
    path = write(tmp_path / "a.txt", b"".join(b"%d\n" % i for i in range(10)))
    blocks = [block.texts for block in textio.iter_texts(path, rows=4)]
    assert [len(block) for block in blocks] == [4, 4, 2]
    assert [text for block in blocks for text in block] == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff byte\n", r"a\.txt:2: not UTF-8 \(byte 0xff at column 5\)"),
        ("a.txt.gz", b"fine\nbad \xff byte\n", r"a\.txt\.gz:2: not UTF-8"),
        ("a.txt", b"", r"a\.txt:1: empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl:1: empty"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl:2: no field 'text'; this line has 'body'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', r"a\.jsonl:2: field 'text' must be str, got int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 20_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b"7" * 5000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', r"a\.jsonl:2: field 'text' holds a lone surrogate"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected a JSON object"),
        ("a.csv", b"x", r"unknown text format '\.csv'; expected one of \.txt"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_bad_texts(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        textio.read_texts(write(tmp_path / name, content))


def test_bad_text_places(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        textio.read_texts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        textio.read_texts(tmp_path)
    write(tmp_path / "x.txt", b"x")
    whole = gzip.compress(b"".join(b"line %d\n" % i for i in range(10_000)))
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not readable as gzip"):
        textio.read_texts(tmp_path / "cut.txt.gz")
    with pytest.raises(InputError, match="no field 'id' for ids"):
        textio.read_texts(tmp_path / "x.txt", id_field="id")


def test_bad_parquet_texts(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["one", None]}), path)
    with pytest.raises(InputError, match="unknown name 'text'; did you mean 'texts'"):
        textio.read_texts(path)
    with pytest.raises(InputError, match="row 1: column 'texts' must be str, got NoneType"):
        textio.read_texts(path, "texts")


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_round_trip(tmp_path, kind, dtype):
    vectors = np.random.default_rng().normal(size=(7, 5)).astype(dtype)
    texts = [f"text {i}" for i in range(7)]
    textio.write_vectors(tmp_path / f"a{kind}", vectors, texts)
    again = textio.read_vectors(tmp_path / f"a{kind}")
    np.testing.assert_array_equal(again.vectors, vectors)
    assert again.vectors.dtype == dtype
    assert again.texts == (texts if kind == ".parquet" else None)
    assert textio.is_vector_file(tmp_path / f"a{kind}")


@pytest.mark.parametrize("kind", [".npy", ".safetensors", ".parquet"])
def test_vectors_written_in_blocks(tmp_path, kind):
    vectors = np.random.default_rng().normal(size=(9, 3)).astype(np.float32)
    with textio.vector_writer(tmp_path / f"a{kind}") as writer:
        for start in (0, 4, 8):
            writer.add(vectors[start : start + 4], ["t"] * len(vectors[start : start + 4]))
    np.testing.assert_array_equal(textio.read_vectors(tmp_path / f"a{kind}").vectors, vectors)


def test_codes_with_their_ranges(tmp_path):
    codes = np.random.default_rng().integers(-128, 128, (5, 3), dtype=np.int8)
    extra = {"scale": np.arange(3, dtype=np.float32)}
    textio.write_vectors(tmp_path / "a.safetensors", codes, extra=extra, metadata={"precision": "int8"})
    again = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again["vectors"], codes)
    np.testing.assert_array_equal(again["scale"], extra["scale"])


def test_other_peoples_vectors(tmp_path):
    vectors = np.random.default_rng().normal(size=(4, 6)).astype(np.float32)
    save_file({"embeddings": vectors, "other": vectors[:2]}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(textio.read_vectors(tmp_path / "a.safetensors").vectors, vectors)
    pq.write_table(pa.table({"vector": vectors.tolist()}), tmp_path / "a.parquet")
    assert textio.read_vectors(tmp_path / "a.parquet").texts is None
    np.testing.assert_allclose(textio.read_vectors(tmp_path / "a.parquet").vectors, vectors)


def test_bad_vectors(tmp_path):
    def refused(name, message):
        with pytest.raises(InputError, match=message):
            textio.read_vectors(tmp_path / name)

    vectors = np.ones((20_000, 2), np.float32)
    vectors[17_001, 1] = np.nan
    np.save(tmp_path / "nan.npy", vectors)
    refused("nan.npy", r"nan\.npy: row 17001 holds NaN")
    np.save(tmp_path / "flat.npy", np.ones(4))
    refused("flat.npy", "expected a float matrix")
    np.save(tmp_path / "int.npy", np.ones((4, 2), np.int64))
    refused("int.npy", "expected a float matrix")
    np.save(tmp_path / "none.npy", np.ones((0, 2)))
    refused("none.npy", "holds no rows")
    np.save(tmp_path / "object.npy", np.array([{"a": 1}]), allow_pickle=True)
    refused("object.npy", "not a readable")
    for name in ("short.npy", "short.safetensors", "short.parquet"):
        (tmp_path / name).write_bytes(b"nothing")
        refused(name, "not a readable")
    save_file({"a": vectors, "b": vectors}, tmp_path / "two.safetensors")
    refused("two.safetensors", "expected one matrix")
    pq.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    refused("ragged.parquet", "row 1: a vector of length 1; expected 2")
    pq.write_table(pa.table({"vector": [[1.0, 2.0], [1.0, None]]}), tmp_path / "null.parquet")
    refused("null.parquet", "row 1 holds a null")
    for values, message in (
        ([[1.0, 2.0], None], "row 1: column 'vector' holds a null"),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), "row 1: column 'vector' holds a null"),
        ([None, [1.0]], "row 0: column 'vector' holds a null"),
        ([[], [1.0]], "row 0: an empty vector"),
    ):
        pq.write_table(pa.table({"vector": values}), tmp_path / "hole.parquet")
        refused("hole.parquet", message)
    twice = pa.table([[[1.0]], [[2.0]], ["a"], ["b"]], names=["vector", "vector", "text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    refused("twice.parquet", "2 columns are named 'vector'; expected one")
    with pytest.raises(InputError, match="2 columns are named 'text'; expected one"):
        textio.read_texts(tmp_path / "twice.parquet")
    for values in ([1.0, 2.0], ["a", "b"], [{"x": 1.0}] * 2):
        pq.write_table(pa.table({"vector": values}), tmp_path / "scalar.parquet")
        refused("scalar.parquet", r"scalar\.parquet: column 'vector' must hold lists of floats, got")
    refused("a.bin", "unknown vector format")


def test_damaged_parquet_pages(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"a text of its own, number {row}" for row in range(5000)]
    vectors = np.random.default_rng().normal(size=(5000, 4)).tolist()
    pq.write_table(pa.table({"text": texts, "vector": vectors}), path)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:footer] = b"\xff" * (footer - 4)
    path.write_bytes(content)
    for read in (textio.read_texts, textio.read_vectors, lambda path: list(parquet.column(path, "text", pa.string()))):
        with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file \(.+\)"):
            read(path)


def test_errors_of_the_system_pass(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "vector": [[1.0]]}), path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "no space left on device")

    for method, read in (("iter_batches", textio.read_texts), ("read", textio.read_vectors)):
        monkeypatch.setattr(pq.ParquetFile, method, full)
        with pytest.raises(OSError, match="no space left"):
            read(path)


def test_a_crash_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    textio.write_vectors(path, np.zeros((2, 2), np.float32))
    before = path.read_bytes()
    for step in ("write", "fsync", "rename"):
        monkeypatch.setattr(files, "on_step", lambda name, _, step=step: 1 / 0 if name == step else None)
        with pytest.raises(ZeroDivisionError):
            textio.write_vectors(path, np.ones((2, 2), np.float32))
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]


def test_leftovers_of_a_killed_writer_go(tmp_path):
    left, other = tmp_path / f"{files.TEMPORARY}a.npy-01234567", tmp_path / f"{files.TEMPORARY}b.npy-01234567"
    left.write_bytes(b"half")
    other.write_bytes(b"half")
    textio.write_vectors(tmp_path / "a.npy", np.zeros((2, 2), np.float32))
    assert not left.exists()
    assert other.exists()


def test_writer_refuses(tmp_path):
    with pytest.raises(InputError, match="unknown vector format"):
        textio.write_vectors(tmp_path / "a.bin", np.zeros((1, 1), np.float32))
    with pytest.raises(InputError, match="does not exist"):
        textio.write_vectors(tmp_path / "no" / "a.npy", np.zeros((1, 1), np.float32))
    with pytest.raises(InputError, match="one text per vector"):
        textio.write_vectors(tmp_path / "a.parquet", np.zeros((1, 1), np.float32))
    with pytest.raises(InputError, match="none to write"), textio.vector_writer(tmp_path / "a.npy"):
        pass
    assert not list(tmp_path.iterdir())


def test_safetensors_are_mapped(tmp_path):
    import torch
    from safetensors.torch import save_file as save_tensors

    path = tmp_path / "a.safetensors"
    x = np.random.default_rng().normal(size=(50, 7))
    for dtype in (np.float16, np.float32, np.float64):
        for rows in (50, 0):
            save_file({"before": np.arange(3, dtype=np.uint8), "vectors": x[:rows].astype(dtype)}, path)
            found = textio.read_vectors(path, empty=True).vectors
            np.testing.assert_array_equal(found, x[:rows].astype(dtype))
            assert isinstance(found, np.memmap) or rows == 0
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        save_tensors({"vectors": torch.from_numpy(x).to(dtype)}, path)
        with pytest.raises(InputError, match=f"a.safetensors: vectors is a matrix of {name}; expected F16, F32, F64"):
            textio.read_vectors(path)
