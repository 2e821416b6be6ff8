"""Lightning's Trainer with every method: accumulation, clipping, validation, saving and resuming."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from tests.optim.models import snapshot
from tests.optim.trainer_case import EXAMPLES, MICRO, data, model_of, optimizer_of

lightning = pytest.importorskip("lightning.pytorch")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

NAMES = optim.REGISTRY.names()
TWO = [name for name in NAMES if hasattr(optim.REGISTRY.load(name), "perturb")]
ONE = [name for name in NAMES if name not in TWO]
BATCHES = EXAMPLES // MICRO


class Module(lightning.LightningModule):
    """A script's own module; the optimizer is given all of it, or the model within."""

    def __init__(self, name: str, whole: bool = False) -> None:
        super().__init__()
        self.name, self.whole = name, whole
        self.model = model_of(dropout=0.2)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.losses.append(float(self.model(**batch)["loss"]))

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.name, self if self.whole else self.model)


def loader() -> Any:
    # with a generator of its own, an iterator draws nothing from that of dropout
    return torch.utils.data.DataLoader(data(), batch_size=MICRO, generator=torch.Generator())


def trainer_of(folder: Path, **options: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**settings, **options})


def fitted(module: Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    validates = {"val_dataloaders": loader()} if "limit_val_batches" in options else {}
    trainer_of(folder, **options).fit(module, loader(), **validates)
    return snapshot(module.model)


def plain(
    name: str, accumulate: int = 1, clip: float | None = None, dropout: float = 0.2
) -> dict[str, Tensor]:
    model = model_of(dropout)
    optimizer = optimizer_of(name, model)
    torch.manual_seed(7)
    batches = list(loader())
    for start in range(0, len(batches), accumulate):
        parts = batches[start : start + accumulate]

        def closure(parts: Any = parts) -> Tensor:
            optimizer.zero_grad()
            for part in parts:
                loss = model(**part)["loss"] / accumulate
                loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(
                    [p for group in optimizer.param_groups for p in group["params"]], clip
                )
            return loss

        optimizer.step(closure)
    optimizer.eval()
    return snapshot(model)


def near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_is_the_plain_loop(name: str, whole: bool, tmp_path: Path) -> None:
    """With validation in between, which draws no random numbers."""
    module = Module(name, whole)
    if whole and name in ("lora_plus", "lora_fa"):
        pytest.skip("peft's functions for them ask for peft's model")
    found = fitted(module, tmp_path, gradient_clip_val=0.05, val_check_interval=6, limit_val_batches=2)
    near(found, plain(name, clip=0.05))


@pytest.mark.parametrize("name", ["sam", "flat_lora", "looksam"])
def test_accumulation_of_a_method_with_two_gradients_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="let it run all micro-batches"):
        fitted(Module(name), tmp_path, accumulate_grad_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE)
def test_accumulation_of_a_method_with_one_gradient(name: str, tmp_path: Path) -> None:
    near(fitted(Module(name), tmp_path, accumulate_grad_batches=2), plain(name, accumulate=2))


@pytest.mark.parametrize("name", ["eflat_lora", "bi_lora", "ema"])
def test_validation_is_at_the_point_that_is_saved(name: str, tmp_path: Path) -> None:
    module = Module(name)
    fitted(module, tmp_path, limit_val_batches=1, num_sanity_val_steps=0)
    model = model_of(dropout=0.2)
    model.load_state_dict(snapshot(module.model))
    batch = next(iter(loader()))
    expected = model.eval()(**batch)["loss"]
    assert module.losses == [pytest.approx(float(expected.detach()), rel=1e-6)]


class Manual(Module):
    """Its own loop within the step."""

    def __init__(self, name: str, way: str) -> None:
        super().__init__(name)
        self.way, self.automatic_optimization = way, False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            if self.way != "keeps":
                optimizer.zero_grad()
            loss = self.model(**batch)["loss"]
            self.manual_backward(loss)
            return loss

        if self.way == "parts":
            closure()
            if hasattr(optimizer, "perturb") and optimizer.perturb():
                closure()
                optimizer.restore()
            optimizer.step()
            return
        if self.way == "eval":
            optimizer.eval()
            assert not optimizer.optimizer.point.training
            optimizer.train()
        optimizer.step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["clears", "keeps", "eval", "parts"])
@pytest.mark.parametrize("name", ["sam", "friendly_sam", "eflat_lora", "msam", "bi_lora"])
def test_manual_optimization(name: str, way: str, tmp_path: Path) -> None:
    module, dropout = Manual(name, way), 0.2
    if way == "parts":  # whose two passes have masks of their own
        dropout = 0.0
        module.model = model_of()
    near(fitted(module, tmp_path), plain(name, dropout=dropout))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    """Lightning saves the model's state first, then the optimizer's, and loads in that order."""
    whole = Module(name)
    whole.model = model_of()
    fitted(whole, tmp_path, max_epochs=2)
    first = Module(name)
    first.model = model_of()
    torch.manual_seed(7)
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Module(name)
    second.model = copy.deepcopy(model_of())
    trainer_of(tmp_path, max_epochs=2).fit(second, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    found, expected = snapshot(second.model), snapshot(whole.model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
