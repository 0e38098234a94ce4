"""Writing to disk so that a crash at any point leaves the previous state whole.

Temporary name in the same folder -> write -> fsync -> rename -> fsync of the folder. Every step first calls
`on_step`, so that tests can crash at each of them.
"""

import ctypes
import errno
import glob
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leafkern.errors import DamagedFileError, InputError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

TEMPORARY = ".leafkern-tmp-"
LOCK = f"{TEMPORARY}lock"
# Reading the umask means setting it for a moment, which other threads would notice: hence only once, at import.
_UMASK = os.umask(0o022)
os.umask(_UMASK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def on_step(step: str, path: Path) -> None:
    """Called before each "write", "fsync", "rename", "fsync-folder", "remove"; tests replace it to inject crashes."""


def existing(path: str | os.PathLike) -> Path:
    """`path`, if it is a file."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    return path


def fsync_file(path: Path) -> None:
    """Makes a file durable, and readable by whom the umask at import lets (safetensors asks for the owner alone)."""
    on_step("fsync", path)
    path.chmod(0o666 & ~_UMASK)
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: Path) -> None:
    """Makes a rename inside `path` durable (a no-op where folders can't be opened, as on Windows)."""
    on_step("fsync-folder", path)
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes `path` and what is missing above it, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_folder(folder.parent)


@contextmanager
def writing(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the writers' lock of `folder`; InputError while somebody else holds it.

    It ends with the process that holds it. A file is locked, not the folder, whose locks NFS would keep from other
    machines. Without effect where the system has no such locks; where this file system has none, that is warned of.
    """
    if fcntl is None:
        yield
        return
    file = Path(folder) / LOCK
    handle = _locked(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        with suppress(OSError):  # a process forked meanwhile would keep what is only closed
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _locked(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)  # whoever held the one opened has removed it just now
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{file.parent}: another process is writing it; try again later") from None
        except FileNotFoundError:
            os.close(handle)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"{file.parent}: lies on a file system without locks; let no two processes write it at a time",
                    stacklevel=4,
                )
                return handle
            os.close(handle)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two existing paths in one step; False where the system or the file system can't, or one is missing."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # no such call; Windows has no CDLL(None)
        return False
    return swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def rename(source: Path, target: Path) -> None:
    """Puts `source` in the place of `target`, in one step."""
    on_step("rename", target)
    os.replace(source, target)


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what is to become it, or was it."""
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")


def temporaries(path: str | os.PathLike) -> list[Path]:
    """What stands under such names of `path`: of a writer that goes on, or was killed."""
    path = Path(path).absolute()
    return [*path.parent.glob(f"{TEMPORARY}{glob.escape(path.name)}-{'[0-9a-f]' * 8}")]


@contextmanager
def atomic_file(path: str | os.PathLike, before_rename: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    before_rename: called when all but that is done.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        on_step("write", temporary)
        yield temporary
        fsync_file(temporary)
        before_rename()
        rename(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` on success; a folder that stood there is replaced.

    Linux swaps the two in one step. Elsewhere, or on a file system without this, the old one is moved aside first: a
    kill between the two renames leaves it under a temporary name, and nothing at `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    aside = path.parent / f"{TEMPORARY}{path.name}-old-{uuid.uuid4().hex[:8]}"
    try:
        on_step("write", temporary)
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                fsync_file(entry)
            elif entry.is_dir():
                fsync_folder(entry)
        fsync_folder(temporary)
        on_step("rename", path)
        if not _exchange(temporary, path):
            if path.exists():
                os.replace(path, aside)
                on_step("rename", path)
            os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: str | os.PathLike, value: object) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, what: str) -> dict:
    """The JSON object in a file that leafkern or sentence-transformers wrote; `what` names it in the error."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long, nested too deeply
        raise DamagedFileError(f"{path}: not a readable {what} ({error})") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path}: not a {what} (a JSON object is expected)")
    return value


def confined(folder: str | os.PathLike, name: str) -> Path:
    """`folder/name`, refused when a manifest's name points outside the folder."""
    folder = Path(folder).resolve()
    path = (folder / name).resolve()
    if folder not in path.parents:
        raise DamagedFileError(f"{folder}: the manifest names {name!r}, which lies outside the folder")
    return path


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what a killed writer left under temporary names in `folder`."""
    for entry in Path(folder).glob(f"{TEMPORARY}*"):
        if entry.name == LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            remove_file(entry)


def remove_file(path: Path) -> None:
    """Removes a file that nothing needs any more."""
    on_step("remove", path)
    with suppress(PermissionError):  # Windows keeps a file that is still open; the next writer removes it
        path.unlink(missing_ok=True)
