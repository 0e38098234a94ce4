"""Sources of teacher vectors: models, files, functions."""

import numpy as np
import pytest

from leafkern import Encoder
from leafkern.errors import InputError
from leafkern.textio import write_vectors
from leafkern.train.recipe import load_recipe
from leafkern.train.teacher import open_teacher

TEXTS = {"documents": ["the leaf", "a kernel of search", ""], "queries": ["how to search", "list"]}


def silent(done, total):
    pass


def opened(values, texts=TEXTS):
    recipe = load_recipe({"teacher": values, "student": {"model": "m"}, "data": {"documents": "d"}})
    return open_teacher(recipe.teacher, texts)


def test_model_with_its_prompts(tiny_bert):
    encoder = Encoder.from_pretrained(tiny_bert, device="cpu")
    teacher = opened({"model": str(tiny_bert), "prompts": {"queries": "how "}, "max_length": 8})
    found = teacher.encode(TEXTS["queries"], "queries", silent)
    expected = encoder.encode(["how how to search", "how list"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    documents, queries = teacher.identity("documents"), teacher.identity("queries")
    assert (documents["prompt"], queries["prompt"], queries["max_length"]) == ("", "how ", 8)
    assert queries["norm"] is True
    other = opened({"model": str(tiny_bert), "prompts": {"queries": "how "}, "max_length": 9}).identity("queries")
    assert other == queries | {"max_length": 9}


def test_a_models_own_prompts_are_the_default(tiny_bert, tmp_path):
    encoder = Encoder.from_pretrained(tiny_bert, device="cpu", prompts={"query": "q: ", "passage": "p: "})
    encoder.save_pretrained(tmp_path / "model")
    teacher = opened({"model": str(tmp_path / "model"), "prompts": {"documents": ""}})
    assert teacher.identity("queries")["prompt"] == "q: "
    assert teacher.identity("documents")["prompt"] == ""


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_files_of_vectors(tmp_path, suffix):
    rng = np.random.default_rng()
    values, matrices = {}, {}
    for kind, texts in TEXTS.items():
        matrices[kind] = rng.standard_normal((len(texts), 5)).astype(np.float32)
        order = rng.permutation(len(texts)) if suffix == ".parquet" else np.arange(len(texts))
        values[kind] = str(tmp_path / f"{kind}{suffix}")
        write_vectors(values[kind], matrices[kind][order], [texts[row] for row in order])
    teacher = opened({"vectors": values})
    for kind, texts in TEXTS.items():
        found = teacher.encode(texts[::-1], kind, silent)
        np.testing.assert_array_equal(found, matrices[kind][::-1])
    before = teacher.identity("queries")["revision"]
    write_vectors(values["queries"], matrices["queries"] + 1, TEXTS["queries"])
    assert opened({"vectors": values}).identity("queries")["revision"] != before


def vectors_file(tmp_path, matrix, name="v.npy"):
    write_vectors(tmp_path / name, np.asarray(matrix, np.float32), [f"t{row}" for row in range(len(matrix))])
    return str(tmp_path / name)


def test_counts_must_match(tmp_path):
    path = vectors_file(tmp_path, np.ones((4, 3)))
    with pytest.raises(InputError, match=r"vectors.documents: 4 vectors for the 3 texts"):
        opened({"vectors": {"documents": path}}, {"documents": TEXTS["documents"], "queries": []})


def test_several_files_count_together(tmp_path):
    paths = [vectors_file(tmp_path, np.full((n, 3), n), f"{n}.npy") for n in (1, 2)]
    teacher = opened({"vectors": {"documents": paths}}, {"documents": TEXTS["documents"], "queries": []})
    assert teacher.encode(TEXTS["documents"], "documents", silent)[:, 0].tolist() == [1, 2, 2]
    paths[1] = vectors_file(tmp_path, np.ones((2, 4)), "wide.npy")
    with pytest.raises(InputError, match="widths differ"):
        opened({"vectors": {"documents": paths}}, {"documents": TEXTS["documents"], "queries": []})


@pytest.mark.parametrize(("value", "what"), [(0.0, "all zeros"), (np.nan, "NaN")])
def test_bad_rows_in_files_are_named(tmp_path, value, what):
    matrix = np.ones((3, 3))
    matrix[1] = value
    path = tmp_path / "v.npy"
    np.save(path, matrix)
    with pytest.raises(InputError, match=f"row 1 .*{what}"):
        opened({"vectors": {"documents": str(path)}}, {"documents": TEXTS["documents"], "queries": []})


def test_a_kind_without_vectors_is_named(tmp_path):
    path = vectors_file(tmp_path, np.ones((3, 3)))
    with pytest.raises(InputError, match=r"teacher.vectors.queries: missing"):
        opened({"vectors": {"documents": path}})


def test_parquet_without_a_text_is_named(tmp_path):
    path = vectors_file(tmp_path, np.ones((3, 3)), "v.parquet")
    teacher = opened({"vectors": {"documents": path}}, {"documents": ["t1", "t9"], "queries": []})
    assert teacher.encode(["t1"], "documents", silent).shape == (1, 3)
    with pytest.raises(InputError, match="no vector for text 't9'"):
        teacher.encode(["t1", "t9"], "documents", silent)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "black_box_teacher.py").write_text(
        "import torch\ncalls = []\nnumber = 3\n"
        "def embed(texts):\n    calls.append(texts)\n    return torch.ones(len(texts), 4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "black_box_teacher"


def test_callable(module):
    teacher = opened({"callable": f"{module}:embed", "id": "v1", "prompts": {"queries": "q: "}})
    assert teacher.encode(["a", "b"], "queries", silent).tolist() == [[1.0] * 4] * 2
    assert teacher.function.__globals__["calls"] == [["q: a", "q: b"]]
    other = opened({"callable": f"{module}:embed", "id": "v2"})
    assert "v1" in teacher.identity("documents")["revision"]
    assert teacher.identity("documents") != other.identity("documents")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_such_module_at_all:embed", ["can't be imported", "no_such_module_at_all"]),
        ("black_box_teacher:embde", ["no function 'embde'"]),
        ("black_box_teacher:number", ["int", "not a function"]),
    ],
)
def test_bad_callables_are_named(module, name, parts):
    with pytest.raises(InputError) as caught:
        opened({"callable": name, "id": "1"})
    for part in parts:
        assert part in str(caught.value)
