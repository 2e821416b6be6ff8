"""Writes the small random models that studies called …-small use where no pretrained one is at hand.

    python studies/small_models.py gpt2 local/gpt2
    python studies/small_models.py vit local/vit
    python studies/small_models.py clip local/clip

Each is a `transformers` folder (configuration, safetensors, tokenizer, image processor). They know
nothing: what is learned from them says that the code runs, not which method is better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode


def gpt2(folder: Path) -> None:
    """A GPT-2 of two layers that reads and writes bytes, 512 of them at most."""
    end = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), end])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    last = vocabulary[end]
    size = {"vocab_size": len(vocabulary), "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=last, eos_token_id=last)).save_pretrained(folder)


def vit(folder: Path) -> None:
    """A ViT of two layers on images of 28x28 pixels."""
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    ViTModel(ViTConfig(image_size=28, patch_size=7, **size)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)


def clip(folder: Path) -> None:
    """A CLIP of two layers in each encoder, on images of 28x28 pixels and texts of 77 bytes at most."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    sides = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=sides).save_pretrained(folder)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    last = len(words) - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text = {"vocab_size": len(words), **ends, **size}
    vision = {"image_size": 28, "patch_size": 7, **size}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)


KINDS = {"gpt2": gpt2, "vit": vit, "clip": clip}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    KINDS[arguments.kind](arguments.folder)


if __name__ == "__main__":
    main()
