"""Sharpness in transformers' Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from flatbench.callbacks.watch import SharpnessWatch, check_schedule
from flatbench.errors import InputError

log = logging.getLogger(__name__)


class SharpnessCallback(transformers.TrainerCallback):  # type: ignore[misc]  # it is loaded lazily
    """Takes measures while transformers' Trainer trains, and leaves the training bit for bit as it was.

    ::

        watch = SharpnessCallback(measures=["critical_sharpness"], data=rows[:256], every=50)
        trainer = transformers.Trainer(model, arguments, ..., callbacks=[watch])
        watch.attach(trainer)  # optional: trackers and progress bars get the values too

    The values are in ``trainer.state.log_history`` and, with all that measures say, in ``sharpness.parquet``
    in the Trainer's ``output_dir``: a row a step, after an interruption too. What it touches, and how the
    budget is kept, says `flatbench.callbacks.watch.SharpnessWatch`.

    Args:
        measures: names of `flatbench list`, or mappings with options.
        data: what is measured on: batches, a data loader, or examples; None for the Trainer's evaluation
            data, through its own loader. Of several sets of evaluation data it is the first, which is told.
        every: take them after every that many steps; None at the Trainer's evaluations.
        budget: the share of the time of training that measures may take; None for no limit.
        folder: where ``sharpness.parquet`` goes; the Trainer's ``output_dir`` if None.
        clock: seconds; another one for tests.
        options: of `flatbench.load_checkpoint`: ``loss``, ``tokenizer``, ``text_columns``, …

    Attributes:
        watch: the `SharpnessWatch` of the last training; None before the first.

    Raises InputError for numbers that make no sense and, when training begins, for measures or data that do
    not, and for a model in shards, of which no process holds all.
    """

    def __init__(
        self,
        *,
        measures: Sequence[str | Mapping[str, Any]],
        data: Any = None,
        every: int | None = None,
        budget: float | None = 0.05,
        folder: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        check_schedule(measures, every, budget)
        self._settings = {"measures": measures, "every": every, "budget": budget, "clock": clock, **options}
        self._data, self._every, self._folder = data, every, folder
        self.watch: SharpnessWatch | None = None
        self._told = False
        self._evaluated: Any = None  # the evaluation data that are measured on
        self._trainer: Any = None
        #: the step and the time at which a training began that this process measures
        self._start: tuple[int, float] | None = None

    def attach(self, trainer: Any) -> None:
        """Hand values to the Trainer's own ``log``, which tells its trackers; added to it if it was not."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training starts or goes on."""
        self.watch = self._start = self._evaluated = None
        if not state.is_world_process_zero:
            return
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise InputError(
                "SharpnessCallback: the model is trained in shards, and no process holds all of it; measure "
                "its checkpoints with `flatbench measure`"
            )
        evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
        if self._data is None and (self._every is not None or not evaluates):
            raise InputError(
                "SharpnessCallback: data: what is to be measured on? Without data=, the Trainer's evaluation "
                "data are taken, at its evaluations (every=None, and an eval_strategy)"
            )
        self._start = (state.global_step, self._settings["clock"]())
        if self._data is not None:
            self._make(args, self._data, **kwargs)

    def _make(self, args: Any, data: Any, **kwargs: Any) -> None:
        assert self._start is not None
        clock = self._settings["clock"]
        before = clock()
        self.watch = SharpnessWatch(
            kwargs["model"],
            kwargs.get("optimizer"),
            data=data,
            folder=args.output_dir if self._folder is None else self._folder,
            **self._settings,
        )
        self.watch.begin(*self._start)
        self.watch.budget.spent += clock() - before  # making it is no training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        if self.watch is not None:
            self._log(state, control, self.watch.after_step(state.global_step, state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has evaluated, and is at the unperturbed point."""
        if self._start is None or self._every is not None:  # not in training, or not asked for
            return
        if self._data is None:
            data = kwargs["eval_dataloader"]
            held = getattr(data, "dataset", data)
            if self._evaluated is not None and held is not self._evaluated:
                if not self._told:
                    log.warning(
                        "SharpnessCallback: the Trainer evaluates several sets of data, and the first alone "
                        "is measured on; give data= to choose"
                    )
                self._told = True
                return
            self._evaluated = held
            if self.watch is None:  # the evaluation's data are there from now on
                self._make(args, data, **kwargs)
        if self.watch is not None:
            self._log(state, control, self.watch.look(state.global_step, state.epoch, evaluated=True))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training has ended: what was left out is said."""
        if self.watch is not None:
            self.watch.end()
        self._start = None

    def _log(self, state: Any, control: Any, values: Mapping[str, float]) -> None:
        if not values:
            return
        if self._trainer is not None:
            due = control.should_log  # the Trainer's own row of this step, which `log` would strike off
            self._trainer.log(dict(values))
            control.should_log = due
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
