"""Real kills and real readers beside a writer, in forked processes (see test_crashes); the figures as JSON on stdout.

Vectors are a function of their id, so that every row that is found can be checked.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from leafkern import Index

WIDTH = 32


def vectors(ids) -> np.ndarray:
    x = np.stack([np.random.default_rng(int(i)).normal(size=WIDTH) for i in ids]).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def check(index: Index, expected_ids: list[int]) -> None:
    rows = index.rows()
    ids = index.ids_at(rows)
    assert ids.tolist() == expected_ids, (ids.tolist()[-5:], expected_ids[-5:])
    assert index.texts_at(rows).tolist() == [f"text {i}" for i in expected_ids]
    np.testing.assert_array_equal(index.vectors_at(rows), vectors(expected_ids).astype(np.float16))


# -- kills -------------------------------------------------------------------------------------------------------------


def write_until_killed(path: Path, pipe: int, seed: int) -> None:
    """Says what it will do, does it, says that it is done; and so on."""
    rng, index = random.Random(seed), Index.open(path)

    def say(*words):
        os.write(pipe, (json.dumps(words) + "\n").encode())

    say("ready")
    while True:
        ids = index.ids_at(index.rows()).tolist()
        what = "compact" if rng.random() < 0.4 else "add" if len(ids) < 300 or rng.random() < 0.5 else "remove"
        if what == "add":
            new = [index._state.manifest["next_id"] + i for i in range(rng.randint(1, 60))]
            content = vectors(new)
            say(what, new)
            index.add(content, texts=[f"text {i}" for i in new])
        elif what == "remove":
            old = rng.sample(ids, rng.randint(1, len(ids) // 3))
            say(what, old)
            index.remove(old)
        else:
            say(what, None)
            index.compact(smaller_than=rng.choice([None, 80]))
        say("done")


def kills(path: str, count: str) -> dict:
    path, rng = Path(path), random.Random()
    ids = list(range(300))
    Index.build(path, vectors(ids), texts=[f"text {i}" for i in ids])
    interrupted = {"add": 0, "remove": 0, "compact": 0, "between": 0}
    for _ in range(int(count)):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                write_until_killed(path, writing, rng.randrange(2**32))
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            os._exit(1)
        os.close(writing)
        stream = os.fdopen(reading)
        assert json.loads(stream.readline()) == ["ready"]
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status), "the writer failed by itself"
        pending = None
        for line in stream:
            what, *rest = json.loads(line)
            if what == "done":
                ids, pending = after(ids, pending), None
            else:
                pending = what, *rest
        index = Index.open(path)
        index.verify()
        if pending is not None and index.ids_at(index.rows()).tolist() != ids:
            ids = after(ids, pending)
        check(index, ids)
        interrupted[pending[0] if pending else "between"] += 1
    return {"interrupted": interrupted}


def after(ids: list[int], change: tuple) -> list[int]:
    what, some = change
    if what == "remove":
        gone = set(some)
        return [i for i in ids if i not in gone]
    return ids + some if what == "add" else ids


# -- readers -----------------------------------------------------------------------------------------------------------

WINDOW, BATCH = 300, 30


class Reader(threading.Thread):
    """Reads until the time is up; a state holds the ids of one window, which moves on only."""

    def __init__(self, path: Path, until: float, shared: Index | None):
        super().__init__()
        self.path, self.until, self.shared = path, until, shared
        self.reads, self.states, self.error = 0, set(), None

    def run(self) -> None:
        try:
            index, newest = self.shared or Index.open(self.path), 0
            rng = np.random.default_rng(threading.get_ident() % 2**32)
            while time.monotonic() < self.until:
                if self.shared is None and rng.random() < 0.3:
                    index = Index.open(self.path)
                else:
                    index.refresh()
                wanted = newest + int(rng.integers(0, WINDOW - 2 * BATCH))
                scores, ids = index.search(vectors([wanted]), 2 * WINDOW)
                # Shared handles move on between the calls of one thread: all is taken from one answer.
                ids = np.sort(ids[0])
                first = int(ids[0])
                assert ids.tolist() == list(range(first, first + len(ids))), ids
                assert len(ids) in (WINDOW, WINDOW + BATCH), len(ids)
                assert first >= newest, "an older state after a newer one"
                if wanted >= first:
                    assert abs(scores[0, 0] - 1) < 2e-3
                newest = first
                self.reads += 1
                self.states.add((first, len(ids)))
        except BaseException as error:
            self.error = repr(error)


def readers(path: str, processes: str, threads: str, seconds: str) -> dict:
    path, until = Path(path), time.monotonic() + float(seconds)
    ids = list(range(WINDOW))
    Index.build(path, vectors(ids), ids=ids)
    pipes, children = [], []
    for _ in range(int(processes)):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                shared = Index.open(path)
                crowd = [Reader(path, until, shared if i % 2 else None) for i in range(int(threads))]
                for reader in crowd:
                    reader.start()
                for reader in crowd:
                    reader.join()
                states = sorted(set.union(*(reader.states for reader in crowd)))
                answer = [[reader.reads for reader in crowd], states, [r.error for r in crowd if r.error]]
                os.write(writing, json.dumps(answer).encode()[:60_000])
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        pipes.append(reading)
        children.append(process)
    index, commits = Index.open(path), 0
    while time.monotonic() < until:
        new = list(range(ids[-1] + 1, ids[-1] + 1 + BATCH))
        index.add(vectors(new), ids=new)
        index.remove(ids[:BATCH])
        ids, commits = ids[BATCH:] + new, commits + 2
        if commits % 6 == 0:
            index.compact(smaller_than=random.choice([None, 100]))
            commits += 1
    answers = [json.loads(os.fdopen(pipe).read()) for pipe in pipes]
    for process in children:
        assert os.waitpid(process, 0)[1] == 0
    errors = [error for _, _, some in answers for error in some]
    assert not errors, errors[:3]
    index.verify()
    counts = [count for some, _, _ in answers for count in some]
    states = {tuple(state) for _, some, _ in answers for state in some}
    return {
        "readers": sum(count > 0 for count in counts),
        "reads": sum(counts),
        "commits": commits,
        "states": len(states),
    }


if __name__ == "__main__":
    print(json.dumps({"kills": kills, "readers": readers}[sys.argv[1]](*sys.argv[2:])))
