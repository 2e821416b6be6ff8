"""The five largest Hessian eigenvalues of a language model with 1.5 billion weights, certified, on a CPU.

    python benchmarks/llm_eigenvalues.py --shape qwen1.5b --tokens 256 --memory 10GB --scratch /somewhere

Random weights in bfloat16 of the shape of Qwen2.5-1.5B, LoRA r = 8 on query and value; the Hessian of one
sentence's loss in the ``merged`` space, 77 million directions, by exact products in float32, until every
value is certified to ``--tol``. ``--memory`` is for graphs and vectors; Lanczos vectors that it does not hold
are in a file in ``--scratch``, 0.3 GB each. What is told is the peak resident size of the whole process,
Python and libraries included, with what it was before the model; one thread.

``--small`` takes a tiny model of the same kind.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import record
import torch
from llm import adapted, loss, sentence, status, told_by
from torch import nn

from flatbench.curvature import HessianOperator, top_eigenpairs
from flatbench.curvature.operators import memory as memory_

SHAPES: dict[str, dict[str, int]] = {
    "qwen1.5b": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
    "qwen0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 5000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def build(shape: str) -> tuple[nn.Module, int]:
    """The model with its adapter, and its number of words."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)  # so that they are never made in float32
    try:
        model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return adapted(model, ["q_proj", "v_proj"], fan_in_fan_out=False), config.vocab_size


def measure(shape: str, tokens: int, memory: int, k: int, tol: float, scratch: Path | None) -> dict[str, Any]:
    """Eigenvalues, bounds, memory and time, in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    before = status("VmRSS")
    model, words = build(shape)
    weights = sum(parameter.numel() for parameter in model.parameters())
    built = status("VmRSS")
    clock, work = time.perf_counter(), time.process_time()
    batches = [sentence(words, tokens)]
    with HessianOperator(
        model, loss, batches, space="merged", memory=memory, products="exact", precision="float32"
    ) as operator:
        found = top_eigenpairs(operator, k, tol=tol, seed=0, scratch=scratch)
        plan, dimension = operator.plan, operator.dimension
    return {
        "peak_bytes_in_all": status("VmHWM"),
        "bytes_before_the_model": before,
        "bytes_with_the_model": built,
        "memory_option": memory,
        "scratch": scratch is not None,
        "plan": plan.describe(),
        "weights": weights,
        "dimension": dimension,
        "tol": tol,
        "values": found.values,
        "errors": found.errors,
        "upper_bounds": found.upper_bounds,
        "certified": found.certified,
        "products": found.products,
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - work,
    }


def main() -> None:
    """Measure in a process of its own, and write what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen1.5b")
    parser.add_argument("--small", dest="shape", action="store_const", const="small")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--memory", default="10GB", help="for graphs and vectors")
    parser.add_argument("--scratch", type=Path, help="a folder for vectors that the memory does not hold")
    parser.add_argument("--values", type=int, default=5, help="how many eigenvalues")
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--remark", help="on the machine's load, for the results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        memory = memory_.parsed(arguments.memory)
        found = measure(
            arguments.shape, arguments.tokens, memory, arguments.values, arguments.tol, arguments.scratch
        )
        print(json.dumps(found))
        return
    path = arguments.results / "llm_eigenvalues.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if arguments.remark:
        results["remark"] = arguments.remark
    options = ["--child", "--shape", arguments.shape, "--tokens", str(arguments.tokens)]
    options += ["--memory", arguments.memory, "--values", str(arguments.values), "--tol", str(arguments.tol)]
    if arguments.scratch:
        options += ["--scratch", str(arguments.scratch)]
    found = told_by([__file__, *options]) | {"load": os.getloadavg()[0]}
    results[f"{arguments.shape}_merged_{arguments.tokens}"] = found
    record.write("llm_eigenvalues", results, arguments.results)


if __name__ == "__main__":
    main()
