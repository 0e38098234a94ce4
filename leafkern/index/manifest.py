"""The manifest of an index: what is in it, and how it is read and checked."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from leafkern.errors import DamagedFileError, InputError, unknown_name
from leafkern.files import TEMPORARY, read_json
from leafkern.ops.quantization import code_width
from leafkern.textio import is_unicode

FORMAT = "leafkern-index"
VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards.json"  # of a folder of indexes
LARGEST_ID = 2**63 - 1
KINDS = ("segment", "deleted", "rotation")
# From fine to coarse: the codes kept for rescoring must be finer than those scanned.
PRECISIONS = ("float32", "float16", "int8", "int4", "ubinary", "binary")
RESCORE_PRECISIONS = PRECISIONS[:4]
_OPTIONAL_STRING = (str, type(None))
_OPTIONAL_DICT = (dict, type(None))
_CODE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8, "binary": torch.int8}


def code_dtype(precision: str) -> torch.dtype:
    return _CODE_DTYPES.get(precision, torch.uint8)


def code_bytes(precision: str, width: int) -> int:
    """Bytes of one vector's codes."""
    return code_width(precision, width) * {"float32": 4, "float16": 2}.get(precision, 1)


def checked_rescore(precision: str, rescore: str | None) -> str | None:
    """`rescore` as an index of `precision` keeps it, or an InputError."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if rescore is None or (precision in ("float32", "float16") and rescore == "float16"):
        return None
    if rescore not in RESCORE_PRECISIONS:
        raise unknown_name("rescore", rescore, RESCORE_PRECISIONS)
    if PRECISIONS.index(rescore) >= PRECISIONS.index(precision):
        raise InputError(f"rescore: {rescore} is not finer than the precision {precision}; give a finer one or None")
    return rescore


class Described(ABC):
    """What the manifests of an index, or of all shards alike, say of the vectors."""

    @property
    @abstractmethod
    def _facts(self) -> dict: ...

    def __len__(self) -> int:
        return self._facts["count"]

    @property
    def width(self) -> int:
        return self._facts["width"]

    @property
    def precision(self) -> str:
        return self._facts["precision"]

    @property
    def rescore(self) -> str | None:
        return self._facts["rescore"]

    @property
    def encoder(self) -> str | None:
        return self._facts["encoder"]

    @property
    def prompt(self) -> str | None:
        return self._facts["prompt"]

    @property
    def has_texts(self) -> bool:
        return self._facts["texts"]


def fingerprint(encoder: object) -> str | None:
    """The fingerprint of an `Encoder`, or of one given as such."""
    found = encoder if encoder is None or isinstance(encoder, str) else getattr(encoder, "fingerprint", ...)
    if not isinstance(found, _OPTIONAL_STRING) or (found is not None and not is_unicode(found)):
        raise InputError(f"encoder: expected an Encoder or its fingerprint, got {encoder!r:.80}")
    return found


def query_fingerprint(encoder: object, has: str | None) -> str | None:
    """`fingerprint`, or `has` where the encoder is a student that was trained to give that encoder's vectors."""
    return has if has is not None and getattr(encoder, "aligned_with", None) == has else fingerprint(encoder)


def is_part(name: str) -> bool:
    """Whether a file of this name may be part of an index, whole or half-written."""
    return name == MANIFEST or name.startswith(TEMPORARY) or is_data(name)


def is_data(name: str) -> bool:
    """Whether an index writes files of this name, to be named by the manifest."""
    return re.fullmatch(rf"({'|'.join(KINDS)})-[0-9a-f]{{16}}\.safetensors", name) is not None


def data_files(manifest: dict) -> set[str]:
    """The names of all files that the manifest names."""
    entries = [*manifest["segments"], *(entry["deleted"] for entry in manifest["segments"]), manifest["rotation"]]
    return {entry["file"] for entry in entries if entry is not None}


_TYPES = {
    "index": str,
    "revision": str,
    "width": int,
    "precision": str,
    "rescore": _OPTIONAL_STRING,
    "encoder": _OPTIONAL_STRING,
    "prompt": _OPTIONAL_STRING,
    "source": _OPTIONAL_DICT,
    "rotation": _OPTIONAL_DICT,
    "ids": _OPTIONAL_STRING,
    "next_id": int,
    "texts": bool,
    "count": int,
    "segments": list,
}
_FILE_TYPES = {"file": str, "bytes": int, "sha256": str}
_SEGMENT_TYPES = {**_FILE_TYPES, "layout": str, "rows": int, "deleted": _OPTIONAL_DICT}
_DELETED_TYPES = {**_FILE_TYPES, "count": int}


def read_manifest(path: Path) -> dict:
    """The manifest of the index at `path`, checked."""
    file = path / MANIFEST
    if not file.is_file():
        if (path / SHARDS).is_file():
            raise InputError(f"{path}: a folder of shards; name one of the indexes in it")
        raise InputError(f"{path}: no index here (there is no {MANIFEST})")
    return checked(file, read_json(file, "manifest of an index"))


def checksum(manifest: dict) -> str:
    """SHA-256 of all that a manifest says; it stands in the manifest, and is compared by `Index.verify`."""
    return hashlib.sha256(json.dumps(dict(manifest, sha256=None), sort_keys=True).encode()).hexdigest()


def checked(file: Path, manifest: dict) -> dict:
    """`manifest`, which stands in `file` or is to stand there, unless a reader has to refuse it."""
    if manifest.get("format") != FORMAT:
        raise DamagedFileError(f"{file}: not the manifest of an index (format {manifest.get('format')!r})")
    if manifest.get("version") != VERSION:
        raise InputError(f"{file}: format version {manifest.get('version')!r}; this leafkern reads version {VERSION}")
    _check_types(file, manifest, _TYPES)
    if not is_unicode(json.dumps(manifest, ensure_ascii=False)):
        raise DamagedFileError(f"{file}: holds a lone surrogate, which is no valid Unicode text")
    precision, rescore = manifest["precision"], manifest["rescore"]
    if precision not in PRECISIONS or rescore not in (None, *RESCORE_PRECISIONS):
        raise DamagedFileError(f"{file}: unknown precision {precision!r}, rescore {rescore!r}")
    if manifest["ids"] not in (None, "int64", "string") or manifest["width"] < 1:
        raise DamagedFileError(f"{file}: ids {manifest['ids']!r}, width {manifest['width']} are not valid")
    if not 0 <= manifest["next_id"] < 1 << 63:
        raise DamagedFileError(f"{file}: next_id {manifest['next_id']} is not valid")
    if (manifest["ids"] is None) != (not manifest["segments"]):
        raise DamagedFileError(f"{file}: ids are {manifest['ids']!r}, segments {len(manifest['segments'])}")
    if manifest["rotation"] is not None:
        _check_file(file, manifest["rotation"], "rotation", _FILE_TYPES)
    for entry in manifest["segments"]:
        _check_file(file, entry, "segment", _SEGMENT_TYPES)
        if entry["layout"] != "rows":
            raise InputError(f"{file}: unknown layout {entry['layout']!r}; this leafkern reads 'rows'")
        deleted = entry["deleted"]
        if deleted is not None:
            _check_file(file, deleted, "deleted", _DELETED_TYPES)
        if entry["rows"] < 1 or (deleted is not None and not 1 <= deleted["count"] <= entry["rows"]):
            raise DamagedFileError(f"{file}: {entry['file']} has {entry['rows']} rows, deleted {deleted}")
    if manifest["count"] != sum(map(live, manifest["segments"])):
        raise DamagedFileError(f"{file}: counts {manifest['count']} rows, its segments another number")
    names = [entry["file"] for entry in manifest["segments"]]
    if len(set(names)) != len(names):
        raise DamagedFileError(f"{file}: names a segment twice")
    return manifest


def live(entry: dict) -> int:
    """Rows of a segment that are not deleted."""
    return entry["rows"] - (entry["deleted"]["count"] if entry["deleted"] is not None else 0)


def _check_file(manifest: Path, entry: object, kind: str, types: dict) -> None:
    _check_types(manifest, entry if isinstance(entry, dict) else {}, types)
    if not is_data(entry["file"]) or not entry["file"].startswith(kind):
        raise DamagedFileError(f"{manifest}: names {entry['file']!r}, which is no {kind} file of an index")


def _check_types(file: Path, value: dict, types: dict) -> None:
    for name, expected in types.items():
        found = value.get(name, ...)
        if not isinstance(found, expected) or (isinstance(found, bool) and expected is int):
            raise DamagedFileError(f"{file}: entry {name!r} is missing or of the wrong type")
