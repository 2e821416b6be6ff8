"""Random small models, adapters, spaces and interruptions: the function measured is the function trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators.adapters import adapted_layers, attentions, base_of, replaced_keys
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.models.factors import adapted_modules
from flatbench.subject.objective import norm
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot

WORDS, WIDTH, TOKENS, ROWS = 5, 4, 3, 4
QUIET = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Turned(nn.Module):
    """A layer over the tokens instead of the features."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT).mT


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.P)


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "bare linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "tanh": nn.Tanh,
    "convolution": lambda: Turned(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "attention": Attended,
    "product": Product,
    "dropout": lambda: nn.Dropout(0.3),
    "batch norm": lambda: Turned(nn.BatchNorm1d(WIDTH)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
}
#: how a layer may stand a second time: the module, its parameter, its parameter's memory
TIES = ("module", "parameter", "memory")


@dataclass(frozen=True)
class Recipe:
    blocks: tuple[str, ...]
    repeat: tuple[int, str] | None  # which of the linear layers comes again, and how
    head: str | None  # how the head is tied to the embedding; None: not
    adapter: str  # none, lora, dora, bias, adalora, parameters
    targets: int  # bits: which of the layers that can be adapted are
    saved: bool  # the head is trained beside, by peft's modules_to_save
    second: bool  # a second adapter is active as well
    state: str  # active, disabled, merged
    space: str
    way: str  # space or operator
    end: str  # how it is left
    seed: int


recipes = st.builds(
    Recipe,
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), max_size=4).map(tuple),
    repeat=st.none() | st.tuples(st.integers(0, 3), st.sampled_from(TIES)),
    head=st.sampled_from([None, "parameter", "memory"]),
    adapter=st.sampled_from(["lora", "none", "dora", "bias", "adalora", "parameters"]),
    targets=st.integers(1, 2**7 - 1),
    saved=st.booleans(),
    second=st.booleans(),
    state=st.sampled_from(["active", "active", "active", "disabled", "merged"]),
    space=st.sampled_from(["merged", "all", "adapter", "chosen"]),
    way=st.sampled_from(["space", "operator"]),
    end=st.sampled_from(["quiet", "error", "interrupt", "loss"]),
    seed=st.integers(0, 2**16),
)


class Network(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        blocks = [BLOCKS[name]() for name in recipe.blocks]
        linear = [block for block in blocks if isinstance(block, nn.Linear)]
        again: nn.Module | None = None
        if recipe.repeat and linear:
            original = linear[recipe.repeat[0] % len(linear)]
            again = original if recipe.repeat[1] == "module" else nn.Linear(WIDTH, WIDTH)
            blocks += [nn.Tanh(), again]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WORDS, bias=recipe.adapter == "bias")
        self.double()
        for p in self.parameters():
            p.data.normal_(std=0.6)
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        if again is not None and recipe.repeat and again is not original:
            tie(again, original, recipe.repeat[1])
        tie(self.head, self.words, recipe.head)

    def forward(self, ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def tie(one: Any, other: Any, how: str | None) -> None:
    if how == "parameter":
        one.weight = other.weight
    elif how == "memory":
        one.weight.data = other.weight.data


def adapted(recipe: Recipe) -> nn.Module:
    model = Network(recipe)
    if recipe.adapter == "none":
        return model
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.MultiheadAttention)
    if recipe.adapter == "adalora":
        kinds = (nn.Linear,)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith("out_proj")]
    if recipe.saved:
        names.remove("head")
    chosen = [name for i, name in enumerate(names) if recipe.targets >> i & 1]
    options: dict[str, Any] = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.2, "target_modules": chosen}
    options["modules_to_save"] = ["head"] if recipe.saved else None
    if recipe.adapter == "parameters":
        parameters = [n for n, _ in model.named_parameters() if n.endswith((".P", "in_proj_weight"))]
        parameters += [f"{name}.weight" for name in chosen if name.startswith("blocks")]
        options |= {"target_modules": [], "target_parameters": sorted(set(parameters)), "lora_dropout": 0.0}
        chosen = parameters
    assume(chosen)
    extra: dict[str, Any] = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(recipe.adapter, {})
    config: Any = peft.LoraConfig
    if recipe.adapter == "adalora":
        config, extra = peft.AdaLoraConfig, {"total_step": 9, "lora_dropout": 0.2}
    try:
        made: Any = peft.get_peft_model(model, config(**{**options, **extra}))
        if recipe.second and recipe.adapter == "lora":
            made.add_adapter("second", config(**{**options, "r": 1, "target_modules": chosen[:1]}))
            made.base_model.set_adapter(["default", "second"])
    except (ValueError, TypeError, NotImplementedError):  # what peft itself refuses
        assume(False)
    for key, p in made.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            p.data.normal_(std=0.5)
        p.data = p.data.double()
    if recipe.state == "disabled":
        made.base_model.disable_adapter_layers()
    elif recipe.state == "merged":
        assume(recipe.head is None and recipe.repeat is None)  # peft writes into what is shared
        try:
            made.merge_adapter()
        except (ValueError, RuntimeError, NotImplementedError):
            assume(False)
    return made


class Broken(Exception):
    pass


def is_refused(recipe: Recipe, model: nn.Module) -> bool:
    """What has no such space, by what the documentation says."""
    layers = adapted_layers(model)
    if recipe.space == "adapter":
        working = recipe.state == "active"
        twice = recipe.way == "operator" or recipe.seed % 2 == 1  # see `inside`
        curved = twice and recipe.adapter == "dora" and working
        return not layers or (bool(attentions(model)) and working) or curved
    nowhere = any(base_of(layer)[0].bias is None for layer in layers.values() if replaced_keys(layer)[1:])
    return nowhere or (recipe.space == "merged" and not layers)


def check(recipe: Recipe) -> None:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(recipe.seed)
        model = adapted(recipe)
        batch = {
            "ids": torch.randint(0, WORDS, (ROWS, TOKENS)),
            "labels": torch.randint(0, WORDS, (ROWS, TOKENS)),
        }
        if recipe.adapter == "parameters":
            assume(trains(model, batch))
        with torch.no_grad():
            expected = model.eval()(**batch).logits
        model.train()
        for i, module in enumerate(model.modules()):
            module.training = (recipe.seed >> (i % 16)) & 1 == 0
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        before, groups = state(model), sharing(model)
        model_is_refused = is_refused(recipe, model)
        measured = False
        try:
            measured = inside(recipe, model, batch, expected)
        except (NotApplicableError, InputError) as error:
            # adapters that are merged or disabled move nothing in their own space
            idle = recipe.space == "adapter" and recipe.state != "active"
            moves_nothing = idle and "depends on no parameter" in str(error)
            assert model_is_refused or moves_nothing, (recipe, error)
        except FlatbenchError as error:
            assert "depends on no parameter" in str(error), (recipe, error)
        except (Broken, KeyboardInterrupt):
            assert recipe.end in ("error", "interrupt", "loss")
        assert same(before, state(model)), changes(before, state(model))
        assert groups == sharing(model)
        assert not (measured and model_is_refused), recipe


def trains(model: nn.Module, batch: Any) -> bool:
    """Whether a training step is possible: peft parametrizes what is shared for each module anew."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        torch.autograd.grad(model.eval()(**batch).loss, parameters, allow_unused=True)
    except RuntimeError as error:
        return "inplace operation" not in str(error)
    return True


def inside(recipe: Recipe, model: nn.Module, batch: Any, expected: Tensor) -> bool:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        nonlocal calls
        calls += 1
        if recipe.end == "loss" and calls == 1 + recipe.seed % 6:
            model(**batch)
            torch.rand(3)
            raise Broken
        return model(**batch).loss, batch["labels"].numel()

    space: Any = recipe.space
    if recipe.way == "operator":
        chosen: Any = (lambda name: "head" in name or "words" in name) if space == "chosen" else space
        with HessianOperator(model, loss, [batch], space=chosen) as hessian:
            look(model, batch, expected)
            value, _ = hessian.point()
            v = torch.randn(hessian.dimension).double()
            assert torch.isfinite(hessian @ v).all()
            del value
            leave(recipe)
        return True
    given = Subject(model, [batch], loss, adapted_modules(model, []), seed=0)
    with in_space(
        given, "all" if space == "chosen" else space, twice_differentiable=bool(recipe.seed % 2)
    ) as p:
        look(model, batch, expected)
        parameters = list(p.parameters.values())
        step = [torch.randn(q.shape).double() for q in parameters]
        found = loss(model, batch)[0]
        if found.requires_grad and not (recipe.adapter == "dora" and space == "adapter"):
            slopes = torch.autograd.grad(found, parameters, allow_unused=True)
            slope = sum(float((g * d).sum()) for g, d in zip(slopes, step, strict=True) if g is not None)
            values = []
            for h in (1e-5, -1e-5):
                with p.moved(step, h / norm(step)), torch.no_grad():
                    values.append(float(loss(model, batch)[0]))
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope / norm(step), rel=1e-5, abs=1e-7)
        look(model, batch, expected)
        leave(recipe)
    return True


def look(model: nn.Module, batch: Any, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-10, atol=1e-10)


def leave(recipe: Recipe) -> None:
    torch.rand(2)
    if recipe.end == "error":
        raise Broken
    if recipe.end == "interrupt":
        raise KeyboardInterrupt


def state(model: nn.Module) -> dict[str, Any]:
    found = snapshot(model)
    if attentions(model):  # whose parameters peft makes anew at every look
        found = {key: value for key, value in found.items() if key not in ("objects", "grad_objects")}
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = []
    for key in before:
        if not same(before[key], after[key]):
            inner = before[key] if isinstance(before[key], dict) else {}
            found += [f"{key}: {n}" for n in inner if not same(inner[n], after[key].get(n))] or [key]
    return found


def sharing(model: nn.Module) -> set[frozenset[str]]:
    """Names that are one parameter, and names over one memory."""
    objects: dict[Any, set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        objects.setdefault(("memory", tensor.data_ptr()), set()).add(name)
        objects.setdefault(("object", id(tensor)), set()).add(name)
    return {frozenset(names) for names in objects.values()}


@pytest.mark.slow
@settings(QUIET, max_examples=40)
@given(recipe=recipes)
def test_the_function_measured_is_the_function_trained(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.long
@settings(QUIET, max_examples=1000, derandomize=False)
@given(recipe=recipes)
def test_the_function_measured_is_the_function_trained_in_many(recipe: Recipe) -> None:
    check(recipe)
