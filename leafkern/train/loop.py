"""The training loop: LEAF's one loss, AdamW, a linear rate with restarts, and a run that survives anything.

After step s the state depends on the recipe, the data and s alone, so a run that is killed and resumed follows
the one left alone, bit for bit on a CPU at an equal thread count.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from leafkern.errors import NonFiniteLossError
from leafkern.files import atomic_file
from leafkern.nn import PackedBatch
from leafkern.ops import alignment_loss
from leafkern.train.checkpoint import restore, save_checkpoint
from leafkern.train.prepare import Prepared
from leafkern.train.progress import Bars
from leafkern.train.recipe import Optimiser, Recipe

TIMED_STEPS = 9


def learning_rate(step: int, steps_per_cycle: int, optimiser: Optimiser, warmup: int = 0) -> float:
    """The rate of step `step` (from 0): lr at the start of each cycle, final_lr at its last step, linear between."""
    place = step % steps_per_cycle
    rate = optimiser.lr + (optimiser.final_lr - optimiser.lr) * place / max(1, steps_per_cycle - 1)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


class History:
    """history.jsonl: one JSON object per line, readable at any moment, cut back to the checkpoint on resume."""

    def __init__(self, path: Path, resumed_at: int | None):
        self.path = path
        self.records: list[dict] = []
        if resumed_at is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that a kill cut short
                if record["step"] <= resumed_at:
                    self.records.append(record)
        with atomic_file(path) as temporary:
            lines = (json.dumps(record) + "\n" for record in self.records)
            temporary.write_text("".join(lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: dict) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def evaluated_at(self, step: int) -> bool:
        return any(record["step"] == step and record["event"] == "evaluate" for record in self.records[-3:])


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the step at hand is finished; a second signal acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def make_optimiser(module: nn.Module, settings: Optimiser) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW, and the names of its parameters in its own order."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
    kept = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
    groups = [
        {"params": [parameter for _, parameter in decayed], "weight_decay": settings.weight_decay},
        {"params": [parameter for _, parameter in kept], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    return optimiser, [name for name, _ in decayed + kept]


@dataclasses.dataclass
class Loop:
    """One run in memory. `state`: what checkpoints keep beside the run's own numbers (fingerprints, recipe)."""

    recipe: Recipe
    output: Path
    prepared: Prepared
    bars: Bars
    state: dict
    step: int = 0
    steps_per_cycle: int = 1
    seconds: float = 0.0  # spent in steps, over all sessions of the run
    saved: Path | None = None

    def __post_init__(self):
        self.module = self.prepared.student.module
        self.device = self.prepared.student.device
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimiser, self.names = make_optimiser(self.module, self.recipe.optimiser)
        self._last = (math.nan, math.nan)
        torch.manual_seed(self.recipe.seed)
        if self.saved is not None:
            restore(self.saved, self.optimiser, self.names, self.device)

    @property
    def total(self) -> int:
        return self.recipe.schedule.cycles * self.steps_per_cycle

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.module(batch)

    def _backward(self, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Loss and gradient norm of batch `step`, on the device, and its number of tokens; gradients are left."""
        rows = self.prepared.stream[step]
        batch = self.prepared.student.collate(self.prepared.tokens[rows])
        targets = self.prepared.targets.vectors(rows).to(self.device, non_blocking=True)
        loss = alignment_loss(self._forward(batch).float(), targets, kind=self.recipe.loss)
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return loss.detach(), nn.utils.get_total_norm(gradients), batch.input_ids.numel()

    def one_step(self) -> dict:
        """Does step `self.step`; NonFiniteLossError, with the weights untouched, where it would spoil them."""
        settings = self.recipe.optimiser
        rate = learning_rate(self.step, self.steps_per_cycle, settings, self.recipe.schedule.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, norm, tokens = self._backward(self.step)
        # One synchronisation with the device per step.
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        self._last = (loss_value, norm_value)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._non_finite(self.step)
        if settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, settings.clip_norm, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss_value, "grad_norm": norm_value, "lr": rate, "tokens": tokens}

    def _non_finite(self, step: int) -> NonFiniteLossError:
        """The error for batch `step` (from 0), naming the texts that give no finite vector."""
        rows = self.prepared.stream[step]
        with torch.no_grad():
            out = self._forward(self.prepared.student.collate(self.prepared.tokens[rows]))
        finite = torch.isfinite(out).all(dim=1).tolist()
        culprits = [row for row, fine in zip(rows.tolist(), finite) if not fine] or rows.tolist()
        return NonFiniteLossError(
            step + 1, *self._last, [self.prepared.corpus.where(row) for row in culprits], self.saved
        )

    def seconds_per_step(self) -> float:
        """Time of a step, from a few forward and backward passes that change nothing."""
        times = []
        for step in range(TIMED_STEPS):
            began = time.perf_counter()
            _, norm, _ = self._backward(step)
            norm.item()
            self.optimiser.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - began)
        torch.manual_seed(self.recipe.seed)
        # Without the first (warm-up); the optimiser adds a few passes over the weights.
        return sum(times[1:]) / (TIMED_STEPS - 1) * 1.05

    def steps_for(self, minutes: float) -> int:
        """Steps per cycle that fill `minutes`."""
        return max(1, int(minutes * 60 / self.seconds_per_step() / self.recipe.schedule.cycles))

    def save(self) -> None:
        """Saves a checkpoint; NonFiniteLossError where the last step spoilt the weights."""
        if not math.isfinite(nn.utils.get_total_norm(self.parameters).item()):
            raise self._non_finite(self.step - 1)
        numbers = {"step": self.step, "steps_per_cycle": self.steps_per_cycle, "seconds": self.seconds}
        folder = self.output / "checkpoints"
        self.saved = save_checkpoint(
            folder,
            self.prepared.student,
            self.optimiser,
            self.names,
            {**self.state, **numbers},
            self.recipe.checkpoint.keep,
        )

    def run(self) -> list[dict]:
        """Trains to the last step and returns the history; KeyboardInterrupt, after saving, on SIGINT or SIGTERM."""
        history = History(self.output / "history.jsonl", None if self.saved is None else self.step)
        self.module.train()
        try:
            with stop_on_signal() as stop:
                self._run(history, stop)
        finally:
            history.close()
        return history.records

    def _run(self, history: History, stop: threading.Event) -> None:
        recipe, every = self.recipe, self.recipe.evaluate.every
        last_save = began = time.monotonic()
        first, texts = self.step, 0
        epoch_steps = self.prepared.stream.steps_per_epoch
        self.bars("train", self.step, self.total)
        while True:
            done = self.step == self.total
            due = self.step == 0 or done or (every is not None and self.step % every == 0)
            if due and not history.evaluated_at(self.step):
                pause = time.monotonic()
                self._evaluate(history)
                began += time.monotonic() - pause
            at_step = recipe.checkpoint.steps is not None and self.step % recipe.checkpoint.steps == 0
            seconds = recipe.checkpoint.seconds
            at_time = seconds is not None and time.monotonic() - last_save >= seconds
            if self.step > first and (at_step or at_time or done or stop.is_set()):
                history.sync()
                self.save()
                last_save = time.monotonic()
            if done:
                return
            if stop.is_set():
                stopped = f"stopped after step {self.step} of {self.total}; go on with --resume (output: {self.output})"
                self.bars.say(stopped)
                raise KeyboardInterrupt(stopped)
            started = time.perf_counter()
            facts = self.one_step()
            self.seconds += time.perf_counter() - started
            texts += len(self.prepared.stream[self.step - 1])
            rate = texts / max(time.monotonic() - began, 1e-3)
            self.bars("train", self.step, self.total, **{"texts/s": rate, "loss": facts["loss"]})
            if self.step % recipe.log_every == 0 or self.step in (1, self.total):
                epoch = self.step / epoch_steps
                history.add({"event": "step", "step": self.step, "epoch": epoch, **facts, "seconds": self.seconds})

    def _evaluate(self, history: History) -> None:
        if not self.prepared.validation:
            return
        prepared = self.prepared
        found = prepared.validation.measure(prepared.student, prepared.prompts, self.bars.texts("evaluate"))
        history.add({"event": "evaluate", "step": self.step, **found, "seconds": self.seconds})
        self.bars("evaluate", 1, 1, **found)
