"""One stage of gpu.sh: runs a command under a hard time limit and writes one JSON, whatever happens. Stdlib only.

    stage.py run OUTDIR NAME SECONDS [--results DIR] [--walk REASON] -- COMMAND...
    stage.py skip OUTDIR NAME REASON
    stage.py table OUTDIR            readable table of the stages and of their benchmark rows
    stage.py unpack OUTDIR FOLDER    writes the stages' benchmark JSON as FOLDER/<machine>/<op>.json

`--walk`: the command only collects; when that works the stage is "skipped" with the reason given.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TAIL = 12_000  # characters of the log that are kept
NOTHING_COLLECTED = 5  # pytest's exit status
GRACE_S = 5


def run(outdir: Path, name: str, seconds: float, command: list[str], results: Path | None, walk: str | None) -> int:
    start = time.monotonic()
    stage = {"stage": name, "status": "failed", "reason": None, "command": command, "limit_s": seconds}
    status = None
    with tempfile.TemporaryFile() as log:
        try:
            # A session of its own, so that whatever the command started ends with it.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            except BaseException as stopped:
                end(process)
                timed_out = isinstance(stopped, subprocess.TimeoutExpired)
                stage["status"] = "timeout" if timed_out else "failed"
                stage["reason"] = f"stopped after {seconds:g} s" if timed_out else type(stopped).__name__
                if not timed_out:
                    raise
            else:
                works = status == 0
                stage["status"] = ("skipped" if walk else "ok") if works else "failed"
                stage["reason"] = walk if works else f"exit status {status}"
                if not works and status == NOTHING_COLLECTED:
                    stage["reason"] = "no test was collected"
        except OSError as error:
            stage["reason"] = str(error)
        finally:
            stage["returncode"] = status
            stage["seconds"] = round(time.monotonic() - start, 1)
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 4 * TAIL))
            stage["log"] = log.read().decode("utf-8", "replace")[-TAIL:]
            stage["results"] = collect(results)
            write(outdir, stage)
    return 0 if stage["status"] in ("ok", "skipped") else 1


def end(process: subprocess.Popen) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def collect(folder: Path | None) -> dict[str, dict]:
    """Benchmark JSON that the command left: {"<machine>/<op>.json": document}."""
    if folder is None:
        return {}
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            found[path.relative_to(folder).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
    return found


def write(outdir: Path, stage: dict) -> None:
    path = outdir / f"{stage['stage']}.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(stage, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def stages(outdir: Path) -> list[dict]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(outdir.glob("*.json"))]
    return [stage for stage in found if "stage" in stage]


def table(outdir: Path) -> None:
    found = stages(outdir)
    lines = [["stage", "status", "seconds", "reason"]]
    lines += [[s["stage"], s["status"], f"{s.get('seconds', 0):.1f}", s.get("reason") or ""] for s in found]
    show(lines)
    rows = [["case", "device", "provider", "p50 ms", "% of limit", "ours faster ×"]]
    for document in (document for s in found for document in s.get("results", {}).values()):
        for row in document["rows"]:
            timed = row["status"] == "ok"
            rows.append(
                [
                    f"{row['op']}/{row['case']}",
                    row["device"],
                    row["provider"],
                    f"{1e3 * row['p50_s']:.3g}" if timed else f"{row['status']}: {row['reason']}"[:60],
                    f"{row['percent_of_limit']:.1f}" if timed and row["percent_of_limit"] else "-",
                    f"{row['ours_is_faster']:.2f}" if timed and row["ours_is_faster"] and not row["ours"] else "",
                ]
            )
    if len(rows) > 1:
        print()
        show(rows)
    for stage in found:
        if stage["status"] in ("failed", "timeout"):
            print(f"\n{stage['stage']}, end of the log:\n{stage['log'][-1500:]}")


def show(lines: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def unpack(outdir: Path, folder: Path) -> None:
    whole: dict[Path, dict] = {}
    for stage in stages(outdir):
        for name, document in stage.get("results", {}).items():
            machine, op = Path(name).parts[-2:]
            # Several stages may each bring a part of one operation's rows.
            first = whole.setdefault(folder / machine / op, document)
            if first is not document:
                first["rows"] += document["rows"]
    for target, document in whole.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(target)


def main(arguments: list[str]) -> int:
    command = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(prog="stage.py")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in {
        "run": ("name", "seconds"),
        "skip": ("name", "reason"),
        "table": (),
        "unpack": ("folder",),
    }.items():
        sub = verbs.add_parser(verb)
        sub.add_argument("outdir", type=Path)
        for name in names:
            sub.add_argument(name, type={"seconds": float, "folder": Path}.get(name, str))
        if verb == "run":
            sub.add_argument("--results", type=Path)
            sub.add_argument("--walk")
    given = parser.parse_args(arguments)
    if given.verb == "run":
        if not command:
            parser.error("run: a command after -- is expected")
        return run(given.outdir, given.name, given.seconds, command, given.results, given.walk)
    if given.verb == "skip":
        write(given.outdir, {"stage": given.name, "status": "skipped", "reason": given.reason, "log": ""})
    elif given.verb == "table":
        table(given.outdir)
    else:
        unpack(given.outdir, given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
