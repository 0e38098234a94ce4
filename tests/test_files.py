"""Atomic writing: a process that ends at any step leaves the old or the new state, never a mixture or nothing."""

import os
import sys

import pytest

from leafkern import files
from leafkern.errors import InputError

fcntl = files.fcntl
posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def save(path, content):
    with files.atomic_folder(path) as folder:
        (folder / "sub" / "deep").mkdir(parents=True)
        for name in ("a", "sub/b", "sub/deep/c"):
            (folder / name).write_text(content)


def content(path):
    return {(path / name).read_text() for name in ("a", "sub/b", "sub/deep/c")}


def exit_status_of(work):
    """The exit status of a child process that does `work`; nothing of the parent's is cleaned up in it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@posix_only
@pytest.mark.parametrize("exchange", [True, False])
def test_a_killed_save_leaves_a_whole_folder(tmp_path, monkeypatch, exchange):
    if exchange and sys.platform != "linux":
        pytest.skip("only Linux swaps folders in one step")
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    seen = []
    for crash_at in range(40):
        path, steps = tmp_path / str(crash_at) / "model", []
        save(path, "old")

        def step(name, where, steps=steps, crash_at=crash_at):
            steps.append((name, where))
            if len(steps) - 1 == crash_at:
                os._exit(9)

        with monkeypatch.context() as patch:
            patch.setattr(files, "on_step", step)
            status = exit_status_of(lambda path=path: save(path, "new"))
        assert status in (0, 9)
        if path.exists():
            (state,) = content(path)
        else:
            (aside,) = path.parent.glob(f"{files.TEMPORARY}*-old-*")
            assert content(aside) == {"old"}
            state = "aside"
        seen.append(state)
        if status == 0:
            assert [entry.name for entry in path.parent.iterdir()] == ["model"]
            break
    # write, three files, two folders and the folder around them; then the renames; then the parent.
    assert seen == ["old"] * 8 + ([] if exchange else ["aside"]) + ["new", "new"]


def test_an_interrupted_save_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    save(tmp_path / "model", "old")
    renames = []

    def step(name, where):
        renames.extend([where] * (name == "rename"))
        if len(renames) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "on_step", step)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "model", "new")
    assert content(tmp_path / "model") == {"old"}
    assert len(list(tmp_path.iterdir())) == 1


@posix_only
def test_the_lock_ends_with_its_process(tmp_path):
    def hold():
        files.writing(tmp_path).__enter__()
        os._exit(0)

    assert exit_status_of(hold) == 0
    with files.writing(tmp_path):
        with pytest.raises(InputError, match="another process is writing it"):
            with files.writing(tmp_path):
                pass


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, how):
        raise OSError(files.errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="lies on a file system without locks"), files.writing(tmp_path):
        pass


@posix_only
def test_the_lock_is_a_file_that_goes(tmp_path):
    with files.writing(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == [files.LOCK]
        files.remove_leftovers(tmp_path)
        for _ in range(2):
            with pytest.raises(InputError, match="another process is writing it"), files.writing(tmp_path):
                pass
        assert [entry.name for entry in tmp_path.iterdir()] == [files.LOCK]
    assert not list(tmp_path.iterdir())
    (tmp_path / files.LOCK).touch()  # of a writer that was killed
    with files.writing(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@posix_only
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    with files.writing(tmp_path):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)
        os.close(ours)
        file = os.open(tmp_path / files.LOCK, os.O_RDWR)
    try:  # not only because the name is gone
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with files.writing(tmp_path):
            pass
    finally:
        os.close(file)
        os.close(theirs)
        os.waitpid(child, 0)
