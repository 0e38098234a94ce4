"""Runs a recipe to its end, then again with kill -9 at given moments, each in a forked child (see test_resume)."""

import json
import os
import signal
import sys
from pathlib import Path

import torch  # noqa: F401  (imported once, before the forks)

import leafkern.evaluate
import leafkern.files
import leafkern.ops.distill
import leafkern.train.stage
from leafkern.train import run

# A killed process loses nothing that it wrote: only a power cut would, and waiting for the disk is most of the time.
os.fsync = lambda handle: None


def child(recipe: dict, output: Path, kill: dict | None, resume: bool) -> int:
    """The signal that ended the child, 0 for a finished run."""
    process = os.fork()
    if process == 0:
        try:
            left = [kill["count"] if kill else 0]

            def count_down(*call):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            if kill and kill["at"] == "write":
                leafkern.files.on_step = count_down
            at_step = bool(kill) and kill["at"] == "step"

            def progress(stage, done, total, facts):
                if at_step and stage == kill["stage"] and done > 0:
                    count_down()

            run(recipe, output=output, resume=resume, progress=progress)
        except BaseException as error:
            print(f"{output.name}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{output.name}: the child failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    ended = {}
    for name, kills in job["runs"].items():
        recipe = {**job["recipe"], "teacher": {**job["recipe"]["teacher"], "cache": f"{job['folder']}/cache-{name}"}}
        output = Path(job["folder"]) / name
        ended[name] = [child(recipe, output, kill, resume=True) for kill in kills]
        ended[name].append(child(recipe, output, None, resume=True))
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
