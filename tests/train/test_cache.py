"""The teacher cache: what it holds, what it survives, and what it refuses."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from leafkern.errors import DamagedFileError, InputError
from leafkern.train import cache as cache_module
from leafkern.train.cache import TeacherCache, text_key

IDENTITY = {"revision": "r1", "prompt": "", "max_length": 64, "pooling": "mean", "norm": True, "compute": "default"}


def vectors_of(texts, dim=7):
    """Unit vectors that depend on the text alone."""
    seeds = [int.from_bytes(text_key(text)[:4], "little") for text in texts]
    rows = np.stack([np.random.default_rng(seed).standard_normal(dim) for seed in seeds])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Source:
    """Counts how often each text is encoded; can break at a text."""

    def __init__(self, breaks_at=None):
        self.encoded, self.breaks_at = [], breaks_at

    def __call__(self, texts, progress):
        if self.breaks_at in texts:
            raise KeyboardInterrupt
        self.encoded.extend(texts)
        progress(len(texts), len(texts))
        return vectors_of(texts)


@pytest.fixture
def texts():
    return [f"text number {number} ü" for number in range(25)]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 6)


@pytest.fixture
def filled(tmp_path, texts, small_shards):
    cache = TeacherCache(tmp_path / "cache", IDENTITY, "float32")
    cache.fill(texts, Source(), "source")
    return tmp_path / "cache"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 5e-4)])
def test_rows_are_found_by_text(tmp_path, texts, small_shards, dtype, tolerance):
    cache = TeacherCache(tmp_path / "cache", IDENTITY, dtype)
    seen = []
    assert cache.fill(texts + texts[:4], Source(), "source", lambda done, total: seen.append((done, total))) == 25
    assert seen[-1] == (25, 25)
    for opened in (cache, TeacherCache(tmp_path / "cache", IDENTITY, dtype)):
        assert (len(opened), opened.dim, opened.unit_norm) == (25, 7, True)
        order = np.random.default_rng().permutation(25)
        wanted = [texts[row] for row in order]
        found = opened.vectors(opened.rows(wanted))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), vectors_of(wanted), atol=tolerance, rtol=0)
    assert len(shards(tmp_path / "cache")) == 5


def test_interrupted_cache_goes_on_at_a_shard(tmp_path, texts, small_shards):
    cache = TeacherCache(tmp_path / "cache", IDENTITY)
    broken = Source(breaks_at=texts[16])
    with pytest.raises(KeyboardInterrupt):
        cache.fill(texts, broken, "source")
    again = TeacherCache(tmp_path / "cache", IDENTITY)
    assert len(again) == 12
    source = Source()
    again.fill(texts, source, "source")
    assert source.encoded == texts[12:]
    more = Source()
    assert TeacherCache(tmp_path / "cache", IDENTITY).fill(["new", *texts], more, "source") == 1
    assert more.encoded == ["new"]


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "fsync-folder"])
def test_disk_full_leaves_earlier_shards(tmp_path, texts, small_shards, monkeypatch, step):
    folder = tmp_path / "cache"
    cache = TeacherCache(folder, IDENTITY)

    def full(name, path):
        if name == step and len(shards(folder)) >= 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("leafkern.files.on_step", full)
    with pytest.raises(OSError, match="No space"):
        cache.fill(texts, Source(), "source")
    monkeypatch.undo()
    again = TeacherCache(folder, IDENTITY)
    assert len(again) >= 12
    again.fill(texts, Source(), "source")
    # float16 rounding of entries below 1.
    np.testing.assert_allclose(again.vectors(again.rows(texts)).numpy(), vectors_of(texts), atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"), [("revision", "r2"), ("prompt", "query: "), ("max_length", 128), ("pooling", "cls")]
)
def test_stale_cache_is_refused(filled, name, value):
    with pytest.raises(InputError, match="stale") as caught:
        TeacherCache(filled, {**IDENTITY, name: value}, "float32")
    for part in (name, repr(value), repr(IDENTITY[name]), "teacher.cache"):
        assert part in str(caught.value)


def test_other_dtype_is_refused(filled):
    with pytest.raises(InputError, match="stale: its dtype is 'float32'"):
        TeacherCache(filled, IDENTITY, "float16")


def test_truncated_shard_is_named(filled):
    path = shards(filled)[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match=f"{path.name}.*truncated"):
        TeacherCache(filled, IDENTITY, "float32")


def test_altered_byte_is_named(filled):
    path = shards(filled)[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{path.name}: altered"):
        TeacherCache(filled, IDENTITY, "float32")


def test_foreign_and_misaligned_shards_are_named(filled, tmp_path):
    path = shards(filled)[0]
    tensors = load_file(path)
    save_file(tensors, path, {"identity": "other"})
    with pytest.raises(DamagedFileError, match=f"{path.name}: foreign"):
        TeacherCache(filled, IDENTITY, "float32")
    fingerprint = TeacherCache(tmp_path / "other", IDENTITY, "float32")._fingerprint
    save_file({"keys": tensors["keys"][1:], "vectors": tensors["vectors"]}, path, {"identity": fingerprint})
    with pytest.raises(DamagedFileError, match=f"{path.name}: misaligned"):
        TeacherCache(filled, IDENTITY, "float32")


def test_a_removed_shard_is_encoded_again(filled, texts):
    even = filled.parent / "even"  # whose last shard stands where the row count without the second one points
    TeacherCache(even, IDENTITY, "float32").fill(texts[:24], Source(), "source")
    for folder, held in ((filled, texts), (even, texts[:24])):
        shards(folder)[1].unlink()
        cache, source = TeacherCache(folder, IDENTITY, "float32"), Source()
        assert cache.missing(held) == held[6:12]
        cache.fill(held, source, "source")
        assert source.encoded == held[6:12]
        again = TeacherCache(folder, IDENTITY, "float32")
        assert again.missing(held) == []
        np.testing.assert_array_equal(again.vectors(again.rows(held)).numpy(), vectors_of(held))


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "cache.json").write_text('{"format": "recipes"}')
    with pytest.raises(DamagedFileError, match="leafkern teacher cache"):
        TeacherCache(tmp_path, IDENTITY)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"cache\.json"):
        TeacherCache(tmp_path, IDENTITY)


@pytest.mark.parametrize(("value", "what"), [(0.0, "all zeros"), (np.nan, "NaN or infinity"), (np.inf, "NaN")])
def test_bad_vectors_of_a_teacher_are_named(tmp_path, texts, small_shards, value, what):
    def encode(block, progress):
        vectors = vectors_of(block)
        vectors[[text == texts[11] for text in block]] = value
        return vectors

    with pytest.raises(InputError, match=what) as caught:
        TeacherCache(tmp_path, IDENTITY).fill(texts, encode, "teacher x")
    assert "row 11" in str(caught.value)
    assert texts[11] in str(caught.value)


def test_values_beyond_float16_are_named(tmp_path, texts):
    with pytest.raises(InputError, match="row 0 does not fit float16"):
        TeacherCache(tmp_path, IDENTITY).fill(texts, lambda block, _: vectors_of(block) * 1e6, "teacher x")


@pytest.mark.parametrize(
    "encode",
    [
        lambda block, _: vectors_of(block)[1:],
        lambda block, _: vectors_of(block)[0],
        lambda block, _: vectors_of(block).astype(np.int32),
    ],
)
def test_wrong_shapes_of_a_teacher_are_refused(tmp_path, texts, encode):
    with pytest.raises(InputError, match="teacher x: gave"):
        TeacherCache(tmp_path, IDENTITY).fill(texts, encode, "teacher x")


def test_changed_width_is_refused(filled):
    cache = TeacherCache(filled, IDENTITY, "float32")
    with pytest.raises(InputError, match="7"):
        cache.fill(["new"], lambda block, _: vectors_of(block, dim=8), "teacher x")


def test_bad_rows_inside_a_cache_are_named(filled, texts):
    path = shards(filled)[1]
    tensors = load_file(path)
    tensors["vectors"][2] = 0
    cache = TeacherCache(filled, IDENTITY, "float32")
    checksum = cache_module._checksum(tensors["keys"], tensors["vectors"])
    save_file(tensors, path, {"identity": cache._fingerprint, "checksum": checksum})
    cache = TeacherCache(filled, IDENTITY, "float32")
    cache.rows(texts[:8])
    with pytest.raises(InputError, match="row 8 is zero or not finite") as caught:
        cache.rows(texts)
    assert texts[8] in str(caught.value)


def test_missing_text_is_named(filled):
    with pytest.raises(InputError, match="no vector for text 'nowhere'"):
        TeacherCache(filled, IDENTITY, "float32").rows(["nowhere"])


def test_unit_norm_is_measured(tmp_path, texts):
    cache = TeacherCache(tmp_path, IDENTITY)
    assert not cache.unit_norm
    cache.fill(texts[:5], Source(), "source")
    assert cache.unit_norm
    cache.fill(texts[5:6], lambda block, _: vectors_of(block) * 1.02, "source")
    assert not cache.unit_norm


def test_nothing_to_do(tmp_path):
    cache = TeacherCache(tmp_path, IDENTITY)
    assert cache.fill([], Source(), "source") == 0
    assert cache.rows([]).shape == (0,)
    assert cache.vectors(np.empty(0, np.int64)).shape == (0, 0)
