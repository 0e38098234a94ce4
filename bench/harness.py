"""What all benchmarks share: a case, its contestants, how they are checked and timed, and the rows that come out.

A contestant whose output fails its check is reported as failed and never timed. The others run in interleaved
rounds (one call of each, then again), each round on the next input set, so that drift of a shared machine meets
all of them alike. On glibc every case runs twice, with the allocator as it is and keeping freed memory; each
contestant is quoted with the better median. A peer that takes over ONE_CALL_S a call is quoted by its checked call.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from .ceilings import Ceiling, as_json
from .machine import commit, machine, mallopt_function, peak_memory, set_allocator, synchronizer, versions

FORMAT = 1
# One timed round lasts at least this long; faster calls are repeated inside it. After a pause the first of them finds
# the cores asleep, which is the machine and not the contestant.
MINIMUM_S = 0.02
ONE_CALL_S = 8.0  # a peer slower than this is quoted by the call that was checked: rounds of it would take minutes
PAUSE_S = 0.005  # before each timed round: the previous library's threads stop spinning and leave the cores


@dataclass(frozen=True)
class Work:
    """What a case must do at the least: operations at the fastest ceiling of `rates`, bytes at that of `bandwidth`."""

    operations: float
    unit: str
    rates: Sequence[str]
    bytes: float
    bandwidth: str
    items: float
    item: str
    also: dict[str, float] = field(default_factory=dict)  # other counts to give per second, such as {"text": 256}

    def floor(self, ceilings: dict[str, Ceiling]) -> float | None:
        """Seconds below which no implementation can go on this machine; None where a ceiling is missing."""
        rate = max((ceilings[name].rate for name in self.rates if name in ceilings), default=None)
        if rate is None or self.bandwidth not in ceilings:
            return None
        return max(self.operations / rate, self.bytes / ceilings[self.bandwidth].rate)


@dataclass(frozen=True)
class Contestant:
    """One implementation. `run(i)` is the timed call on input set i; `check(output, i)` says what is wrong, or None."""

    name: str
    run: Callable[[int], object]
    check: Callable[[object, int], str | None]
    ours: bool = False
    same_job: bool = True  # False: other precision or no selection; shown, but not the peer that ratios are against
    limited: bool = True  # False: it leaves out the work that the case's limit counts
    note: str = ""
    values: dict = field(default_factory=dict)  # figures other than time, filled by the check


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    shape: dict
    work: Work
    contestants: Sequence[Contestant]
    sets: int = 1
    device: str = "cpu"


# Timing


def measure(
    case: Case, ceilings: dict[str, Ceiling], *, budget: float, benchmark=None, command: str = ""
) -> list[dict]:
    """One row per contestant. `budget`: seconds for the timed rounds; `benchmark`: pytest-benchmark's fixture.

    With the fixture, our contestant's rounds are its rounds, so that its own table and JSON stand beside ours.
    """
    synchronize = synchronizer(case.device)
    alive, rows, costs = [], {}, {}
    for contestant in case.contestants:
        wrong, peak, seconds = _checked(contestant, case, synchronize)
        rows[contestant.name] = _empty_row(case, contestant, ceilings, command) | {"peak_bytes": peak}
        if wrong is not None:
            rows[contestant.name] |= {"status": "failed", "reason": wrong}
        elif seconds > ONE_CALL_S and not contestant.ours:
            rows[contestant.name] |= _best_timing({"default": [seconds]})
        else:
            alive.append(contestant)
            costs[contestant.name] = seconds
    if alive:
        for name, timing in _rounds(alive, costs, case, budget, synchronize, benchmark).items():
            rows[name] |= timing
    finished = list(rows.values())
    for row in finished:
        # JSON has no NaN.
        row["values"] = {name: value if math.isfinite(value) else None for name, value in row["values"].items()}
        row |= derived(row, case.work)
    compare(finished)
    return finished


def _checked(contestant: Contestant, case: Case, synchronize) -> tuple[str | None, int | None, float]:
    """(what is wrong or None, peak memory above the state before the first call, seconds of the fastest call; on a GPU
    of one more, for the first on each set may compile, tune and capture)."""
    peak, fastest = None, float("inf")

    def timed(i: int) -> tuple[object, float]:
        start = time.perf_counter()
        output = contestant.run(i)
        synchronize()
        return output, time.perf_counter() - start

    for i in range(case.sets):
        try:
            with peak_memory(case.device) as memory:
                output, seconds = timed(i)
            fastest = min(fastest, seconds)
            wrong = contestant.check(output, i)
            if case.device == "cuda" and wrong is None and i == case.sets - 1:
                fastest = timed(i)[1]
        except Exception as error:
            return f"{type(error).__name__}: {error}", peak, fastest
        peak = memory["peak"] if i == 0 else peak
        if wrong is not None:
            return f"input set {i}: {wrong}", peak, fastest
        del output
    return None, peak, fastest


def _rounds(alive, costs, case: Case, budget: float, synchronize, benchmark) -> dict[str, dict]:
    allocators = ("default", "reuse") if case.device == "cpu" and mallopt_function() else ("default",)
    calls = {c.name: max(1, round(MINIMUM_S / max(costs[c.name], 1e-7))) for c in alive}
    one_round = sum(calls[c.name] * costs[c.name] for c in alive)
    rounds = int(min(40, max(3, budget / len(allocators) / max(one_round, 1e-6))))
    times = {(c.name, allocator): [] for c in alive for allocator in allocators}

    def once(contestant: Contestant, number: int, allocator: str) -> None:
        repeats = calls[contestant.name]
        first = number * repeats
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        for i in range(first, first + repeats):
            contestant.run(i % case.sets)
        synchronize()
        times[contestant.name, allocator].append((time.perf_counter() - start) / repeats)

    ours = next((c for c in alive if c.ours), None)
    others = [c for c in alive if c is not ours]
    schedule = [(allocator, number) for allocator in allocators for number in range(rounds)]
    position = iter(schedule)

    def before_ours():
        allocator, number = next(position)
        if number == 0 and allocator != allocators[0]:
            set_allocator(allocator)
            for contestant in alive:  # warm-up under this allocator; the checks were the first one's
                contestant.run(0)
            synchronize()
        for contestant in others:
            once(contestant, number, allocator)
        return (ours, number, allocator), {}

    try:
        if benchmark is not None and ours is not None:
            benchmark.pedantic(once, setup=before_ours, rounds=len(schedule), iterations=1)
        else:
            for _ in schedule:
                arguments, _ = before_ours()
                if ours is not None:
                    once(*arguments)
    finally:
        set_allocator("default")
    return {c.name: _best_timing({a: times[c.name, a] for a in allocators if times[c.name, a]}) for c in alive}


def _best_timing(by_allocator: dict[str, list[float]]) -> dict:
    allocator, best = min(by_allocator.items(), key=lambda pair: percentile(pair[1], 50))
    return {
        "status": "ok",
        "p20_s": percentile(best, 20),
        "p50_s": percentile(best, 50),
        "p80_s": percentile(best, 80),
        "rounds": len(best),
        "allocator": allocator,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the sorted values, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


# Rows


def _empty_row(case: Case, contestant: Contestant, ceilings, command: str) -> dict:
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "device": case.device,
        "provider": contestant.name,
        "ours": contestant.ours,
        "same_job": contestant.same_job,
        "note": contestant.note,
        "status": "skipped",
        "reason": None,
        "operations": case.work.operations,
        "unit": case.work.unit,
        "bytes": case.work.bytes,
        "floor_s": case.work.floor(ceilings) if contestant.limited else None,
        "values": contestant.values,
        "command": command,
    }


def derived(row: dict, work: Work) -> dict:
    """Percent of the limit and items per second of one timed row."""
    if row["status"] != "ok":
        return {"percent_of_limit": None, "items_per_s": None, "item": work.item, "also_per_s": {}}
    floor = row["floor_s"]
    return {
        "percent_of_limit": None if floor is None else 100 * floor / row["p50_s"],
        "items_per_s": work.items / row["p50_s"],
        "item": work.item,
        "also_per_s": {name: count / row["p50_s"] for name, count in work.also.items()},
    }


def compare(rows: list[dict]) -> None:
    """Adds to every row how much faster ours is, and to ours the ratio to the best peer that does the same job."""
    timed = [row for row in rows if row["status"] == "ok"]
    ours = next((row for row in timed if row["ours"]), None)
    peers = [row for row in timed if not row["ours"] and row["same_job"]]
    best = min(peers, key=lambda row: row["p50_s"], default=None)
    for row in rows:
        row["ours_is_faster"] = row["p50_s"] / ours["p50_s"] if ours and row in timed else None
        row["best_peer"] = best["provider"] if best and row["ours"] else None
        row["ratio_to_best_peer"] = best["p50_s"] / row["p50_s"] if best and row["ours"] and row in timed else None


def document(op: str, rows: list[dict], ceilings: dict[str, Ceiling], *, size: str, command: str) -> dict:
    """What is written to results/<machine>/<op>.json."""
    return {
        "format": FORMAT,
        "op": op,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "size": size,
        "machine": machine(),
        "versions": versions(),
        "ceilings": as_json(ceilings),
        "rows": rows,
    }


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the readable table."""
    header = ["case", "provider", "p50", "p20", "p80", "rate", "% of limit", "ours faster ×", "peak MiB", "note"]
    body = []
    for row in rows:
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason'] or ''}"
            body.append([row["case"], row["provider"], *["-"] * 7, reason])
            continue
        rates = [f"{row['items_per_s']:,.0f} {row['item']}/s"]
        rates += [f"{rate:,.0f} {name}/s" for name, rate in row["also_per_s"].items()]
        values = "; ".join(f"{key} {value:.4g}" for key, value in row["values"].items())
        percent, peak = row["percent_of_limit"], row["peak_bytes"]
        speed = row["ours_is_faster"]
        body.append(
            [
                row["case"],
                row["provider"],
                *(_milliseconds(row[key]) for key in ("p50_s", "p20_s", "p80_s")),
                ", ".join(rates),
                "-" if percent is None else f"{percent:.1f}",
                "" if row["ours"] or speed is None else f"{speed:.2f}",
                "-" if peak is None else f"{peak / 2**20:.1f}",
                "; ".join(filter(None, (row["note"], values))),
            ]
        )
    return header, body


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
