"""transformers' Trainer with accumulation, clipping, bf16, saving and resuming is the plain loop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from flatbench import optim
from tests.optim.trainer_case import (
    ACCUMULATION,
    MICRO,
    STEPS,
    Trainer,
    adapter_in,
    data,
    model_of,
    optimizer_of,
    schedule,
    trainer_of,
)

NAMES = optim.REGISTRY.names()


def plain_loop(name: str, bf16: bool) -> list[dict[str, Tensor]]:
    """What a model without Trainer is saved as after each step."""
    model = model_of()
    optimizer = optimizer_of(name, model)
    scheduler = schedule(optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, 0.05)

    optimizer.base.register_step_pre_hook(clip)
    examples, saved = data(), []
    model.train()
    for step in range(STEPS):
        parts = []
        for i in range(ACCUMULATION):
            start = (step * ACCUMULATION + i) * MICRO
            rows = examples[start : start + MICRO]
            parts.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

        def closure(parts: list[dict[str, Tensor]] = parts) -> Tensor:
            optimizer.zero_grad()
            for part in parts:
                with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
                    loss = model(**part)["loss"]
                (loss / ACCUMULATION).backward()
            if (
                name == "lora_mgpo"
            ):  # whose mean is of the gradients that it sees, and the Trainer clips before
                clip()
            return loss

        optimizer.step(closure)
        scheduler.step()
        saved.append(saved_state(model))
    return saved


def saved_state(model: Any) -> dict[str, Tensor]:
    import peft

    return {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    a, b = (torch.cat([d[key].flatten() for key in sorted(first)]) for d in (first, second))
    return float((a - b).norm() / b.norm())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_trainer_is_the_plain_loop_and_resumes(name: str, tmp_path: Path) -> None:
    often = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
    }
    trainer = trainer_of(name, tmp_path / "whole", model_of(), **often)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    expected = plain_loop(name, bf16=True)
    final = adapter_in(tmp_path / "final")
    assert distance(final, expected[-1]) <= 1e-6
    # the files in the middle are those of the plain loop at its unperturbed point
    for step in (2, 4):
        saved = adapter_in(tmp_path / "whole" / f"checkpoint-{step}")
        assert distance(saved, expected[step - 1]) <= 1e-6
    resumed = trainer_of(name, tmp_path / "resumed", model_of(), **often)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed.save_model(str(tmp_path / "again"))
    assert same(adapter_in(tmp_path / "again"), final)


@pytest.mark.parametrize("name", ["eflat_lora", "bi_lora", "flat_lora_rwp", "msam"])
def test_one_gradient_methods_need_no_mixin(name: str, tmp_path: Path) -> None:
    made = trainer_of(name, tmp_path, model_of())
    stock = transformers.Trainer(
        made.model,
        made.args,
        train_dataset=made.train_dataset,
        optimizers=(made.optimizer, made.lr_scheduler),
    )
    stock.train()
    stock.save_model(str(tmp_path / "final"))
    assert distance(adapter_in(tmp_path / "final"), plain_loop(name, bf16=False)[-1]) <= 1e-6


def test_a_two_gradient_method_in_the_stock_trainer_names_the_mixin(tmp_path: Path) -> None:
    made = trainer_of("sam", tmp_path, model_of())
    stock = transformers.Trainer(
        made.model,
        made.args,
        train_dataset=made.train_dataset,
        optimizers=(made.optimizer, made.lr_scheduler),
    )
    with pytest.raises(ValueError, match="SharpnessAwareTrainer"):
        stock.train()


@pytest.mark.slow
def test_what_is_saved_is_what_was_evaluated(tmp_path: Path) -> None:
    """The loss of the file, loaded into a fresh model, is the loss that the Trainer reported at that step."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for name in ("eflat_lora", "flat_lora_rwp", "bi_lora", "msam", "ema"):
        trainer = trainer_of(name, tmp_path / name, model_of(), **often)
        trainer.train()
        reported = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
        rows = data()[:32]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        for step in (2, 4):
            fresh: Any = model_of()
            fresh.load_adapter(str(tmp_path / name / f"checkpoint-{step}"), "default")
            loss = fresh.eval()(**batch)["loss"]
            assert float(loss.detach()) == pytest.approx(reported[step], rel=1e-6)


def test_the_best_model_is_loaded_and_stays(tmp_path: Path) -> None:
    """Loading at the end of training must not be undone by the next evaluation or save."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        "eflat_lora", tmp_path, model_of(), load_best_model_at_end=True, metric_for_best_model="loss", **often
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    assert same(adapter_in(tmp_path / "final"), adapter_in(best))


@pytest.mark.parametrize("name", ["sam", "flat_lora"])
def test_each_micro_batch_keeps_its_dropout_masks(name: str, tmp_path: Path) -> None:
    model = model_of(dropout=0.5)
    trainer = trainer_of(name, tmp_path, model, max_steps=2)
    masks: list[Tensor] = []
    for module in model.modules():
        if type(module) is nn.Dropout and module.p == 0.5:
            module.register_forward_hook(lambda _, __, output: masks.append(output == 0))
    trainer.train()
    assert len(masks) == 2 * 2 * ACCUMULATION
    for step in range(2):
        start = step * 2 * ACCUMULATION
        first = masks[start : start + ACCUMULATION]
        second = masks[start + ACCUMULATION : start + 2 * ACCUMULATION]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])


def test_batch_norm_moves_once_and_an_exception_puts_the_weights_back(tmp_path: Path) -> None:
    model: Any = model_of()
    norm = nn.BatchNorm1d(12)
    model.base_model.model.first.register_forward_pre_hook(lambda _, arguments: (norm(arguments[0]),))
    model.base_model.model.norm = norm
    trainer = trainer_of("sam", tmp_path, model, max_steps=1)
    trainer.train()
    assert int(norm.num_batches_tracked) == ACCUMULATION

    model = model_of()
    trainer = trainer_of("sam", tmp_path, model)
    before, calls = saved_state(model), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == ACCUMULATION + 2:
            raise RuntimeError("out of memory")

    model.base_model.model.first.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert same(saved_state(model), before)


def scaled_loop(name: str, scale: float | None) -> dict[str, Tensor]:
    """A loop with the two passes written out, with a GradScaler if ``scale`` is given."""
    model = model_of()
    optimizer = optimizer_of(name, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale or 1.0, growth_interval=10**6, enabled=scale is not None
    )
    examples = data()
    for step in range(STEPS):
        rows = examples[step * 16 : step * 16 + 16]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        optimizer.zero_grad()
        optimizer.train()
        scaler.scale(model(**batch)["loss"]).backward()
        if optimizer.gradients_per_step > 1 and optimizer.perturb(scaler.get_scale() if scale else None):
            optimizer.zero_grad()
            scaler.scale(model(**batch)["loss"]).backward()
            optimizer.restore()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 0.05)
        scaler.step(optimizer)
        scaler.update()
    return saved_state(model)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name: str) -> None:
    """Powers of two change no bit: scaled losses give what unscaled ones give, whatever a method keeps."""
    assert same(scaled_loop(name, 2.0**14), scaled_loop(name, None))


@pytest.mark.parametrize("name", ["sam", "gsam", "friendly_sam", "looksam", "flat_lora", "eflat_lora"])
@pytest.mark.slow
def test_grad_scaler_in_the_trainer(name: str, tmp_path: Path) -> None:
    """fp16 needs a GPU, but the scaler that it brings can be put in by hand."""
    saved = []
    for scale in (None, 2.0**12):
        trainer = trainer_of(name, tmp_path, model_of(), max_grad_norm=0.0)
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        trainer.save_model(str(tmp_path / f"{scale}"))
        saved.append(adapter_in(tmp_path / f"{scale}"))
    assert same(*saved)


def test_an_overflow_skips_the_step() -> None:
    model = model_of()
    optimizer = optimizer_of("sam", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = saved_state(model)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    assert optimizer.perturb(scaler.get_scale())
    optimizer.restore()
    scaler.step(optimizer)
    scaler.update()
    assert same(saved_state(model), before)
    assert int(optimizer.skipped_perturbations) == 1
    assert scaler.get_scale() == 2.0**9


TWO = ["sam-global", "sam-process", "eflat_lora-global", "bi_lora-global"]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes have trained, each case in a folder of its own."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("trainer_case.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    outcome = subprocess.run(
        [*command, str(script), str(folder), *TWO],
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO)
def test_two_processes(case: str, by_two: Path, tmp_path: Path) -> None:
    """Two gloo processes equal one process on the joint batch, if the perturbation is global."""
    name, perturbation = case.split("-")
    alone = trainer_of(name, tmp_path / "alone", model_of())
    alone.train()
    alone.save_model(str(tmp_path / "alone"))
    joint, two = adapter_in(tmp_path / "alone"), adapter_in(by_two / case)
    assert same(two, adapter_in(by_two / case / "second")), "both processes hold the same weights"
    if perturbation == "global":
        assert distance(two, joint) <= 1e-5
    else:
        assert 1e-5 < distance(two, joint) < 0.1, "m-sharpness is another method, though a close one"


@pytest.mark.slow
def test_the_mixin_is_not_imported_with_the_optimizers() -> None:
    code = "import sys, flatbench.optim as o; o.SAM; sys.exit('flatbench.optim.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Trainer.perturbation == "global"
