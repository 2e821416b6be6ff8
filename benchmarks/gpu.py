"""Time per step and peak memory of every method on a GPU, at the size of the models that the paper trains.

One epoch of RTE with a model of RoBERTa-large's shape, and one of ScienceQA's questions with images with one
of Qwen2.5-VL-3B's shape under LoRA, both at bf16. Weights are random and texts are tokenised into bytes,
because neither changes what a step of so many tokens costs; what is learned says nothing. Each method is an
ordinary run of a study. A method that cannot train one of them is reported with its reason.

    python benchmarks/gpu.py ../shared/data/glue ../shared/data/scienceqa

``--small FOLDER`` makes the same runs with tiny models, on the CPU too, and writes FOLDER/gpu.json: it shows
that the code runs, and its times say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flatbench import optim
from flatbench.models.pretrained import quiet
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study import Study
from flatbench.study.plan import Plan

SHAPES: dict[str, dict[str, Any]] = {
    "roberta_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096, "vocab_size": 50265},
    "qwen2_5_vl_3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                      "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151936},
}  # fmt: skip
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 300}  # fmt: skip
SMALL_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
#: values of `cost` that are reported
REPORTED = ("step_ms", "step_ms_q1", "step_ms_q3", "steps_timed", "gradients_per_step", "peak_memory_mb",
            "peak_memory_source", "trainable_parameters", "gflops_per_example")  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path, special: list[str]) -> tuple[dict[str, int], tuple[str, str]]:
    """Files of a tokenizer with a token a byte after the special ones; its vocabulary and their names."""
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate([*special, *bytes_to_unicode().values()])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return vocabulary, (str(folder / "vocab.json"), str(folder / "merges.txt"))


def roberta(folder: Path, small: bool) -> Path:
    """A random RoBERTa with its tokenizer."""
    ids, files = byte_tokenizer(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    transformers.RobertaTokenizerFast(*files).save_pretrained(folder)
    ends = {"bos_token_id": ids["<s>"], "pad_token_id": ids["<pad>"], "eos_token_id": ids["</s>"]}
    shape = SMALL if small else SHAPES["roberta_large"]
    config = transformers.RobertaConfig(**shape, **ends, max_position_embeddings=514, type_vocab_size=1)
    transformers.RobertaModel(config).save_pretrained(folder)
    return folder


def qwen_vl(folder: Path, small: bool) -> Path:
    """A random Qwen2.5-VL in bfloat16 with its processor."""
    marks = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    special = ["<|endoftext|>", *(f"<|{name}|>" for name in marks)]
    ids, files = byte_tokenizer(folder, special)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": special[1:]}
    transformers.GPT2TokenizerFast(*files, bos_token=None, **ends).save_pretrained(folder)
    transformers.Qwen2VLImageProcessor().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shape = {**SMALL, "num_key_value_heads": 1} if small else SHAPES["qwen2_5_vl_3b"]
    turned = shape["hidden_size"] // shape["num_attention_heads"] // 2
    sections = [turned - 2 * (3 * turned // 8), 3 * turned // 8, 3 * turned // 8]
    text = {
        **shape,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {**(SMALL_VISION if small else VISION), "out_hidden_size": shape["hidden_size"]}
    places = {f"{name}_token_id": ids[f"<|{mark}|>"] for name, mark in
              (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
               ("vision_end", "vision_end"))}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **places
    )
    config.dtype = torch.bfloat16
    with torch.device("cpu" if small else "cuda"):  # three thousand million random numbers
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def methods(adapters_alone: bool) -> list[str]:
    """Every optimizer as a method, plain LoRA first, and full fine-tuning."""
    names = ["lora", *(name for name in optim.REGISTRY.names() if name != "plain")]
    return names if adapters_alone else [*names, "full_ft"]


def studies(arguments: argparse.Namespace, models: Path) -> dict[str, dict[str, Any]]:
    """The two studies as their files would say them."""
    small = arguments.small is not None
    train = {"epochs": 1, "precision": "bf16", "log_every": 1, "lr": 1e-4}
    common = {"seeds": [0], "measures": ["cost"]}
    few = {"train_examples": 16, "validation_examples": 4, "test_examples": 4} if small else {}
    rte = {"name": "glue", "task": "rte", "data": str(arguments.glue.resolve()), "max_length": 256, **few}
    vqa = {"name": "vqa", "dataset": "scienceqa", "data": str(arguments.scienceqa.resolve()),
           "questions": "with_image", "image_size": 56 if small else 448, "max_length": 1024,
           "max_new_tokens": 2, "validation_examples": 16, "test_examples": 16, **few}  # fmt: skip
    return {
        "rte_roberta_large": {
            "task": rte,
            "model": {"name_or_path": str(roberta(models / "roberta", small))},
            "methods": methods(adapters_alone=False),
            "train": {**train, "batch_size": 8 if small else 32},
            **common,
        },
        "scienceqa_qwen2_5_vl_3b": {
            "task": vqa,
            "model": {
                "name_or_path": str(qwen_vl(models / "qwen_vl", small)),
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
            },
            "methods": methods(adapters_alone=True),
            "train": {**train, "batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 8},
            **common,
        },
    }


def measured(directory: RunDirectory) -> dict[str, Any]:
    """One method's run to its end: what it cost, or why there is no such number."""
    state = finish(directory.path)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if state != "done":
        return {"state": state, "error": json.loads((directory.path / "failure.json").read_text())["error"]}
    values = directory.measures()["cost"]["values"]
    return {"state": state, **{name: values[name] for name in REPORTED}}


def table(name: str, content: dict[str, Any], results: Path) -> dict[str, Any]:
    """Method -> cost, and step time and memory as ratios to LoRA's."""
    study = Study({"name": name, **content}, f"{name}.yaml")
    found = {}
    for run in Plan(study, StudyFolder(results, name)).final([]):
        directory = StudyFolder(results, name).run(run.id)
        directory.prepare(run.spec())
        found[run.method] = one = measured(directory)
        said = one.get("error") or f"{one['step_ms']:.1f} ms a step, {one['peak_memory_mb']:.0f} MB"
        print(f"{name}: {run.method}: {said}", file=sys.stderr, flush=True)
    base = found["lora"]
    for one in found.values():
        for key in ("step_ms", "peak_memory_mb"):
            if one.get(key) and base.get(key):
                one[f"{key}_ratio"] = one[key] / base[key]
    model = {key: value for key, value in study.conditions[0].model.items() if key != "name_or_path"}
    task = {key: value for key, value in study.conditions[0].task.items() if key != "data"}
    return {"task": task, "model": model, "train": content["train"], "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("glue", type=Path, help="GLUE's TSV files")
    parser.add_argument("scienceqa", type=Path, help="ScienceQA's problems with images")
    parser.add_argument("--small", type=Path, metavar="FOLDER", help="tiny models, on the CPU too")
    arguments = parser.parse_args()
    if arguments.small is None and not torch.cuda.is_available():
        print("error: no CUDA device here; --small FOLDER runs tiny models on the CPU", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with quiet():
            contents = studies(arguments, Path(folder))
        found = {name: table(name, content, Path(folder) / "results") for name, content in contents.items()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    record.write(
        "gpu",
        {"gpus": gpus, "small": arguments.small is not None, **found},
        arguments.small or record.RESULTS,
    )


if __name__ == "__main__":
    main()
