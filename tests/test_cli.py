"""The command line: what each command prints and writes, and how each kind of wrong use ends."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from leafkern import Encoder, Index, bulk, cli, files, textio
from leafkern.ops import quantize

TEXTS = ["the leaf", "a kernel of search", "how to list a file", "python", "vector search is the kernel", ""]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["leafkern", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr()
        return end.value.code, out.out, out.err

    return call


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def fails(result, status, *parts):
    """`status`, nothing on stdout, one line of error that holds `parts`, no traceback."""
    code, out, err = result
    assert (code, out) == (status, ""), err
    lines = [line for line in err.splitlines() if line.startswith("leafkern: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]


COMMANDS = [
    "train",
    "encode",
    "index build",
    "index add",
    "index remove",
    "index compact",
    "index export",
    "index info",
    "index verify",
    "search",
    "eval",
    "bench",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Example: leafkern {command}" in " ".join(out.split())


def test_help_is_instant():
    code = (
        "import sys, leafkern.cli; print([m for m in ('torch', 'triton', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version_and_no_arguments(run):
    from leafkern import __version__

    assert run("--version") == (0, f"{__version__}\n", "")
    code, out, _ = run()
    assert code == 0
    assert "Usage: leafkern" in out


def test_doctor(run):
    from leafkern import ops
    from leafkern.ops._core.backend import OPERATIONS

    code, out, _ = run("doctor")
    assert code == 0
    for word in ("torch", "native kernels", *OPERATIONS, *(name for name in ops.__all__ if name.islower())):
        assert word in out
    cpu, cuda = out.split("Operations on CUDA tensors")
    assert re.search(r"pooling +reference +PyTorch; it has no other backend for cpu yet", cpu)
    assert re.search(r"pooling +triton ", cuda) or "triton is not installed" in cuda


def test_doctor_says_what_is_missing(monkeypatch):
    from leafkern import doctor
    from leafkern.ops._core import native

    monkeypatch.setattr(native, "library", lambda: (None, "leafkern._C is not built"))
    rows = {operation: rest for operation, *rest in doctor.operations("cpu")}
    assert rows["relative"] == ["reference", "PyTorch", "native: leafkern._C is not built"]
    assert rows["attention"][2] == ""
    monkeypatch.setattr(doctor, "OPTIONAL", (("no-such-package", "train", "leafkern train"), ("torch", "x", "y")))
    assert doctor.absent() == [("leafkern[train]", "leafkern train (no-such-package)")]


def test_doctor_says_what_is_forced(run, monkeypatch):
    monkeypatch.setenv("LEAFKERN_BACKEND", "retrieval=reference")
    assert "LEAFKERN_BACKEND says so" in run("doctor")[1]
    monkeypatch.setenv("LEAFKERN_BACKEND", "nativ")
    fails(run("doctor"), 2, "unknown name 'nativ'; did you mean 'native'")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_encode(run, tmp_path, corpus, tiny_bert, suffix):
    code, out, err = run("encode", tiny_bert, corpus, "-o", tmp_path / f"v{suffix}", "--dim", 16)
    assert (code, out) == (0, "")
    assert "6 vectors of width 16, float32" in err
    got = textio.read_vectors(tmp_path / f"v{suffix}")
    expected = Encoder.from_pretrained(tiny_bert).encode(TEXTS, dim=16)
    np.testing.assert_allclose(got.vectors, expected, atol=1e-6)
    assert got.texts == (TEXTS if suffix == ".parquet" else None)


def test_encode_in_blocks_of_a_pipe(run, tmp_path, tiny_bert, monkeypatch):
    lines = "".join(f"{text}\n" for text in TEXTS * 30).encode()
    assert run("encode", tiny_bert, "-", "-o", tmp_path / "a.npy", stdin=lines)[0] == 0
    (tmp_path / "texts.txt").write_bytes(lines)
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 7)
    assert run("encode", tiny_bert, tmp_path / "texts.txt", "-o", tmp_path / "b.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-6)


def test_encode_codes(run, tmp_path, corpus, tiny_bert):
    import torch

    assert run("encode", tiny_bert, corpus, "-o", tmp_path / "v.safetensors", "--precision", "int8")[0] == 0
    got = load_file(tmp_path / "v.safetensors")
    expected = quantize(torch.from_numpy(Encoder.from_pretrained(tiny_bert).encode(TEXTS)), "int8")
    np.testing.assert_array_equal(got["vectors"], expected.codes.numpy())
    np.testing.assert_array_equal(got["scale"], expected.scale.numpy())
    assert run("encode", tiny_bert, corpus, "-o", tmp_path / "v.npy", "--precision", "binary")[0] == 0
    assert np.load(tmp_path / "v.npy").shape == (6, 4)
    assert run("encode", tiny_bert, corpus, "-o", tmp_path / "v.safetensors", "--precision", "ubinary")[0] == 0
    with safe_open(tmp_path / "v.safetensors", "np") as file:
        assert file.metadata() == {"precision": "ubinary", "dim": "32"}
    fails(run("encode", tiny_bert, corpus, "-o", tmp_path / "w.npy", "--precision", "int8"), 2, "write .safetensors")


def test_encode_refuses(run, tmp_path, corpus, tiny_bert):
    out = tmp_path / "v.npy"
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\nno \xff\n")
    fails(run("encode", tiny_bert, bad, "-o", out), 2, "bad.txt:2: not UTF-8")
    bad.write_bytes(b"")
    fails(run("encode", tiny_bert, bad, "-o", out), 2, "bad.txt:1: empty")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--field", "body"), 2, "docs.jsonl:1: no field 'body'")
    fails(run("encode", tiny_bert, tmp_path / "none.txt", "-o", out), 2, "no such file")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--precision", "in8"), 2, "'in8'; did you mean 'int8'")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--dim", 33), 2, "33", "32")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--prompt", "qery"), 2, "qery")
    bad.write_bytes(b"\xff")  # the name is looked at before anything is read
    fails(run("encode", tiny_bert, bad, "-o", tmp_path / "v.bin"), 2, "unknown vector format '.bin'", "v.bin/' for an")
    fails(run("encode", tiny_bert, bad, "-o", tmp_path / "no" / "v.npy"), 2, "does not exist")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--rescore", "int8"), 2, "--rescore: ", "is no index")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--no-texts"), 2, "--no-texts: ", "is no index")
    fails(run("encode", tmp_path / "nomodel", corpus, "-o", out), 2, "nomodel")
    near = tiny_bert.with_name(f"{tiny_bert.name}s")
    fails(run("encode", near, corpus, "-o", out), 2, f"no folder {near}; did you mean {tiny_bert}?")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--device", "gpu"), 2, "device: 'gpu'", "'cpu'")
    fails(run("encode", tiny_bert, corpus), 2, "output")
    fails(run("encod", tiny_bert), 2, "encod")
    fails(run("encode", tiny_bert, corpus, "-o", out, "--dimm", 3), 2, "--dimm")
    assert not out.exists()


def test_cut_said_once(run, tmp_path, tiny_bert):
    (tmp_path / "long.txt").write_text("the leaf " * 5000 + "\n" + "search " * 5000 + "\n")
    code, _, err = run("encode", tiny_bert, tmp_path / "long.txt", "-o", tmp_path / "v.npy")
    assert code == 0
    assert err.count("leafkern: warning: ") == 1
    assert "cut" in err


def test_index_and_search(run, tmp_path, corpus, tiny_bert):
    index = tmp_path / "index"
    code, out, err = run("index", "build", index, corpus, "--model", tiny_bert, "--ids-field", "id")
    assert (code, out) == (0, f"{index}\n")
    assert "6 vectors of width 32, int8, rescored float16" in err
    code, out, _ = run("search", index, tiny_bert, TEXTS[2], "-k", 2)
    first = out.splitlines()[0].split(maxsplit=3)
    assert code == 0
    assert (first[0], first[2], first[3]) == ("1", "d2", TEXTS[2])
    assert float(first[1]) == pytest.approx(1, abs=1e-3)
    code, out, _ = run("search", index, tiny_bert, "-", "-k", 100, "--json", stdin=b"python\nthe leaf\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["query"] for line in lines] == ["python", "the leaf"]
    assert [line["results"][0]["id"] for line in lines] == ["d3", "d0"]
    assert [result["rank"] for result in lines[0]["results"]] == [1, 2, 3, 4, 5, 6]  # k > N: min(k, N)
    more = tmp_path / "more.jsonl"
    more.write_text('{"id": "new", "text": "a new file"}\n')
    assert run("index", "add", index, more, "--model", tiny_bert, "--ids-field", "id")[0] == 0
    fails(
        run("index", "add", index, more, "--model", tiny_bert, "--ids-field", "id"), 2, "'new' is already in the index"
    )
    code, out, _ = run("index", "info", index, "--json")
    facts = json.loads(out)
    assert (facts["count"], facts["ids"], facts["texts"]) == (7, "string", True)
    assert facts["encoder"] == Encoder.from_pretrained(tiny_bert).fingerprint
    assert "count" in run("index", "info", index)[1]
    assert run("index", "verify", index)[0] == 0
    segment = min(index.glob("segment-*"))
    content = bytearray(segment.read_bytes())
    content[-70] ^= 4
    segment.write_bytes(content)
    fails(run("index", "verify", index), 1, segment.name, "damaged")
    segment.write_bytes(content[:-1])
    fails(run("search", index, tiny_bert, "x"), 1, segment.name, "truncated")


def test_search_of_an_empty_index(run, tmp_path, tiny_bert):
    Index.build(tmp_path / "i", np.empty((0, 32), np.float32))
    assert run("search", tmp_path / "i", tiny_bert, "the leaf") == (0, "", "")
    code, out, err = run("search", tmp_path / "i", tiny_bert, "a", "b", "--json")
    assert (code, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [{"query": text, "results": []} for text in "ab"]


def test_search_refuses(run, tmp_path, corpus, tiny_bert):
    index = tmp_path / "index"
    assert run("index", "build", index, corpus, "--model", tiny_bert)[0] == 0
    student = Encoder.from_layers(Encoder.from_pretrained(tiny_bert), [0, 3])
    student.save_pretrained(tmp_path / "student")
    fails(run("search", index, tmp_path / "student", "x"), 2, "neither the encoder that made the index", "--asymmetric")
    assert run("search", index, tmp_path / "student", "x", "--asymmetric")[0] == 0
    fails(run("index", "add", index, corpus, "--model", tmp_path / "student"), 2, "encoder: the index")
    narrow = Encoder.from_layers(Encoder.from_pretrained(tiny_bert), [0], dense_out=16)
    narrow.save_pretrained(tmp_path / "narrow")
    fails(run("search", index, tmp_path / "narrow", "x", "--asymmetric"), 2, "built with width 32, not 16")
    fails(run("search", index, tiny_bert, "x", "-k", 0), 2, "k: expected an int >= 1")
    fails(run("search", tmp_path / "none", tiny_bert, "x"), 2, "no index here")
    fails(run("search", index, tiny_bert), 2, "QUERY")
    fails(run("index", "build", tmp_path / "j", corpus, "--model", tiny_bert, "--precision", "int9"), 2, "'int8'")
    fails(run("index", "build", tmp_path / "j", corpus), 2, "holds texts; name the model")
    fails(run("index", "build", tmp_path / "j", tmp_path / "no.jsonl", "--model", "nomodel"), 2, "no such file")


def test_index_of_vectors(run, tmp_path):
    vectors = np.random.default_rng().normal(size=(120, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    textio.write_vectors(tmp_path / "v.parquet", vectors, [f"t{i}" for i in range(120)])
    np.save(tmp_path / "v.npy", vectors)
    build = ["index", "build", tmp_path / "i"]
    assert run(*build, tmp_path / "v.npy", "--precision", "binary", "--rescore", "none")[0] == 0
    assert Index.open(tmp_path / "i").rescore is None
    assert run(*build, tmp_path / "v.parquet", "--ids-field", "text")[0] == 0
    index = Index.open(tmp_path / "i")
    assert index.search(vectors[:2], 1)[1].tolist() == [["t0"], ["t1"]]
    fails(run("index", "add", tmp_path / "i", tmp_path / "v.npy"), 2, "texts")
    fails(run("index", "add", tmp_path / "i", tmp_path / "v.npy", "--prompt", "query"), 2, "--prompt: ", "vectors")
    fails(run(*build, tmp_path / "v.parquet", "--field", "body"), 2, "--field: ", "vectors")
    vectors[11, 3] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    fails(run(*build, tmp_path / "v.npy"), 2, "v.npy: row 11 holds NaN")
    fails(run(*build, tmp_path / "v.npy", "--ids-field", "id"), 2, "--ids-field")
    assert len(Index.open(tmp_path / "i")) == 120


def test_index_of_other_files(run, tmp_path):
    index, vectors = tmp_path / "i", np.random.default_rng().normal(size=(120, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "v.npy.ids.json").write_text(json.dumps([f"n{i}" for i in range(120)]))
    assert run("index", "build", index, tmp_path / "v.npy", "--rotate")[0] == 0
    assert Index.open(index).search(vectors[:2], 1)[1].tolist() == [["n0"], ["n1"]]
    assert Index.open(index).rotates
    for kind in ("faiss", "parquet", "safetensors", "npy"):
        out = tmp_path / f"out.{kind}"
        code, printed, err = run("index", "export", index, out)
        assert (code, printed) == (0, f"{out}\n")
        assert "120 vectors, float32" in err
        ids = ["--ids-field", "id"] if kind == "parquet" else []
        assert run("index", "build", tmp_path / "again", out, "--precision", "float32", *ids)[0] == 0
        again = Index.open(tmp_path / "again")
        np.testing.assert_array_equal(again.vectors_at(again.rows()), Index.open(index).vectors_at(np.arange(120)))
        assert again.ids_at(again.rows())[5] == "n5"
    assert run("index", "export", index, tmp_path / "bits.faiss", "--precision", "ubinary")[0] == 0
    build = ["index", "build", tmp_path / "bits", tmp_path / "bits.faiss"]
    fails(run(*build), 2, "bits.faiss: holds bits only; choose precision ubinary")
    assert run(*build, "--precision", "ubinary", "--rescore", "none")[0] == 0
    (tmp_path / "bits.faiss.ids.json").write_text(json.dumps([f"m{i}" for i in range(120)]))
    assert run("index", "add", tmp_path / "bits", tmp_path / "bits.faiss")[0] == 0
    assert len(Index.open(tmp_path / "bits")) == 240
    fails(run("index", "export", index, tmp_path / "v.bin"), 2, "unknown vector format '.bin'")
    fails(run("index", "export", index, tmp_path / "v.npy", "--precision", "float23"), 2, "did you mean 'float32'")
    (tmp_path / "v.faiss").write_bytes(b"IxFIshort")
    fails(run("index", "build", tmp_path / "j", tmp_path / "v.faiss"), 2, "v.faiss: not a readable FAISS file")
    assert not (tmp_path / "j").exists()


def test_index_of_no_vectors(run, tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((0, 12), np.float32))
    assert run("index", "build", tmp_path / "i", tmp_path / "v.npy")[0] == 0
    assert (len(Index.open(tmp_path / "i")), Index.open(tmp_path / "i").width) == (0, 12)
    assert run("index", "add", tmp_path / "i", tmp_path / "v.npy")[0] == 0
    code, _, _ = run("index", "export", tmp_path / "i", tmp_path / "out.npy")
    assert (code, np.load(tmp_path / "out.npy").shape) == (0, (0, 12))


def test_index_with_ranges(run, tmp_path):
    vectors = 3 * np.eye(12, dtype=np.float32)
    np.save(tmp_path / "v.npy", vectors)
    build = ["index", "build", tmp_path / "i", tmp_path / "v.npy"]
    fails(run(*build), 2, "row 0 has norm 3", "give ranges=calibrate")
    np.save(tmp_path / "r.npy", np.stack([np.full(12, -3.0), np.full(12, 3.0)]))
    assert run(*build, "--ranges", tmp_path / "r.npy")[0] == 0
    index = Index.open(tmp_path / "i")
    assert index.search(vectors, 1)[1][:, 0].tolist() == list(range(12))
    np.save(tmp_path / "r.npy", np.zeros((2, 11)))
    fails(run(*build, "--ranges", tmp_path / "r.npy"), 2, "ranges: expected shape (2, 12)")
    fails(run(*build, "--ranges", tmp_path / "r.txt"), 2, "--ranges: ", "r.txt is no .npy file")
    fails(run(*build, "--ranges", tmp_path / "none.npy"), 2, "none.npy: no such file")
    fails(run(*build, "--ranges", tmp_path / "r.npy", "--precision", "binary"), 2, "ranges: an index of binary has no")


def test_remove_and_compact(run, tmp_path):
    vectors = np.eye(12, dtype=np.float32)
    numbered, named = tmp_path / "numbered", tmp_path / "named"
    Index.build(numbered, vectors)
    index = Index.build(named, vectors[:6], ids=[f"n{i}" for i in range(6)])
    index.add(vectors[6:], ids=[f"n{i}" for i in range(6, 12)])
    code, out, err = run("index", "remove", numbered, 3, "5")
    assert (code, out) == (0, "")
    assert "2 vectors removed, 10 left" in err
    Index.open(numbered).add(vectors[:2], ids=[-5, -7])
    assert run("index", "remove", numbered, "--", "-5", "-7")[0] == 0
    assert run("index", "remove", named, "-", "n11", stdin=b"n1\n\nn8\n \n")[0] == 0
    assert Index.open(named).ids_at(Index.open(named).rows()).tolist() == [
        f"n{i}" for i in (0, 2, 3, 4, 5, 6, 7, 9, 10)
    ]
    fails(run("index", "remove", named, "n0", "n1"), 2, "ids: 'n1' is not in the index")
    fails(run("index", "remove", numbered, "seven"), 2, "ID: 'seven' is no whole number")
    for other in ("1_0", " 7 ", "٣", "9" * 5000):
        fails(run("index", "remove", numbered, other), 2, "is no whole number")
    fails(run("index", "remove", numbered), 2, "ID")
    assert len(Index.open(named)) == 9
    code, out, err = run("index", "compact", named)
    assert (code, out) == (0, "")
    assert "2 segments became 1" in err
    assert run("index", "verify", named) == (0, f"{named}: 9 vectors, as written\n", "")
    fails(run("index", "compact", named, "--smaller-than", 0), 2, "smaller_than: expected an int >= 1")
    fails(run("index", "compact", tmp_path / "none"), 2, "no index here")


def test_passes_over_vectors_are_shown(run, tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def bar():
        yield lambda *step: seen.append(step)

    monkeypatch.setattr(cli, "progress_bar", bar)
    monkeypatch.setattr("leafkern.index.vectors.BLOCK_VALUES", 80 * 12)
    np.save(tmp_path / "v.npy", np.eye(12, dtype=np.float32).repeat(10, 0))
    for command, shown in (
        (("build", tmp_path / "v.npy"), ["checking", "taking ranges", "writing int8", "writing float16"]),
        (("add", tmp_path / "v.npy"), ["checking", "comparing with the ranges", "writing int8", "writing float16"]),
    ):
        seen.clear()
        assert run("index", command[0], tmp_path / "i", *command[1:])[0] == 0
        assert seen == [(what, done, 120) for what in shown for done in (80, 120)]
    seen.clear()
    assert run("index", "compact", tmp_path / "i")[0] == 0
    assert {step for step in seen if step[1] == 240} == {
        (f"writing {x}", 240, 240) for x in ("ids", "codes", "rescore")
    }
    seen.clear()
    assert run("index", "verify", tmp_path / "i")[0] == 0
    assert seen == [("checking, in MB", 1, 1)]


def test_verify_beside_a_compaction(run, tmp_path, monkeypatch):
    index, verify, compacted = Index.build(tmp_path / "i", np.eye(9, dtype=np.float32)), Index.verify, []

    def late(self, **options):
        if len(compacted) < times:
            index.add(np.eye(9, dtype=np.float32))
            compacted.append(index.compact())
        verify(self, **options)

    monkeypatch.setattr(Index, "verify", late)
    times = 2
    assert run("index", "verify", tmp_path / "i") == (0, f"{tmp_path / 'i'}: 27 vectors, as written\n", "")
    times = 9
    fails(run("index", "verify", tmp_path / "i"), 2, "changed on disk")


def test_encode_into_an_index(run, tmp_path, corpus, tiny_bert):
    for out in (f"{tmp_path}/v1.index/", f"{tmp_path}/plain"):
        code, printed, err = run("encode", tiny_bert, corpus, "-o", out, "--ids-field", "id", "--dim", 16)
        assert (code, printed) == (0, f"{out}\n")
        assert "6 vectors of width 16, int8, rescored float16" in err
        assert Index.open(out).ids_at(np.arange(2)).tolist() == ["d0", "d1"]
    again = ["encode", tiny_bert, corpus, "-o", tmp_path / "plain", "--ids-field", "id"]
    assert run(*again, "--dim", 16)[0] == 0
    source = json.loads(run("index", "info", tmp_path / "plain", "--json")[1])["source"]
    assert (source["rows"], source["total"], source["ids_field"]) == (6, 6, "id")
    assert re.search(r"source total +6\n", run("index", "info", tmp_path / "plain")[1])
    assert run("search", tmp_path / "plain", tiny_bert, "python", "--dim", 8)[0] == 0
    fails(run("search", tmp_path / "plain", tiny_bert, "python", "--dim", 17), 2, "dim: expected an int from 1 to 16")
    fails(run(*again), 2, "width: ", "was begun with width 16, not 32")
    fails(
        run("encode", tiny_bert, "-", "-o", tmp_path / "j", stdin=b"a\n"), 2, "INPUT: an index is encoded from a file"
    )
    fails(run("encode", tiny_bert, corpus, "-o", tmp_path / "v.npy", "--ids-field", "id"), 2, "--ids-field: ")
    fails(run("encode", tiny_bert, corpus, "-o", tmp_path / "j", "--rescore", "int4"), 2, "int4 is not finer")
    fails(run("encode", tiny_bert, corpus, "-o", tmp_path / "j", "--dim", 33), 2, "33", "32")
    assert not (tmp_path / "j").exists()


def test_disk_full_keeps_the_index(run, tmp_path, monkeypatch):
    np.save(tmp_path / "v.npy", np.eye(8, dtype=np.float32))
    assert run("index", "build", tmp_path / "i", tmp_path / "v.npy")[0] == 0

    def full(step, path):
        if step == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "on_step", full)
    fails(run("index", "add", tmp_path / "i", tmp_path / "v.npy"), 1, "the disk is full")
    monkeypatch.undo()
    Index.open(tmp_path / "i").verify()


def test_eval(run, tmp_path, tiny_bert, monkeypatch):
    task = tmp_path / "task"
    task.mkdir()
    (task / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    (task / "queries.jsonl").write_text('{"_id": "q", "text": "python"}\n')
    (task / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    figures, html = tmp_path / "f.json", tmp_path / "f.html"
    arguments = ["--teacher", tiny_bert, "--data", task, "--dims", "32,8", "--precisions", "float32,binary"]
    code, out, _ = run("eval", tiny_bert, *arguments, "--json", figures, "--html", html)
    assert code == 0
    assert "nDCG@10" in out
    result = json.loads(figures.read_text())
    assert len(result["rows"]) == 3 * 2 * 2
    assert result["rows"][0]["ndcg"] == 1
    assert html.read_text().startswith("<!DOCTYPE html>")
    sts = tmp_path / "sts.tsv"
    sts.write_text("score\ts1\ts2\n" + "".join(f"{i}\t{text or 'x'}\tthe leaf\n" for i, text in enumerate(TEXTS)))
    code, out, _ = run("eval", tiny_bert, "--data", sts)
    assert code == 0
    assert "Spearman" in out
    fails(run("eval", tiny_bert, "--data", task, "--dims", "64"), 2, "dims: 64 is not a width of student")
    monkeypatch.setattr(Encoder, "encode", None)  # refused before anything is encoded
    for dims in ("0", "-3", "32,0"):
        wrong = dims.split(",")[-1]
        fails(run("eval", tiny_bert, "--data", task, "--dims", dims), 2, f"dims: {wrong} is not a width of student")
    fails(run("eval", tiny_bert, "--data", task, "--dims", "a"), 2, "--dims: 'a'; expected whole numbers")
    fails(run("eval", tiny_bert, "--data", task, "--precisions", "int7"), 2, "'int7'; did you mean 'int8'")
    fails(run("eval", tiny_bert, "--data", tmp_path / "no"), 2, "no such file or folder")
    (task / "qrels.tsv").write_text("q\td3\n")
    fails(run("eval", tiny_bert, "--data", task), 2, "qrels.tsv:1")


def test_train_refuses(run, tmp_path):
    (tmp_path / "r.yaml").write_text("teachr: x\n")
    fails(run("train", tmp_path / "r.yaml"), 2, "teachr", "teacher")
    fails(run("train", tmp_path / "none.yaml"), 2, "none.yaml")


def test_train_refuses_a_wrong_device(run, tmp_path, corpus, tiny_bert):
    values = {
        "teacher": {"model": str(tiny_bert)},
        "student": {"layers": [0]},
        "data": {"documents": str(corpus)},
        "device": "cuda:99",
    }
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    fails(run("train", tmp_path / "r.yaml", "--output", tmp_path / "out"), 2, "device: 'cuda:99'")


def test_bench_refuses(run):
    fails(run("bench", "serch"), 2, "'serch'; did you mean 'search'")


def test_debug_shows_the_traceback(run, tmp_path):
    code, _, err = run("index", "info", tmp_path, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("leafkern: error: ")


def test_interrupted(run, monkeypatch, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "open", stop)
    assert run("index", "info", tmp_path) == (130, "", "leafkern: stopped\n")


def test_a_reader_that_leaves(tmp_path):
    """`leafkern … | head -1` ends without a complaint."""
    Index.build(tmp_path / "i", np.eye(8, dtype=np.float32))
    command = f"{sys.executable} -m leafkern index info {tmp_path / 'i'} | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stderr == ""
