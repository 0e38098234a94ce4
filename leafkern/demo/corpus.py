"""English text that every Python machine has: the docstrings of the standard library and of installed packages.

Sources are parsed with `ast`; nothing is imported. Each docstring with a title line and a body gives a known-item
pair: the title is the query, the body (which never contains the title) is its one right answer.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("numpy", "torch", "transformers", "sklearn", "scipy")
# Generated, vendored or test code says little in English.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "_vendor"}
MAX_FILE_BYTES = 1_000_000
BODY_CHARACTERS = (80, 1200)
TITLE_WORDS = (4, 24)

_ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`")
_MARKUP = re.compile(r"`{1,2}|\*{2}|^\s*\.\. [a-z-]+::|^[-=~^]{3,}\s*$|^>>> |^\.\.\. ", re.MULTILINE)
_LETTERS = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Page:
    """One docstring: qualified name, title line, and the text below it."""

    name: str
    title: str
    body: str


def source_roots(packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    """The standard library's folder and those of the packages that are installed here."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            roots.append(Path(spec.origin).parent)
    return roots


def read_pages(
    roots: list[Path] | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Page]:
    """All usable docstrings below `roots`, in a fixed order, no two with the same name, title or body."""
    pages: list[Page] = []
    names: set[str] = set()
    titles: set[str] = set()
    bodies: set[str] = set()
    stdlib = source_roots(())[0]
    files = [
        (root, file) for root in (source_roots() if roots is None else roots) for file in sorted(root.rglob("*.py"))
    ]
    for done, (root, file) in enumerate(files):
        progress(done, len(files))
        inside = file.relative_to(root)
        if SKIPPED.intersection(inside.parts) or file.stat().st_size > MAX_FILE_BYTES:
            continue
        module = ".".join(inside.with_suffix("").parts)
        prefix = module if root == stdlib else f"{root.name}.{module}"
        for page in _pages_of(file, prefix.removesuffix(".__init__")):
            title, body = (_LETTERS.sub("", text.lower()) for text in (page.title, page.body))
            if page.name in names or title in titles or body[:300] in bodies or title in body:
                continue
            names.add(page.name)
            titles.add(title)
            bodies.add(body[:300])
            pages.append(page)
    return pages


def _pages_of(file: Path, module: str) -> Iterator[Page]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        docstring = ast.get_docstring(node)
        if docstring:
            page = split_docstring(name, docstring)
            if page is not None:
                yield page
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((child, f"{name}.{child.name}"))


def split_docstring(name: str, docstring: str) -> Page | None:
    """The page of one docstring, or None where it has no usable title and body."""
    text = _MARKUP.sub("", _ROLE.sub(r"\1", inspect.cleandoc(docstring)))
    head, _, rest = text.partition("\n\n")
    title, body = " ".join(head.split()), " ".join(rest.split())
    least, most = TITLE_WORDS
    if not least <= len(title.split()) <= most or len(body) < BODY_CHARACTERS[0]:
        return None
    if not title.isascii() or not body.isascii():
        return None
    return Page(name, title, body[: BODY_CHARACTERS[1]])
