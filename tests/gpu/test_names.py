"""What only runs on a GPU still has to exist: every name of torch and triton that the sources spell out, looked up."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("leafkern", "bench", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGES = ("torch", "triton")


def dotted(node: ast.AST) -> str | None:
    """ "torch.cuda.Stream" for the expression of that form."""
    if isinstance(node, ast.Name):
        return node.id if node.id in PACKAGES else None
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return None


def exists(name: str) -> bool:
    package, *parts = name.split(".")
    found = importlib.import_module(package)
    for part in parts:
        # Operations are looked up when called; what they are called is each registration's own matter.
        if type(found).__module__.startswith("torch._ops"):
            return True
        package = f"{package}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(package)
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_exists(path):
    names = {dotted(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))} - {None}
    if any(name.startswith("triton") for name in names):
        pytest.importorskip("triton")
    assert [name for name in sorted(names) if not exists(name)] == []


def test_a_missing_name_is_found():
    assert exists("torch.cuda.reset_peak_memory_stats")
    assert not exists("torch.cuda.resetpeak_memory_stats")
