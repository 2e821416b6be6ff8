"""A model that one optimizer has trained is trained by another, or gets other weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.optim import EMA, SAM, SWA, EFlatLoRA, release
from tests.optim.models import adapted, snapshot
from tests.optim.test_points import BOTH, make

X = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 20, generator=generator).double(), torch.randint(0, 3, (32,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def trained(name: str, steps: int = 3) -> tuple[nn.Module, Any]:
    model = adapted()
    optimizer = make(name, model)
    for seed in range(steps):
        gradients(model, seed)
        optimizer.step()
    return model, optimizer


def second_phase(model: nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
    model.eval()
    model(X)
    return snapshot(model)


@pytest.mark.parametrize("name", BOTH)
def test_another_optimizer_is_refused_until_the_first_is_released(name: str) -> None:
    model, optimizer = trained(name)
    gradients(model, 9)
    second = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(InputError, match="release"):
        second.step()
    optimizer.eval()
    clean = adapted()
    clean.load_state_dict(model.state_dict())
    release(model)
    found, expected = second_phase(model), second_phase(clean)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_released_though_the_optimizer_is_gone() -> None:
    model, optimizer = trained("eflat_lora")
    optimizer.eval()
    before = snapshot(model)
    optimizer.train()
    del optimizer
    release(model)
    for key, value in before.items():
        assert torch.equal(snapshot(model)[key], value)
    second_phase(model)
    release(model)  # nothing is there any more


def test_optimizers_of_other_weights_step_beside_it() -> None:
    model = adapted()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    (first, *_), rest = names, set(names[1:])
    own = [p for n, p in model.named_parameters() if n in rest]
    optimizer = EMA(torch.optim.SGD(own, lr=0.1), model)
    other = torch.optim.SGD([dict(model.named_parameters())[first]], lr=0.1)
    gradients(model, 0)
    optimizer.step()
    other.step()


@pytest.mark.parametrize("kind", [EMA, SWA])
@pytest.mark.parametrize("how", ["load_state_dict", "in place"])
def test_weights_that_are_loaded_over_an_average_stay(kind: Any, how: str) -> None:
    model = adapted()
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"decay": 0.9} if kind is EMA else {"start": 0.0}
    optimizer = kind(torch.optim.AdamW(parameters, lr=1e-2), model, **options)
    best: dict[str, Tensor] = {}
    for seed in range(4):
        gradients(model, seed)
        optimizer.step()
        if seed == 1:
            best = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.eval()
    if how == "load_state_dict":
        model.load_state_dict(best)
    else:
        with torch.no_grad():
            for key, value in model.state_dict(keep_vars=True).items():
                value.copy_(best[key])
    model.train()
    gradients(model, 5)  # a pass without a step
    for key, value in model.state_dict().items():
        assert torch.equal(value, best[key]), key
    gradients(model, 6)
    optimizer.step()
    model.eval()
    model(X)
    assert any(not torch.equal(value, best[key]) for key, value in model.state_dict().items())


def test_an_average_written_in_half_precision_is_still_the_average() -> None:
    model, optimizer = trained("ema")
    optimizer.train()
    trained_at = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.eval()
    averages = {name: value.bfloat16() for name, value in model.state_dict().items() if name in trained_at}
    model.load_state_dict(averages, strict=False)
    optimizer.train()
    for key, value in model.named_parameters():
        assert key not in trained_at or torch.equal(value, trained_at[key]), key


def test_a_radius_by_the_learning_rate_never_exceeds_rho() -> None:
    """OneCycleLR begins at a 25th of its largest learning rate, and LambdaLR may go above its first."""
    for schedule in (
        lambda base: torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.1, total_steps=8),
        lambda base: torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0 + step),
    ):
        model = adapted()
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer = SAM(base, model, rho=0.05, rho_schedule="lr")
        scheduler = schedule(base)
        radii = []
        for seed in range(6):
            optimizer.step(functools.partial(gradients, model, seed))
            radii.append(float(optimizer.perturbation_norm))
            scheduler.step()
        assert max(radii) <= 0.05 * (1 + 1e-9)
        assert max(radii) > 0.04


@pytest.mark.parametrize("name", ["ema", "eflat_lora", "flat_lora_rwp"])
@pytest.mark.parametrize("kind", [EFlatLoRA, SAM])
def test_a_second_method_takes_the_model_over(name: str, kind: Any) -> None:
    model, first = trained(name)
    first.eval()
    clean = adapted()
    clean.load_state_dict(model.state_dict())
    first.train()
    for each in (model, clean):
        parameters = [p for p in each.parameters() if p.requires_grad]
        second = kind(torch.optim.AdamW(parameters, lr=1e-2), each)
        for seed in range(3):
            if kind is SAM:
                second.step(functools.partial(gradients, each, seed))
            else:
                gradients(each, seed)
                second.step()
        second.eval()
    for key, value in clean.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
