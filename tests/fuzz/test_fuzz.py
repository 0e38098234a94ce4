"""No damaged file ends in anything but DamagedFileError or InputError."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutate import mutated
from targets import Targets

import leafkern

NAMES = [
    "manifest-strings",
    "manifest-integers",
    "manifest-empty",
    "segment-strings",
    "segment-header-strings",
    "segment-header-integers",
    "deleted-strings",
    "deleted-header-integers",
    "rotation-integers",
    "rotation-header-integers",
    "npy",
    "parquet",
    "safetensors",
    "faiss",
    "ids",
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return Targets(tmp_path_factory.mktemp("fuzz"))


def test_what_is_valid_is_read(targets):
    assert set(NAMES) <= set(targets.targets)
    for name, target in targets.targets.items():
        assert target(targets.seeds[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_read_or_refused(targets, name):
    # Mutations of mutations do not get simpler by shrinking, which would take minutes.
    @settings(max_examples=60, deadline=None, database=None, phases=[Phase.generate])
    @given(st.integers(0, 2**32))
    def run(chance):
        targets.targets[name](mutated(targets.seeds[name], random.Random(chance)))

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest-strings", "segment-header-strings", "deleted-header-integers", "faiss"])
def test_atheris_finds_nothing(tmp_path, name):
    pytest.importorskip("atheris", reason="atheris has no wheel for this system")
    script = Path(__file__).parent / "run_atheris.py"
    options = ["-runs=5000", "-max_len=8192", "-timeout=20", "-rss_limit_mb=3000", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, str(script), name, str(tmp_path / "work"), *options]
    environment = dict(os.environ, PYTHONPATH=str(Path(leafkern.__file__).parents[1]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Done 5000 runs" in done.stderr
