"""Hooks by which a model tells its optimizer what it is used for."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flatbench.errors import InputError
from flatbench.labels import uncompiled

#: wrappers for parallel training; torch.compile's has its model as ``_orig_mod``
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
#: those that serve an optimizer, or did
_EVERY: weakref.WeakSet[Any] = weakref.WeakSet()
#: of `nn.Module.__call__`, by which a pass is found that runs already
_CALL = nn.Module._call_impl.__code__


@torch._disable_dynamo  # type: ignore[attr-defined]  # what torch.optim itself uses
def _move(follower: Follower, training: bool) -> None:
    """Go to the point for training or for an evaluation; a graph is left for it."""
    if training:
        follower.optimizer.for_training()
        follower.optimizer.before_pass()
    elif not follower._in_a_training_pass():
        follower.optimizer.for_evaluation()


class Follower:
    """Hooks of every module whose outputs or weights differ between the two points of an optimizer.

    Saving, loading or evaluating any of them finds the point of evaluation, and the next forward pass in
    training mode that of training. A module in evaluation mode inside of a pass that trains is no evaluation,
    nor is one that gradient checkpointing runs again.

    The model holds its optimizer by them: one that is saved after the training function returned must still
    find the way to its unperturbed point. A copy of the model is made at the point of evaluation; it has no
    optimizer, unless that is copied with it.
    """

    def __init__(self) -> None:
        _EVERY.add(self)
        self.optimizer: Any = None
        #: the optimizer's, where a compiled graph can look at it
        self.point: Any = None

    def serve(self, optimizer: Any) -> None:
        """Tell this optimizer; None to tell nobody."""
        self.optimizer, self.point = optimizer, None if optimizer is None else optimizer.point

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        """A module is called; in a compiled graph this is traced, with guards on what it looks at."""
        point = self.point
        if point is None or point.held or getattr(module, "_is_replica", False):
            return
        if module.training:
            if point.returns:
                _move(self, True)
            elif not torch.compiler.is_compiling():
                self.optimizer.before_pass()
        elif point.training:
            _move(self, False)

    def before_forward_within(self, module: nn.Module, *_: Any) -> None:
        """A layer is called; in a graph, the module around it has moved already."""
        if not torch.compiler.is_compiling():
            self.before_forward(module)

    def _in_a_training_pass(self) -> bool:
        """Whether one of the modules calls this one in training mode, or a backward pass does."""
        if torch._C._current_graph_task_id() != -1:
            return True
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL:
                caller = frame.f_locals["self"]
                hooks = caller._forward_pre_hooks.values()
                if caller.training and any(getattr(hook, "__self__", None) is self for hook in hooks):
                    return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def before_state_dict(self, *_: Any) -> None:
        """The module's state is asked for, or a state is loaded into it."""
        if self.optimizer is not None:
            self.optimizer.for_evaluation()

    def __deepcopy__(self, memo: dict[int, Any]) -> Follower:
        made = Follower()
        memo[id(self)] = made
        if self.optimizer is not None:
            with self.optimizer.at_evaluation(), torch.no_grad():
                for parameter in self.optimizer.moved_parameters():
                    if id(parameter) in memo:
                        memo[id(parameter)].copy_(parameter)
                    else:
                        copy.deepcopy(parameter, memo)
        return made

    def __reduce__(self) -> Any:
        if self.optimizer is not None:
            self.optimizer.for_evaluation()
        return (Follower, ())


def follow(optimizer: Any, model: nn.Module) -> None:
    """Put an optimizer's hooks into its model, and those of earlier ones out of it."""
    own, bases = optimizer._follower, _chain(optimizer)[1:]
    for found in _unhook(model):
        _release(found, own, bases)
    if own is None:
        own = optimizer._follower = Follower()
    own.serve(optimizer)
    if not _hook_in(model, {id(p) for p in optimizer.moved_parameters()}, own, {}):
        # parts of divided parameters, which no module holds
        _hook_whole(model, own)


def release(model: nn.Module) -> None:
    """End what an optimizer of `flatbench.optim` does to a model: another one may train it from now on.

    The weights are left at the point of evaluation. Without it, another optimizer's step is refused, because
    the first one's hooks go on to move the weights between its two points.
    """
    for found in _unhook(model):
        _release(found, None, [])


def _unhook(model: nn.Module) -> list[Follower]:
    """Take all followers' hooks out of a model; whose they were."""
    found: dict[int, Follower] = {}
    for module in model.modules():
        for hooks in (getattr(module, name) for name in _HOOKS):
            for key, hook in list(hooks.items()):
                owner = getattr(getattr(hook, "hook", hook), "__self__", None)
                if isinstance(owner, Follower):
                    del hooks[key]
                    found[id(owner)] = owner
    return list(found.values())


def _chain(optimizer: Any, *names: str) -> list[Any]:
    """An optimizer and those within it, by ``base`` or by the names under which wrappers hold theirs."""
    found, inner = [], optimizer
    while inner is not None:
        found.append(inner)
        held = (getattr(inner, name, None) for name in ("base", *names))
        inner = next((each for each in held if each is not None), None)
    return found


def take_over(optimizer: Any) -> None:
    """Release earlier optimizers of the same weights, for one that leaves no hooks in the model."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for follower in list(_EVERY):
        owner = follower.optimizer
        if owner is not None and not _belongs(optimizer, owner) and own & _ids(owner):
            release(owner.model)


def _ids(owner: Any) -> set[int]:
    """What moves, and what is trained beside it, as LoRA's factors under noise in the frozen weights."""
    trained = {id(p) for group in owner.param_groups for p in group["params"]}
    return trained | {id(p) for p in owner.moved_parameters()}


def _refuse_others(stepping: Any, *_: Any) -> None:
    """Before any optimizer's step: raise InputError if it trains weights that another one moves."""
    for follower in list(_EVERY):
        owner = follower.optimizer
        if owner is None or owner.stepping or _belongs(stepping, owner):
            continue
        own = _ids(owner)
        if any(id(p) in own for group in stepping.param_groups for p in group["params"]):
            kind = type(owner).__name__
            raise InputError(
                f"{type(stepping).__name__} is to step weights that an earlier {kind} still moves between "
                f"its two points, so that the step would be lost or taken at a perturbed point; call "
                f"flatbench.optim.release(model) when {kind} has done its part"
            )


def _belongs(optimizer: Any, owner: Any) -> bool:
    """Whether an optimizer is the owner, is within it, or is a wrapper of it."""
    wrappers = _chain(optimizer, "optimizer", "_optimizer")
    return any(each is optimizer for each in _chain(owner)) or any(each is owner for each in wrappers)


register_optimizer_step_pre_hook(_refuse_others)


def _release(found: Follower, own: Follower | None, bases: list[Any]) -> None:
    """Let an earlier optimizer's hooks go: it leaves the model where it is evaluated."""
    earlier = found.optimizer
    if found is own or earlier is None:
        return
    found.serve(None)
    earlier.let_go()
    if not any(earlier is base for base in bases):
        earlier.eval()


def _hook_in(
    module: nn.Module, moved: set[int], follower: Follower, done: dict[int, bool], inside_layer: bool = False
) -> bool:
    """Hook a module, if it or one within holds a parameter that moves."""
    if id(module) in done:
        return done[id(module)]
    outermost = not done
    done[id(module)] = False
    layer = inside_layer or hasattr(module, "get_base_layer")
    children = [_hook_in(child, moved, follower, done, layer) for child in module.children()]
    holds = any(children) or any(id(p) in moved for p in module._parameters.values())
    done[id(module)] = holds
    # a wrapper has no mode of its own: that of the model in it counts
    if holds and not (isinstance(module, _PARALLEL) or hasattr(module, "_orig_mod")):
        if not inside_layer:  # nobody calls a factor of a layer by itself
            whole = outermost or (any(children) and not layer)
            module.register_forward_pre_hook(
                follower.before_forward if whole else follower.before_forward_within
            )
        module.register_state_dict_pre_hook(follower.before_state_dict)
        module.register_load_state_dict_pre_hook(follower.before_state_dict)
        # what is pickled goes through the hooks first, and by them to the point of evaluation
        for name in ("_parameters", "_buffers"):
            if name in module.__dict__:
                module.__dict__[name] = module.__dict__.pop(name)
    return holds


def _hook_whole(model: nn.Module, follower: Follower) -> None:
    inner = uncompiled(model)
    inner.register_forward_pre_hook(follower.before_forward)
    inner.register_state_dict_pre_hook(follower.before_state_dict)
    inner.register_load_state_dict_pre_hook(follower.before_state_dict)
