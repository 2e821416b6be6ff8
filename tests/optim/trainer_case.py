"""A small classifier, its data, and transformers' Trainer around any method; also run under torchrun.

torchrun --nproc-per-node 2 trainer_case.py METHOD PERTURBATION FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from flatbench import optim
from flatbench.optim.trainer import SharpnessAwareTrainer

STEPS, ACCUMULATION, MICRO = 6, 4, 4
EXAMPLES = STEPS * ACCUMULATION * MICRO


class Trainer(SharpnessAwareTrainer, transformers.Trainer):
    pass


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 12, generator=generator)
    labels = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    return [{"x": x[i], "labels": labels[i]} for i in range(EXAMPLES)]


def model_of(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"], modules_to_save=["head"])
    return peft.get_peft_model(Classifier(dropout), config)


def optimizer_of(name: str, model: nn.Module, **options: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(parameters, lr=1e-2)
    known = optim.REGISTRY.options(name).model_fields
    options |= {key: value for key, value in {"total_steps": STEPS, "ess": 100.0}.items() if key in known}
    return optim.REGISTRY.load(name)(base, model, **options)


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def trainer_of(name: str, folder: Path, model: nn.Module, processes: int = 1, **arguments: Any) -> Trainer:
    optimizer = optimizer_of(name, model)
    settings = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": MICRO // processes,
            "per_device_eval_batch_size": 32,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_grad_norm": 0.05,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            **arguments,
        }
    )
    return Trainer(
        model,
        settings,
        train_dataset=data(),
        eval_dataset=data()[:32],
        optimizers=(optimizer, schedule(optimizer)),
    )


def adapter_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def main(folder: str, *cases: str) -> None:
    """Train each case, an optimizer and a perturbation such as ``sam-global``, into a folder of its name."""
    for case in cases:
        train(*case.split("-"), f"{folder}/{case}")


def train(name: str, perturbation: str, folder: str) -> None:
    trainer = trainer_of(name, Path(folder), model_of(), processes=2, ddp_backend="gloo")
    trainer.perturbation = perturbation  # type: ignore[assignment]
    trainer.train()
    trainer.save_model(folder)
    if trainer.args.process_index == 1:  # both processes must hold the same weights
        trainer.model.save_pretrained(f"{folder}/second")


if __name__ == "__main__":
    main(*sys.argv[1:])
