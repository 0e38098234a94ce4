"""Files encoded and shards searched through Ray: what the same work gives here, also when processes are killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from leafkern import Encoder, Index, Shards
from leafkern.errors import DamagedFileError, InputError
from leafkern.index.shards import MissingShardWarning, shard_folders
from leafkern.integrations import ray as ours

WORDS = ["the leaf", "a kernel of search", "how to list a file", "python", "vector search is the kernel", ""]
TEXTS = {"field": "text", "dim": None, "prompt": None}
VECTORS = TEXTS | {"precision": "float32"}
INDEX = TEXTS | {"id_field": "id", "precision": "int8", "rescore": "float16", "texts": True, "ranges": None}


def texts_of(number, rows):
    return [f"{WORDS[(row + number) % 6]} {number} {row}" for row in range(rows)]


def write(folder, number, rows):
    path = folder / f"{number}.parquet"
    ids = [f"{number}-{row}" for row in range(rows)]
    pq.write_table(pa.table({"id": ids, "text": texts_of(number, rows)}), path, row_group_size=100)
    return path


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        write(tmp_path / "in", number, 20 + number)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder.from_pretrained(tiny_bert, device="cpu")


def unit(n, d=24):
    x = np.random.default_rng().normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def worker(kind, model, options):
    return kind(str(model), "cpu", 1, options)


def job(inputs, output, number, suffix=".parquet"):
    (output / ours.RECEIPTS).mkdir(parents=True, exist_ok=True)
    return {"input": str(inputs / f"{number}.parquet"), "output": str(output / f"{number}{suffix}")}


def vectors_of(path):
    column = pq.read_table(path).column("vector").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_file_of_vectors(tiny_bert, encoder, inputs, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(ours, "BLOCK_ROWS", 7)
    write(inputs, 4, 0)
    found = worker(ours._VectorFiles, tiny_bert, VECTORS | {"dim": 12, "precision": precision})
    for number, rows in ((0, 20), (3, 23), (4, 0)):
        task = job(inputs, tmp_path / "out", number)
        assert found(task) == {"input": task["input"], "rows": rows, "kept": False, "wrong": False, "error": ""}
        table = pq.read_table(task["output"])
        assert table.drop(["vector"]).equals(pq.read_table(task["input"]))
        assert table.schema.field("vector").type == pa.list_(getattr(pa, precision)(), 12)
        if rows:
            expected = encoder.encode(texts_of(number, rows), dim=12, precision=precision)
            close = 2e-6 if precision == "float32" else 1e-3
            np.testing.assert_allclose(vectors_of(task["output"]), expected, atol=close)


def test_a_shard(tiny_bert, encoder, inputs, tmp_path):
    write(inputs, 4, 0)
    found = worker(ours._IndexShards, tiny_bert, INDEX)
    for number, rows in ((1, 21), (4, 0)):
        task = job(inputs, tmp_path / "out", number, "")
        assert (found(task)["rows"], found(task)["kept"]) == (rows, True)
        index = Index.open(task["output"], encoder=encoder, prompt="", width=32)
        index.verify()
        assert len(index) == rows
        assert index.has_texts
    one = Index.open(tmp_path / "out" / "1")
    _, rows = one.search_rows(encoder.encode(texts_of(1, 21)), 1)
    assert one.ids_at(rows)[:, 0].tolist() == [f"1-{row}" for row in range(21)]
    assert one.texts_at(rows)[:, 0].tolist() == texts_of(1, 21)


def test_outputs_are_kept_while_they_fit(tiny_bert, inputs, tmp_path):
    found, task = worker(ours._VectorFiles, tiny_bert, VECTORS), job(inputs, tmp_path / "out", 0)
    output = Path(task["output"])
    receipt = output.parent / ours.RECEIPTS / "0.parquet.json"
    assert not found(task)["kept"]
    written = output.stat().st_mtime_ns
    assert (found(task)["kept"], found(task)["rows"], output.stat().st_mtime_ns) == (True, 20, written)
    for other in (VECTORS | {"dim": 8}, VECTORS | {"precision": "float16"}):
        result = worker(ours._VectorFiles, tiny_bert, other)(task)
        assert (result["wrong"], result["rows"]) == (True, 0)
        assert f"{output}: was made with" in result["error"]
        assert "choose another folder" in result["error"]
    output.unlink()
    assert not found(task)["kept"]
    receipt.unlink()  # as after a kill between the output and its receipt
    assert not found(task)["kept"]
    write(inputs, 0, 33)
    assert (found(task)["kept"], len(vectors_of(output))) == (False, 33)
    receipt.write_text("{")
    assert "not a readable receipt" in found(task)["error"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a", None]}, "0.parquet: row 1: column 'text' must be str, got NoneType"),
        ({"body": ["a"]}, "0.parquet: column: unknown name 'text'"),
        ({"text": ["a"], "vector": [1.0]}, "0.parquet: has a column 'vector' already"),
        (b"PAR1, or not", "0.parquet: not a readable parquet file"),
        (b"", "0.parquet: not a readable parquet file"),
    ],
)
def test_bad_files_are_named(tiny_bert, inputs, tmp_path, table, message):
    task = job(inputs, tmp_path / "out", 0)
    if isinstance(table, bytes):
        Path(task["input"]).write_bytes(table)
    else:
        pq.write_table(pa.table(table), task["input"])
    result = worker(ours._VectorFiles, tiny_bert, VECTORS)(task)
    assert (result["wrong"], result["rows"]) == (True, 0)
    assert message in result["error"]
    assert os.listdir(tmp_path / "out") == [ours.RECEIPTS]


def test_a_model_that_is_missing_is_said_once_per_file(inputs, tmp_path):
    result = worker(ours._VectorFiles, tmp_path / "no-model", VECTORS)(job(inputs, tmp_path / "out", 0))
    assert result["wrong"]
    assert "no-model" in result["error"]


def test_any_other_error_is_one_file_s(tiny_bert, inputs, tmp_path, monkeypatch):
    task = job(inputs, tmp_path / "out", 0)
    found = worker(ours._VectorFiles, tiny_bert, VECTORS)

    def failing(error):
        def write_batch(*_):
            raise error

        return write_batch

    for error in (pa.ArrowInvalid("no space"), RuntimeError("out of memory")):
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetWriter, "write_batch", failing(error))
            result = found(task)
        assert not result["wrong"]
        assert result["error"] == f"{task['input']}: {type(error).__name__}: {error}"
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, task["input"])
    assert task["input"] in found(task)["error"]
    assert os.listdir(tmp_path / "out") == [ours.RECEIPTS]


class LocalRay:
    """What `RayShards` takes of Ray, in this process. broken: actor number -> what its calls raise."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        GetTimeoutError = type("GetTimeoutError", (RayError,), {})
        OutOfMemoryError = type("OutOfMemoryError", (RayError,), {})

    def __init__(self):
        self.actors, self.broken = [], {}

    def remote(self, kind):
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=lambda *a: self.actor(kind(*a))))

    def actor(self, actual):
        number = len(self.actors)

        def method(name):
            return types.SimpleNamespace(remote=lambda *arguments: lambda: self.call(number, actual, name, arguments))

        self.actors.append(types.SimpleNamespace(search=method("search"), refresh=method("refresh")))
        return self.actors[-1]

    def wait(self, calls, num_returns, timeout):
        return calls, []

    def put(self, value):
        return value

    def kill(self, actor):
        self.actors.remove(actor)

    def get(self, call):
        return call()

    def call(self, number, actual, name, arguments):
        try:
            if number in self.broken:
                raise self.broken[number]
            return getattr(actual, name)(*arguments)
        except (InputError, DamagedFileError) as cause:
            error = self.exceptions.RayTaskError()
            error.cause = cause
            raise error from cause


@pytest.fixture
def local_ray(monkeypatch):
    ray, threads = LocalRay(), torch.get_num_threads()
    monkeypatch.setattr(ours, "_ray", lambda: ray)
    yield ray
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_actors_together_give_what_shards_give(local_ray, tmp_path, precision):
    x = np.repeat(unit(40), 3, axis=0)  # equal scores within actors and across them
    whole = Shards.build(tmp_path / "s", x, shards=5, ids=[f"d{i}" for i in range(120)], precision=precision)
    for workers in (1, 2, 5, 9):
        with ours.RayShards(tmp_path / "s", workers=workers) as shards:
            assert (len(shards), len(local_ray.actors)) == (120, min(workers, 5))
            for k, oversample in ((1, 1), (7, 2), (200, 4)):
                found = shards.search(x[:4], k, oversample=oversample)
                for mine, expected in zip(found, whole.search(x[:4], k, oversample=oversample)):
                    np.testing.assert_array_equal(mine, expected)
        assert local_ray.actors == []
    with pytest.raises(InputError, match="k: expected an int >= 1"), ours.RayShards(tmp_path / "s") as shards:
        shards.search(x, 0)


def test_an_actor_that_gives_no_answer(local_ray, tmp_path):
    x = unit(40)
    Shards.build(tmp_path / "s", x, shards=4)
    rest = Shards.open(shard_folders(tmp_path / "s")[2:])
    with ours.RayShards(tmp_path / "s", workers=2) as shards:
        local_ray.broken = {0: local_ray.exceptions.OutOfMemoryError("ended for its memory\nmore")}
        with pytest.raises(ours.NoAnswerError, match=r"shards .*-00000, .*-00001: ended for its memory$"):
            shards.search(x, 3)
        shards.partial = True
        for error in (*local_ray.broken.values(), DamagedFileError("cut short")):
            local_ray.broken = {0: error}
            with pytest.warns(MissingShardWarning, match="2 of 4 shards can't be read") as caught:
                found = shards.search(x, 3)
            assert caught[0].filename == __file__
            np.testing.assert_array_equal(found[1], rest.search(x, 3)[1])
        local_ray.broken = dict.fromkeys(range(2), local_ray.exceptions.OutOfMemoryError("both"))
        with pytest.raises(ours.NoAnswerError, match="none of 4 shards can be searched"):
            shards.search(x, 3)


def test_shards_made_by_other_means_are_not_orphaned(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_ray", lambda: None)
    Shards.build(tmp_path / "s", unit(9), shards=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"holds the shard 'shard-.*-00000', made by other means"):
        ours.build_shards("model", inputs, tmp_path / "s")
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_arguments(inputs, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    write(other, 0, 1)
    for given, options, message in (
        (inputs, {"precision": "int8"}, "precision: unknown name 'int8'"),
        (inputs, {"workers": 0}, "workers: expected an int >= 1, got 0"),
        (tmp_path, {}, "inputs: no .parquet files in"),
        ([], {}, "inputs: an empty list"),
        (inputs / "9.parquet", {}, "9.parquet: no such file"),
        ([inputs / "0.npy"], {}, "0.npy: expected .parquet"),
        ([inputs / "0.parquet", other / "0.parquet"], {}, "would both be written"),
        (inputs, {"output": inputs}, "is the folder of the input"),
    ):
        with pytest.raises(InputError, match=message):
            ours.encode_files("model", given, **{"output": out} | options)
    with pytest.raises(InputError, match="rescore: float32 is not finer"):
        ours.build_shards("model", inputs, out, precision="float32", rescore="float32")
    with pytest.raises(InputError, match="no shards here"):
        ours.RayShards(inputs)
    monkeypatch.setitem(sys.modules, "ray", None)
    for call in (lambda: ours.encode_files("model", inputs, out), lambda: ours.RayShards([inputs])):
        with pytest.raises(InputError, match=r"Ray is not installed: pip install 'leafkern\[ray\]'"):
            call()
    assert not out.exists()


# -- a local Ray of two workers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A local Ray; its address."""
    ray = pytest.importorskip("ray")
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    # Sockets lie in it, whose names may not be long.
    folder = tempfile.mkdtemp(prefix="lk-")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False, _temp_dir=folder)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def holders(folder):
    """Other processes that have something below `folder` open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(f"{folder}/") and int(link.parts[2]) != os.getpid():
                found.add(int(link.parts[2]))
        except OSError:
            pass  # gone meanwhile
    return found


def kill_one(folder, killed):
    """Kills the first process that is found writing below `folder`."""
    while not killed:
        for pid in sorted(holders(folder))[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.05)


@pytest.fixture
def killing():
    """Starts `kill_one` beside the test; the list of those killed."""
    killed, threads = [], []

    def start(folder):
        threads.append(threading.Thread(target=kill_one, args=(folder, killed), daemon=True))
        threads[-1].start()
        return killed

    yield start
    killed.append(None)  # ends a thread that found nobody
    for thread in threads:
        thread.join()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks in /proc for the process to kill")
def test_encoding_survives_the_loss_of_a_worker(cluster, tiny_bert, encoder, inputs, tmp_path, killing):
    for number in (1, 2, 3):
        write(inputs, number, 8_000)
    pq.write_table(pa.table({"text": [None]}), inputs / "4.parquet")
    out = tmp_path / "out"
    assert worker(ours._VectorFiles, tiny_bert, VECTORS)(job(inputs, out, 0))["rows"] == 20
    written, killed, reports = (out / "0.parquet").stat().st_mtime_ns, killing(out), []
    with pytest.raises(InputError, match=r"1 of 5 files failed, the others are done: .*4\.parquet: row 0"):
        ours.encode_files(tiny_bert, inputs, out, progress=lambda *report: reports.append(report))
    assert len(killed) == 1
    assert reports == [("encoding", done, 5) for done in range(6)]
    assert (out / "0.parquet").stat().st_mtime_ns == written
    assert sorted(os.listdir(out)) == ["0.parquet", "1.parquet", "2.parquet", "3.parquet", ours.RECEIPTS]
    for number, rows in enumerate((20, 8_000, 8_000, 8_000)):
        table = pq.read_table(out / f"{number}.parquet")
        assert table.column("text").to_pylist() == texts_of(number, rows)
        sample = np.random.default_rng().integers(0, rows, 100)
        expected = encoder.encode([texts_of(number, rows)[row] for row in sample])
        np.testing.assert_allclose(vectors_of(out / f"{number}.parquet")[sample], expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks in /proc for the process to kill")
def test_shards_after_the_loss_of_the_job_and_of_a_worker(cluster, tiny_bert, encoder, inputs, tmp_path, killing):
    for number in range(4):
        write(inputs, number, 8_000)
    out = tmp_path / "out"
    code = (
        "import sys, ray; from leafkern.integrations.ray import build_shards; address, *paths = sys.argv[1:]; "
        "ray.init(address=address); build_shards(*paths, id_field='id')"
    )
    arguments = [sys.executable, "-c", code, cluster, tiny_bert, inputs, out]
    driver = subprocess.Popen(list(map(str, arguments)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: driver.poll() is not None or any(out.glob(f"{ours.RECEIPTS}/*.json")))
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not holders(out))
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob(f"{ours.RECEIPTS}/*.json")}
    assert 1 <= len(finished) < 4
    with pytest.raises(InputError, match="no shards here"):
        Shards.open(out)
    killed = killing(out)
    assert ours.build_shards(tiny_bert, inputs, out, id_field="id") == (32_000, 4, len(finished))
    assert len(killed) == 1
    for name, written in finished.items():
        assert (out / ours.RECEIPTS / name).stat().st_mtime_ns == written
    shards = Shards.open(out, encoder=encoder, prompt="", width=32)
    shards.verify()
    for number in range(4):
        local = Index.build(tmp_path / "local", encoder.encode(texts_of(number, 8_000)), precision="int8")
        queries = encoder.encode(texts_of(number, 5))
        for mine, expected in zip(Index.open(out / f"{number}").search_rows(queries, 3), local.search_rows(queries, 3)):
            np.testing.assert_allclose(mine, expected, atol=1e-5)
    found, ids = shards.search(encoder.encode(texts_of(2, 5)), 1)
    np.testing.assert_allclose(found, 1, atol=1e-3)
    assert ids[:, 0].tolist() == [f"2-{row}" for row in range(5)]


def slow_down(actor, seconds):
    """Makes each shard of the actor, but not of its successors, take `seconds` longer; the process it runs in."""
    import ray

    def change(_):
        from leafkern import Index

        search = Index.candidates
        Index.candidates = lambda *arguments, **options: time.sleep(seconds) or search(*arguments, **options)
        return os.getpid()

    return ray.get(actor.__ray_call__.remote(change))


@pytest.mark.slow
def test_searching_survives_the_loss_of_an_actor(cluster, tmp_path):
    import ray

    x, queries = unit(400), unit(5)
    local = Shards.build(tmp_path / "s", x, shards=5, ids=[f"d{i}" for i in range(400)], precision="binary")
    folders = shard_folders(tmp_path / "s")

    def same(found):
        for mine, expected in zip(found, local.search(queries, 7, query_bits=8)):
            np.testing.assert_array_equal(mine, expected)

    with ours.RayShards(tmp_path / "s", workers=2) as shards:
        assert (len(shards), shards.info()) == (400, local.info())
        same(shards.search(queries, 7, query_bits=8))
        with pytest.raises(InputError, match="k: expected an int >= 1, got 0"):
            shards.search(queries, 0)
        with pytest.raises(InputError, match="allowed: actors know no row numbers"):
            shards.search(queries, 1, allowed=np.ones(400, bool))
        # Killed in the middle of a search: its successor answers.
        pid, start = slow_down(shards._actors[1], 300), time.monotonic()
        timer = threading.Timer(1, os.kill, (pid, signal.SIGKILL))
        timer.start()
        same(shards.search(queries, 7, query_bits=8))
        assert 1 < time.monotonic() - start < 200
        timer.join()
        # Too slow, or gone for good.
        slow_down(shards._actors[0], 2)
        shards.timeout = 1
        with pytest.raises(ours.NoAnswerError, match=r"shards .*-00000, .*-00001: no answer within 1 s"):
            shards.search(queries, 7)
        shards.timeout = None
        same(shards.search(queries, 7, query_bits=8))
        ray.kill(shards._actors[0])
        with pytest.raises(ours.NoAnswerError, match=r"shards .*-00000, .*-00001: .*died"):
            shards.search(queries, 7)
        shards.partial = True
        with pytest.warns(MissingShardWarning, match="2 of 5 shards can't be read"):
            scores, ids = shards.search(queries, 7)
        rest = Shards.open(folders[2:]).search(queries, 7)
        np.testing.assert_array_equal(scores, rest[0])
        np.testing.assert_array_equal(ids, rest[1])
    with pytest.raises(InputError, match=r"ended by close"):
        shards.search(queries, 7)

    (folders[3] / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"-00003.manifest.json: not a readable manifest"):
        ours.RayShards(tmp_path / "s")
    with pytest.warns(MissingShardWarning, match=r"1 of 3 shards can't be read.*-00003"):
        shards = ours.RayShards(tmp_path / "s", partial=True)
    with shards, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = shards.search(queries, 7)
        assert len(shards) == 320
    rest = Shards.open([folder for folder in folders if folder != folders[3]]).search(queries, 7)
    np.testing.assert_array_equal(found[1], rest[1])
