"""Steps of a method and of plain LoRA timed side by side, so that a shared machine slows both alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flatbench.config.sections import ADAPTER_SHORTHANDS, AdapterOptions
from flatbench.errors import DivergedError, InputError, NotApplicableError
from flatbench.machine import random_streams
from flatbench.runs import open as opening
from flatbench.runs import out_of_memory
from flatbench.store import RunDirectory
from flatbench.training.trainer import Trainer

#: steps in a block of a method that does the same in each, at least
_BLOCK = 4
#: a block's seconds, at least: many turns of a scheduler that shares a core out among processes
_BLOCK_SECONDS = 0.1


def plain_lora(adapter: AdapterOptions) -> AdapterOptions:
    """The adapter without what makes it a variant of LoRA; of full fine-tuning, the default LoRA."""
    return AdapterOptions.model_validate({**adapter.model_dump(), **ADAPTER_SHORTHANDS["lora"]})


def paired(directory: RunDirectory, pairs: int) -> dict[str, Any]:
    """Time a run's method and plain LoRA in turns: a block of steps of the one, a block of the other.

    Both start anew, on models of their own, with the run's task, batches, base optimizer, precision and
    threads. Which of a pair comes first changes from pair to pair, so that drift favours neither. A block
    lasts a tenth of a second at least, and holds whole periods of a method that perturbs at every k-th step
    only. A pair of short blocks comes before, as warm-up.

    Args:
        directory: a run, trained or not; nothing in it is changed.
        pairs: blocks of each whose times count.

    Returns:
        ``paired_ratio``, ``paired_ratio_q1``, ``paired_ratio_q3`` (median and quartiles over the pairs of the
        method's time over LoRA's), ``paired_step_ms`` and ``paired_lora_step_ms`` (median milliseconds of a
        step in these blocks), ``paired_pairs``, ``paired_block`` (steps in a block),
        ``paired_gradients_per_step`` (as taken by the method in these blocks), ``paired_reference`` (what it
        was compared with).

    Raises:
        NotApplicableError: several processes trained the run, LoRA has no modules to adapt, memory is too
            short for both, or a loss is not finite.
    """
    options = opening.train_options(directory)
    if options.processes > 1:
        raise NotApplicableError(
            f"{options.processes} processes trained this run, and paired steps are taken by one"
        )
    config = directory.spec()["config"]
    lora = plain_lora(AdapterOptions.model_validate(config["adapter"]))
    plain = {"name": "plain", "base": config["optimizer"]["base"]}
    random = random_streams.state()
    try:
        method = _TimedMethod(directory, None, config["optimizer"])
        found = _time_blocks(method, _TimedMethod(directory, lora, plain), pairs)
    except (DivergedError, InputError) as reason:
        raise NotApplicableError(str(reason)) from reason
    except Exception as error:
        if out_of_memory.out_of_memory(error):
            raise NotApplicableError(
                "memory ran out with two models in training beside the trained one"
            ) from None
        raise
    finally:
        random_streams.restore(random)
    return {**found, "paired_reference": f"LoRA of rank {lora.r}"}


class _TimedMethod:
    """One of the two that are compared, at the beginning of its training.

    Attributes:
        gradients: that were taken so far.
    """

    def __init__(self, directory: RunDirectory, adapter: AdapterOptions | None, optimizer: Any) -> None:
        run = opening.open_run(directory, trained=False, adapter=adapter)
        options = opening.train_options(directory)
        self.trainer = Trainer(run.task, run.model, run.splits, options, optimizer, run.config["seed"])
        self.gradients = 0
        self._steps: Iterator[None] = self.trainer.steps()

    def block(self, steps: int) -> float:
        """Seconds of the next steps."""
        before = self.trainer.elapsed()
        for _ in range(steps):
            self.gradients += self.trainer.optimizer.gradients_of_next_step
            next(self._steps)
        return self.trainer.elapsed() - before


def _time_blocks(method: _TimedMethod, reference: _TimedMethod, pairs: int) -> dict[str, Any]:
    period = getattr(method.trainer.optimizer, "every", 1)
    steps = period * math.ceil(_BLOCK / period)
    warm_up = min(method.block(steps), reference.block(steps)) / steps
    if warm_up > 0:
        steps = period * math.ceil(max(_BLOCK, _BLOCK_SECONDS / warm_up) / period)
    before = method.gradients
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            other = reference.block(steps)
            own = method.block(steps)
        else:
            own = method.block(steps)
            other = reference.block(steps)
        times.append((own, other))
    own_seconds, other_seconds = np.array(times).T
    quartiles = [float(q) for q in np.percentile(own_seconds / other_seconds, [25, 50, 75])]
    return {
        "paired_ratio": quartiles[1],
        "paired_ratio_q1": quartiles[0],
        "paired_ratio_q3": quartiles[2],
        "paired_step_ms": float(np.median(own_seconds)) / steps * 1e3,
        "paired_lora_step_ms": float(np.median(other_seconds)) / steps * 1e3,
        "paired_pairs": pairs,
        "paired_block": steps,
        "paired_gradients_per_step": (method.gradients - before) / (steps * pairs),
    }
