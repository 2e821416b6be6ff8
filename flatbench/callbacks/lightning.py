"""Sharpness in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from flatbench.callbacks.watch import SharpnessWatch, check_schedule
from flatbench.errors import InputError

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise InputError("LightningSharpness needs Lightning: pip install lightning") from error


class LightningSharpness(Callback):
    """Takes measures while Lightning trains; `flatbench.callbacks.watch.SharpnessWatch` says all else.

    Args:
        model: name of the module's attribute that is the model, which takes the batches of ``data`` and gives
            their loss.
        every: take them after every that many optimizer steps.
        settings: as of `SharpnessWatch`: measures, data, budget, folder, …
    """

    def __init__(self, *, model: str = "model", every: int, **settings: Any) -> None:
        check_schedule(settings.get("measures", ()), every, settings.get("budget", 0.05))
        self._name, self._settings = model, {"every": every, **settings}
        self.watch: SharpnessWatch | None = None
        self._last_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The training starts or goes on."""
        self.watch, self._last_step = None, trainer.global_step
        if not trainer.is_global_zero:
            return
        if not hasattr(pl_module, self._name):
            raise InputError(
                f"LightningSharpness: the module has no '{self._name}'; name its model with model="
            )
        if len(trainer.optimizers) != 1:
            raise InputError(f"LightningSharpness: one optimizer, not {len(trainer.optimizers)}")
        self.watch = SharpnessWatch(getattr(pl_module, self._name), trainer.optimizers[0], **self._settings)
        self.watch.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """A batch is done; with accumulation, not every one is a step."""
        if self.watch is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        values = self.watch.after_step(trainer.global_step, trainer.current_epoch)
        if values and trainer.logger is not None:
            trainer.logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The training has ended: what was left out is said."""
        if self.watch is not None:
            self.watch.end()
