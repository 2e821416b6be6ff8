"""Tiny models of images and text, and files as ScienceQA and VizWiz are published, that tests write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    GPT2TokenizerFast,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.vqa.vqa import VQA

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}"
    "{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}


def tokenizer(folder: Path, special: Sequence[str], **marks: Any) -> Any:
    """A token a byte, and some of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *special])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return GPT2TokenizerFast(*files, bos_token=None, additional_special_tokens=list(special), **marks)


def _saved(folder: Path, kind: Any, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    return folder


def qwen_folder(folder: Path, **text: Any) -> Path:
    """A random Qwen2.5-VL; images of 56x56 pixels at most take 1 to 4 places."""
    names = ["im_end", "endoftext", "im_start", "vision_start", "vision_end", "image_pad", "video_pad"]
    special = [f"<|{name}|>" for name in names]
    tokens = tokenizer(folder, special, eos_token=special[0], pad_token=special[1])
    tokens.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 56**2}).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    size = {**TEXT, **text}["hidden_size"]
    turned = size // TEXT["num_attention_heads"] // 2
    own = {
        "vocab_size": len(tokens),
        "eos_token_id": 256,
        "pad_token_id": 257,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [turned - 2 * (turned // 4), turned // 4, turned // 4],
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": size, "fullatt_block_indexes": [0]}  # fmt: skip
    ids = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261,
           "video_token_id": 262}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **own, **text}, vision_config=vision, tie_word_embeddings=True, **ids
    )
    return _saved(folder, Qwen2_5_VLForConditionalGeneration, config)


def llava_folder(folder: Path) -> Path:
    """A random LLaVA without a chat template: an image is resized to 28x28 pixels and takes 4 places."""
    tokens = tokenizer(folder, ["</s>", "<pad>", "<image>"], eos_token="</s>", pad_token="<pad>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 28,
              "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    text = {
        "model_type": "llama",
        "vocab_size": len(tokens),
        "eos_token_id": 256,
        "pad_token_id": 257,
        **TEXT,
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=258)
    return _saved(folder, LlavaForConditionalGeneration, config)


def idefics_folder(folder: Path) -> Path:
    """A random Idefics3, as SmolVLM is: an image becomes four of 28x28 pixels and a small one of itself."""
    special = ["<end_of_utterance>", "<pad>", "<|im_start|>", "<fake_token_around_image>", "<image>",
               "<global-img>"]  # fmt: skip
    tokens = tokenizer(folder, special, eos_token=special[0], pad_token=special[1])
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    Idefics3Processor(
        images, tokens, image_seq_len=1, chat_template=IDEFICS_TEMPLATE
    ).save_pretrained(folder)  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, "num_hidden_layers": 1,
              "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    text = {
        "model_type": "llama",
        "vocab_size": len(tokens),
        "eos_token_id": 256,
        "pad_token_id": 257,
        **TEXT,
    }
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=260, tie_word_embeddings=False
    )
    return _saved(folder, Idefics3ForConditionalGeneration, config)


FOLDERS = {"qwen": qwen_folder, "llava": llava_folder, "idefics": idefics_folder}
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def picture(
    path: Path, colour: str, generator: np.random.Generator, size: tuple[int, int] = (60, 40)
) -> Path:
    """An image of one colour with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = generator.integers(-15, 16, (size[1], size[0], 3))
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def write_scienceqa(folder: Path, seed: int = 0, counts: Sequence[int] = (24, 9, 9)) -> Path:
    """ScienceQA's official layout: which colour a picture has; every third question has none and says it."""
    generator = np.random.default_rng(seed)
    problems = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for i in range(count):
            pid, colour = str(len(problems) + 1), list(COLOURS)[i % 3]
            shown = i % 3 != 2 or i % 2 == 0
            if shown:
                size = ((60, 40), (40, 60), (84, 28))[i % 3]  # the last takes three places, as a grid does
                picture(folder / "images" / split / pid / "image.png", colour, generator, size)
            problems[pid] = {
                "question": f"Colour {seed}.{pid}?",
                "choices": list(COLOURS),
                "answer": i % 3,
                "hint": "" if shown else f"It is {colour}.",
                "image": "image.png" if shown else None,
                "grade": f"grade{1 + i % 12}",
                "subject": ("natural science", "social science", "language science")[i % 3],
                "split": split,
            }
    (folder / "problems.json").write_text(json.dumps(problems))
    return folder


def write_vizwiz(folder: Path, counts: Sequence[int] = (16, 8), seed: int = 0) -> Path:
    """VizWiz's annotations with small photographs; every fourth question cannot be answered."""
    generator = np.random.default_rng(seed)
    for split, count in zip(("train", "val"), counts, strict=True):
        rows = []
        for i in range(count):
            colour, answerable = list(COLOURS)[i % 3], int(i % 4 != 3)
            name = f"VizWiz_{split}_{i:08d}.jpg"
            picture(folder / split / name, colour, generator)
            most = colour if answerable else "unanswerable"
            answers = [*[most] * 7, *["unsuitable"] * 3]
            rows.append(
                {
                    "image": name,
                    "question": f"What colour is this, {split} {i}?",
                    "answer_type": "other" if answerable else "unanswerable",
                    "answerable": answerable,
                    "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers],
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def make(folder: Path, data: Path, **options: Any) -> VQA:
    """ScienceQA on a model in a folder, unless the options say else."""
    standard = {"dataset": "scienceqa", "instruction": "", "max_length": 512, "max_new_tokens": 4}
    model = PretrainedModel(name_or_path=str(folder))
    return VQA(model=model, data=str(data), **{**standard, **options})


def refused(call: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
