"""Shards: what one index of the same rows gives, whatever the split; strict about what is missing."""

import contextlib
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leafkern
from leafkern import Index, Shards, cli, files
from leafkern.errors import DamagedFileError, InputError
from leafkern.index.shards import MissingShardWarning, open_index, shard_folders

pytestmark = pytest.mark.filterwarnings("ignore::leafkern.ops._core.backend.FallbackWarning")


def unit(n, d=24, seed=None):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parts(tmp_path):
    """Four shards of 30 rows with string ids and texts, and the one index of all."""
    x = unit(120)
    ids, texts = [f"d{i}" for i in range(120)], [f"text {i}" for i in range(120)]
    folders = []
    for start in range(0, 120, 30):
        part = slice(start, start + 30)
        folders.append(tmp_path / f"part{start}")
        Index.build(folders[-1], x[part], ids=ids[part], texts=texts[part], precision="binary", prompt="p: ")
    return folders, Index.build(tmp_path / "one", x, ids=ids, texts=texts, precision="binary", prompt="p: ")


def same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.usefixtures("threads")
def test_any_split_equals_one_index(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shards")
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any))
    precision = data.draw(st.sampled_from(["int8", "int4", "binary", "ubinary", "float32"]))
    rescore = data.draw(st.sampled_from([None, "float16"]))
    width, k = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 3, 10, 200]))
    seed, kinds = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 60))
    strings = data.draw(st.booleans())
    # Few kinds of rows: equal scores within shards and across them.
    x = unit(kinds, width, seed)[np.random.default_rng(seed).integers(0, kinds, sum(sizes))]
    ids = [f"id {i}" for i in range(len(x))] if strings else list(range(7, 7 + len(x)))
    options = {"precision": precision, "rescore": rescore, "width": width}
    ranges = np.stack([x.min(0), x.max(0)]) if precision in ("int8", "int4") else None
    one = Index.build(folder / "one", x, ids=ids, ranges=ranges, **options)
    start = 0
    for number, size in enumerate(sizes):
        part, shard_ids = x[start : start + size], ids[start : start + size]
        Index.build(folder / f"{number}", part, ids=shard_ids, ranges=ranges if size else None, **options)
        start += size
    shards = Shards.open([folder / f"{number}" for number in range(len(sizes))], width=width)
    assert len(shards) == len(one)
    queries = unit(3, width, seed + 1)
    oversample = data.draw(st.integers(1, 5))
    scores, found = shards.search(queries, k, oversample=oversample)
    expected_scores, expected = one.search(queries, k, oversample=oversample)
    _, rows = shards.search_rows(queries, k, oversample=oversample)
    if precision == "float32":  # a matrix product rounds otherwise where it has another size
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-6)
    else:
        same((scores, found), (expected_scores, expected))
        np.testing.assert_array_equal(rows, one.search_rows(queries, k, oversample=oversample)[1])
    np.testing.assert_array_equal(shards.ids_at(rows), found)
    allowed = np.random.default_rng(seed).random(len(x)) < data.draw(st.sampled_from([0, 0.1, 0.9]))
    for mine, expected in zip(shards.search(queries, k, allowed=allowed), one.search(queries, k, allowed=allowed)):
        if precision == "float32" and mine.dtype == np.float32:
            np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)
        elif precision != "float32":
            np.testing.assert_array_equal(mine, expected)
    shutil.rmtree(folder)


def test_facts_texts_and_refresh(parts):
    folders, one = parts
    shards = Shards.open(folders, width=24, precision="binary", prompt="p: ")
    queries = unit(7)
    same(shards.search(queries, 4, oversample=3), one.search(queries, 4, oversample=3))
    same(shards.search(queries, 4, dim=8), one.search(queries, 4, dim=8))
    same(shards.search(queries[:, :16], 4, dim=8), one.search(queries[:, :16], 4, dim=8))
    _, rows = shards.search_rows(queries, 4)
    np.testing.assert_array_equal(shards.texts_at(rows), one.texts_at(rows))
    assert (len(shards), shards.rescore, shards.encoder, shards.has_texts) == (120, "float16", None, True)
    assert {"count": 120, "shards": 4, "prompt": "p: "}.items() <= shards.info().items()
    shards.verify()
    new = unit(1)
    Index.open(folders[1]).add(new, ids=["new"], texts=["new text"])
    assert "new" not in shards.search(new, 1)[1]
    before = shards.pinned()
    shards.refresh()
    assert (len(before), len(shards)) == (120, 121)
    _, rows = shards.search_rows(new, 1)
    assert (shards.ids_at(rows), shards.texts_at(rows)) == ("new", "new text")
    assert len(shards) == 121
    Index.open(folders[0]).remove(["d3"])
    shards.refresh()
    assert len(shards) == 120
    assert "d3" not in shards.search(queries, 120)[1]
    _, rows = shards.search_rows(new, 1)
    assert shards.ids_at(rows) == "new"


def test_a_missing_shard_is_named(parts):
    folders, one = parts
    queries = unit(5)
    shutil.move(folders[2], folders[2].with_name("gone"))
    with pytest.raises(InputError, match=r"part60: no index here"):
        Shards.open(folders)
    with pytest.warns(MissingShardWarning, match=r"1 of 4 shards can't be read.*part60: no index here") as caught:
        shards = Shards.open(folders, partial=True)
    with pytest.warns(MissingShardWarning, match="part60") as again:
        shards.refresh()
    assert [caught[0].filename, again[0].filename] == [__file__] * 2  # the caller's line, not leafkern's
    assert list(shards.missing) == [folders[2]]
    one.remove([f"d{i}" for i in range(60, 90)])
    same(shards.search(queries, 90), one.search(queries, 90))
    shutil.move(folders[2].with_name("gone"), folders[2])
    shards.refresh()
    assert (len(shards), shards.missing) == (120, {})
    for folder in folders:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError, match="part0"):
        Shards.open(folders, partial=True)


def test_a_shard_damaged_after_opening(parts, monkeypatch):
    folders, _ = parts
    queries = unit(5)
    strict, partial = Shards.open(folders), Shards.open(folders, partial=True)
    candidates = Index.candidates

    def failing(index, *args, **options):
        if index.path == folders[1]:
            raise DamagedFileError(f"{index.path}: damaged")
        return candidates(index, *args, **options)

    monkeypatch.setattr(Index, "candidates", failing)
    with pytest.raises(DamagedFileError, match="part30: damaged"):
        strict.search(queries, 3)
    with pytest.warns(MissingShardWarning, match="1 of 4 shards can't be read.*part30: damaged") as caught:
        _, ids = partial.search(queries, 90)
    assert caught[0].filename == __file__
    assert set(ids[0]) == {f"d{i}" for i in range(120) if not 30 <= i < 60}
    with pytest.raises(InputError, match="k: expected an int >= 1"):
        partial.search(queries, 0)
    with pytest.raises(InputError, match="allowed: expected a bool for each of 120 rows, got 30"):
        partial.search(queries, 3, allowed=[True] * 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": unit(9, 23)}, "width 23, but .*part0 has 24"),
        ({"precision": "int8"}, "precision 'int8', but .* has 'binary'"),
        ({"rescore": None}, "rescore None, but .* has 'float16'"),
        ({"ids": range(9)}, "ids 'int64', but .* has 'string'"),
        ({"texts": None}, "texts False, but .* has True"),
        ({"prompt": "q: "}, "prompt 'q: ', but .* has 'p: '"),
        ({"encoder": "f00d"}, "encoder 'f00d', but .* has None"),
    ],
)
def test_shards_that_differ_are_refused(parts, tmp_path, options, message):
    folders, _ = parts
    names = [f"{i}" for i in range(9)]
    options = {"x": unit(9), "precision": "binary", "ids": names, "texts": names, "prompt": "p: "} | options
    Index.build(tmp_path / "other", options.pop("x"), **options)
    with pytest.raises(InputError, match=f"other: a shard with {message}"):
        Shards.open([*folders, tmp_path / "other"], partial=True)


@pytest.mark.parametrize("precision", ["int8", "int4", "binary"])
@pytest.mark.parametrize("n", [7, 300])
def test_build_equals_one_index(tmp_path, precision, n):
    x, queries = unit(n), unit(4)
    one = Index.build(tmp_path / "one", x, precision=precision, rescore=None)
    whole = Shards.build(tmp_path / "whole", x, shards=3, precision=precision, rescore=None)
    blocks = Shards.build(tmp_path / "blocks", iter(np.array_split(x, 4)), shards=3, precision=precision, rescore=None)
    for name, shards in (("whole", whole), ("blocks", blocks), ("whole", Shards.open(tmp_path / "whole"))):
        assert [len(index) for index in map(Index.open, shard_folders(tmp_path / name))] == [
            n // 3,
            (n + 1) // 3,
            (n + 2) // 3,
        ]
        same(shards.search(queries, 9), one.search(queries, 9))
    assert isinstance(open_index(tmp_path / "whole"), Shards)
    assert isinstance(open_index(tmp_path / "one"), Index)


def test_build_in_place_of_another(tmp_path):
    x = unit(50)
    ids = [f"d{i}" for i in range(50)]
    Shards.build(tmp_path / "s", x, shards=4)
    shards = Shards.build(tmp_path / "s", x, shards=2, ids=ids, texts=ids, precision="float16")
    assert len(list((tmp_path / "s").iterdir())) == 3
    np.testing.assert_array_equal(shards.search(x, 1)[1][:, 0], ids)
    assert len(Shards.build(tmp_path / "none", np.zeros((0, 3), np.float32), shards=1)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards: expected an int from 1 to the number of vectors, 50; got 0"),
        ({"shards": 51}, "shards: .* got 51"),
        ({"shards": True}, "shards: .* got True"),
        ({"ids": [0] * 50}, "ids: 0 is given more than once"),
        ({"ids": [0]}, "ids: 1 for 50 vectors"),
        ({"texts": ["a"]}, "texts: 1 for 50 vectors"),
        ({"precision": "int9"}, "precision: unknown name 'int9'"),
        ({"texts": [*["a"] * 49, 3]}, "texts: row 24 is int"),
    ],
)
def test_build_refuses_and_leaves_what_was_there(tmp_path, options, message):
    x = unit(50)
    options = {"shards": 2} | options
    with pytest.raises(InputError, match=message):
        Shards.build(tmp_path / "s", x, **options)
    assert not (tmp_path / "s").exists()
    Shards.build(tmp_path / "s", x, shards=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        Shards.build(tmp_path / "s", x, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_build_leaves_other_folders_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'a.txt', which is no shard"):
        Shards.build(tmp_path / "notes", unit(9), shards=2)
    with pytest.raises(InputError, match="is a file"):
        Shards.build(tmp_path / "notes" / "a.txt", unit(9), shards=2)
    (tmp_path / "notes" / "a.txt").unlink()
    for name in ("shard-notes", "shard-00000", "shard-0badcafe-00000.bak"):
        (tmp_path / "notes" / name).mkdir()
        for count in (0, 2):
            with pytest.raises(InputError, match=rf"holds '{name}', which is no shard"):
                Shards.build(tmp_path / "notes", unit(9), shards=count)
        (tmp_path / "notes" / name).rmdir()
    with files.writing(tmp_path / "notes"), pytest.raises(InputError, match="another process is writing"):
        Shards.build(tmp_path / "notes", unit(9), shards=2)


def test_a_refused_build_removes_nothing(tmp_path):
    leftover = tmp_path / "s" / "shard-0badcafe-00000"  # of a killed build, or a user's by chance
    leftover.mkdir(parents=True)
    with pytest.raises(InputError, match="shards: expected"):
        Shards.build(tmp_path / "s", unit(9), shards=0)
    assert leftover.exists()
    Shards.build(tmp_path / "s", unit(9), shards=2)
    assert not leftover.exists()


def test_a_failed_build_leaves_a_folder_that_another_took(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    make_folder = files.make_folder

    def taken(path):
        make_folder(path)
        holder.enter_context(files.writing(path))  # another process comes first, and has written nothing yet

    monkeypatch.setattr("leafkern.index.shards.make_folder", taken)
    with contextlib.ExitStack() as holder:
        with pytest.raises(InputError, match="another process is writing"):
            Shards.build(folder, unit(9), shards=2)
        assert folder.is_dir()


def test_a_crash_at_any_step_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """At any step that `files` announces; old shards go after them, by `rmtree`, when nothing names them any more."""
    old, new = unit(6, 3), unit(8, 3)
    folder = tmp_path / "s"
    options = {"precision": "float32", "rescore": None}
    crashed, step = True, 0
    while crashed:
        shutil.rmtree(folder, ignore_errors=True)
        Shards.build(folder, old, shards=2, **options)
        seen, crashed = 0, False

        def crash(name, path, at=step):
            nonlocal seen
            if seen == at:
                raise KeyboardInterrupt
            seen += 1

        with monkeypatch.context() as patch:
            patch.setattr(files, "on_step", crash)
            # As after a kill: nothing is taken back.
            patch.setattr("leafkern.index.shards._discard", lambda *args: None)
            try:
                Shards.build(folder, new, shards=2, **options)
            except KeyboardInterrupt:
                crashed = True
        shards = Shards.open(folder)
        shards.verify()
        assert len(shards) in ((6, 8) if crashed else (8,))
        x = {6: old, 8: new}[len(shards)]
        np.testing.assert_array_equal(shards.search(x, 1)[1][:, 0], np.arange(len(x)))
        assert len(Shards.build(folder, new, shards=3, **options)) == 8
        assert len(list(folder.iterdir())) == 4
        step += 1
    assert step > 15


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", DamagedFileError, "not a readable list of shards"),
        ("[]", DamagedFileError, "not a list of shards"),
        ({"format": "other"}, DamagedFileError, "not a list of shards .format 'other'"),
        ({"version": 2}, InputError, "format version 2; this leafkern reads version 1"),
        ({"shards": []}, DamagedFileError, "entry 'shards'"),
        ({"shards": [1]}, DamagedFileError, "1 is not the name"),
        ({"shards": "shard"}, DamagedFileError, "entry 'shards'"),
        ({"shards": ["a", "a"]}, DamagedFileError, "entry 'shards'"),
        ({"shards": ["../one"]}, DamagedFileError, "'../one' is not the name of a folder in it"),
        ({"shards": [""]}, DamagedFileError, "outside the folder"),
        ({"shards": ["a\0"]}, DamagedFileError, "is not the name"),
        ({"shards": ["\ud800"]}, DamagedFileError, "is not the name"),
        ({"shards": ["é" * 200]}, DamagedFileError, "is not the name"),
        ({"shards": ["absent"]}, InputError, "absent: no index here"),
    ],
)
def test_damaged_lists_are_named(tmp_path, content, error, message):
    shards = Shards.build(tmp_path / "s", unit(9), shards=2)
    file = tmp_path / "s" / "shards.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    with pytest.raises(error, match=message):
        Shards.open(tmp_path / "s")
    assert len(Shards.build(tmp_path / "s", unit(9), shards=2)) == len(shards)


def test_command_line(tmp_path, tiny_bert, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["leafkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    texts = ["the leaf", "a kernel of search", "how to list a file", "python"]
    encoder = leafkern.Encoder.from_pretrained(tiny_bert, device="cpu")
    Shards.build(tmp_path / "s", encoder.encode(texts), shards=3, ids=list("abcd"), texts=texts, encoder=encoder)
    for number, text in enumerate(texts):
        (found,) = json.loads(run("search", tmp_path / "s", tiny_bert, text, "-k", 1, "--json"))["results"]
        assert (found["id"], found["text"]) == ("abcd"[number], text)
    assert {"count": 4, "shards": 3}.items() <= json.loads(run("index", "info", tmp_path / "s", "--json")).items()
    assert "4 vectors, as written" in run("index", "verify", tmp_path / "s")
    with pytest.raises(InputError, match=r"s: a folder of shards; name one of the indexes in it"):
        Index.open(tmp_path / "s")


def test_what_is_no_folder_of_shards(tmp_path):
    Index.build(tmp_path / "one", unit(9))
    with pytest.raises(InputError, match=r"no shards here \(there is no shards.json\)"):
        Shards.open(tmp_path / "one")
    with pytest.raises(InputError, match="an empty list"):
        Shards.open([])
    with pytest.raises(InputError, match="one is named more than once"):
        Shards.open([tmp_path / "one", str(tmp_path / "one")])
    with pytest.raises(InputError, match=r"rows: expected row numbers from 0 to 8"):
        Shards.open([tmp_path / "one"]).ids_at([9])


def test_shards_replaced_while_they_are_opened(tmp_path, monkeypatch):
    folder, x, y = tmp_path / "s", unit(9), unit(8)
    options = {"shards": 2, "precision": "float32", "rescore": None}
    opened, open_one = Shards.build(folder, x, **options), Index.open
    for partial, error in ((False, None), (True, None), (False, FileNotFoundError("manifest.json"))):
        replace = [error]

        def replacing(path, replace=replace):
            if replace:
                error = replace.pop()
                Shards.build(folder, y, **options)
                if error:  # the manifest vanished after it had been seen
                    raise error
            return open_one(path)

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.setattr(Index, "open", replacing)
            shards = Shards.open(folder, partial=partial)
        np.testing.assert_array_equal(shards.search(y, 1)[1][:, 0], range(8))
    # What was open stays what it was, until it is refreshed.
    np.testing.assert_array_equal(opened.search(x, 1)[1][:, 0], range(9))
    opened.refresh()
    np.testing.assert_array_equal(opened.search(y, 1)[1][:, 0], range(8))
