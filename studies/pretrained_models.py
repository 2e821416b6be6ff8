"""Writes the small image models that fashion-cnn and fashion-vit start from, pretrained without labels.

    python studies/pretrained_models.py resnet DATA local/fashion-resnet
    python studies/pretrained_models.py vit DATA local/fashion-vit

DATA is the folder of Fashion-MNIST's published IDX files. The pretext task is to tell by how many quarter
turns an image was turned (Gidaris et al. 2018, arXiv 1803.07728). Only training images are read, and no
label: a study that starts from these models may take its examples from the same files. Under a minute each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from flatbench.tasks.images.image_data import read

IMAGES, BATCH, LR = 20_000, 128, 2e-3
TURNS = 4
EPOCHS = {"resnet": 2, "vit": 6}


def model_of(kind: str) -> nn.Module:
    """A small classifier of turns on images of 28x28 pixels, from random weights."""
    if kind == "vit":
        size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        config: PretrainedConfig = ViTConfig(image_size=28, patch_size=7, num_labels=TURNS, **size)
        return ViTForImageClassification(config)
    size = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=TURNS, **size))


def batches(pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images turned by random quarters, ``(n, 3, 28, 28)``, and by how many."""
    for chosen in torch.randperm(len(pixels)).split(BATCH):
        turns = torch.randint(TURNS, (len(chosen),))
        turned = [torch.rot90(image, int(k), (1, 2)) for image, k in zip(pixels[chosen], turns, strict=True)]
        yield torch.stack(turned), turns


def pretrain(kind: str, data: str, folder: Path) -> float:
    """Train and write the backbone with its image processor; returns the share of turns told right."""
    torch.manual_seed(0)
    _, splits = read(data, None, None, "image", "label")
    processor = ViTImageProcessor(size={"height": 28, "width": 28})
    images = [np.asarray(splits["train"].image(i)) for i in range(min(IMAGES, len(splits["train"])))]
    pixels = processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    steps = EPOCHS[kind] * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(EPOCHS[kind]):
        right = 0
        for images_turned, turns in batches(pixels):
            found = model(pixel_values=images_turned, labels=turns)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            schedule.step()
            right += int((found.logits.argmax(dim=1) == turns).sum())
    model.base_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return right / len(pixels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=EPOCHS)
    parser.add_argument("data", help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    accuracy = pretrain(arguments.kind, arguments.data, arguments.folder)
    print(f"tells {100 * accuracy:.1f} % of the turns; written to {arguments.folder}")


if __name__ == "__main__":
    main()
