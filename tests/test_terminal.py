"""What a person at a terminal sees: bars on stderr, results alone on stdout."""

import json
import os
import subprocess
import sys
import threading

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX's")

BAR = "━"
END = b"\x04end of what was drawn\x04"


def at_a_terminal(*arguments, cwd):
    """Runs `leafkern` with stderr on a terminal and stdout in a pipe: (status, stdout, what the terminal got)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "leafkern", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, cwd=cwd)
    drawn = bytearray()

    def read():
        while not drawn.endswith(END):
            drawn.extend(os.read(ours, 65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    out = process.communicate(timeout=300)[0].decode()
    # Our side of the terminal stays open until all is read: a kernel may drop what is unread when the last one closes.
    os.write(theirs, END)
    reader.join(timeout=60)
    os.close(theirs)
    os.close(ours)
    return process.returncode, out, drawn.removesuffix(END).decode()


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"the leaf of kernel {row}\n" for row in range(40)))
    return path


def test_encode_draws_a_bar(tmp_path, texts, tiny_bert):
    status, out, drawn = at_a_terminal("encode", tiny_bert, texts, "-o", "v.npy", "--device", "cpu", cwd=tmp_path)
    assert (status, out) == (0, ""), drawn
    assert BAR in drawn
    assert "40/40" in drawn
    assert drawn.rstrip().endswith("40 vectors of width 32, float32: v.npy")


def test_train_draws_a_bar_for_every_stage(tmp_path, texts, tiny_bert):
    values = {
        "teacher": {"model": str(tiny_bert)},
        "student": {"layers": [0, 2]},
        "data": {"documents": str(texts)},
        "schedule": {"cycles": 1, "steps": 3},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    status, out, drawn = at_a_terminal("train", "recipe.yaml", "--output", "out", cwd=tmp_path)
    assert (status, out) == (0, f"{os.path.join('out', 'model')}\n"), drawn
    assert BAR in drawn
    for shown in ("teacher", "tokenise", "train", "evaluate", "40/40", "3/3", "loss"):
        assert shown in drawn
    assert "Traceback" not in drawn
