"""RandomPerturbation: the published noise, its schedule, and that nothing of it stays."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim import RandomPerturbation
from tests.optim.models import adapted, problem, snapshot, trainable


def make(model: nn.Module, **options) -> RandomPerturbation:
    base = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    return RandomPerturbation(base, model, **{"total_steps": 10, "rho": 0.3, **options})


def base_weights(model: nn.Module) -> list[Tensor]:
    return [f.layer.get_base_layer().weight.detach().clone() for f in lora_factors(model)]


def moved(model: nn.Module, steps: int) -> RandomPerturbation:
    """An optimizer before its step number ``steps``, on a model whose B is not zero any more."""
    optimizer, closure = make(model), problem(model)
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def test_row_wise_standard_deviation() -> None:
    """Over many seeds: ``rho_t/√m·‖(W0 + s·B·A)_i‖`` for every row i, to the sampling error."""
    model = adapted()
    optimizer = moved(model, 5)
    optimizer.eval()
    clean = base_weights(model)
    squares = [torch.zeros(weight.shape[0], dtype=weight.dtype) for weight in clean]
    draws = 400
    for seed in range(draws):
        optimizer.seed = seed
        optimizer.train()
        for total, noisy, weight in zip(squares, base_weights(model), clean, strict=True):
            total += (noisy - weight).square().sum(1)
        optimizer.eval()
    rho = 0.3 * (1 - math.cos(math.pi * 5 / 10)) / 2
    for f, total, weight in zip(lora_factors(model), squares, clean, strict=True):
        m = weight.shape[1]
        measured = (total / (draws * m)).sqrt()
        merged = weight + f.scaling * f.B.detach() @ f.A.detach()
        expected = rho / math.sqrt(m) * merged.norm(dim=1)
        # a standard deviation from n numbers is known to 1/√(2n); five of these for the worst of 66 rows
        assert (measured / expected - 1).abs().max() < 5 / math.sqrt(2 * draws * m)


def test_the_noise_grows_as_published() -> None:
    model = adapted()
    optimizer, closure = make(model), problem(model)
    norms = []
    for _ in range(10):
        optimizer.step(closure)
        norms.append(float(optimizer.perturbation_norm))
    clean = torch.cat([w.flatten() for w in base_weights(model)]).norm()
    # after step t the noise of step t + 1 is there
    factors = [(1 - math.cos(math.pi * min(t, 10) / 10)) / 2 for t in range(1, 11)]
    assert all(a < b for a, b in pairwise(norms))
    for norm, factor in zip(norms, factors, strict=True):
        assert norm / (0.3 * factor * float(clean)) == pytest.approx(1, abs=0.25)


def test_perturbation_norm_is_that_of_what_was_added() -> None:
    model = adapted()
    optimizer = moved(model, 4)
    optimizer.eval()
    clean = base_weights(model)
    optimizer.train()
    added = torch.cat([(a - b).flatten() for a, b in zip(base_weights(model), clean, strict=True)])
    assert float(optimizer.perturbation_norm) == pytest.approx(float(added.norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = base_weights(model)
    pointers = [f.layer.get_base_layer().weight.data_ptr() for f in lora_factors(model)]
    optimizer = moved(model, 6)
    assert not all(torch.equal(a, b) for a, b in zip(before, base_weights(model), strict=True))
    optimizer.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, base_weights(model), strict=True))
    assert pointers == [f.layer.get_base_layer().weight.data_ptr() for f in lora_factors(model)]


def test_ten_steps_as_written_plainly() -> None:
    """The gradient is that of the model whose W0 holds the noise; the rest is the base optimizer's."""
    model = adapted(dtype=torch.float32)
    twin = copy.deepcopy(model)
    optimizer = make(model)
    base = torch.optim.SGD(trainable(twin), lr=0.1, momentum=0.9)
    weights = [f.layer.get_base_layer().weight for f in lora_factors(twin)]
    for step in range(10):
        optimizer.train()
        noisy = base_weights(model)
        optimizer.step(problem(model, step))
        old = [weight.detach().clone() for weight in weights]
        for weight, value in zip(weights, noisy, strict=True):
            weight.data.copy_(value)
        problem(twin, step)()
        for weight, value in zip(weights, old, strict=True):
            weight.data.copy_(value)
        base.step()
        for own, expected in zip(trainable(model), trainable(twin), strict=True):
            assert (own - expected).norm() <= 1e-6 * expected.norm()


def test_all_micro_batches_of_a_step_see_the_same_noise_and_steps_do_not() -> None:
    model = adapted()
    optimizer = moved(model, 4)
    first = base_weights(model)
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(first, base_weights(model), strict=True))
    optimizer.step(problem(model))
    assert not any(torch.equal(a, b) for a, b in zip(first, base_weights(model), strict=True))


def test_the_noise_leaves_the_global_generator_alone() -> None:
    model = adapted()
    optimizer, closure = make(model), problem(model)
    before = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(before, torch.get_rng_state())


def test_every_third_step() -> None:
    model = adapted()
    optimizer, closure = make(model, every=3, rho_schedule="constant"), problem(model)
    clean, seen = base_weights(model), []
    for _ in range(6):
        optimizer.train()
        seen.append(not torch.equal(base_weights(model)[0], clean[0]))
        optimizer.step(closure)
    assert seen == [True, False, False, True, False, False]


def test_what_cannot_hold_noise_is_refused_by_name() -> None:
    model = adapted()
    weight = lora_factors(model)[1].layer.get_base_layer().weight
    weight.requires_grad_(True)
    with pytest.raises(InputError, match="second trains itself"):
        make(model)
    model = adapted()
    layer = lora_factors(model)[1].layer.get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"second is quantised .*int8"):
        make(model)


def test_a_saved_state_holds_no_noise() -> None:
    model = adapted()
    before = base_weights(model)
    moved(model, 3)
    stored = snapshot(model)
    for f, weight in zip(lora_factors(model), before, strict=True):
        name = next(n for n, m in model.named_modules() if m is f.layer)
        assert torch.equal(stored[f"{name}.base_layer.weight"], weight)
