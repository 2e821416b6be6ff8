"""Writes the small random models that studies called …-small use where no pretrained one is at hand.

    python studies/small_models.py gpt2 local/gpt2
    python studies/small_models.py vit local/vit
    python studies/small_models.py clip local/clip
    python studies/small_models.py qwen_vl local/qwen_vl

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
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
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


QWEN_VL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_vl(folder: Path) -> None:
    """A Qwen2.5-VL of two and two layers: bytes, and images of at most four places in the text."""
    marks = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    special = ["<|endoftext|>", *(f"<|{name}|>" for name in marks)]
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *special])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": special[1:]}
    GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), bos_token=None, **ends
                      ).save_pretrained(folder)  # fmt: skip
    Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 56**2}).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_VL_TEMPLATE)
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": vocabulary["<|im_end|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
    places = {f"{name}_token_id": vocabulary[f"<|{mark}|>"] for name, mark in
              (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
               ("vision_end", "vision_end"))}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **places)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


KINDS = {"gpt2": gpt2, "vit": vit, "clip": clip, "qwen_vl": qwen_vl}


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
