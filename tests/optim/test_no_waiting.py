"""No step waits for the device: run on fake tensors, on which reading a value raises an error.

The fake tensors lie on the CPU, because torch without CUDA makes no others; what differs on an accelerator,
the whitening, is put in the CPU's place.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from flatbench import optim
from flatbench.optim.base import full_space

#: LoRA-FA's update is peft's own
NAMES = [name for name in optim.REGISTRY.names() if name != "lora_fa"]


class NoRandomState:
    """Random numbers are not what is tested, and a state of fake numbers cannot be set."""

    def __init__(self, groups: Any) -> None:
        pass

    def restore(self) -> None:
        pass


def fake_model(mode: FakeTensorMode) -> nn.Module:
    inner = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(16, 16))
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], modules_to_save=["2"])
    model = peft.get_peft_model(inner, config)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = mode.from_tensor(p.detach().clone())
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
    return model


@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = optim.REGISTRY.options(name).model_fields
    if norm == "layer" and "norm" not in fields:
        pytest.skip("no such option")
    given = {"total_steps": 6, "ess": 100.0}
    options: dict[str, Any] = {key: value for key, value in given.items() if key in fields}
    options |= {"norm": norm} if "norm" in fields else {}
    monkeypatch.setattr(full_space._Group, "_exact", lambda self, X, cut: full_space.damped_whitening(X, cut))
    monkeypatch.setattr("flatbench.optim.base.two_gradients.RandomState", NoRandomState)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(mode)
    with mode:
        parameters = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer = optim.REGISTRY.load(name)(base, model, **options)

        def closure() -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)

        for _ in range(6):
            optimizer.step(closure)
        optimizer.eval()
        assert type(optimizer.perturbation_norm).__name__ in ("FakeTensor", "Tensor")


def test_the_fake_tensors_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(2).norm() > 0)
