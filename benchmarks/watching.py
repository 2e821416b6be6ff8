"""Whether `SharpnessCallback` keeps to its budget in a training of minutes, by another clock than its own.

A small ViT with LoRA learns digits in transformers' Trainer, with AdamW and with EFlat-LoRA. Four measures of
very different cost are due every few steps, more than the budget allows. Everything that the callback does is
timed around it, its records and reports included; what is left of the wall-clock time is training.

    python benchmarks/watching.py --minutes 10

``share`` is the time of measures relative to the time of training, which is to be at most 1.1 times the
budget; ``told`` is what the callback says at the end of what was left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import record
import torch
import transformers
from sklearn.datasets import load_digits

from flatbench.callbacks import SharpnessCallback
from flatbench.optim import EFlatLoRA

MEASURES: list[Any] = [
    "critical_sharpness",
    {"name": "critical_sharpness", "label": "adamw", "direction": "adamw"},
    {"name": "sam_sharpness", "examples": 128},
    {"name": "hessian", "examples": 128},
]
EVERY = 5


class Timed(SharpnessCallback):
    """The same, with the time of everything that it does."""

    outside = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("on_"):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.outside += time.perf_counter() - start

        return timed


class Until(transformers.TrainerCallback):
    """Ends a training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Time counts from here."""
        self.end = time.perf_counter() + self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if it is time."""
        control.should_training_stop |= time.perf_counter() > self.end


def run(method: str, seconds: float, budget: float, folder: Path) -> dict[str, Any]:
    """Train so long and tell where the time went."""
    transformers.set_seed(0)
    images, labels = load_digits(return_X_y=True)
    rows = [
        {"pixel_values": (image.reshape(1, 8, 8) / 8 - 1).astype("float32"), "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=128, num_labels=10,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(transformers.ViTForImageClassification(config), lora)
    watch = Timed(measures=MEASURES, data=rows[1400:1528], every=EVERY, budget=budget)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=10**6, per_device_train_batch_size=32, learning_rate=5e-3, save_steps=500,
        save_total_limit=1, report_to="none", use_cpu=True, logging_steps=500, disable_tqdm=True,
    )  # fmt: skip
    optimizers: dict[str, Any] = {}
    if method == "eflat_lora":
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        optimizers["optimizers"] = (EFlatLoRA(adamw, model, rho=0.05), None)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows[:1400], callbacks=[watch, Until(seconds)], **optimizers
    )
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    taken: dict[str, int] = {}
    for row in watch.watch.rows:
        for label in ("critical_sharpness_merged", "adamw", "sam_sharpness_merged", "hessian_merged"):
            taken[label] = taken.get(label, 0) + (f"{label}.seconds" in row)
    share = watch.outside / (whole - watch.outside)
    return {
        "method": method,
        "budget": budget,
        "steps": trainer.state.global_step,
        "seconds": round(whole, 1),
        "seconds_of_callback": round(watch.outside, 2),
        "share": round(share, 4),
        "held": share <= 1.1 * budget,
        "due": trainer.state.global_step // EVERY,
        "taken": taken,
        "told": watch.watch.summary(),
    }


def main() -> None:
    """Train with both methods, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of each training")
    parser.add_argument("--budget", type=float, default=0.05)
    chosen = parser.parse_args()
    found = []
    for method in ("adamw", "eflat_lora"):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(method, 60 * chosen.minutes, chosen.budget, Path(folder)))
    record.write("watching", {"measures": MEASURES, "every": EVERY, "trainings": found})


if __name__ == "__main__":
    main()
