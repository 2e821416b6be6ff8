"""EFlat-LoRA in transformers' Trainer: one line of a stock script changes. Runs offline in seconds."""

import peft
import torch
import transformers
from sklearn.datasets import load_digits

from flatbench.optim import EFlatLoRA

transformers.set_seed(0)
images, labels = load_digits(return_X_y=True)
rows = [
    {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, 8, 8) / 8 - 1, "labels": int(label)}
    for image, label in zip(images, labels, strict=True)
]
base = transformers.ViTForImageClassification(
    transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
    )
)
base.save_pretrained("base")
base = transformers.ViTForImageClassification.from_pretrained("base")
lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
model = peft.get_peft_model(base, lora)

adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
optimizer = EFlatLoRA(adamw, model, rho=0.05)  # the line that a stock script does not have

arguments = transformers.TrainingArguments(
    "trained", num_train_epochs=4, per_device_train_batch_size=32, eval_strategy="epoch", report_to="none",
    use_cpu=True,
)  # fmt: skip
trainer = transformers.Trainer(
    model,
    arguments,
    train_dataset=rows[:1400],
    eval_dataset=rows[1400:],
    compute_metrics=lambda found: {
        "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
    },
    optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
)
trainer.train()
print(trainer.evaluate())  # at the unperturbed point: the Trainer asks the optimizer for it
model.save_pretrained("my-adapter")
