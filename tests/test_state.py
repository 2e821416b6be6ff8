"""Training state survives a round trip exactly, and damage is noticed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flatbench.errors import InputError
from flatbench.store import training_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(max_size=5)
    | st.floats(allow_nan=False)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(tree=trees)
@example(
    tree={"history": [{"step": 1, "loss": math.inf, "kind": None, "end": True}, {}, {"step": 2.0}], 3: []}
)
@example(tree=[{"rows": 1}, {"tensor": "0"}])
@example(tree=[{"rows": 1}, {2: "a key that JSON would make a text"}])
@example(tree=[{"step": 1}, {"inner": [1, (2,)]}])
def test_plain_trees_come_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    training_state.save(path, tree)
    assert training_state.load(path) == tree


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_tensors_come_back_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 4).to(dtype)
    shared = torch.arange(6.0)
    tree = {"a": [tensor, tensor.T, torch.tensor(math.pi)], 3: (shared, shared[2:]), "empty": torch.zeros(0)}
    training_state.save(tmp_path / "s", tree)
    back = training_state.load(tmp_path / "s")
    assert back["a"][0].dtype == dtype
    assert torch.equal(back["a"][0], tensor)
    assert torch.equal(back["a"][1], tensor.T)
    assert back["a"][2].shape == ()
    assert torch.equal(back[3][1], shared[2:])
    assert back["empty"].shape == (0,)


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        training_state.save(tmp_path / "s", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_damage_is_noticed(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s"
    training_state.save(path, {"x": torch.arange(100.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged"):
        training_state.load(path)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(InputError, match="damaged"):
        training_state.load(tmp_path / "s")
