"""Messages name what has no part in the loss; what is kept is known by the loss."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
)

from flatbench.curvature import HessianOperator
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.labels import IGNORED
from flatbench.models.factors import adapted_modules
from flatbench.notebook.load import load_checkpoint
from flatbench.subject.objective import Objective
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.checkpoint_cases import (
    bert,
    class_batches,
    cross_entropy,
    ids,
    token_batches,
)


def adapted() -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(bert(BertForMaskedLM), peft.LoraConfig(r=2, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def mean_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, int((batch["labels"] != IGNORED).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("merge_adapter", r"merged into the weights.*unmerge_adapter\(\)"),
        ("disable_adapter_layers", "disabled"),
    ],
)
def test_adapters_that_have_no_part_in_the_loss(change: str, message: str) -> None:
    model, batches = adapted(), token_batches()
    opened = load_checkpoint(model, batches)
    getattr(model, change)()
    for ask in (opened.hessian, opened.sharpness):
        with pytest.raises(InputError, match=f"depends on no parameter of the space 'adapter': .*{message}"):
            ask(space="adapter", cached=False)
    with pytest.raises(InputError, match=message):  # flat in silence before
        opened.landscape(space="adapter", points=3, cached=False)
    with (
        HessianOperator(model, mean_loss, batches, space="adapter") as operator,
        pytest.raises(FlatbenchError, match=f"no parameter of the space: .*{message}"),
    ):
        operator.point()


class Encoder(nn.Module):
    """torch's own encoder layer, which has a fused fast path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(inputs).mean(1))
        return found


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear1"]])
def test_adapters_that_a_fused_fast_path_passes_over(targets: list[str]) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=targets)).eval()
    data = [(torch.randn(5, 3, 4), torch.randint(0, 3, (5,)))]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        passed_over = float(cross_entropy(model(data[0][0]), data[0][1]))
        torch.backends.mha.set_fastpath_enabled(False)
        trained = float(cross_entropy(model(data[0][0]), data[0][1]))
        torch.backends.mha.set_fastpath_enabled(True)
    assert abs(trained - passed_over) > 1e-3
    # measured is the function that was trained: in training the layers are called
    opened = load_checkpoint(model, data, loss=cross_entropy)
    with in_space(opened.subject(), "adapter") as point:
        loss, gradient = Objective(opened.subject(), point, None).gradient()
    assert loss == pytest.approx(trained, rel=1e-6)
    assert all(bool(g.any()) for g in gradient)
    assert torch.backends.mha.get_fastpath_enabled()
    assert "forward" not in vars(model.base_model.model.layer.linear1)


def test_what_peft_does_with_a_whole_attention_is_no_passing_over() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=["self_attn"])).eval()
    data = [(torch.randn(5, 3, 4), torch.randint(0, 3, (5,)))]
    load_checkpoint(model, data, loss=cross_entropy)
    # torch's attention reads this one without calling it in any mode
    out = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=["out_proj"])).eval()
    with pytest.raises(InputError, match=r"out_proj.*passed over"):
        load_checkpoint(out, data, loss=cross_entropy)


@pytest.mark.slow  # torch.compile imports its compiler
def test_a_compiled_model_has_its_adapters() -> None:
    model, batches = adapted(), token_batches()
    expected = load_checkpoint(model, batches)
    compiled = load_checkpoint(torch.compile(model), batches)  # type: ignore[arg-type]
    assert compiled.model is model
    assert compiled.space == "merged"
    assert compiled.adapted == expected.adapted == ["bert.encoder.layer.0.attention.self.query"]
    for space in ("merged", "adapter"):
        values = [c.sharpness(space=space, cached=False)["sharpness"] for c in (expected, compiled)]
        assert values[0] == values[1] > 0
    # compiled in parts: names have the wrapper in their middle
    parts = adapted()
    layers = parts.base_model.model.bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend="eager")
    opened = load_checkpoint(parts, batches)
    assert opened.adapted == expected.adapted
    with in_space(opened.subject(), "merged") as point:
        assert list(point.parameters) == ["bert.encoder.layer.0.attention.self.query.weight"]
    assert load_checkpoint(nn.DataParallel(model), batches).adapted == expected.adapted


def test_adapters_without_a_wrapper_around_the_model() -> None:
    model = bert(BertForMaskedLM)
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    except ValueError as error:  # the newest transformers may want a peft that is not there yet
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    opened = load_checkpoint(model.double(), token_batches())
    assert opened.adapted == ["bert.encoder.layer.0.attention.self.query"]
    injected = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["query"]), copy.deepcopy(bert(BertForMaskedLM))
    )
    assert adapted_modules(injected, ()) == opened.adapted
    subject = Subject(model, token_batches(), mean_loss, (), 0)
    with (
        pytest.raises(NotApplicableError, match="no adapted modules are named, though the model has 1"),
        in_space(subject, "merged"),
    ):
        pass


def test_target_modules_that_are_not_there() -> None:
    model = bert(BertForMaskedLM)
    with pytest.raises(InputError, match="no module of the model is called q_proj"):
        load_checkpoint(model, token_batches(), target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"give a list of names: \['query'\]"):
        load_checkpoint(model, token_batches(), target_modules="query")


def smoothed(share: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: cross_entropy(outputs, targets, label_smoothing=share)


def test_results_of_another_loss_are_not_taken_from_the_cache() -> None:
    model, batches = nn.Linear(4, 3).double(), class_batches("targets")
    criteria: list[Any] = [
        cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        smoothed(0.3),
        smoothed(0.4),
        functools.partial(cross_entropy, label_smoothing=0.5),
        functools.partial(cross_entropy, label_smoothing=0.6),
        nn.functional.multi_margin_loss,
    ]
    opened = [load_checkpoint(model, batches, loss=criterion) for criterion in criteria]
    found = [c.sharpness()["sharpness"] for c in opened]
    assert found == [c.sharpness(cached=False)["sharpness"] for c in opened]
    assert len(set(found)) == len(found)
    losses = [c.landscape(points=3, space="all").loss for c in opened]
    assert losses == [c.landscape(points=3, space="all", cached=False).loss for c in opened]
    again = load_checkpoint(model, batches, loss=smoothed(0.3))
    assert again.sharpness().cached
    assert again.loss_key == opened[3].loss_key


def test_the_models_own_loss_is_known_by_its_configuration() -> None:
    torch.manual_seed(0)
    batch = {"input_ids": ids(4, 3)[0], "labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}
    model = bert(num_labels=2, problem_type="regression")
    first = load_checkpoint(model, [batch]).sharpness()["sharpness"]
    model.config.problem_type = "multi_label_classification"
    second = load_checkpoint(model, [batch])
    assert second.sharpness()["sharpness"] == second.sharpness(cached=False)["sharpness"] != first


def test_running_means_that_changed_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    opened = load_checkpoint(model, [(torch.randn(5, 4).double(), torch.arange(5) % 3)], loss=cross_entropy)
    first = opened.sharpness()
    model[0].running_mean.add_(1.0)
    second = opened.sharpness()
    assert not second.cached
    assert second["sharpness"] != first["sharpness"]
