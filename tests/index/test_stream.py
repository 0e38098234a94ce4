"""An index encoded block by block: after a kill at any point the same call goes on and ends with the same index."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from leafkern import Encoder, Index, bulk, files
from leafkern.errors import InputError
from leafkern.index import ClippedWarning
from leafkern.index.manifest import MANIFEST
from leafkern.index.stream import Stream

BLOCK = 40


def unit(n, d=24):
    x = np.random.default_rng().normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def corpus(tmp_path):
    """150 texts with ids."""
    words = ["leaf", "kernel", "search", "vector", "python", "file", "list", "how", "the", "of"]
    chosen = np.random.default_rng().choice(words, (150, 6))
    lines = ({"id": f"d{row}", "text": f"{row} " + " ".join(each)} for row, each in enumerate(chosen))
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK_ROWS", BLOCK)


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return Encoder.from_pretrained(tiny_bert)


def content(index):
    """Everything that an index gives back, in order."""
    rows = index.rows()
    codes = [part.tensors["codes"].numpy()[part.live_rows() - part.first] for part in index._state.segments]
    texts = index.texts_at(rows).tolist() if index.has_texts else None
    return index.ids_at(rows).tolist(), texts, np.concatenate(codes), index.vectors_at(rows)


def same(one, other):
    for a, b in zip(content(one), content(other)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_equals_an_index_built_of_the_same_vectors(tmp_path, corpus, blocks, encoder, precision):
    steps = []
    index = bulk.encode_index(
        lambda: encoder,
        corpus,
        tmp_path / "i",
        ids_field="id",
        precision=precision,
        progress=lambda *step: steps.append(step),
    )
    index.verify()
    assert index.info()["segments"] == 1
    encoded = [done for what, done, total in steps if (what, total) == ("encoding", 150)]
    assert encoded == sorted(encoded)
    assert encoded[-1] == 150
    assert steps[-1][0].startswith("writing ")
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    ids, texts = ([line[name] for line in lines] for name in ("id", "text"))
    expected = None
    for start in range(0, 150, BLOCK):
        part = slice(start, start + BLOCK)
        vectors = encoder.encode(texts[part])
        if expected is None:
            expected = Index.build(tmp_path / "j", vectors, ids=ids[part], texts=texts[part], precision=precision)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ClippedWarning)
                expected.add(vectors, ids=ids[part], texts=texts[part])
    same(index, expected)
    assert index.encoder == encoder.fingerprint
    queries = encoder.encode(texts[70:80])
    for found, right in zip(index.search(queries, 5), expected.search(queries, 5)):
        np.testing.assert_array_equal(found, right)


def test_options(tmp_path, corpus, blocks, encoder):
    index = bulk.encode_index(
        lambda: encoder, corpus, tmp_path / "i", field="id", dim=16, precision="float16", rescore=None, texts=False
    )
    assert (index.width, index.precision, index.rescore, index.has_texts) == (16, "float16", None, False)
    assert index.ids_at(index.rows()).tolist() == list(range(150))
    np.testing.assert_array_equal(
        index.vectors_at(np.arange(BLOCK)), encoder.encode([f"d{i}" for i in range(BLOCK)], dim=16).astype(np.float16)
    )


@pytest.mark.filterwarnings("ignore::leafkern.index.ClippedWarning")
def test_stopped_between_two_steps(tmp_path, corpus, blocks, encoder, monkeypatch):
    """Stopped before a write, sync, rename or removal, a second call ends with the index of one call."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    vectors = dict(zip(texts, encoder.encode(texts)))
    encoded = []

    def encode(_, given, **options):
        encoded.extend(given)
        return np.array([vectors[text] for text in given], np.float32).reshape(len(given), 32)

    monkeypatch.setattr(Encoder, "encode", encode)

    def run(name):
        return bulk.encode_index(lambda: encoder, corpus, tmp_path / name, ids_field="id")

    steps = []
    monkeypatch.setattr(files, "on_step", lambda name, _: steps.append(name))
    expected = run("whole")
    assert encoded == texts
    count = len(steps)
    for place in range(0, count, 5):
        taken, name = [], f"i{place}"

        def stop(step, _, taken=taken, place=place):
            taken.append(step)
            if len(taken) > place:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "on_step", stop)
        encoded.clear()
        with pytest.raises(KeyboardInterrupt):
            run(name)
        monkeypatch.setattr(files, "on_step", lambda *_: None)
        there = (tmp_path / name / MANIFEST).exists()
        position = Index.open(tmp_path / name).source["rows"] if there else 0
        before = len(encoded)
        assert before - BLOCK <= position <= before  # the block at hand is all that may be lost
        same(run(name), expected)
        assert encoded[before:] == texts[position:]


def test_a_finished_one_is_left_alone(tmp_path, corpus, blocks, encoder):
    index = bulk.encode_index(lambda: encoder, corpus, tmp_path / "i")
    before = (tmp_path / "i" / MANIFEST).read_bytes()
    seen = []
    bulk.encode_index(lambda: encoder, corpus, tmp_path / "i", progress=lambda *step: seen.append(step))
    assert seen == []
    assert (tmp_path / "i" / MANIFEST).read_bytes() == before
    index.add(unit(1, 32), texts=["by hand"])
    index.remove([7])
    again = bulk.encode_index(lambda: encoder, corpus, tmp_path / "i", progress=lambda *step: seen.append(step))
    assert "encoding" not in {what for what, _, _ in seen}
    assert again.texts_at(again.rows())[-1] == "by hand"
    assert again.ids_at(again.rows()).tolist() == [*range(7), *range(8, 151)]


def test_refusals_name_what_changed(tmp_path, corpus, blocks, encoder, tiny_bert):
    index = tmp_path / "i"
    bulk.encode_index(lambda: encoder, corpus, index, ids_field="id")
    other = Encoder.from_layers(encoder, [0, 3])
    prompted = Encoder.from_pretrained(tiny_bert, prompts={"document": "passage: "})
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text() + '{"id": "x", "text": "one more"}\n')
    before = (index / MANIFEST).read_bytes()
    defaults = {"ids_field": "id", "encoder": encoder, "input": corpus}
    for given, message in (
        (
            {"input": changed},
            r"input: .*i was begun with input '[0-9a-f]{64}', not '[0-9a-f]{64}'; go on with the same",
        ),
        ({"encoder": other}, "encoder: .* was begun with encoder"),
        ({"encoder": prompted}, "prompt: .* was begun with prompt '', not 'passage: '"),
        ({"ids_field": None}, "ids_field: .* was begun with ids_field 'id', not None"),
        ({"field": "id"}, "field: .* was begun with field 'text', not 'id'"),
        ({"dim": 16}, "width: .* was begun with width 32, not 16"),
        ({"precision": "binary"}, "precision: .* was begun with precision 'int8', not 'binary'"),
        ({"rescore": None}, "rescore: .* was begun with rescore 'float16', not None"),
        ({"texts": False}, "texts: .* was begun with texts True, not False"),
    ):
        options = defaults | given
        source, used = options.pop("input"), options.pop("encoder")
        with pytest.raises(InputError, match=message):
            bulk.encode_index(lambda used=used: used, source, index, **options)
    assert (index / MANIFEST).read_bytes() == before
    by_hand = Index.build(tmp_path / "by-hand", unit(120, 32))
    with pytest.raises(InputError, match="holds an index that was not made by a stream; choose another folder"):
        bulk.encode_index(lambda: encoder, corpus, by_hand.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds 'thesis\.txt', which is not part of an index"):
        bulk.encode_index(lambda: encoder, corpus, tmp_path / "other")


def test_bad_input_is_refused_before_anything_is_encoded(tmp_path, blocks):
    def never():
        raise AssertionError("the encoder was opened")

    class Unused:
        dim, prompts = 24, ()
        prompt_text = staticmethod(lambda prompt: "")

    path = tmp_path / "docs.jsonl"
    lines = [json.dumps({"id": row, "text": "a"}) for row in range(100)]
    lines.insert(3, "")
    for bad, message in (
        ('{"id": 7, "text": "b"}', r"docs\.jsonl:102: field 'id' is 7, as in a row before"),
        ('{"id": "seven", "text": "b"}', r"docs\.jsonl:102: field 'id' is 'seven'; expected all int or all str"),
        (json.dumps({"id": 2**70, "text": "b"}), r"docs\.jsonl: field 'id': ids: "),
        ('{"id": 100}', r"docs\.jsonl:102: no field 'text'"),
    ):
        path.write_text("\n".join([*lines, bad]))
        with pytest.raises(InputError, match=message):
            bulk.encode_index(never, path, tmp_path / "i", ids_field="id")
        with pytest.raises(InputError, match=message):
            bulk.documents(Unused(), path, ids_field="id")
    with pytest.raises(InputError, match="standard input"):
        bulk.encode_index(never, "-", tmp_path / "i")
    with pytest.raises(InputError, match="'int9'; did you mean 'int8'"):
        bulk.encode_index(never, path, tmp_path / "i", precision="int9")
    assert not (tmp_path / "i").exists()


def test_input_that_changes_meanwhile(tmp_path, corpus, blocks, encoder):
    """What was read before a file changed is kept, and the file of before goes on from there."""
    before = corpus.read_text()

    def change(_, done, total):
        if done > 2 * BLOCK:
            corpus.write_text(before + '{"id": "x", "text": "one more"}\n')

    with pytest.raises(InputError, match=r"docs\.jsonl: was changed while it was encoded; .* goes on at text 80"):
        bulk.encode_index(lambda: encoder, corpus, tmp_path / "i", ids_field="id", progress=change)
    assert len(Index.open(tmp_path / "i")) == 2 * BLOCK
    corpus.write_text(before)
    assert len(bulk.encode_index(lambda: encoder, corpus, tmp_path / "i", ids_field="id")) == 150


def test_clipped_values_are_said_once(tmp_path):
    stream = Stream(tmp_path / "i", {"input": "a"}, width=24)
    stream.add(unit(120))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            stream.add(np.eye(2, 24, dtype=np.float32))
    assert stream.clipped == 6
    with pytest.warns(ClippedWarning, match="6 of the values added now lie outside"):
        stream.finish()
    assert Stream(tmp_path / "i", {"input": "a"}, width=24).position == 126


DRIVER = """
import sys
from leafkern import bulk, cli
bulk.BLOCK_ROWS = 40
sys.argv = ["leafkern", *sys.argv[1:]]
cli.main()
"""


def test_killed_and_called_again(tmp_path, corpus, tiny_bert):
    """A real SIGKILL of the real command; what it had committed is kept, and the end is that of one call."""
    lines = corpus.read_text().splitlines()
    more = [line.replace('"d', f'"e{part}-') for part in range(12) for line in lines]
    corpus.write_text("\n".join(more))
    command = [sys.executable, "-c", DRIVER, "encode", str(tiny_bert), str(corpus), "--ids-field", "id", "-o"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    path = tmp_path / "killed"
    process = subprocess.Popen([*command, str(path)], env=environment, stderr=subprocess.PIPE, text=True)
    rows, deadline = 0, time.monotonic() + 120
    while rows < 3 * BLOCK:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
        if (path / MANIFEST).exists():
            rows = Index.open(path).source["rows"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    index = Index.open(path)
    index.verify()
    rows = index.source["rows"]
    assert 3 * BLOCK <= rows == len(index) < len(more)
    kept = content(index)
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    index = Index.open(path)
    index.verify()
    assert index.ids_at(index.rows()).tolist() == [json.loads(line)["id"] for line in more]
    for before, after in zip(kept, content(index)):
        np.testing.assert_array_equal(before, after[:rows])
    assert index.info()["segments"] == 1
