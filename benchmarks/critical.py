"""Critical sharpness beside the certified largest eigenvalue, on small trained models: ranks and passes.

LoRA on scikit-learn's digits with a small vision transformer, trained by AdamW, SAM and EFlat-LoRA at several
learning rates and for several numbers of epochs. Of every model, over the same 256 training images, in the
space ``merged`` (along the gradient) and ``adapter`` (gradient; AdamW's and EFlat-LoRA's update from one
gradient): the largest eigenvalue with its certificate, and critical sharpness with its interval. Written:
Spearman's rank correlation of the two over the models, with a bootstrap interval, how often the gradient's
value is at most the eigenvalue's upper bound (as it is where the loss is quadratic), and the forward passes.

    python benchmarks/critical.py
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import peft
import record
import torch
import transformers
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import flatbench
from flatbench.optim import SAM, EFlatLoRA

METHODS = ("adamw", "sam", "eflat_lora")
RATES = (2e-3, 1e-2)
EPOCHS = (1, 3, 8)
TRAIN, MEASURED, BATCH = 1024, 256, 32
#: space and direction
LINES = (
    ("merged", "gradient"),
    ("adapter", "gradient"),
    ("adapter", "adamw"),
    ("adapter", "eflat_lora"),
)


def model_of(seed: int) -> Any:
    """A small vision transformer with LoRA and a head that trains."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
    )
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    return peft.get_peft_model(transformers.ViTForImageClassification(config), lora)


def train(model: Any, method: str, rate: float, epochs: int, data: dict[str, torch.Tensor]) -> None:
    """Train in batches of a fixed random order."""
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    optimizer: Any = adamw
    if method == "sam":
        optimizer = SAM(adamw, model, rho=0.05)
    elif method == "eflat_lora":
        optimizer = EFlatLoRA(adamw, model, rho=0.05)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(TRAIN, generator=generator).split(BATCH):
            batch = {key: value[:TRAIN][index] for key, value in data.items()}

            def closure(batch: Any = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            optimizer.step(closure)
    getattr(optimizer, "eval", lambda: None)()


def correlation(x: list[float], y: list[float]) -> dict[str, float]:
    """Spearman's, with the 2.5 and 97.5 percentiles over 2,000 samples of the models with replacement."""
    draw = np.random.default_rng(0)
    a, b = np.array(x), np.array(y)
    picks = [draw.integers(0, len(a), len(a)) for _ in range(2000)]
    again = [spearmanr(a[i], b[i]).statistic for i in picks if len(set(a[i])) > 2]
    low, high = np.nanpercentile(again, [2.5, 97.5])
    return {"spearman": float(spearmanr(a, b).statistic), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=len(METHODS) * len(RATES) * len(EPOCHS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    data = {"pixel_values": pixels, "labels": torch.tensor(labels)}
    measured = [{key: value[:MEASURED] for key, value in data.items()}]
    found: list[dict[str, Any]] = []
    start = time.perf_counter()
    settings = list(itertools.product(METHODS, RATES, EPOCHS))[: arguments.models]
    for method, rate, epochs in settings:
        model = model_of(seed=1)
        train(model, method, rate, epochs, data)
        checkpoint = flatbench.load_checkpoint(model, measured)
        row: dict[str, Any] = {"method": method, "lr": rate, "epochs": epochs}
        for space in ("merged", "adapter"):
            top = checkpoint.hessian(space=space, which="LA", interval=None, tol=0.01, cached=False)
            row[f"{space}.eigenvalue"], row[f"{space}.upper"] = top["eigenvalue_1"], top["upper_bound_1"]
            row[f"{space}.certified"] = top["certified"]
        for space, direction in LINES:
            values = checkpoint.measure("critical_sharpness", space=space, direction=direction, cached=False)
            row["loss"] = values["loss"]
            for key in ("critical_sharpness", "lower_bound", "upper_bound", "converged", "forward_passes"):
                row[f"{space}.{direction}.{key}"] = values[key]
        found.append(row)
        print(row, flush=True)
    summary: dict[str, Any] = {"models": len(found), "seconds": time.perf_counter() - start}
    summary["certified"] = sum(r["merged.certified"] and r["adapter.certified"] for r in found)
    for space, direction in LINES:
        name = f"{space}.{direction}"
        known = [row for row in found if row[f"{name}.critical_sharpness"] is not None]
        values = [row[f"{name}.critical_sharpness"] for row in known]
        summary[name] = {
            "found": len(known),
            "converged": sum(row[f"{name}.converged"] for row in found),
            "most_forward_passes": max(row[f"{name}.forward_passes"] for row in found),
            "mean_forward_passes": sum(row[f"{name}.forward_passes"] for row in found) / len(found),
            **correlation(values, [row[f"{space}.eigenvalue"] for row in known]),
        }
        if direction == "gradient":
            summary[name]["at_most_the_eigenvalue"] = sum(
                row[f"{name}.lower_bound"] <= row[f"{space}.upper"] for row in known
            )
    record.write("critical", {"summary": summary, "models": found})


if __name__ == "__main__":
    main()
