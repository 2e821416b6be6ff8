"""One exact Hessian product of a language model whose weights lie on a disk: memory in all, and seconds.

    python benchmarks/offloaded.py --shape llama7b --tokens 128 --folder SCRATCH

Random weights in bfloat16 (LoRA r = 8 on query and value in float32) are written into the folder tensor by
tensor, in accelerate's layout, and removed at the end (``--keep`` leaves them). The model is built without
memory, `accelerate.disk_offload` brings its layers, and flatbench's operator is given ``--memory`` for graphs
and vectors. What is told is the peak resident size of the whole process, Python and libraries included, with
what it was before the model; one thread. The folder needs 2 bytes a weight: 13.5 GB for ``llama7b``.

``--small`` takes a tiny model, and compares the product with that of the model in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import record
import torch
from accelerate import disk_offload, init_empty_weights
from accelerate.utils import OffloadedWeightsLoader, offload_weight, save_offload_index
from llm import loss, sentence, status, told_by
from torch import nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators import memory as memory_

SHAPES: dict[str, dict[str, Any]] = {
    "llama7b": {},  # transformers' defaults
    "small": {
        "vocab_size": 5000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}  # fmt: skip
#: random numbers that all weights are made of
_POOL = 1 << 24


def build(shape: str) -> tuple[nn.Module, int]:
    """The model with its adapter, without numbers, and its number of words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape])
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    with init_empty_weights(include_buffers=False):
        made = peft.get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), options)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return made.eval(), config.vocab_size


def write_weights(shape: str, folder: Path) -> int:
    """Write random weights in accelerate's layout; their number."""
    model, _ = build(shape)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL, generator=generator) * 0.02
    index: dict[str, Any] = {}
    total = 0
    for name, like in model.state_dict().items():
        if "norm" in name:
            made = torch.ones(like.shape)
        else:
            start = int(torch.randint(_POOL, (1,), generator=generator))
            copies = (start + like.numel()) // _POOL + 1
            made = pool.repeat(copies)[start : start + like.numel()].reshape(like.shape)
        offload_weight(made.to(like.dtype), name, folder, index)
        total += like.numel()
    save_offload_index(index, folder)
    return total


def measure(shape: str, tokens: int, folder: Path, memory: int) -> dict[str, Any]:
    """Memory and time of a product, in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    before = status("VmRSS")
    model, words = build(shape)
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    batch = sentence(words, tokens)
    clock, work = time.perf_counter(), time.process_time()
    with HessianOperator(model, loss, [batch], space="adapter", memory=memory, products="exact") as operator:
        value, gradient = operator.point()
        prepared = [time.perf_counter() - clock, time.process_time() - work]
        vector = torch.randn(operator.dimension, generator=torch.Generator().manual_seed(2))
        clock, work = time.perf_counter(), time.process_time()
        product = operator @ vector
        taken = [time.perf_counter() - clock, time.process_time() - work]
        plan = operator.plan
    return {
        "peak_bytes_in_all": status("VmHWM"),
        "bytes_before_the_model": before,
        "stated_bytes": plan.peak_bytes,
        "plan": plan.describe(),
        "memory_option": memory,
        "prepare_seconds": prepared[0],
        "prepare_cpu_seconds": prepared[1],
        "seconds": taken[0],
        "cpu_seconds": taken[1],
        "loss": value,
        "gradient_norm": float(gradient.norm()),
        "vHv": float(vector @ product),
        "dimension": operator.dimension,
    }


def in_memory(shape: str, tokens: int, folder: Path) -> float:
    """``vHv`` of the same model with its weights in memory."""
    model, words = build(shape)
    weights = {name: tensor.clone() for name, tensor in OffloadedWeightsLoader(save_folder=folder).items()}
    model.load_state_dict(weights, assign=True)
    with HessianOperator(model, loss, [sentence(words, tokens)], space="adapter") as operator:
        vector = torch.randn(operator.dimension, generator=torch.Generator().manual_seed(2))
        return float(vector @ (operator @ vector))


def main() -> None:
    """Write the weights, measure in a process of its own, and remove them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="llama7b")
    parser.add_argument("--small", dest="shape", action="store_const", const="small")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path, required=True, help="for the weights, 2 bytes each")
    parser.add_argument("--memory", default="1.5GB", help="for graphs and vectors")
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--remark", help="on the machine's load, for the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder / f"weights-{arguments.shape}"
    memory = memory_.parsed(arguments.memory)
    if arguments.child:
        print(json.dumps(measure(arguments.shape, arguments.tokens, folder, memory)))
        return
    path = arguments.results / "offloaded.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if arguments.remark:
        results["remark"] = arguments.remark
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "index.json").is_file():
            write_weights(arguments.shape, folder)
        options = ["--child", "--shape", arguments.shape, "--folder", str(arguments.folder)]
        options += ["--tokens", str(arguments.tokens), "--memory", arguments.memory]
        found = told_by([__file__, *options]) | {"load": os.getloadavg()[0]}
        found["weights"] = sum(t.numel() for t in build(arguments.shape)[0].parameters())
        if arguments.shape == "small":
            found["vHv_in_memory"] = in_memory(arguments.shape, arguments.tokens, folder)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    results[f"{arguments.shape}_adapter_{arguments.tokens}"] = found
    record.write("offloaded", results, arguments.results)


if __name__ == "__main__":
    main()
