"""Sharpness and curvature of an adapter that peft saved; `optimizer_in_a_trainer.py` writes one."""

import torch
from sklearn.datasets import load_digits

import flatbench

images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
batch = {"pixel_values": pixels[:256], "labels": torch.tensor(labels[:256])}

checkpoint = flatbench.load_checkpoint("my-adapter", {"train": [batch]})  # a folder, a hub name, a live model
print(checkpoint.evaluate()["train"])

top = checkpoint.hessian(k=3)  # of the merged weights W0 + s·B·A; space="adapter" for A and B
for i in range(1, 4):
    print(f"eigenvalue {i}: {top[f'eigenvalue_{i}']:.4g}, at most {top[f'upper_bound_{i}']:.4g} (99 %)")
print("certified to the tolerance:", top["certified"])

sam = checkpoint.sharpness(rho=0.05)
print(f"SAM sharpness: {sam['sharpness']:.4g} of a loss of {sam['loss']:.4g}")

line = checkpoint.landscape(points=11)
line.plot().figure.savefig("slice.png")
