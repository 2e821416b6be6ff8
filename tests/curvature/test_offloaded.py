"""Models whose weights accelerate keeps on a disk: the numbers of the model in memory, and its memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import flatbench
from flatbench.curvature import GaussNewtonOperator, HessianOperator, top_eigenpairs
from flatbench.curvature.operators.widened import Deferred, Offloaded, Widened
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures import REGISTRY

QWEN = Qwen2Config(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
ALL_BUT_LAYERS = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb")
IDS = torch.arange(12).reshape(2, 6) * 3 % 50
LITTLE = 60_000
BATCH = {"input_ids": IDS, "labels": IDS}


def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, batch["labels"][:, 1:].numel()


def adapted(model: Any) -> nn.Module:
    """The model under LoRA, the same each time, B unlike zero."""
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def devices(prefix: str = "") -> dict[str, str]:
    return {prefix + "model.layers": "disk"} | {prefix + name: "cpu" for name in ALL_BUT_LAYERS}


def saved(path: Path, kind: torch.dtype) -> Path:
    torch.manual_seed(0)
    Qwen2ForCausalLM(QWEN).to(kind).save_pretrained(path, max_shard_size="4KB")
    return path


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), torch.float32)


def in_memory(folder: Path) -> nn.Module:
    return adapted(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def layers_on_disk(folder: Path, away: Path) -> nn.Module:
    """As a device_map does it."""
    return dispatch_model(in_memory(folder), devices("base_model.model."), offload_dir=str(away))


def all_on_disk(folder: Path, away: Path) -> nn.Module:
    model = in_memory(folder)
    disk_offload(model, str(away))
    return model


#: each pair of two choices; all of them in `make test-long`
CASES = [
    pytest.param(*case, marks=[] if (i + j + k + m) % 2 == 0 else pytest.mark.long)
    for i, j, k, m in itertools.product(range(2), repeat=4)
    for case in [
        (
            (layers_on_disk, all_on_disk)[i],
            ("adapter", "merged")[j],
            (HessianOperator, GaussNewtonOperator)[k],
            (10**9, None)[m],
        )
    ]
]


@pytest.mark.parametrize(("put_away", "space", "kind", "memory"), CASES)
def test_products_are_those_of_the_model_in_memory(
    folder: Path, tmp_path: Path, put_away: Any, space: Any, kind: Any, memory: int | None
) -> None:
    torch.manual_seed(2)
    found = []
    for model in (in_memory(folder), put_away(folder, tmp_path)):
        before = {name: str(p.device) for name, p in model.named_parameters()}
        forwards = [vars(module).get("forward") for module in model.modules()]
        options = {} if kind is GaussNewtonOperator else {"loss": loss}
        with kind(model, batches=[BATCH], space=space, memory=memory, **options) as operator:
            vector = torch.randn(operator.dimension, generator=torch.Generator().manual_seed(3))
            found.append((operator.point()[0], operator @ vector, operator.device))
        assert {name: str(p.device) for name, p in model.named_parameters()} == before
        assert [vars(module).get("forward") for module in model.modules()] == forwards
        assert not any(isinstance(p, Deferred) for p in model.parameters())
    (value, product, _), (same, again, device) = found
    assert same == pytest.approx(value, rel=1e-6)
    assert device.type == "cpu"
    torch.testing.assert_close(again, product, rtol=1e-4, atol=1e-6 * float(product.abs().max()))


def test_block_by_block(folder: Path, tmp_path: Path) -> None:
    """The way for which weights on a disk are made: little memory, and several vectors at once."""
    found = []
    for model in (in_memory(folder), all_on_disk(folder, tmp_path)):
        with HessianOperator(model, loss, [BATCH], space="adapter", memory=LITTLE) as operator:
            vectors = torch.randn(operator.dimension, 3, generator=torch.Generator().manual_seed(3))
            found.append(operator @ vectors)
            assert operator.plan.way == "blocks"
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6 * float(found[0].abs().max()))


def test_a_model_that_is_loaded_with_a_device_map(folder: Path, tmp_path: Path) -> None:
    """Its weights are read from its own safetensors files; those that move are brought into memory."""
    found = []
    for options in ({}, {"device_map": devices(), "offload_folder": str(tmp_path)}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
        only = lambda name: "layers.1.mlp.down_proj" in name  # noqa: E731
        found.append(top_eigenpairs(HessianOperator(model, loss, [BATCH], space="all", only=only), 2).values)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("only", [None, lambda name: "embed" in name, lambda name: "lm_head" in name])
def test_ties_that_are_lost_are_refused(folder: Path, tmp_path: Path, only: Any) -> None:
    """An embedding and its head are one weight, of which accelerate makes two: another matrix."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    disk_offload(model, str(tmp_path))
    with pytest.raises(NotApplicableError, match=r"embed_tokens.weight and lm_head.weight hold the same"):
        HessianOperator(model, loss, [BATCH], space="all", only=only).point()
    # new norms are all ones, and whether two are one cannot be seen
    with pytest.raises(NotApplicableError, match=r"layernorm.weight hold the same"):
        HessianOperator(model, loss, [BATCH], space="all", only=lambda name: "norm" in name).point()
    HessianOperator(model, loss, [BATCH], space="all", only=lambda name: "mlp" in name).point()


def test_measures_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    found = []
    for model in (in_memory(folder), all_on_disk(folder, tmp_path)):
        checkpoint = flatbench.load_checkpoint(model, [BATCH])
        found.append(checkpoint.measure("sam_sharpness", space="merged"))
    assert found[1]["sharpness"] == pytest.approx(found[0]["sharpness"], rel=1e-3)


class Transposed(nn.Module):
    """Two layers on one weight, the second on its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 5)
        self.second.weight = nn.Parameter(self.first.weight.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_weight_that_shares_with_anothers_transpose_is_refused(tmp_path: Path) -> None:
    model = Transposed()
    disk_offload(model, str(tmp_path))
    with pytest.raises(NotApplicableError, match=r"first.weight and second.weight hold the same numbers"):
        HessianOperator(model, lambda m, b: m(b).square().mean(), [torch.ones(2, 5)]).point()


def test_a_forward_pass_that_fails_leaves_nothing_loaded(folder: Path, tmp_path: Path) -> None:
    model = all_on_disk(folder, tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    handle = model.base_model.model.model.layers[1].mlp.up_proj.register_forward_pre_hook(fail)
    with pytest.raises((RuntimeError, FlatbenchError), match="half-way"):
        HessianOperator(model, loss, [BATCH], space="adapter").point()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    handle.remove()


@pytest.mark.parametrize("name", sorted(REGISTRY.names()))
def test_every_measure_is_that_of_the_model_in_memory(in_float32: Path, tmp_path: Path, name: str) -> None:
    """Or is refused, as it is there."""
    found: list[Any] = []
    for model in (in_memory(in_float32), all_on_disk(in_float32, tmp_path)):
        try:
            found.append(flatbench.load_checkpoint(model, [BATCH]).measure(name))
        except FlatbenchError as error:
            found.append(str(error))
        assert model.base_model.model.model.layers[2].mlp.up_proj.weight.device == (
            next(model.parameters()).device
        )
    here, away = found
    if isinstance(here, str):
        assert away == here
        return
    assert here.keys() == away.keys()
    for key, value in here.items():
        if isinstance(value, float) and "second" not in key and "step" not in key:
            assert away[key] == pytest.approx(value, rel=2e-2, abs=1e-4, nan_ok=True), key


def test_weights_that_nobody_brings_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """peft makes the factors of a layer that is away already without numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    disk_offload(model, str(tmp_path))
    with pytest.raises(NotApplicableError, match=r"12 weights .* \(model.layers.0.*lora_A.* no hook"):
        HessianOperator(adapted(model), loss, [BATCH], space="adapter").point()
    empty = nn.Linear(3, 2, device="meta")
    with pytest.raises(NotApplicableError, match=r"2 weights are not in memory \(weight is on"):
        HessianOperator(empty, lambda m, b: m(b).sum(), [torch.ones(2, 3)]).point()


def test_files_that_are_gone_are_named(folder: Path, tmp_path: Path) -> None:
    model = all_on_disk(folder, tmp_path)
    name = next(iter(tmp_path.glob("*layers.2*mlp.up_proj*.dat")))
    name.unlink()
    with pytest.raises((InputError, FileNotFoundError), match="up_proj"):
        HessianOperator(model, loss, [BATCH], space="adapter").point()
    assert model.base_model.model.model.layers[2].mlp.up_proj.weight.device.type == "meta"


def test_a_weight_that_is_read_is_never_written_to() -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    for held in (Widened(weight, torch.float32), Offloaded(lambda: weight, weight.to("meta"), weight.device)):
        with pytest.raises(RuntimeError, match="would write to a frozen weight"):
            held.add_(1)
        torch.testing.assert_close(
            (held.t() @ torch.ones(3, 1, dtype=held.dtype)).sum(), torch.tensor(6.0, dtype=held.dtype)
        )
    assert bool((weight == 1).all())
