"""The manifest of an index: what is in it, and how it is read and checked."""

from pathlib import Path

import torch

from leafkern.errors import DamagedFileError, InputError, unknown_name
from leafkern.files import TEMPORARY, read_json
from leafkern.ops.quantization import code_width

FORMAT = "leafkern-index"
VERSION = 1
MANIFEST = "manifest.json"
# From fine to coarse: the codes kept for rescoring must be finer than those scanned.
PRECISIONS = ("float32", "float16", "int8", "int4", "ubinary", "binary")
RESCORE_PRECISIONS = PRECISIONS[:4]
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


def fingerprint(encoder: object) -> str | None:
    """The fingerprint of an `Encoder`, or of one given as such."""
    return encoder if encoder is None or isinstance(encoder, str) else encoder.fingerprint


def query_fingerprint(encoder: object, has: str | None) -> str | None:
    """`fingerprint`, or `has` where the encoder is a student that was trained to give that encoder's vectors."""
    return has if has is not None and getattr(encoder, "aligned_with", None) == has else fingerprint(encoder)


def is_part(name: str) -> bool:
    """Whether a file of this name may be part of an index, whole or half-written."""
    return (
        name == MANIFEST
        or name.startswith(TEMPORARY)
        or (name.startswith("segment-") and name.endswith(".safetensors"))
    )


_OPTIONAL_STRING = (str, type(None))
_TYPES = {
    "index": str,
    "revision": str,
    "width": int,
    "precision": str,
    "rescore": _OPTIONAL_STRING,
    "encoder": _OPTIONAL_STRING,
    "prompt": _OPTIONAL_STRING,
    "ids": _OPTIONAL_STRING,
    "next_id": int,
    "texts": bool,
    "count": int,
    "segments": list,
}
_SEGMENT_TYPES = {"file": str, "layout": str, "rows": int, "bytes": int, "sha256": str}


def read_manifest(path: Path) -> dict:
    """The manifest of the index at `path`, checked."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path}: no index here (there is no {MANIFEST})")
    manifest = read_json(file, "manifest of an index")
    if manifest.get("format") != FORMAT:
        raise DamagedFileError(f"{file}: not the manifest of an index (format {manifest.get('format')!r})")
    if manifest.get("version") != VERSION:
        raise InputError(f"{file}: format version {manifest.get('version')!r}; this leafkern reads version {VERSION}")
    _check_types(file, manifest, _TYPES)
    for entry in manifest["segments"]:
        _check_types(file, entry if isinstance(entry, dict) else {}, _SEGMENT_TYPES)
        if entry["layout"] != "rows":
            raise InputError(f"{file}: unknown layout {entry['layout']!r}; this leafkern reads 'rows'")
    if manifest["precision"] not in PRECISIONS or manifest["rescore"] not in (None, *RESCORE_PRECISIONS):
        raise DamagedFileError(f"{file}: unknown precision {manifest['precision']!r}, rescore {manifest['rescore']!r}")
    if manifest["ids"] not in (None, "int64", "string") or manifest["width"] < 1:
        raise DamagedFileError(f"{file}: ids {manifest['ids']!r}, width {manifest['width']} are not valid")
    if manifest["count"] != sum(entry["rows"] for entry in manifest["segments"]):
        raise DamagedFileError(f"{file}: counts {manifest['count']} rows, its segments another number")
    return manifest


def _check_types(file: Path, value: dict, types: dict) -> None:
    for name, expected in types.items():
        if name not in value or not isinstance(value[name], expected):
            raise DamagedFileError(f"{file}: entry {name!r} is missing or of the wrong type")
