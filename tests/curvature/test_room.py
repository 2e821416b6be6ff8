"""Searches whose vectors are kept away from the graphs find what others find."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator, MatrixOperator, top_eigenpairs
from flatbench.curvature.eigenpairs import room
from flatbench.curvature.eigenpairs.rows import Rows
from flatbench.curvature.eigenpairs.rows_elsewhere import FileStore, HostStore, RowsElsewhere
from flatbench.curvature.operators.memory import limited
from flatbench.errors import InputError

SIZE = 70_000  # beyond one block of columns


def _matrix(size: int = 200) -> MatrixOperator:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.tensor([9.0, 9.0, 7.0, -6.5]), torch.linspace(-3, 4, size - 4)]).double()
    return MatrixOperator(basis * values @ basis.T)


def _stacks(folder: Path, dtype: torch.dtype) -> dict[str, Rows | RowsElsewhere]:
    here = torch.device("cpu")
    return {
        "here": Rows(SIZE, dtype, here),
        "host": RowsElsewhere(HostStore(SIZE, dtype), SIZE, dtype, here),
        "file": RowsElsewhere(FileStore(folder, SIZE, dtype), SIZE, dtype, here),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stack_elsewhere_does_what_one_here_does(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(SIZE, 20, generator=generator, dtype=dtype))
    coefficients = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    probe = torch.randn(SIZE, generator=generator, dtype=dtype)
    seen: dict[str, list[Tensor]] = {}
    for name, stack in _stacks(tmp_path, dtype).items():
        for vector in vectors.T:
            stack.append(vector)
        left = probe.clone()
        seen[name] = [stack.project_out(left), left, stack.combined(coefficients), stack[13]]
        stack.recombine(coefficients)
        assert stack.count == 6
        seen[name] += [stack[i].clone() for i in range(6)]
        stack.shrink(2)
        stack.append(probe)
        assert stack.count == 3
        seen[name] += [stack[1].clone(), stack[2].clone()]
    close = 1e-5 if dtype == torch.float32 else 1e-12
    for name in ("host", "file"):
        for found, expected in zip(seen[name], seen["here"], strict=True):
            torch.testing.assert_close(found, expected, rtol=close, atol=close)


def _cramped(memory: float, each: int = 8) -> MatrixOperator:
    operator = _matrix()
    operator.memory = int(memory * each * operator.dimension)
    return operator


def test_a_search_in_a_folder_finds_what_one_in_memory_finds(tmp_path: Path) -> None:
    plain = top_eigenpairs(_matrix(), 4, tol=1e-6)
    found = top_eigenpairs(_cramped(12), 4, tol=1e-6, scratch=tmp_path)
    assert all(found.certified)
    assert abs(found.products - plain.products) <= 2
    assert found.values == pytest.approx(plain.values, rel=1e-6)
    assert found.values == pytest.approx((9, 9, 7, -6.5), rel=1e-6)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(4).double(), atol=1e-10, rtol=0)
    assert list(tmp_path.iterdir()) == []


def test_restarts_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LONGEST_BASIS", 16)
    found = top_eigenpairs(_cramped(12), 4, tol=1e-6, scratch=str(tmp_path))
    assert all(found.certified)
    assert found.values == pytest.approx((9, 9, 7, -6.5), rel=1e-6)


def test_a_folder_around_searches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"do not hold 8 vectors.*or a folder for them \(scratch\)"):
        top_eigenpairs(_cramped(12), 4)
    with limited(None, tmp_path):
        assert all(top_eigenpairs(_cramped(12), 4).certified)


def test_where_memory_does_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: Any) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr(room, "FileStore", none)
    assert all(top_eigenpairs(_cramped(80), 4, scratch=tmp_path).certified)


def test_folders_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is no folder"):
        top_eigenpairs(_cramped(12), 4, scratch=tmp_path / "none")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 1600))
    with pytest.raises(InputError, match=r"elsewhere there is room for 5 of .*with room elsewhere for 9"):
        top_eigenpairs(_cramped(12), 4, scratch=tmp_path)


def test_a_full_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match=r"scratch: .*No space left on device"):
        top_eigenpairs(_cramped(12), 4, scratch=tmp_path)


def test_graphs_leave_room_for_the_vectors() -> None:
    """Of a budget that would hold both, kept graphs do not take what a search needs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).double()
    batch = {"x": torch.randn(4000, 64, dtype=torch.float64)}

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return model(batch["x"]).square().mean(), len(batch["x"])

    memory = 40 * 8 * 33_088
    with HessianOperator(net, loss, [batch], memory=memory) as operator:
        before = operator.plan
        found = top_eigenpairs(operator, 8, tol=1e-2)
        after = operator.plan
        assert before.peak_bytes + 20 * 8 * operator.dimension > memory >= after.peak_bytes
    assert all(found.certified)
    with HessianOperator(net, loss, [batch], memory=10 * memory) as operator:
        assert top_eigenpairs(operator, 8, tol=1e-2).values == pytest.approx(found.values, rel=1e-2)
