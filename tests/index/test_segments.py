"""An index of many segments, with rows removed, compacted, rotated, searched by prefixes: as if built at once."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leafkern import Index
from leafkern.errors import DamagedFileError, InputError
from leafkern.index import PRECISIONS
from leafkern.index.shards import Shards
from leafkern.index.vectors import random_rotation
from leafkern.ops import calibrate, quantize, search
from leafkern.ops.retrieval import rescore_candidates

pytestmark = pytest.mark.filterwarnings(
    "ignore::leafkern.ops._core.backend.FallbackWarning", "ignore::leafkern.index.ClippedWarning"
)
WIDTH = 16
SIDES = np.float32([[-1] * WIDTH, [1] * WIDTH])


def coarse_vectors(rng, n):
    """Eighths, so that float32 sums are exact whatever their order; few values, so that many rows tie."""
    x = rng.integers(-8, 9, (n, WIDTH)).astype(np.float32) / 8
    x[rng.random(n) < 0.3] = 0.5
    return x


def unit_vectors(n):
    x = np.random.default_rng().normal(size=(n, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Model:
    """What the index should hold: ids, vectors and texts in order of insertion."""

    def __init__(self, names):
        self.names, self.rows, self.next = names, [], 0

    def new(self, rng, n):
        ids = [self.next + i for i in range(n)]
        self.next += n
        ids = [f"n{i}" for i in ids] if self.names else ids
        vectors = coarse_vectors(rng, n)
        self.rows += [(i, v, f"text {i} ✓") for i, v in zip(ids, vectors)]
        return vectors, ids, [f"text {i} ✓" for i in ids]

    def part(self, place):
        return [row[place] for row in self.rows]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40)),
        st.tuples(st.just("remove"), st.floats(0, 1)),
        st.tuples(st.just("compact"), st.sampled_from([None, 1, 15, 30])),
    ),
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(
    operations=OPERATIONS,
    precision=st.sampled_from(PRECISIONS),
    rescore=st.sampled_from([None, "float16"]),
    names=st.booleans(),
    first=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_any_history_equals_one_build(tmp_path_factory, operations, precision, rescore, names, first, seed):
    folder, rng, model = tmp_path_factory.mktemp("history"), np.random.default_rng(seed), Model(names)
    rescore = None if precision in ("float32", "float16") else rescore
    options = {"precision": precision, "rescore": rescore}
    if precision in ("int8", "int4"):
        options["ranges"] = SIDES
    vectors, ids, texts = model.new(rng, first)
    index = Index.build(folder / "i", vectors, ids=ids, texts=texts, **options)
    for operation, how_many in operations:
        before = {file.name: file.read_bytes() for file in index.path.iterdir()}
        if operation == "add":
            vectors, ids, texts = model.new(rng, how_many)
            index.add(vectors, ids, texts=texts)
        elif operation == "remove":
            gone = {row[0] for row in model.rows if rng.random() < how_many}
            model.rows = [row for row in model.rows if row[0] not in gone]
            assert index.remove(list(gone)) == len(gone)
        else:
            index.compact(smaller_than=how_many)
            assert how_many is not None or (index.info()["segments"] <= 1 and index.info()["deleted"] == 0)
        if operation != "compact":  # nothing is written again
            assert all(
                file.read_bytes() == before[file.name] for file in index.path.glob("segment-*") if file.name in before
            )
        if operation != "compact" and model.rows:
            assert {name for name in before if name.startswith("segment-")} <= {f.name for f in index.path.iterdir()}
        if not model.rows and precision in ("int8", "int4"):
            return  # its ranges are gone with its rows
    opened = Index.open(folder / "i")
    opened.verify()
    assert len(index) == len(opened) == len(model.rows)
    rows = opened.rows()
    assert opened.ids_at(rows).tolist() == model.part(0)
    assert opened.texts_at(rows).tolist() == model.part(2)
    if not model.rows:
        assert opened.search(coarse_vectors(rng, 2), 3)[0].shape == (2, 0)
        return
    whole = Index.build(folder / "whole", np.stack(model.part(1)), ids=model.part(0), **options)
    np.testing.assert_array_equal(opened.vectors_at(rows), whole.vectors_at(whole.rows()))
    queries = coarse_vectors(rng, 5)
    bits = [None, 1, 8] if precision in ("binary", "ubinary") else [None]
    for k, query_bits, searched in [(1, None, index), *((k, each, opened) for k in (4, 500) for each in bits)]:
        scores, found = searched.search(queries, k, query_bits=query_bits, oversample=2)
        expected_scores, expected = whole.search(queries, k, query_bits=query_bits, oversample=2)
        assert found.tolist() == expected.tolist()
        np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("rescore", [None, "float32"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_segments_and_shards_tell_apart_what_float32_does_not(tmp_path, precision, rescore):
    """Offsets that far outweigh what a code is worth: scores of different integers are equal in float32."""
    rng = np.random.default_rng()
    x = rng.random((400, 4)).astype(np.float32)
    x[:, 0] += 1_000_000
    ranges = np.float32([[1e6, 0, 0, 0], [1e6, 1, 1, 1]])
    queries = np.float32(rng.random((7, 4)) + 0.5)
    base, fine = quantize(torch.from_numpy(x), precision, ranges=torch.from_numpy(ranges)), torch.from_numpy(x)
    options = {"precision": precision, "rescore": rescore, "ranges": ranges}
    index = Index.build(tmp_path / "i", x[:30], **options)
    for start, stop in ((30, 31), (31, 250), (250, 400)):
        index.add(x[start:stop])
    Index.build(tmp_path / "a", x[:30], **options)
    other = Index.build(tmp_path / "b", x[30:240], ids=range(30, 240), **options)
    other.add(x[240:], ids=range(240, 400))
    whole = Index.build(tmp_path / "whole", x, **options)
    shards = Shards.open([tmp_path / "a", tmp_path / "b"])
    for k in (1, 2, 9, 400):
        scores, rows = search(torch.from_numpy(queries), base, k, rescore=None if rescore is None else fine)
        assert k < 400 or rescore or (scores[:, 1:] == scores[:, :-1]).float().mean() > 0.5
        for searched in (whole, index, shards):
            found = searched.search(queries, k)
            np.testing.assert_array_equal(found[1], rows.numpy())
            np.testing.assert_array_equal(found[0], scores.numpy())


def test_row_numbers_stay_until_compaction(tmp_path):
    x = unit_vectors(150)
    index = Index.build(tmp_path / "i", x[:120], precision="float32")
    index.add(x[120:])
    index.remove([3, 5, 130])
    live = np.delete(np.arange(150), [3, 5, 130])
    assert index.rows().tolist() == live.tolist()
    assert index.search_rows(x[live], 1)[1][:, 0].tolist() == live.tolist()
    assert index.info()["deleted"] == 3
    np.testing.assert_array_equal(index.vectors_at(live), x[live])
    assert index.vectors_at(live[:6].reshape(3, 2)).shape == (3, 2, WIDTH)
    assert index.vectors_at(live[:0]).shape == (0, WIDTH)
    with pytest.raises(InputError, match="ids: 3 is not in the index"):
        index.remove([3])
    index.add(x[[3]], ids=[3])  # a removed id may come again
    assert index.search(x[[3]], 1)[1] == 3
    assert index.search_rows(x[[3]], 1)[1] == 150
    for rows in ([151], [-1], [0.5]):
        with pytest.raises(InputError, match="rows: expected row numbers from 0 to 150"):
            index.ids_at(np.array(rows))
    assert index.compact() == 3
    assert index.compact() == 0
    assert index.rows().tolist() == list(range(148))
    assert index.ids_at(index.rows()).tolist() == [*live.tolist(), 3]
    with pytest.raises(InputError, match="smaller_than: expected an int >= 1 or None, got 0"):
        index.compact(smaller_than=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_search_among_allowed_rows(tmp_path, precision):
    x = unit_vectors(200)
    rescore = None if precision in ("float32", "float16") else "float16"
    index = Index.build(tmp_path / "i", x, precision=precision, rescore=rescore)
    ranges = index._state.segments[0].tensors.get("codes_ranges")
    for pieces in (1, 3):
        if pieces > 1:
            index = Index.build(tmp_path / "i", x[:50], precision=precision, rescore=rescore, ranges=ranges)
            index.add(x[50:90])
            index.add(x[90:])
        index.remove([0, 60, 61])
        for share in (0.5, 0.02, 0.0):
            allowed = np.random.default_rng().random(200) < share
            kept = np.flatnonzero(allowed & ~np.isin(np.arange(200), [0, 60, 61]))
            found = index.search(x[:3], 7, allowed=allowed)
            assert found[1].shape == (3, min(7, len(kept)))
            if len(kept):
                alone = Index.build(
                    tmp_path / "alone", x[kept], ids=kept, precision=precision, rescore=rescore, ranges=ranges
                )
                for ours, expected in zip(found, alone.search(x[:3], 7)):
                    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
        assert index.search(x[:3], 7, allowed=torch.ones(200, dtype=torch.bool))[0].shape == (3, 7)
    for allowed in (np.ones(197, bool), np.ones(200), np.ones((200, 1), bool)):
        with pytest.raises(InputError, match="allowed: expected a bool for each of 200 rows, removed ones included"):
            index.search(x[:3], 7, allowed=allowed)


def test_compaction_of_small_segments_only(tmp_path):
    x = unit_vectors(200)
    index = Index.build(tmp_path / "i", x[:100])
    big = index._state.segments[0].path.name
    for start, stop in ((100, 110), (110, 120), (120, 190), (190, 200)):
        index.add(x[start:stop])
    index.remove([0, 119])
    assert index.compact(smaller_than=20) == 2  # the last stands alone and is whole
    assert [len(part) for part in index._state.segments] == [100, 19, 70, 10]
    assert index._state.segments[0].path.name == big
    assert index.info()["deleted"] == 1
    assert index.search(x[1:119], 1)[1][:, 0].tolist() == list(range(1, 119))
    index.remove(range(190, 200))
    assert index.compact(smaller_than=20) == 1
    assert [len(part) for part in index._state.segments] == [100, 19, 70]
    index.verify()


def test_compaction_takes_the_memory_of_a_block(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr("leafkern.index.writer._BLOCK_BYTES", 1 << 17)
    rng, names = np.random.default_rng(), [f"name {i}" * 3 for i in range(40_000)]
    x = rng.normal(size=(40_000, 64)).astype(np.float32)
    index = Index.build(tmp_path / "i", x[:30_000], ids=names[:30_000], texts=names[:30_000])
    index.add(x[30_000:], names[30_000:], texts=names[30_000:])
    index.remove(names[5:30_000:7])
    index._state.segments[0].allowed  # noqa: B018 (a byte per row, which search needs as well)
    tracemalloc.start()
    index.compact()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    index.verify()
    assert index.info()["bytes"] > 7e6
    assert peak < 2e6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefixes(tmp_path, precision):
    """dim=: the first stage on a prefix of the codes; wider queries are scored again on as many dimensions."""
    rng, d = np.random.default_rng(), 8
    x, queries = coarse_vectors(rng, 130), torch.from_numpy(coarse_vectors(rng, 6))
    for rescore in (None, "float16"):
        ranges = calibrate(torch.from_numpy(x[:70]), precision) if precision in ("int8", "int4") else None
        index = Index.build(tmp_path / f"{rescore}", x[:70], precision=precision, rescore=rescore, ranges=ranges)
        index.add(x[70:])
        base = quantize(torch.from_numpy(x), precision, ranges=ranges)
        fine = quantize(torch.from_numpy(x), rescore) if index.rescore else None
        narrow = base.prefix(d)
        assert narrow.codes.data_ptr() == base.codes.data_ptr()
        expected = search(queries[:, :d].contiguous(), narrow, 5, rescore=fine.prefix(d) if fine else None)
        for ours, theirs in zip(index.search(queries[:, :d], 5, dim=d), expected):
            np.testing.assert_array_equal(ours, theirs.numpy())
        bits = {"query_bits": 8} if precision in ("binary", "ubinary") else {}
        for wide in (12, WIDTH):
            if wide == 12 and not fine and precision in ("binary", "ubinary"):
                continue
            _, candidates = search(queries[:, :d].contiguous(), narrow, 20, **bits)
            level = (fine or base).prefix(wide)
            parts = level.codes, level.scale, level.offset, level.precision
            expected = rescore_candidates(queries[:, :wide].contiguous(), *parts, candidates, 5)
            for ours, theirs in zip(index.search(queries[:, :wide], 5, dim=d), expected):
                np.testing.assert_array_equal(ours, theirs.numpy())
        for ours, theirs in zip(index.search(queries, 5, dim=WIDTH), index.search(queries, 5)):
            np.testing.assert_array_equal(ours, theirs)
    for dim, width, message in (
        (0, WIDTH, "dim: expected an int from 1 to 16, got 0"),
        (17, WIDTH, "dim: expected an int from 1 to 16, got 17"),
        (8, 7, r"queries: expected from 8 \(dim\) to 16 dimensions, got 7"),
        (None, 8, "width: .* built with width 16, not 8"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(queries[:, :width], 5, dim=dim)
    per = {"int4": 2, "binary": 8, "ubinary": 8}.get(precision)
    if per:
        with pytest.raises(InputError, match=f"dim: {precision} codes end only at multiples of {per}, got 9"):
            index.search(queries, 5, dim=9)


@pytest.mark.parametrize("precision", ["float32", "int8", "int4", "binary"])
def test_rotation(tmp_path, precision):
    rng = np.random.default_rng()
    x = rng.normal(size=(300, 24)).astype(np.float32) * 4.0 ** -np.arange(24, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rescore = None if precision == "float32" else "float32"
    index = Index.build(tmp_path / "i", x[:200], precision=precision, rescore=rescore, rotate=5)
    index.add(x[200:])
    index.remove([7])
    index.compact()
    assert index.rotates
    assert index.info()["rotates"]
    live = np.delete(np.arange(300), 7)
    opened = Index.open(tmp_path / "i")
    opened.verify()
    scores, ids = opened.search(x[:9], 300, oversample=1)
    exact = x[:9].astype(np.float64) @ x.astype(np.float64).T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, ids, 1), atol=2e-6)
    np.testing.assert_allclose(opened.vectors_at(opened.rows()), x[live], atol=2e-6)
    rotation = random_rotation(24, 5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24), atol=1e-6, rtol=0)
    again = quantize(
        (torch.from_numpy(x[:9]).double() @ rotation.double()).float(),
        precision,
        **({"ranges": opened._state.segments[0].tensors["codes_ranges"]} if precision in ("int8", "int4") else {}),
    )
    live_first = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])
    assert torch.equal(opened._state.segments[0].tensors["codes"][:8], again.codes[live_first])
    with pytest.raises(InputError, match=r"dim: the vectors of .* are rotated"):
        opened.search(x[:1, :8], 1, dim=8)
    file = next(opened.path.glob("rotation-*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{file.name}: damaged: SHA-256"):
        Index.open(opened.path).verify()
    file.unlink()
    with pytest.raises(DamagedFileError, match=f"{file.name}: the manifest names this file, but it is missing"):
        Index.open(opened.path)


def test_rotation_arguments(tmp_path):
    x = unit_vectors(120)
    for rotate in (-1, "yes", 1.5):
        with pytest.raises(InputError, match="rotate: expected True, False or a seed >= 0"):
            Index.build(tmp_path / "i", x, rotate=rotate)
    with pytest.raises(InputError, match="ranges: a rotated index takes them from the rotated vectors"):
        Index.build(tmp_path / "i", x, rotate=True, ranges=calibrate(torch.from_numpy(x), "int8"))
    assert not Index.build(tmp_path / "i", x).rotates
    empty = Index.build(tmp_path / "i", x[:0], rotate=True)
    empty.add(x)
    same = Index.build(tmp_path / "j", x, rotate=0)
    for name, tensor in same._state.segments[0].tensors.items():
        assert torch.equal(tensor, empty._state.segments[0].tensors[name])
    Index.build(tmp_path / "i", x, rotate=False)
    assert not list((tmp_path / "i").glob("rotation-*"))


def test_source_changes_with_the_vectors(tmp_path):
    x = unit_vectors(120)
    index = Index.build(tmp_path / "i", x, source={"file": "a.txt", "rows": 120})
    index.add(x[:2])
    assert Index.open(tmp_path / "i").source == {"file": "a.txt", "rows": 120}
    index.add(x[:2], source={"rows": 122})
    index.add(x[:0], source={"rows": 123, "done": True})
    index.remove([0])
    index.compact()
    assert Index.open(tmp_path / "i").source == index.source == {"rows": 123, "done": True}
    for source in (3, {"a": {1}}, {1: 2}, {"a": float("nan")}):
        with pytest.raises(InputError, match="source: expected a dict that JSON holds as it is"):
            index.add(x[:2], source=source)


def test_refresh(tmp_path):
    x = unit_vectors(120)
    writer = Index.build(tmp_path / "i", x)
    reader = Index.open(tmp_path / "i")
    assert not reader.refresh()
    writer.add(x[:2])
    assert len(reader) == 120
    assert reader.refresh()
    assert len(reader) == 122
    assert reader._state.segments[0].tensors["codes"].data_ptr()
    writer.remove([0])
    writer.compact()
    assert reader.search(x[:1], 1)[1] == 0  # what it has mapped stays whole
    with pytest.raises(InputError, match="changed on disk since it was opened; refresh it"):
        reader.verify()
    reader.refresh()
    reader.remove([120])  # and it may write
    Index.build(tmp_path / "i", x[:7, :8], precision="binary")
    reader.refresh()
    assert (len(reader), reader.width, reader.precision) == (7, 8, "binary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2}, "segment-.* has 100 rows, deleted"),
        ({"count": 0}, "has 100 rows, deleted"),
        ({"count": 101}, "has 100 rows, deleted"),
        ({"file": "segment-0123456789abcdef.safetensors"}, "which is no deleted file of an index"),
        ({"bytes": 3}, "truncated or altered"),
        ({"sha256": None}, "entry 'sha256' is missing or of the wrong type"),
    ],
)
def test_damaged_tombstones(tmp_path, change, message):
    x = unit_vectors(120)
    index = Index.build(tmp_path / "i", x[:100])
    index.add(x[100:])
    index.remove([3])
    file = tmp_path / "i" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["segments"][0]["deleted"] |= change
    if change == {"count": 2}:  # consistent, but not what the file marks
        manifest["count"] -= 1
        message = "deleted-.*: marks 1 rows, the manifest says 2"
    file.write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError, match=message):
        Index.open(tmp_path / "i").search(x[:1], 1)
