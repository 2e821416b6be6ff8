"""Sharpness while transformers' Trainer trains; afterwards, of what it saved:
flatbench measure watched --data held-out.jsonl --measure critical_sharpness --output measured
"""

import json
from pathlib import Path

import peft
import transformers
from sklearn.datasets import load_digits

from flatbench.callbacks import SharpnessCallback

transformers.set_seed(0)
images, labels = load_digits(return_X_y=True)
rows = [
    {"pixel_values": (image.reshape(1, 8, 8) / 8 - 1).astype("float32"), "labels": int(label)}
    for image, label in zip(images, labels, strict=True)
]
shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2}
shape |= {"num_attention_heads": 4, "intermediate_size": 64, "num_labels": 10}
transformers.ViTForImageClassification(transformers.ViTConfig(**shape)).save_pretrained("base")
base = transformers.ViTForImageClassification.from_pretrained("base")
lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
model = peft.get_peft_model(base, lora)

held_out = rows[1400:1528]
texts = [json.dumps({"pixel_values": r["pixel_values"].tolist(), "labels": r["labels"]}) for r in held_out]
Path("held-out.jsonl").write_text("\n".join(texts))
measures = ["critical_sharpness", {"name": "critical_sharpness", "direction": "adamw"}]
watch = SharpnessCallback(measures=measures, data=held_out, every=10, budget=None)  # the line that is new
arguments = transformers.TrainingArguments(
    "watched", num_train_epochs=3, per_device_train_batch_size=32, learning_rate=1e-2, save_steps=26,
    report_to="none", use_cpu=True,
)  # fmt: skip
trainer = transformers.Trainer(model, arguments, train_dataset=rows[:1400], callbacks=[watch])
trainer.train()
print(watch.watch.summary())
