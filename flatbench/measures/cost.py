"""Cost of training: time per step, gradients, memory and parameters as recorded, operations as counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from flatbench.config.registry import LATER
from flatbench.curvature.operators.model_state import as_found, plain_attention
from flatbench.curvature.operators.offloaded import within_reach
from flatbench.errors import InputError, NotApplicableError
from flatbench.measures.base import Measure
from flatbench.subject.objective import first_examples, rows
from flatbench.subject.subject import Subject

#: operations are counted on so many examples
_FLOP_EXAMPLES = 8
#: pairs of blocks, unless a study says how many
PAIRS = 15
#: what is handed on as it was recorded
_TRAINING_KEYS = (
    "peak_memory_source",
    "trainable_parameters",
    "train_seconds",
    "clock",
    "device",
    "threads",
    "jobs",
    "energy_joules",
    "energy_source",
    "energy_missing",
    "core_wait_share",
)


class Cost(Measure):
    """What training cost: median step time, gradients per step, peak memory, energy, trained parameters.

    Args:
        paired: also time steps of the method beside steps of plain LoRA, after training and apart from it.
            On a machine that is shared, the ratio is fairer than that of times taken at different moments.
        pairs: of blocks of steps that are timed so; 15 if not given.

    Raises:
        InputError: ``pairs`` without ``paired``.
    """

    def __init__(
        self,
        *,
        paired: Annotated[bool, LATER] = False,
        pairs: Annotated[Annotated[int, Field(ge=3)] | None, LATER] = None,
    ) -> None:
        if pairs is not None and not paired:
            raise InputError("pairs: nothing is timed in pairs unless paired is true")
        self.paired, self.pairs = paired, pairs or PAIRS

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Summarise ``subject.training``, and count operations; what was not recorded is None.

        Returns:
            ``step_ms``, ``step_ms_q1``, ``step_ms_q3`` (median and quartiles of a step's milliseconds after
            warm-up), ``steps_timed`` (recorded times they summarise; a time is itself a mean where not every
            step is logged), ``warmup_steps`` (recorded times left out), ``gradients_per_step``,
            ``gflops_per_example`` (10⁹ floating-point operations of the matrix products that a step makes for
            one example, on average over eight: forward and backward passes for all its gradients;
            neither elementwise operations nor the optimizer's own), ``peak_memory_mb`` (1 MB is 10⁶ bytes),
            ``peak_memory_source``, ``trainable_parameters``, ``train_seconds``, ``clock``, ``device``,
            ``threads``, ``jobs`` (runs beside it on the machine, itself included), ``energy_joules`` (of
            training without evaluation) with ``energy_source``, or ``energy_missing``, the reason why there
            is none; ``core_wait_share`` (of the time in which its threads had work during training, the
            share in which no core was free; None where the system records none). Paired also what
            `flatbench.runs.paired_cost.paired` returns, or ``paired_missing``.

        Raises NotApplicableError if nothing was recorded.
        """
        training = subject.training
        if not training:
            raise NotApplicableError("no training was recorded for this checkpoint")
        peak = training.get("peak_memory_bytes")
        gradients = training.get("gradients_per_step")
        return {
            **step_times(training.get("step_seconds") or ()),
            "gradients_per_step": gradients,
            "gflops_per_example": None if gradients is None else gradients * flops_per_example(subject) / 1e9,
            "peak_memory_mb": None if peak is None else peak / 1e6,
            **{name: training.get(name) for name in _TRAINING_KEYS},
            **(self._time_beside_lora(subject) if self.paired else {}),
        }

    def _time_beside_lora(self, subject: Subject) -> dict[str, Any]:
        if subject.pair is None:
            return {"paired_missing": "only runs in their own directories can be timed beside LoRA"}
        try:
            return subject.pair(self.pairs)
        except NotApplicableError as reason:
            return {"paired_missing": str(reason)}


def flops_per_example(subject: Subject, examples: int | None = _FLOP_EXAMPLES) -> float:
    """Floating-point operations of one gradient's matrix products, per example, on average over a few.

    Counted by torch while the passes are made, with an attention that is made of products it can see.

    Args:
        examples: how many of the first batch; all of it if None.
    """
    from torch.utils.flop_counter import FlopCounterMode

    (batch,) = first_examples(subject.batches[:1], examples)
    counter = FlopCounterMode(display=False, custom_mapping=quantized_products())
    with (
        within_reach(subject.model, [p for p in subject.model.parameters() if p.requires_grad]),
        as_found(subject.model),
        plain_attention(subject.model),
        torch.enable_grad(),
    ):
        trained = [p for p in subject.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(True)
        with counter:
            loss, _ = subject.loss(subject.model, batch)
            torch.autograd.grad(loss, trained, allow_unused=True)
    return counter.get_total_flops() / rows(batch)


def quantized_products() -> dict[Any, Any]:
    """How to count the products of bitsandbytes' layers, which torch does not know: ``FlopCounterMode``'s
    ``custom_mapping``, empty where they are not loaded."""

    def product(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        out = out_shape[0] if isinstance(out_shape[0], tuple | list | torch.Size) else out_shape
        # each output is a product over the inputs' last dimension
        return 2 * math.prod(out) * int(shapes[0][-1])

    names = ("gemm_4bit", "int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul")
    known = torch.ops.bitsandbytes
    return {getattr(known, name): product for name in names if hasattr(known, name)}


def step_times(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """Median and quartiles of step times in milliseconds, without the warm-up.

    The first tenth is left out, and at least five, but never more than half.
    """
    count = len(seconds)
    warmup = min(max(5, math.ceil(count / 10)), count // 2)
    found: list[float | None] = [None, None, None]
    if count:
        found = [float(q) * 1e3 for q in np.percentile(seconds[warmup:], [25, 50, 75])]
    return {
        "step_ms": found[1],
        "step_ms_q1": found[0],
        "step_ms_q3": found[2],
        "steps_timed": count - warmup,
        "warmup_steps": warmup,
    }
