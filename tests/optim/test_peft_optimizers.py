"""LoRA+ and LoRA-FA: what peft's own optimizers do, behind our interface."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim import EFlatLoRA, LoRAFA, LoRAPlus
from tests.optim.models import TwoLayers, adapted, layers, problem, trainable


def test_lora_plus_is_peft_s() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    ours = LoRAPlus(torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1), model, lr_ratio=8.0)
    theirs = peft.optimizers.create_loraplus_optimizer(
        twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    for seed in range(10):
        ours.step(problem(model, seed))
        problem(twin, seed)()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))
    rates = {id(p): g["lr"] for g in ours.param_groups for p in g["params"]}
    for f in lora_factors(model):
        assert rates[id(f.B)] == pytest.approx(8 * rates[id(f.A)])


def test_lora_plus_keeps_the_base_s_hooks_and_takes_a_scheduler() -> None:
    model = adapted()
    base = torch.optim.AdamW(trainable(model), lr=1e-2)
    seen: list[int] = []
    base.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer = LoRAPlus(base, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(problem(model))
    scheduler.step()
    assert seen == [1]
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.08}


def test_another_method_around_lora_plus() -> None:
    model = adapted()
    base = LoRAPlus(torch.optim.AdamW(trainable(model), lr=1e-2), model).base
    optimizer = EFlatLoRA(base, model)
    assert len({group["lr"] for group in optimizer.param_groups}) == 2
    optimizer.step(problem(model))


def test_lora_fa_is_peft_s() -> None:
    model = adapted(dtype=torch.float32)
    twin = copy.deepcopy(model)
    before = [layer.A.detach().clone() for layer in layers(model)]
    base = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1, eps=1e-6)
    ours = LoRAFA(base, model)
    theirs = peft.optimizers.create_lorafa_optimizer(twin, r=4, lora_alpha=12, lr=1e-2, weight_decay=0.1)
    for seed in range(10):
        ours.step(problem(model, seed))
        problem(twin, seed)()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, layer.A) for a, layer in zip(before, layers(model), strict=True))
    assert len(ours.param_groups[0]["params"]) == len(trainable(model)) + len(before)


def test_lora_fa_refuses_by_name_what_peft_s_optimizer_would_get_wrong() -> None:
    config = peft.LoraConfig(r=2, target_modules=["first"], use_dora=True)
    model = peft.get_peft_model(TwoLayers(), config)
    with pytest.raises(InputError, match=r"first: .*DoRA"):
        LoRAFA(torch.optim.AdamW(trainable(model), lr=0.1), model)
    with pytest.raises(InputError, match="cannot use SGD"):
        LoRAFA(torch.optim.SGD(trainable(adapted()), lr=0.1), adapted())


@pytest.mark.parametrize("cls", [LoRAPlus, LoRAFA])
def test_bad_input(cls: type) -> None:
    plain = nn.Linear(3, 3)
    with pytest.raises(InputError, match="no LoRA layer"):
        cls(torch.optim.AdamW(plain.parameters(), lr=0.1), plain)
    model = adapted()
    with pytest.raises(InputError, match="exactly the parameters"):
        cls(torch.optim.AdamW(trainable(model)[:2], lr=0.1), model)
