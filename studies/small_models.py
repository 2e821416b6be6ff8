"""Writes the small random models that studies called …-small use where no pretrained one is at hand.

    python studies/small_models.py gpt2 local/gpt2
    python studies/small_models.py t5 local/t5
    python studies/small_models.py vit local/vit
    python studies/small_models.py clip local/clip
    python studies/small_models.py qwen_vl local/qwen_vl

Each is a `transformers` folder (configuration, safetensors, tokenizer, image processor). They know
nothing: what is learned from them says that the code runs, not which method is better. qwen_vl is taught, in
about ten seconds on one core, that an answer is one letter and an end mark, on made-up questions of which
nothing tells the answer: a model that generates no letter would score 0 whatever it learns. No data is read.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flatbench.models.pretrained import PretrainedModel, quiet
from flatbench.tasks.vqa.vqa import VQA

#: of qwen_vl's lessons
STEPS, BATCH, LR = 100, 8, 5e-3
SIDE = 56


def gpt2(folder: Path) -> None:
    """A GPT-2 of two layers that reads and writes bytes, 512 of them at most."""
    end = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), end])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(
        folder
    )
    last = vocabulary[end]
    size = {"vocab_size": len(vocabulary), "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, bos_token_id=last, eos_token_id=last)
    ).save_pretrained(folder)


def t5(folder: Path) -> None:
    """A T5 of two layers in encoder and decoder that reads bytes and an end mark after each text."""
    end, pad = "</s>", "<pad>"
    vocabulary = {token: i for i, token in enumerate([pad, end, *bytes_to_unicode().values()])}
    reader = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = tokenizers.decoders.ByteLevel()
    marks = {"single": f"$A {end}", "pair": f"$A {end} $B {end}", "special_tokens": [(end, vocabulary[end])]}
    reader.post_processor = tokenizers.processors.TemplateProcessing(**marks)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, eos_token=end, pad_token=pad, model_max_length=512
    ).save_pretrained(folder)
    size = {"vocab_size": len(vocabulary), "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
    ends = {"eos_token_id": vocabulary[end], "pad_token_id": vocabulary[pad], "decoder_start_token_id": 0}
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(**size, **ends, num_heads=4)
    ).save_pretrained(folder)


def vit(folder: Path) -> None:
    """A ViT of two layers on images of 28x28 pixels."""
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    transformers.ViTModel(transformers.ViTConfig(image_size=28, patch_size=7, **size)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)


def clip(folder: Path) -> None:
    """A CLIP of two layers in each encoder, on images of 28x28 pixels and texts of 77 bytes at most."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(
        folder
    )
    sides = {"height": 28, "width": 28}
    transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=sides).save_pretrained(folder)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    last = len(words) - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text = {"vocab_size": len(words), **ends, **size}
    vision = {"image_size": 28, "patch_size": 7, **size}
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).save_pretrained(folder)


QWEN_VL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_vl(folder: Path) -> None:
    """A Qwen2.5-VL of two and two layers: bytes, and images of at most four places in the text.

    It is random but for what `teach_letters` teaches it.
    """
    marks = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    special = ["<|endoftext|>", *(f"<|{name}|>" for name in marks)]
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *special])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": special[1:]}
    transformers.GPT2TokenizerFast(*files, bos_token=None, **ends).save_pretrained(folder)
    transformers.Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 56**2}).save_pretrained(
        folder
    )
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
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **places
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    teach_letters(folder)


def teach_letters(folder: Path) -> None:
    """Train a model of ScienceQA's questions to answer a letter, any of five alike, and write it again."""
    with tempfile.TemporaryDirectory() as made_up:
        write_questions(Path(made_up), STEPS * BATCH)
        model = PretrainedModel(name_or_path=str(folder))
        task = VQA(model=model, dataset="scienceqa", data=made_up, image_size=SIDE, max_length=512)
        built, examples = task.build_model(0), task.splits(0).train
        optimizer = torch.optim.AdamW(built.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
        for step in range(STEPS):
            batch = task.collate([examples[step * BATCH + i] for i in range(BATCH)])
            optimizer.zero_grad()
            task.loss(built, batch).backward()
            optimizer.step()
            schedule.step()
        built.save_pretrained(folder)


def write_questions(folder: Path, count: int) -> None:
    """Questions of random letters about pictures of noise, with one of five choices right by chance."""
    words, noise = random.Random(0), np.random.default_rng(0)

    def text(most: int) -> str:
        many = range(words.randint(1, most))
        return " ".join("".join(words.choices(string.ascii_lowercase, k=words.randint(2, 8))) for _ in many)

    problems = {}
    for number in range(count + 2):
        split = "train" if number < count else ("val", "test")[number - count]
        place = folder / "images" / split / str(number)
        place.mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(place / "image.png")
        problems[str(number)] = {
            "question": text(12),
            "choices": [text(3) for _ in range(5)],
            "answer": words.randrange(5),
            "hint": text(16) if number % 2 else "",
            "image": "image.png",
            "split": split,
        }
    (folder / "problems.json").write_text(json.dumps(problems))


KINDS = {"gpt2": gpt2, "t5": t5, "vit": vit, "clip": clip, "qwen_vl": qwen_vl}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with quiet():  # transformers says at length that images go through Pillow
        KINDS[arguments.kind](arguments.folder)
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()
