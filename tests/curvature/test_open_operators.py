"""What happens to a model and its batches while an operator is open, or before it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flatbench.curvature import HessianOperator, MatrixOperator, top_eigenpairs
from flatbench.curvature.operators import batches as cutting
from flatbench.errors import InputError
from tests.curvature.curvature_cases import CASES, lora, on_tuple


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def texts(count: int = 4, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (count, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def own(model: nn.Module, batches: list[Any], **options: Any) -> HessianOperator:
    return HessianOperator(model, None, batches, **options)


# -- gradients and batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, "600kB"])
@pytest.mark.parametrize("layer", ["", "model.layers.0"])
def test_gradients_that_are_switched_off_are_no_curvature_of_zero(memory: Any, layer: str) -> None:
    model = llama()
    with own(model, [texts()], memory=memory) as made:
        made @ torch.ones(made.dimension).double()
        model.get_submodule(layer).requires_grad_(False)
        with pytest.raises(InputError, match=r"requires_grad of model\.\S+ and \d+ more was switched off"):
            made @ torch.ones(made.dimension).double()
        model.requires_grad_(True)
        assert float((made @ torch.ones(made.dimension).double()).norm()) > 0


@pytest.mark.parametrize("spaces", [("merged", "adapter"), ("adapter", "merged"), ("all", "adapter")])
def test_two_spaces_of_one_model_are_not_open_together(spaces: tuple[Any, Any]) -> None:
    model = lora(llama(), ["q_proj", "v_proj"])
    one, other = (own(model, [texts()], space=space) for space in spaces)
    expected = other.point()[0]
    with one, other, pytest.raises(InputError, match=r"close that one first|close what is open"):
        one @ torch.ones(one.dimension).double()
    assert other.point()[0] == pytest.approx(expected, rel=1e-12)


def test_a_batch_that_is_written_to_is_refused() -> None:
    batch = texts()
    with own(llama(), [batch]) as made:
        made.point()
        batch["labels"][0, 3] = -100
        with pytest.raises(InputError, match="a batch was written to"):
            made @ torch.ones(made.dimension).double()


def test_one_buffer_that_is_filled_anew_is_refused() -> None:
    model, batches = CASES["mlp"].make()

    def refilled() -> Iterator[Any]:
        buffer = [torch.empty_like(tensor) for tensor in batches[0]]
        for _ in range(2):
            for tensor in buffer:
                tensor.random_(0, 2)
            yield tuple(buffer)

    with pytest.raises(InputError, match="one buffer"):
        HessianOperator(model, on_tuple, refilled())
    again = HessianOperator(model, on_tuple, iter(batches))
    assert again.point()[0] == pytest.approx(HessianOperator(model, on_tuple, batches).point()[0], rel=1e-12)


def test_weights_of_other_shapes_are_refused() -> None:
    model = llama()
    made = own(model, [texts()])
    model.resize_token_embeddings(50)
    with pytest.raises(InputError, match="other shapes"):
        made.point()


@pytest.mark.parametrize("space", ["merged", "adapter"])
def test_inference_mode_is_named(space: Any) -> None:
    made = own(lora(llama(), ["q_proj"]), [texts()], space=space)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        made.point()
    with torch.inference_mode():
        born_there = llama()
    with pytest.raises(InputError, match="inference_mode"):
        own(born_there, [texts()]).point()
    with torch.no_grad():
        assert made.point()[0] > 0


def test_another_thread_is_told_to_wait() -> None:
    """torch's choice of an attention is the process's: in two threads one lost its second derivatives."""
    made = own(llama(), [texts()])
    raised: list[BaseException] = []

    def measure() -> None:
        try:
            own(llama(), [texts()]).point()
        except InputError as error:
            raised.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join()

    with made, made:
        in_a_thread()
        assert "another thread" in str(raised.pop())
        assert made.point()[0] > 0
    in_a_thread()
    assert not raised


# -- caches and packed texts ---------------------------------------------------------------------------------


def packed(count: int = 2) -> dict[str, Tensor]:
    """Four texts of eight words in one row, as padding-free collators make them."""
    ids = torch.randint(1, 40, (1, 32), generator=torch.Generator().manual_seed(count))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(8).repeat(4)[None]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_texts_see_each_other_where_there_is_a_cache(attention: str) -> None:
    model = llama(attn_implementation=attention)
    plain = {key: packed()[key] for key in ("input_ids", "labels")}
    for batches in ([packed()], [plain, packed()]):
        with pytest.raises(InputError, match=r"without its cache.*use_cache = False"):
            own(model, batches).point()
    assert model.config.use_cache is True
    model.config.use_cache = False
    with torch.no_grad():
        expected = float(model(**packed()).loss)
    assert own(model, [packed()]).point()[0] == pytest.approx(expected, rel=1e-9)


def test_a_cache_in_a_batch_is_named() -> None:
    model = llama()
    with torch.no_grad():
        cache = model(texts()["input_ids"]).past_key_values
    with pytest.raises(InputError, match="past_key_values"):
        own(model, [{**texts(), "past_key_values": cache}])


# -- padding that is none ------------------------------------------------------------------------------------


def ragged(count: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 9, (count, 1), generator=generator)
    batch = texts(count, 10)
    mask = (torch.arange(10) < lengths).long()
    return {
        "input_ids": batch["input_ids"] * mask,
        "attention_mask": mask,
        "labels": batch["labels"].masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize("row", [0, 17, 40, 63])
def test_labels_beyond_the_mask_of_one_row_are_not_cut_off(row: int) -> None:
    batch = ragged()
    batch["labels"][row] = texts(64, 10)["labels"][row]
    model = llama()
    made, whole = own(model, [batch]), own(model, [batch], shorten=False)
    with made:
        assert made.point()[0] == pytest.approx(whole.point()[0], rel=1e-10)
        assert made.terms == int((batch["labels"][:, 1:] != -100).sum())
    vector = torch.ones(made.dimension).double()
    torch.testing.assert_close(made @ vector, whole @ vector, rtol=1e-8, atol=1e-10)


def test_padding_is_cut_where_it_is_padding() -> None:
    with own(llama(), [ragged()]) as made:
        assert made.plan.padding > 0.1


def test_positions_of_one_row_for_all_are_cut_with_the_rest() -> None:
    batch, model = ragged(), llama()
    made = own(model, [{"position_ids": torch.arange(10)[None], **batch}])
    with made:
        assert made.plan.padding > 0.1
        assert made.point()[0] == pytest.approx(own(model, [batch]).point()[0], rel=1e-10)


def test_rows_are_known_by_name() -> None:
    batch = {"position_ids": torch.arange(8)[None], "bias": torch.ones(3, 3), **texts()}
    assert cutting.rows(batch) == 4
    assert cutting.rows((torch.ones(5, 2), torch.ones(5))) == 5
    assert cutting.rows({"x": torch.ones(()), "y": torch.ones(7)}) == 7


# -- half precision inside -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast_inside_a_loss_enters_the_errors(kind: torch.dtype) -> None:
    def cast(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        with torch.autocast("cpu", kind):
            return model(**batch).loss, batch["labels"][:, 1:].numel()

    model = llama().float()
    plain = own(model, [texts()])
    with plain:
        assert plain.relative_error == 0
        assert not plain.coarse
    with HessianOperator(model, cast, [texts()]) as made:
        assert made.relative_error >= torch.finfo(kind).eps
        assert str(kind).removeprefix("torch.") in made.coarse


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"which": "la"}, "which: 'la' is none of LM, LA, SA"),
        ({"block": 0}, "block: 0"),
        ({"k": 2.0}, "k: 2.0"),
        ({"k": True}, "k: True"),
        ({"start": np.ones(30)}, "start: a ndarray"),
        ({"seed": 2**70}, "seed"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"max_products": 0}, "max_products: 0"),
        ({"max_products": -3}, "max_products: -3"),
        ({"scratch": ""}, "scratch: an empty name"),
    ],
)
def test_options_that_mean_nothing(options: Any, words: str) -> None:
    calls = 0

    def multiply(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return vector

    with pytest.raises(InputError, match=words):
        top_eigenpairs(MatrixOperator(multiply, 30), **options)
    assert calls == 0


@pytest.mark.parametrize("certify", [True, False])
def test_fewer_values_than_wanted_are_told(certify: bool) -> None:
    with pytest.warns(UserWarning, match="10 eigenvalues were wanted, and 5 were found"):
        found = top_eigenpairs(MatrixOperator(torch.eye(30).double()), 10, certify=certify, max_products=5)
    assert len(found.values) == 5
