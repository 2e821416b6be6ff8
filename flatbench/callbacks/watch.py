"""Measures of a model while somebody else's loop trains it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from flatbench.callbacks.budget import Budget, OverBudget
from flatbench.callbacks.points import method_of, unperturbed
from flatbench.callbacks.record import FILE, Record
from flatbench.errors import InputError, ModelChangedError, NotApplicableError
from flatbench.labels import uncompiled
from flatbench.machine import random_streams
from flatbench.measures.base import Measure, Track, checked
from flatbench.notebook.checkpoint import Checkpoint
from flatbench.notebook.chosen import answers, resolved
from flatbench.notebook.load import load_checkpoint

log = logging.getLogger(__name__)


class SharpnessWatch:
    """Takes measures of a model every so many steps of a loop, and leaves its training bit for bit as it was.

    ::

        watch = SharpnessWatch(model, optimizer, measures=["critical_sharpness"], data=batches, every=50,
                               folder="trained")
        for step, batch in enumerate(loader, start=1):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.after_step(step)
        print(watch.summary())

    Measures are taken at the unperturbed point (`flatbench.optim`'s methods and schedule-free optimizers have
    another one in training), in evaluation mode; weights, gradients, buffers, the optimizer's state and all
    random streams are afterwards what they were. With accelerate, hand over what ``prepare`` gave, and call
    `after_step` where ``accelerator.sync_gradients``, in the main process alone.

    Args:
        model: what is trained.
        optimizer: what trains it; None where it keeps no point of its own, as for SGD.
        measures: names of `flatbench list`, or mappings with options such as
            ``{"name": "hessian", "space": "adapter"}``.
        data: what is measured on: batches, a data loader, or examples, as `flatbench.load_checkpoint` takes
            them; a mapping of names to them holds other data too, for ``relative_critical_sharpness``.
        every: take them after every that many steps; None to ask for them with `look`.
        budget: the share of the time of training that measures, and all that is done for them, may take; None
            for no limit. A measurement that does not fit is left out, and said to be.
        folder: where `sharpness.parquet` goes; None for nowhere.
        clock: seconds; another one for tests.
        options: of `flatbench.load_checkpoint`: ``loss``, ``tokenizer``, ``text_columns``, …

    Raises InputError for measures, data or a budget that make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        measures: Sequence[str | Mapping[str, Any]],
        data: Any,
        every: int | None = None,
        budget: float | None = 0.05,
        folder: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        check_schedule(measures, every, budget)
        self.every = every
        self.optimizer = method_of(optimizer)
        bare = uncompiled(model)
        self._measures = {k: taken for k, (taken, _) in resolved(measures, bare, "watch").items()}
        kept = random_streams.state()  # a data loader draws a number for every iteration
        try:
            with unperturbed(self.optimizer):
                self._checkpoint: Checkpoint = load_checkpoint(bare, data, **options)
        finally:
            random_streams.restore(kept)
        self._checkpoint.subject()
        self._tracks = {label: Track() for label in self._measures}
        self.record = Record(None if folder is None else Path(folder) / FILE)
        self.budget = Budget(budget, clock, self._measures)
        self._left_out: dict[str, int] = dict.fromkeys(self._measures, 0)
        self._counts: dict[str, int] = dict.fromkeys(self._measures, 0)
        #: steps since the last row at which something was due, and nothing fitted the budget
        self._passed_over = 0
        self._started = False
        self._notices: set[str] = set()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict for every step at which something was taken, as in the file."""
        return self.record.rows

    def begin(self, step: int = 0, since: float | None = None) -> None:
        """The training starts, or goes on, after so many steps; time counts from here, or from ``since``.

        `after_step` does so by itself, at the step before its first.
        """
        last = self.record.begin(step)
        self.budget.resume(
            last.get("train_seconds", 0.0) if last else 0.0,
            last.get("measure_seconds", 0.0) if last else 0.0,
            since,
        )
        self._started = True

    def after_step(self, step: int, epoch: float | None = None) -> dict[str, float]:
        """So many steps are done: measure, if it is time. Returns what is of interest, by name."""
        if not self._started:
            self.begin(step - 1)
        if self.every is None or step % self.every:
            return {}
        return self.look(step, epoch)

    def look(self, step: int, epoch: float | None = None, *, evaluated: bool = False) -> dict[str, float]:
        """Measure now, unless this step was measured already.

        Args:
            step: steps that are done.
            evaluated: the weights are at the unperturbed point already.

        Returns:
            ``<label>.<value>`` of what is of interest; everything is in `rows`.
        """
        if not self._started:
            self.begin(step)
        if self.record.last_step >= step:
            return {}
        if not any(self.budget.affords(label) for label in self._measures):
            for label in self._measures:
                self._left_out[label] += 1
            self._passed_over += 1
            return {}
        with self.budget.around():
            return self._look(step, {} if epoch is None else {"epoch": float(epoch)}, evaluated)

    def _look(self, step: int, place: Mapping[str, float], evaluated: bool) -> dict[str, float]:
        row: dict[str, Any] = {"step": step, **place}
        shown: dict[str, float] = {}
        for label, measure in self._measures.items():
            if not self.budget.affords(label):
                row[f"{label}.left_out"] = "budget"
                self._left_out[label] += 1
                continue
            values = self._take(label, measure, evaluated)
            row |= {f"{label}.{k}": v for k, v in values.items() if not isinstance(v, list | dict)}
            shown |= {f"{label}.{k}": v for k, v in answers(values).items()}
        self.record.add({**row, "passed_over": self._passed_over, **self.budget.state()})
        self._passed_over = 0
        return shown

    def _take(self, label: str, measure: Measure, evaluated: bool) -> dict[str, Any]:
        """A measure's values; where it has none, why not."""
        subject = replace(self._checkpoint.subject(), optimizer=self.optimizer)
        try:
            with self.budget.spending(label) as limited, unperturbed(self.optimizer, evaluated):
                taken = measure.during(replace(subject, loss=limited(subject.loss)), self._tracks[label])
                found = checked(label, taken, finite=False)
        except OverBudget:
            self._left_out[label] += 1
            return {"left_out": "broken off for the budget"}
        except NotApplicableError as reason:
            return {"skipped": self._tell(label, str(reason))}
        except (ModelChangedError, KeyboardInterrupt):
            raise
        except Exception as error:  # a training of days does not end because a measure failed
            return {
                "failed": self._tell(label, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            }
        self._counts[label] += 1
        return found

    def _tell(self, label: str, reason: str) -> str:
        if f"{label}{reason}" not in self._notices:
            self._notices.add(f"{label}{reason}")
            log.warning("%s: not measured: %s", label, reason)
        return reason

    def end(self) -> None:
        """The training has ended: say in the log what was taken, and what was left out."""
        log.log(logging.WARNING if any(self._left_out.values()) else logging.INFO, "%s", self.summary())

    def summary(self) -> str:
        """What was taken, what it cost, and what was left out, in a line."""
        trained, spent = self.budget.trained, self.budget.spent
        share = spent / trained if trained > 0 else 0.0
        parts = []
        for label in self._measures:
            out = self._left_out[label]
            left = f", {out} left out for the budget" if out else ""
            parts.append(f"{label} {self._counts[label]} times{left}")
        limit = "no limit" if self.budget.share is None else f"budget {self.budget.share:.1%}"
        return f"{'; '.join(parts)}; {spent:.3g} s, {share:.1%} of {trained:.3g} s of training ({limit})"


def check_schedule(measures: Iterable[Any], every: int | None, budget: float | None) -> None:
    """Raise InputError for no measures, and for numbers that make no sense."""
    if isinstance(measures, str) or not list(measures):
        raise InputError("measures: give a list of names, such as ['critical_sharpness']")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise InputError(f"every: a number of steps, at least 1, not {every!r}")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(
            f"budget: a share of the time of training above 0 and at most 1, or None, not {budget!r}"
        )
