"""Checkpoints: everything that the rest of a run depends on, as safetensors and JSON.

checkpoints/step-000000120/ holds model/ (the student, in sentence-transformers' layout), training.safetensors
(optimiser and random states) and state.json; checkpoints/latest names the newest. A checkpoint is whole before
`latest` names it, and older ones go only afterwards.
"""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leafkern.encode import Encoder
from leafkern.errors import DamagedFileError
from leafkern.files import atomic_file, atomic_folder, confined, read_json, remove_leftovers, write_json

FORMAT = "leafkern checkpoint"
VERSION = 1
POINTER = "latest"
TENSORS = "training.safetensors"
STATE = "state.json"


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def save_checkpoint(
    folder: Path, student: Encoder, optimiser: torch.optim.Optimizer, names: list[str], state: dict, keep: int
) -> Path:
    """Saves and returns checkpoints/step-…; `names`: of the optimiser's parameters in order; `state`: JSON-able."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state(student.device)
    for number, values in optimiser.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimiser.{names[number]}.{key}"] = value.contiguous()
    path = folder / f"step-{state['step']:09d}"
    with atomic_folder(path) as temporary:
        student.save_pretrained(temporary / "model")
        save_file(tensors, temporary / TENSORS)
        whole = {"format": FORMAT, "version": VERSION, **state, "checksums": _checksums(temporary)}
        write_json(temporary / STATE, whole)
    with atomic_file(folder / POINTER) as temporary:
        temporary.write_text(path.name + "\n", encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != path:
            shutil.rmtree(old)
    remove_leftovers(folder)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None where nothing was saved."""
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    path = confined(folder, pointer.read_text(encoding="utf-8", errors="replace").strip() or ".")
    if not path.is_dir():
        raise DamagedFileError(f"{pointer}: names {path.name!r}, which is not there; name another step-… in it")
    return path


def read_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint, its files checked byte by byte."""
    if not (checkpoint / STATE).exists():
        raise DamagedFileError(f"{checkpoint}: no {STATE}; it is no checkpoint")
    state = read_json(checkpoint / STATE, FORMAT)
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise DamagedFileError(f"{checkpoint / STATE}: expected a {FORMAT} of version {VERSION}")
    found = _checksums(checkpoint)
    for name, checksum in state["checksums"].items():
        if found.get(name) != checksum:
            raise DamagedFileError(
                f"{checkpoint / name}: {'altered or truncated' if name in found else 'missing'}; "
                f"name an older step-… in {checkpoint.parent / POINTER} to go on from there"
            )
    return state


def restore(checkpoint: Path, optimiser: torch.optim.Optimizer, names: list[str], device: torch.device) -> None:
    """Puts the optimiser's and the random states back."""
    try:
        tensors = load_file(checkpoint / TENSORS)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{checkpoint / TENSORS}: {error}") from None
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda_state = tensors.pop("rng.cuda", None)
    if cuda_state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda_state, device)
    number_of = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.removeprefix("optimiser.").rpartition(".")
        # A fresh copy: mapped tensors are not aligned alike, and alignment can change the last bit of a sum.
        state.setdefault(number_of[name], {})[key] = tensor.clone()
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
