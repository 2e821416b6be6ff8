"""GPU hours before starting: the operations are those that a run's cost is counted in."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from flatbench import study, tasks
from flatbench.cli import app
from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.estimate import curves, gpu_hours, measuring, sketches, wall_time
from flatbench.estimate import operations as shapes
from flatbench.estimate.gpu_hours import Estimate, MethodCost
from flatbench.estimate.gpus import gpu
from flatbench.measures.cost import flops_per_example
from flatbench.models import pretrained
from flatbench.models.adapt import adapt
from flatbench.runs.finish import finish
from flatbench.store import StudyFolder
from flatbench.study import plan
from flatbench.subject.subject import Subject
from flatbench.tasks.base import Example, Splits, Task
from tests.conftest import SMALL
from tests.tasks.task_cases import CASES
from tests.test_batching import text_study
from tests.test_runner import prepared

pytestmark = pytest.mark.slow


GPU = gpu("h100")


class Lines(Task):
    """40 training examples of seven numbers, two linear layers without biases."""

    metric = "accuracy"
    target_modules = ("0",)

    def fingerprint(self) -> str:
        return "0"

    def splits(self, seed: int) -> Splits:
        parts = [[{"x": [0.0] * 7, "labels": 0}] * count for count in (40, 10, 20)]
        return Splits(*parts)

    def build_model(self, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 3, bias=False))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {key: torch.tensor([e[key] for e in examples]) for key in ("x", "labels")}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        return {}

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["labels"]), logits


def of(content: dict[str, Any], **options: Any) -> Estimate:
    return gpu_hours.estimate(study.Study({**SMALL, **content}, "small.yaml"), GPU, **options)


def by_method(found: Estimate) -> dict[str, MethodCost]:
    return {cost.method: cost for cost in found.costs}


def test_a_study_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of n·m weights: 2nm forward, 2nm for the weights' gradient, 2nm for its input's."""
    monkeypatch.setattr(tasks, "load", lambda task, model: Lines())
    monkeypatch.setattr(gpu_hours, "LAUNCH", 0)
    gradient, forward = 2 * 7 * 5 * 2 + 2 * 5 * 3 * 3, 2 * 7 * 5 + 2 * 5 * 3  # the first input needs none
    sam = {"name": "sam", "adapter": "none", "optimizer": {"name": "sam", "every": 4}}
    tuned = {"grid": {"lr": [1e-3, 1e-2]}, "seeds": [7]}
    training = {"epochs": 3, "evaluate_every": 1, "batch_size": 16}
    content = {"methods": ["full_ft", sam], "tune": tuned, "seeds": [0, 1, 2], "train": training}
    found = by_method(of({**content, "measures": ["cost"]}, utilisation=0.5))
    for name, gradients in (("full_ft", 1), ("sam", 1 + 1 / 4)):
        trained = 3 * 40 * gradient * gradients
        validated = 3 * 10 * forward  # after the first two epochs and at the end
        measured = 8 * gradient  # the examples on which `cost` counts
        final = trained + validated + (40 + 20) * forward + measured  # training and test data at the end
        operations = 2 * (trained + validated) + 3 * final
        one = found[name]
        assert (one.tuning_runs, one.final_runs, one.gradients_per_step) == (2, 3, gradients)
        assert one.gflops_per_example == pytest.approx(gradient * gradients / 1e9)
        assert one.operations == pytest.approx(operations)
        assert one.hours == pytest.approx(operations / (0.5 * 66.9e12) / 3600)


def test_a_run_measures_the_cost_that_was_estimated(tmp_path: Path) -> None:
    found = by_method(of({}))
    for method in ("full_ft", "lora", "sam", "eflat_lora"):
        directory = prepared(tmp_path / method, method)
        assert finish(directory.path) == "done"
        measured = directory.measures()["cost"]["values"]
        assert found[method].gflops_per_example == measured["gflops_per_example"]
        assert found[method].gradients_per_step == measured["gradients_per_step"]
    assert found["sam"].hours == pytest.approx(2 * (found["lora"].hours or 0), rel=0.2)


@pytest.mark.parametrize("name", CASES)
def test_shapes_alone_give_the_count_of_a_real_pass(name: str, tmp_path: Path) -> None:
    task = CASES[name](tmp_path).task()
    examples = task.splits(0).train
    batch = task.collate([examples[i] for i in range(6)])

    def model() -> nn.Module:
        options = AdapterOptions(r=2, alpha=4)
        return adapt(task.build_model(0), options, task.target_modules, task.modules_to_save)

    subject = Subject(model(), [batch], lambda model, batch: (task.loss(model, batch), 1), (), 0)
    with pretrained.shapes_only():
        shaped = model()
    assert shapes.operations(shaped, [batch], task.loss)[0] == flops_per_example(subject) > 0


def test_a_mask_that_is_there_decides_a_shape() -> None:
    """As where T5 reads off a class at the end marks."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.layer(x[keep]).sum()

    batch = {"x": torch.zeros(5, 4), "keep": torch.tensor([True, False, True, True, False])}
    _, forward = shapes.operations(Chosen(), [batch], lambda model, batch: model(**batch))
    assert forward * 5 == 2 * 3 * 4 * 3


def test_neither_weights_nor_other_precisions_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_hours, "LAUNCH", 0)
    content = text_study(tmp_path)
    before = by_method(of(content))
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    assert by_method(of(content)) == before
    half = by_method(of({**content, "train": {**content["train"], "precision": "bf16"}}))
    assert half["lora"].operations == before["lora"].operations
    assert half["lora"].hours == pytest.approx((before["lora"].hours or 0) * 66.9 / 989)
    checkpointed = {**content, "model": {**content["model"], "gradient_checkpointing": True}}
    more = by_method(of(checkpointed))["lora"].operations or 0
    assert 1.2 < more / (before["lora"].operations or 0) < 1.5  # a forward pass more for each gradient


def test_grouped_batches_cost_less(tmp_path: Path) -> None:
    content = text_study(tmp_path, batch_size=8)
    content["train"]["group_by_length"] = True
    grouped = by_method(of(content))["lora"].operations or 0
    assert grouped < (by_method(of(text_study(tmp_path, batch_size=8)))["lora"].operations or 0)


def test_what_is_not_at_hand_is_said_and_not_invented(tmp_path: Path) -> None:
    content = text_study(tmp_path)
    on_the_hub = of({**content, "model": {"name_or_path": "nobody/no-such-model"}})
    assert all(cost.hours is None for cost in on_the_hub.costs)
    assert on_the_hub.costs[0].final_runs == 1
    (line,) = on_the_hub.unknown
    assert "operations and examples: model.name_or_path: nobody/no-such-model" in line
    no_data = of({**content, "task": {**content["task"], "data": str(tmp_path / "nowhere")}})
    assert all(cost.hours is None for cost in no_data.costs)
    assert "nowhere" in no_data.unknown[0]
    weights = 12 * 8 * 8 + 8 * 257  # a layer's of GPT-2, and the head's, which is tied to the embedding
    assert f"{weights:,} weights in matrix products" in no_data.unknown[1]


def test_a_model_that_looks_at_its_numbers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Curious(Lines):
        def outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            loss, logits = super().outputs(model, batch)
            return (loss if float(loss) > 0 else -loss), logits

    monkeypatch.setattr(tasks, "load", lambda task, model: Curious())
    found = of({"methods": ["full_ft"]})
    assert found.costs[0].hours is None
    assert "not to be counted from shapes" in found.unknown[0]


def test_measures_and_generated_texts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = text_study(tmp_path)
    plain = by_method(of({**content, "measures": []}))["lora"]
    more = by_method(of({**content, "measures": [{"name": "sam_sharpness", "examples": 4}]}))["lora"]
    gradient = (plain.gflops_per_example or 0) * 1e9
    assert (more.operations or 0) - (plain.operations or 0) == pytest.approx(12 * 4 * gradient, rel=1e-6)
    assert (more.measuring or 0) > (plain.measuring or 0) > 0  # generated texts are in it too
    assert not of({**content, "measures": ["hessian", "slice", "cost"]}).excluded
    monkeypatch.setattr(measuring, "gradients", lambda measure, train: None)
    assert of({**content, "measures": ["hessian"]}).excluded == ["the measure hessian_merged"]


def test_no_gradient_is_faster_than_its_layers_are_asked_for(tmp_path: Path) -> None:
    """So small a model waits for the processor that asks: its hours are those of its layers."""
    one = by_method(of({"measures": []}))["lora"]
    steps = 3 * 4  # epochs, and batches of 16 among 60 examples
    layers = (one.hours or 0) * 3600 / gpu_hours.LAUNCH / steps
    assert layers == pytest.approx(round(layers))
    assert layers > 10
    sam = by_method(of({"measures": []}))["sam"]
    assert sam.hours == pytest.approx(2 * (one.hours or 0))


@pytest.mark.parametrize("texts", [True, False])
def test_a_few_layers_tell_what_all_cost(texts: bool, tmp_path: Path) -> None:
    """Extrapolated in depth, length and size, against the count of the whole."""
    case = "glue" if texts else "clip_classification"
    task: Any = CASES[case](tmp_path).task()
    config = copy.deepcopy(task._config)
    for part in (config,) if texts else (config.text_config, config.vision_config):
        part.num_hidden_layers = 5
    options = AdapterOptions(r=2, alpha=4)

    def build(changed: Any) -> nn.Module:
        task.__dict__["_config"] = changed
        task.__dict__.pop("modules_to_save", None)
        with pretrained.shapes_only():
            model = task.build_model(0)
            return adapt(model, options, task.target_modules, task.modules_to_save).to("meta")

    def batch(examples: int, tokens: int) -> dict[str, Tensor]:
        labels = torch.zeros(examples, dtype=torch.int64)
        if not texts:
            return {"pixel_values": torch.zeros(examples, 3, 16, 16), "labels": labels}
        ids = torch.full((examples, tokens), 5)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    found = curves.curve(config, build, batch, task.loss, texts, not texts, bf16=False).at(6, 48)
    whole = curves.count(build(config), batch(6, 48), task.loss, bf16=False)
    assert found.gradient == pytest.approx(whole.gradient, rel=0.03)
    assert found.forward == pytest.approx(whole.forward, rel=0.03)
    assert found.saved == pytest.approx(whole.saved, rel=0.1)


def test_a_decoder_of_its_own_is_counted_layer_by_layer() -> None:
    """Encoders and decoders have numbers of layers of their own, and the whole decoder is never built."""
    config = transformers.T5Config(
        num_layers=5, num_decoder_layers=7, d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=100,
        decoder_start_token_id=0,
    )  # fmt: skip
    blocks: list[int] = []

    def count(changed: Any) -> curves.Cost:
        with torch.device("meta"):
            model = transformers.T5ForConditionalGeneration(changed)
        blocks.append(len(model.encoder.block) + len(model.decoder.block))
        ids = torch.full((2, 24), 5)
        batch = {"input_ids": ids, "labels": ids}
        return curves.count(model, batch, lambda made, given: made(**given).loss, bf16=False)

    found = curves._of_all_layers(config, count)
    assert max(blocks) == 3
    whole = count(config)
    assert found.gradient == pytest.approx(whole.gradient, rel=1e-9)
    assert found.forward == pytest.approx(whole.forward, rel=1e-9)
    assert found.saved == pytest.approx(whole.saved, rel=0.01)


def test_sizes_without_data_are_those_of_the_data() -> None:
    """Of TREC's real files, as `tests/tasks/test_prompt_classification.py` counts them."""
    loaded = study.load("paper-few-shot")
    condition = next(c for c in loaded.conditions if c.task["task"] == "trec")
    found = sketches.sketch(tasks.load(condition.task, condition.model))
    assert found.sizes == {"train": 86 + 5 * 512, "validation": 3 * 512 + 323 + 384, "test": 500}
    assert sketches.shortages(found.task)["train"] == {"ABBR": 86}


def test_lengths_are_spread_as_they_are_known_to_be() -> None:
    """Against lengths drawn at random: alone, and padded to the longest of 32."""
    lengths = sketches.padded_lengths((30.0, 60.0), 1000, 1, grouped=False)
    assert sum(lengths) / 9 == pytest.approx(30, rel=0.05)
    drawn = np.random.default_rng(0).lognormal(math.log(30) - 0.4962**2 / 2, 0.4962, (4000, 32))
    assert np.quantile(drawn, 0.95) == pytest.approx(60, rel=0.02)
    longest = sketches.padded_lengths((30.0, 60.0), 1000, 32, grouped=False)
    assert sum(longest) / 9 == pytest.approx(drawn.max(axis=1).mean(), rel=0.05)
    assert max(sketches.padded_lengths((30.0, 60.0), 50, 32, grouped=False)) == 50


def test_runs_are_told_and_timed_without_their_data(tmp_path: Path) -> None:
    """By their configurations; how long, from a timed step, or from what was run before."""
    loaded = study.Study({**SMALL, "methods": ["lora"]}, "small.yaml")
    folder = StudyFolder(tmp_path / "results", loaded.name)
    rows, waiting = plan.sketch(loaded, folder)
    assert [(row.id, row.method, row.state) for row in rows] == [("", "lora", "planned")]
    assert waiting == 0
    (timed,) = wall_time.wall_time(loaded, folder).times
    assert timed.basis == "a timed step"
    assert timed.seconds[1] > timed.seconds[0] > 0
    planned = plan.Plan(loaded, folder)
    (run,) = planned.final([])
    folder.prepare()
    folder.write(planned.snapshot())
    folder.run(run.id).prepare(run.spec())
    assert finish(folder.run(run.id).path) == "done"
    rows, _ = plan.sketch(loaded, folder)
    assert [(row.id, row.state) for row in rows] == [(run.id, "done")]
    (earlier,) = wall_time.wall_time(loaded, folder).times
    assert earlier.basis == "earlier runs"
    assert earlier.total > 0


def test_on_the_command_line(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "methods": ["lora", "sam"]}))
    found = CliRunner().invoke(app, ["show", str(file), "--gpu", "A100", "--mfu", "0.4"])
    assert found.exit_code == 0
    assert "assumed: 40% of the peak of a100 (bf16 312, fp32 19.5 TFLOP/s)" in found.stdout
    assert "in all:" in found.stdout
    assert isinstance(CliRunner().invoke(app, ["show", str(file), "--gpu", "b52"]).exception, InputError)


@pytest.mark.parametrize(
    ("name", "said"), [("h10", "did you mean 'h100'"), ("-3", "known"), ("nan", "known")]
)
def test_unknown_gpus(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        gpu(name)
    assert gpu("300").peak("bf16") == 3e14
    with pytest.raises(InputError, match="--mfu"):
        of({}, utilisation=1.5)
