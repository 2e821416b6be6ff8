"""Loops with and without a watch, of which the weights have to be the same, bit for bit."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatbench.callbacks import SharpnessWatch
from tests.optim.models import snapshot
from tests.optim.trainer_case import MICRO, data, model_of, optimizer_of

#: cheap, along the optimizer's own update, and one of merged weights with gradients of its own
MEASURES = [
    {"name": "critical_sharpness", "direction": "adamw"},
    {"name": "sam_sharpness", "steps": 2, "examples": 16},
]
ROWS = data()[:16]


def batches() -> list[dict[str, Tensor]]:
    rows = data()
    return [
        {key: torch.stack([row[key] for row in rows[i : i + MICRO]]) for key in rows[0]}
        for i in range(0, len(rows), MICRO)
    ]


def optimizer_for(name: str, model: Any) -> Any:
    if name == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return optimizer_of(name, model)


def plain_loop(
    name: str,
    folder: Path | None,
    accumulate: int = 1,
    bf16: bool = False,
    watch: bool = True,
    restart_after: int | None = None,
) -> tuple[dict[str, Tensor], Any]:
    """The weights at the unperturbed point after a loop of its own, and its last watch.

    Args:
        restart_after: go on after so many steps with another model and optimizer, from their states.
    """
    model = model_of(dropout=0.3)
    optimizer = optimizer_for(name, model)
    torch.manual_seed(5)

    def watched() -> Any:
        if not watch:
            return None
        return SharpnessWatch(
            model, optimizer, measures=MEASURES, data=ROWS, every=2, budget=None, folder=folder
        )

    made = watched()
    model.train()
    parts = batches()
    for step in range(len(parts) // accumulate):
        if step == restart_after:
            states, random = (
                copy.deepcopy((model.state_dict(), optimizer.state_dict())),
                torch.get_rng_state(),
            )
            model = model_of(dropout=0.3)
            optimizer = optimizer_for(name, model)
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            made = watched()
            model.train()
            torch.set_rng_state(random)
        own = parts[step * accumulate : (step + 1) * accumulate]

        optimizer.step(partial(_gradients, model, optimizer, own, bf16))
        if made is not None:
            made.after_step(step + 1)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return snapshot(model), made


def _gradients(model: Any, optimizer: Any, parts: list[dict[str, Tensor]], bf16: bool) -> Tensor:
    optimizer.zero_grad()
    for part in parts:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(**part)["loss"]
        (loss / len(parts)).backward()
    return loss


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
