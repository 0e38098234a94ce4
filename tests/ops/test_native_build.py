"""Installing with and without a compiler, and the kernels under the sanitizers, in copies of the sources."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def sources(tmp_path) -> Path:
    if importlib.util.find_spec("pybind11") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs pybind11 and setuptools")
    copy = tmp_path / "sources"
    for name in ("leafkern", "csrc", "bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def install(sources: Path, **environment) -> tuple[Path, str]:
    site = sources.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", site, "."]
    done = subprocess.run(
        command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # An editable install of the same package would still offer its own extension module.
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    return site, done.stdout + done.stderr


def run(site: Path, *command: object, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(site), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=site, env=environment, capture_output=True, text=True, timeout=600
    )


SEARCH = """
import warnings, torch, leafkern
from pathlib import Path
assert Path(leafkern.__file__).is_relative_to(Path.cwd()), leafkern.__file__
from leafkern.ops import quantize, search
from leafkern.ops._core.native import library
x = torch.nn.functional.normalize(torch.randn(200, 16), dim=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ids = search(x[:5], quantize(x, "int8"), 1)[1]
assert ids.flatten().tolist() == [0, 1, 2, 3, 4]
print("native" if library()[0] else "reference", len(caught), *(str(w.message) for w in caught))
"""


def test_without_a_compiler_the_reference_serves(sources):
    site, log = install(sources, CC="/bin/false", CXX="/bin/false")
    assert "native kernels not built" in log
    done = run(site, "-c", SEARCH)
    assert done.returncode == 0, done.stderr
    # Said once of each operation, not at every call.
    assert done.stdout.startswith("reference 2 leafkern.quantization: ")
    assert done.stdout.count("leafkern.retrieval: ") == 1
    assert "install a C++ compiler" in done.stdout


def test_native_can_be_required_and_refused(sources):
    site, _ = install(sources, LEAFKERN_NATIVE="0")
    assert run(site, "-c", SEARCH).stdout.startswith("reference 2 ")
    with pytest.raises(AssertionError, match="Failed building wheel"):
        install(sources, LEAFKERN_NATIVE="1", CC="/bin/false", CXX="/bin/false")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("sanitizer", "library"), [("address", "libasan.so"), ("undefined", "libubsan.so"), ("thread", "libtsan.so")]
)
def test_kernels_under_sanitizers(sources, sanitizer, library):
    found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{library} is not installed")
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -O1"
    site, _ = install(sources, LEAFKERN_NATIVE="1", LEAFKERN_CXXFLAGS=flags)
    chosen = {
        "test_retrieval.py": "definition or every_thread or saturate or view or beyond or equal_scores or folds",
        "test_retrieval_floats.py": "definition or wide or views or every_number or not_finite or rescoring",
        "test_retrieval_bits.py": "one_size or best_and_worst or whole_and_ragged or wider_base",
        "test_retrieval_allowed.py": "integers_equal",
        "test_relative.py": "native_equals_brute or every_number or finite or triangles or any_scores",
        "test_similarity.py": "native_equals_the_blocked_form",
        "test_distill.py": "alignment_equals or strided_rows",
        "test_quantization_native.py": "equal_the_reference or views or every_number or rounding or half",
        "test_contrastive_native.py": "equal_the_reference or every_number or exponentials or pieces or overlapping",
    }
    if sanitizer == "thread":
        # Torch's own threads are not instrumented; only the kernels' pool is watched, by a program of our own.
        done = run(site, "-c", POOL, LD_PRELOAD=found, TSAN_OPTIONS="halt_on_error=1 exitcode=66", OMP_NUM_THREADS="1")
    else:
        folder = ROOT / "tests" / "ops"
        options = ["-x", "-q", "-s", "--rootdir", site, "-c", "/dev/null"]
        # Torch's own exceptions pass through the sanitizer, which finds their library only where it is loaded first.
        preload = f"{found} libstdc++.so.6"
        for file, names in chosen.items():
            command = ["-m", "pytest", *options, "-k", names, folder / file]
            done = run(site, *command, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
            assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


POOL = """
import threading, numpy as np
from leafkern import _C
rng = np.random.default_rng(0)
codes = rng.integers(-128, 128, (20000, 128), dtype=np.int8)
u = rng.integers(-63, 64, (16, 1024), dtype=np.int8)
allowed = rng.random(20000) < 0.5
many = rng.standard_normal((20000, 64)).astype(np.float32)
listed = np.stack([rng.permutation(20000)[:500] for _ in range(20)])
bias = rng.standard_normal(20).astype(np.float32)
# Enough bytes (rows of 128) and products for several threads.
def search(threads, form, q):
    scores, ids = np.empty((q, 10), np.int32), np.empty((q, 10), np.int64)
    dim, given, rows, stride = [(128, u, codes, 128), (1024, u, codes, 128), (64, many, many, 256)][form // 2]
    sizes = (form, dim, 0, q, 20000, stride, 10, threads)
    space = np.empty(_C.search_workspace(*sizes) + 64, np.uint8)
    pointers = [part.ctypes.data for part in (given, rows, allowed, scores, ids, space)]
    _C.search(*sizes, *pointers, len(space))
    return ids
def rescore(threads, form):
    scores, ids = np.empty((20, 5), np.int32), np.empty((20, 5), np.int64)
    rows, stride = (codes, 128) if form == 6 else (many, 256)
    sizes = (form, 64, 20, stride, 500, 5, threads)
    space = np.empty(_C.rescore_workspace(sizes), np.uint8)
    pointers = [part.ctypes.data for part in (many, bias, rows, listed, scores, ids, space)]
    _C.rescore(sizes, *pointers, len(space))
    return ids
student, teacher = rng.standard_normal((2, 300, 300)), rng.standard_normal((300, 300)).round(2)
def relative(threads, ties, gap):
    loss, gradient = np.empty(2), np.empty((2, 300, 300))
    sizes = (True, 300, 2, threads)
    space = np.empty(_C.relative_workspace(*sizes), np.uint8)
    pointers = [part.ctypes.data for part in (student, teacher, loss, gradient, space)]
    _C.relative(*sizes, 0.015, gap, ties, *pointers, len(space))
    return gradient
rows = rng.standard_normal((300, 24))
def distill(threads):
    dims, inverse = [24, 9], np.empty((2, 300))
    _C.inverse_norms((True, threads, rows.ctypes.data, 300, 24, inverse.ctypes.data, 300), dims)
    scores, taught = np.stack([rows[:, :d] @ rows[:, :d].T for d in dims]), np.zeros((300, 300))
    sums, loss, gradient = np.zeros((2, 300)), np.zeros(1), np.zeros((300, 24))
    norms = [inverse.ctypes.data] * 2
    found = [sums.ctypes.data] * 2 + [loss.ctypes.data]
    _C.distill_block(True, _C.DISTILL_FUSED, 2, [300, 300], [90000, 300, 300, 300], False, 1.0, 0.0, False, threads,
                     scores.ctypes.data, taught.ctypes.data, 0, *norms, *found)
    _C.distill_finish(True, 300, 24, dims, [rows.ctypes.data], [24], [24], 1.0, 300, threads, rows.ctypes.data, 24,
                      inverse.ctypes.data, sums.ctypes.data, *norms[:1], gradient.ctypes.data)
    _C.distill_align(True, 1, True, 300, 24, 1.0, threads, rows.ctypes.data, 24, gradient.ctypes.data, 24,
                     scores.ctypes.data)
    return np.concatenate([loss, gradient.ravel(), scores.ravel()])
def quantization(threads):
    found = np.empty((2, 64), np.float32)
    given = (0, many.ctypes.data, *many.shape, 64, 1, threads)
    codes = np.empty(many.shape, np.int8)
    _C.extremes(given, found.ctypes.data)
    step = (found[1] - found[0]) / 255
    _C.encode(given, 0, 0, found.ctypes.data, step.ctypes.data, codes.ctypes.data)
    return codes
def both(threads):
    found = [relative(threads, ties, gap) for ties in (False, True) for gap in (0.0, 0.5)]
    searches = [search(threads, form, q) for form in range(5) for q in (1, 16)]
    searches += [rescore(threads, form) for form in (4, 6)]
    return [*searches, quantization(threads), distill(threads), *found]
expected = both(1)
workers = [threading.Thread(target=both, args=(4,)) for _ in range(3)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert all(np.array_equal(x, y) for x, y in zip(both(4), expected))
"""
