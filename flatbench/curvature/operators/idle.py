"""Adapters that have no part in what a model computes: merged into the weights, disabled, or passed over."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from flatbench.curvature.operators.adapters import adapted_layers
from flatbench.errors import InputError

#: modules of torch that read the weights of layers inside of them without calling the layers
_FUSED = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)
#: what is the matter with them, and what to do
PASSED_OVER = (
    "passed over: fused layers of torch read their weights without the adapter; leave them out of "
    "target_modules"
)


def idle_adapters(model: nn.Module) -> str:
    """Why adapters of a model have no part in its outputs, and what to do; empty where they have."""
    layers = adapted_layers(model)
    states = (
        (
            "merged",
            "merged into the weights (merge_adapter)",
            "unmerge_adapter(), or close what is open in the space 'merged'",
        ),
        ("disable_adapters", "disabled", "enable_adapter_layers(), or leave disable_adapter()"),
    )
    for attribute, state, remedy in states:
        found = [name for name, layer in layers.items() if getattr(layer, attribute, False)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"the adapters of {found[0]}{more} are {state}; call {remedy}"
    return ""


def refuse_idle_adapters(model: nn.Module) -> None:
    """Raise InputError for a model whose adapters are merged or disabled: their factors move nothing."""
    reason = idle_adapters(model)
    if reason:
        raise InputError(f"the loss depends on no parameter of the space 'adapter': {reason}")


@contextlib.contextmanager
def passed_over(model: nn.Module) -> Iterator[list[str]]:
    """On leaving, the list holds the adapted layers that fused modules of torch ran without calling."""
    layers = adapted_layers(model)
    # peft's own layer around an attention reads the adapters inside by itself
    fused = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _FUSED) and not name.endswith("base_layer")
    }
    inside = {
        key: [name for name in fused if key.startswith(f"{name}.") or not name]
        for key in layers
        if ".base_layer." not in key
    }
    called: set[int] = set()
    missed: list[str] = []
    with contextlib.ExitStack() as stack:
        for module in {id(m): m for m in (*fused.values(), *layers.values())}.values():
            stack.enter_context(_note_calls(module, called))
        yield missed
    missed += [
        key
        for key, names in inside.items()
        if id(layers[key]) not in called and any(id(fused[name]) in called for name in names)
    ]


@contextlib.contextmanager
def _note_calls(module: Any, called: set[int]) -> Iterator[None]:
    """Inside, calls of a module are noted. Not by hooks, for which torch leaves its fast paths."""
    own, forward = vars(module).get("forward"), module.forward

    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.add(id(module))
        return forward(*args, **kwargs)

    module.forward = noted
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def why_unused(model: nn.Module, run: Callable[[], Any]) -> str:
    """The end of the message that a loss depends on no parameter: its cause, where one is known.

    Args:
        run: computes the loss once.
    """
    reason = idle_adapters(model)
    if reason:
        return f": {reason}"
    with passed_over(model) as missed:
        run()
    if missed:
        return f": {', '.join(missed[:3])} {PASSED_OVER}"
    return ""
