"""Measures inside somebody else's training: the training is bit for bit the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from flatbench.callbacks import SharpnessCallback, SharpnessWatch
from flatbench.callbacks.record import FILE, read
from flatbench.errors import InputError, ModelChangedError
from tests.callbacks_cases import MEASURES, ROWS, batches, optimizer_for, plain_loop, same
from tests.optim.models import snapshot
from tests.optim.test_accelerate import _no_state_left  # noqa: F401 - a fixture
from tests.optim.trainer_case import (
    Trainer,
    adapter_in,
    data,
    model_of,
    schedule,
    trainer_of,
)

LABELS = ("critical_sharpness_adapter.critical_sharpness", "sam_sharpness_merged.sharpness")


# -- training is left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bf16"),
    [("adamw", False), ("eflat_lora", False), ("eflat_lora", True), ("sam", False), ("sam", True)],
)
def test_a_plain_loop_is_left_alone(name: str, bf16: bool, tmp_path: Path) -> None:
    watched, watch = plain_loop(name, tmp_path, 4, bf16)
    alone, _ = plain_loop(name, None, 4, bf16, watch=False)
    assert same(watched, alone)
    table = pd.read_parquet(tmp_path / FILE)
    assert table["step"].tolist() == [2, 4, 6]
    for column in LABELS:
        assert table[column].notna().all(), table.columns.tolist()
    assert table["critical_sharpness_adapter.moments"].eq("live optimizer").all()
    assert table["critical_sharpness_adapter.forward_passes"].max() <= 8
    assert watch.rows[-1]["measure_seconds"] > 0


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.long), "eflat_lora"])
def test_a_plain_loop_that_is_interrupted_goes_on(name: str, tmp_path: Path) -> None:
    """After step 3, of which there is a state, and a row of step 4 that is measured again."""
    alone, _ = plain_loop(name, None, 4, watch=False)
    whole, _ = plain_loop(name, tmp_path, 4)
    again, _ = plain_loop(name, tmp_path, 4, restart_after=3)
    assert same(again, alone)
    assert same(whole, alone)
    assert read(tmp_path)["step"].tolist() == [2, 4, 6]


def test_a_schedule_free_optimizer_comes_back_exactly() -> None:
    """It computes its point of training from that of evaluation, which rounds."""
    free = pytest.importorskip("schedulefree")
    saved = []
    for watched in (True, False):
        model = model_of()
        optimizer = free.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer.train()
        watch = SharpnessWatch(model, optimizer, measures=["balancedness"], data=ROWS, every=1, budget=None)
        for step, batch in enumerate(batches()[:8], start=1):
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
            if watched:
                watch.after_step(step)
        saved.append(snapshot(model))
    assert same(*saved)


@pytest.mark.usefixtures("_no_state_left")
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.long), "eflat_lora", "sam"])
def test_an_accelerate_loop_is_left_alone(name: str, tmp_path: Path) -> None:
    saved = []
    for watched in (True, False):
        model = model_of(dropout=0.3)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
        loader = torch.utils.data.DataLoader(data(), batch_size=4, generator=torch.Generator())
        torch.manual_seed(3)
        model, optimizer, loader = accelerator.prepare(model, optimizer_for(name, model), loader)
        watch = None
        if watched:
            held_out = torch.utils.data.DataLoader(ROWS, batch_size=8, shuffle=True)
            watch = SharpnessWatch(
                model, optimizer, measures=MEASURES, data=held_out, every=3, budget=None, folder=tmp_path
            )
        step, kept = 0, []
        for batch in loader:
            with accelerator.accumulate(model):
                kept.append(batch)
                accelerator.backward(model(**batch)["loss"])
                if name == "sam" and accelerator.sync_gradients and optimizer.optimizer.perturb():
                    optimizer.optimizer.zero_grad()
                    for part in kept:
                        accelerator.backward(model(**part)["loss"])
                    optimizer.optimizer.restore()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step, kept = step + 1, []
                if watch is not None:
                    watch.after_step(step)
        getattr(getattr(optimizer, "optimizer", optimizer), "eval", lambda: None)()
        saved.append(snapshot(model))
    assert same(*saved)
    assert read(tmp_path)["step"].tolist() == [3, 6]


def callback(**options: Any) -> SharpnessCallback:
    return SharpnessCallback(**{"measures": MEASURES, "data": ROWS, "every": 2, "budget": None, **options})


def trained(folder: Path, name: str, watch: SharpnessCallback | None, resume: str | None = None) -> Any:
    """The repository's Trainer, with accumulation, clipping and bf16, that saves every two steps."""
    often = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
    }
    if name == "adamw":
        made: Any = trainer_of("eflat_lora", folder, model_of(dropout=0.3), **often)
        model = model_of(dropout=0.3)
        optimizer = optimizer_for(name, model)
        trainer: Any = Trainer(
            model,
            made.args,
            train_dataset=made.train_dataset,
            eval_dataset=made.eval_dataset,
            optimizers=(optimizer, schedule(optimizer)),
        )
    else:
        trainer = trainer_of(name, folder, model_of(dropout=0.3), **often)
    if watch is not None:
        trainer.add_callback(watch)
    transformers.set_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eflat_lora", "sam", pytest.param("adamw", marks=pytest.mark.long)])
def test_transformers_trainer_is_left_alone_and_resumes(name: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "a", name, callback())
    trained(tmp_path / "b", name, None)
    final = adapter_in(tmp_path / "b" / "final")
    assert same(adapter_in(tmp_path / "a" / "final"), final)
    table = read(tmp_path / "a")
    assert table["step"].tolist() == [2, 4, 6]
    logged = {row["step"]: row for row in trainer.state.log_history if LABELS[0] in row}
    assert [logged[step][LABELS[0]] for step in (2, 4, 6)] == table[LABELS[0]].tolist()
    # interrupted after step 5, with a row of step 4 and none of 6; it goes on from the file of step 2
    frame = table[table["step"] <= 4]
    frame.to_parquet(tmp_path / "a" / FILE, index=False)
    again = trained(tmp_path / "a", name, callback(), str(tmp_path / "a" / "checkpoint-2"))
    assert same(adapter_in(tmp_path / "a" / "final"), final)
    resumed = read(tmp_path / "a")
    assert resumed["step"].tolist() == [2, 4, 6]
    assert [row["step"] for row in again.state.log_history if LABELS[0] in row] == [2, 4, 6]
    pd.testing.assert_series_equal(resumed[LABELS[1]], table[LABELS[1]])
    assert resumed["measure_seconds"].is_monotonic_increasing


@pytest.mark.slow
def test_at_evaluations_of_the_evaluation_data_and_to_trackers(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.append(dict(logs))

    trainer = trainer_of("eflat_lora", tmp_path, model_of(), eval_strategy="steps", eval_steps=3)
    trainer.add_callback(Tracker())
    watch = callback(every=None, data=None, measures=["critical_sharpness"])
    watch.attach(trainer)
    trainer.train()
    column = "critical_sharpness_merged.critical_sharpness"
    table = read(tmp_path)
    assert table["step"].tolist() == [3, 6]
    assert [row[column] for row in told if column in row] == table[column].tolist()
    assert table["critical_sharpness_merged.examples"].tolist() == [32, 32]
    # the loss there is that of the Trainer's own evaluation, at the unperturbed point
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert table["critical_sharpness_merged.loss"].tolist() == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
def test_of_several_sets_of_evaluation_data_the_first_is_measured_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of("eflat_lora", tmp_path, model_of(), eval_strategy="steps", eval_steps=3)
    whole = trainer.eval_dataset
    trainer.eval_dataset = {"a": [whole[i] for i in range(20)], "b": [whole[i] for i in range(20, 32)]}
    trainer.add_callback(callback(every=None, data=None, measures=["critical_sharpness"]))
    trainer.train()
    table = read(tmp_path)
    assert table["step"].tolist() == [3, 6]
    assert table["critical_sharpness_merged.examples"].tolist() == [20, 20]
    assert sum("the first alone is measured on" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_an_attached_callback_takes_no_row_of_the_trainers(tmp_path: Path) -> None:
    trainer = trainer_of("eflat_lora", tmp_path, model_of())
    watch = callback(every=1, measures=["balancedness"])
    watch.attach(trainer)
    trainer.train()
    rows = trainer.state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "balancedness.balancedness" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.long), "eflat_lora"])
def test_lightning_is_left_alone(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from flatbench.callbacks import LightningSharpness
    from tests.optim.test_lightning import Module, fitted

    class Own(Module):
        def configure_optimizers(self) -> Any:
            return optimizer_for(self.name, self.model)

    watch = LightningSharpness(measures=MEASURES, data=ROWS, every=2, budget=None, folder=tmp_path)
    options = {"accumulate_grad_batches": 4}
    watched = fitted(Own(name), tmp_path, callbacks=[watch], **options)
    assert same(watched, fitted(Own(name), tmp_path, **options))
    assert read(tmp_path)["step"].tolist() == [2, 4, 6]
    with pytest.raises(InputError, match="has no 'network'"):
        fitted(
            Own(name), tmp_path, callbacks=[LightningSharpness(model="network", measures=MEASURES, every=1)]
        )


# -- what goes wrong ----------------------------------------------------------------------------------------


def test_a_measure_that_fails_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    watch = SharpnessWatch(
        model,
        None,
        measures=["ema_gap", "cost", "critical_sharpness"],
        data=ROWS,
        every=1,
        budget=None,
    )
    watch.after_step(1)
    with torch.no_grad():
        model.base_model.model.second.base_layer.weight.fill_(float("nan"))  # type: ignore[union-attr]
    watch.after_step(2)
    first, second = watch.rows
    assert "during training" in first["ema_gap.skipped"]
    assert first["critical_sharpness_merged.critical_sharpness"] > 0
    assert "nan" in second["critical_sharpness_merged.failed"].lower()
    assert caplog.text.count("ema_gap: not measured") == 1


def test_each_step_once_and_a_new_training_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def watch() -> SharpnessWatch:
        return SharpnessWatch(
            model_of(), None, measures=["balancedness"], data=ROWS, every=1, budget=None, folder=tmp_path
        )

    first = watch()
    for step in (1, 2, 3, 3):
        first.after_step(step)
    first.look(3)
    assert read(tmp_path)["step"].tolist() == [1, 2, 3]
    again = watch()
    again.after_step(3)
    assert read(tmp_path)["step"].tolist() == [1, 2, 3]
    assert "1 rows of steps after 2 are dropped" in caplog.text
    watch().after_step(1)
    assert read(tmp_path)["step"].tolist() == [1]
    with pytest.raises(InputError, match="no table of a watched training"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": []}, "give a list of names"),
        ({"measures": "hessian"}, "give a list of names"),
        ({"measures": ["sharpnes"]}, "unknown measure 'sharpnes'"),
        ({"measures": ["critical_sharpness", "critical_sharpness"]}, "two measures are called"),
        ({"measures": [{"name": "sam_sharpness", "radius": 1}]}, "radius"),
        ({"every": 0}, "at least 1"),
        ({"every": 2.5}, "at least 1"),
        ({"budget": 5}, "a share of the time"),
        ({"data": None}, "no data"),
        ({"data": []}, "no examples"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    settings = {"measures": ["balancedness"], "data": ROWS, "every": 1, **options}
    with pytest.raises(InputError, match=message):
        SharpnessWatch(model_of(), None, **settings)


def test_models_in_shards_are_refused() -> None:
    arguments = SimpleNamespace(fsdp="full_shard", deepspeed=None)
    with pytest.raises(InputError, match="trained in shards"):
        callback().on_train_begin(arguments, SimpleNamespace(is_world_process_zero=True, global_step=0), None)


def test_a_model_that_comes_back_changed_ends_the_training() -> None:
    """Weights that a measurement has spoilt are not to be trained on."""
    model = model_of()

    def spoiling(outputs: Any, targets: Tensor) -> Tensor:
        if watch is not None:
            with torch.no_grad():
                model.base_model.model.head.modules_to_save.default.bias.add_(1.0)  # type: ignore[union-attr]
        return torch.nn.functional.cross_entropy(outputs["logits"], targets)

    watch = None
    watch = SharpnessWatch(
        model, None, measures=["critical_sharpness"], data=ROWS, every=1, budget=None, loss=spoiling
    )
    with pytest.raises(ModelChangedError, match="not as it was"):
        watch.after_step(1)


def test_the_callback_says_what_is_missing_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every"):
        callback(every=-1)
    trainer = trainer_of("eflat_lora", tmp_path, model_of(), max_steps=1)
    trainer.add_callback(callback(data=None))
    with pytest.raises(InputError, match="what is to be measured on"):
        trainer.train()
