"""Memory and time of one exact Hessian product of language models, beside a gradient and two other packages.

Random weights (memory and time do not depend on them), LoRA r = 8 on the attention's query and value (GPT-2:
its joint projection), one sentence, float32, one thread. Each engine runs in a process of its own, one after
the other: ``gradient``; ``lean``, ``half`` and ``fast``, flatbench block by block with no block's graph
kept, with the memory halfway, and with all kept; ``whole``, flatbench's plan with much memory; hessian-
eigenthings, exactly and by differences; and curvlinops.

Memory is the process's peak resident size over what it was with the model loaded and a short product done,
where glibc gives freed memory back. Seconds are of one product after what an engine prepares once, which is
told apart; ``cpu_seconds`` count what the thread computed, which other processes on the machine disturb less
than ``seconds`` on the wall. ``vHv`` is the same number from every exact engine.

    pip install --no-deps --target PEERS "hessian-eigenthings==1.0.0a5" curvlinops-for-pytorch \\
        backpack-for-pytorch einops einconv linear_operator opt-einsum jaxtyping wadler_lindig unfoldNd
    PYTHONPATH=PEERS python benchmarks/llm.py --shape gpt2 --space adapter --tokens 512

A run is one shape, space and length; results of others stay in the file. ``--small`` takes a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import record
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators import memory as memory_
from flatbench.curvature.operators.model_state import as_found, plain_attention
from flatbench.curvature.operators.spaces import spanned
from flatbench.errors import InputError

ENGINES = (
    "gradient",
    "lean",
    "half",
    "fast",
    "whole",
    "eigenthings",
    "eigenthings_differences",
    "curvlinops",
)
OURS = ("lean", "half", "fast", "whole")
EXACT_PEERS = ("eigenthings", "curvlinops")
#: enough for every graph, and little more than nothing
MUCH, LITTLE = 10**12, 1000


def build(shape: str) -> tuple[nn.Module, int]:
    """The model with its adapter, and its number of words."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if shape in ("gpt2", "small"):
        small = {"vocab_size": 5000, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
        config = GPT2Config(**(small if shape == "small" else {}))
        model, targets = GPT2LMHeadModel(config), ["c_attn"]
    else:
        config = Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model, targets = Qwen2ForCausalLM(config), ["q_proj", "v_proj"]
    return adapted(model, targets, fan_in_fan_out=shape != "qwen"), config.vocab_size


def adapted(model: Any, targets: list[str], fan_in_fan_out: bool) -> nn.Module:
    """The model under LoRA, B unlike zero as after training."""
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    made = peft.get_peft_model(model, options)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return made.eval()


def sentence(words: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, batch["labels"].shape[1] - 1


# -- engines: what is prepared, what is then timed, the dimension, and more to tell --

Engine = tuple[Callable[[], Any], Callable[[Tensor], Tensor], int, dict[str, Any]]


def operator_of(model: nn.Module, batch: Any, space: Any, memory: int) -> HessianOperator:
    return HessianOperator(model, loss, [batch], space=space, memory=memory, products="exact")


def ours(model: nn.Module, batch: Any, space: str, memory: int) -> AbstractContextManager[Engine]:
    return entered(operator_of(model, batch, space, memory))


@contextlib.contextmanager
def entered(operator: HessianOperator) -> Iterator[Engine]:
    """The operator as an engine, and what its plan says."""
    told: dict[str, Any] = {}

    def prepare() -> None:
        operator.point()
        plan = operator.plan
        told.update(plan=plan.describe(), stated_bytes=plan.peak_bytes, way=plan.way, head=plan.head)

    with operator:
        yield prepare, operator.__matmul__, operator.dimension, told


def least(operator: HessianOperator) -> int:
    """The memory that is named where a plan with little is refused."""
    try:
        with operator:
            operator.plan  # noqa: B018
    except InputError as error:
        found = re.search(r"about ([\d.]+ [kMG]?B) would", str(error))
        if found:
            return memory_.parsed(found[1].replace(" ", ""))
    raise RuntimeError("no memory was refused")


def all_kept(model: nn.Module, batch: Any, space: str, sizes: Iterable[int]) -> int:
    """The first of these memories in which every block keeps its graph."""
    for memory in sizes:
        with operator_of(model, batch, space, memory) as operator:
            if operator.plan.graph == "kept":
                return memory
    raise RuntimeError("none of these memories keeps all graphs")


class OfInputs(nn.Module):
    """The logits of every token but the last, as curvlinops wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """``(tokens - 1, words)``."""
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return found.flatten(0, 1)


@contextlib.contextmanager
def theirs(name: str, model: nn.Module, batch: Any, chosen: dict[str, nn.Parameter]) -> Iterator[Engine]:
    parameters = list(chosen.values())
    size = sum(parameter.numel() for parameter in parameters)
    if name == "gradient":

        def gradient(vector: Tensor) -> Tensor:
            found = torch.autograd.grad(loss(model, batch)[0], parameters)
            return torch.cat([each.flatten() for each in found])

        yield (lambda: None), gradient, size, {}
        return
    if name == "curvlinops":
        from curvlinops import HessianLinearOperator

        operator = HessianLinearOperator(
            OfInputs(model),
            nn.CrossEntropyLoss(),
            parameters,
            [(batch["input_ids"], batch["labels"][:, 1:].flatten())],
            check_deterministic=False,
        )
        yield (lambda: None), operator.__matmul__, size, {}
        return
    from hessian_eigenthings.operators.hessian import HessianOperator as Theirs

    made = Theirs(
        model, [batch], lambda model, batch: model(**batch).loss,
        param_filter=lambda name, parameter: parameter.requires_grad,
        method="finite_difference" if name.endswith("differences") else "autograd",
    )  # fmt: skip
    yield (lambda: None), made.matvec, size, {}


# -- one engine in a process of its own ----------------------------------------------------------------------


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def child(shape: str, space: str, tokens: int, name: str, products: int, kept: int | None) -> dict[str, Any]:
    """Memory and time of an engine; ``kept`` is a memory that may keep all graphs, or None to look for it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, words = build(shape)
    batch, few = sentence(words, tokens), sentence(words, 32)
    if name in OURS:
        memory = MUCH
        if name in ("lean", "half") or (name == "fast" and kept is None):
            memory = least(operator_of(model, batch, space, LITTLE))
        if name in ("half", "fast"):
            tried = [3, 4, 5, 6, 8, 10] if kept is None else [1, 1.15, 1.3, 1.5, 1.8]
            most = all_kept(model, batch, space, [round(factor * (kept or memory)) for factor in tried])
            memory = most if name == "fast" else (memory + most) // 2
        found = timed(lambda rows: ours(model, rows, space, memory), batch, few, products)
        return {**found, "memory_option": memory}
    with as_found(model), spanned(model, space) as chosen, plain_attention(model):  # type: ignore[arg-type]
        return timed(lambda rows: theirs(name, model, rows, chosen), batch, few, products)


def timed(
    make: Callable[[Any], AbstractContextManager[Engine]], batch: Any, few: Any, products: int
) -> dict[str, Any]:
    """Of products over a batch, after one over a few tokens, for what libraries take once."""
    with make(few) as (prepare, multiply, size, _):
        vector = torch.randn(size, generator=torch.Generator().manual_seed(2))
        prepare()
        multiply(vector)
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    clock, work = time.perf_counter(), time.process_time()
    seconds, cpu = [], []
    with make(batch) as (prepare, multiply, _, told):
        prepare()
        prepared = [time.perf_counter() - clock, time.process_time() - work]
        for _ in range(products):
            clock, work = time.perf_counter(), time.process_time()
            product = multiply(vector)
            seconds.append(time.perf_counter() - clock)
            cpu.append(time.process_time() - work)
            curvature = float(vector @ product)
            del product  # it would count beside the next one
    return {
        "memory_bytes": status("VmHWM") - base,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu),
        "prepare_seconds": prepared[0],
        "prepare_cpu_seconds": prepared[1],
        "model_bytes": base,
        "vHv": curvature,
        **told,
    }


def apart(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """`child` in a process of its own; what went wrong, if it did."""
    options = ["--child", name, "--shape", arguments.shape, "--space", arguments.space]
    options += ["--tokens", str(arguments.tokens), "--products", str(arguments.products)]
    options += ["--kept", str(arguments.kept)] if arguments.kept else []
    return told_by([__file__, *options])


def told_by(script: list[str]) -> dict[str, Any]:
    """The JSON that a script prints last, in a process of its own; what went wrong, if it did."""
    command = [sys.executable, *script]
    # freed memory goes back to the system, so that the peak is what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Ours over the leaner and the quicker exact peer, and over a gradient."""
    peers = [found[name] for name in EXACT_PEERS if "memory_bytes" in found.get(name, {})]
    made: dict[str, Any] = {}
    for name in OURS:
        own = found.get(name, {})
        if "memory_bytes" not in own:
            continue
        entry = made.setdefault(name, {})
        if "memory_bytes" in found.get("gradient", {}):
            entry["memory_of_a_gradient"] = own["memory_bytes"] / found["gradient"]["memory_bytes"]
        if peers:
            entry["memory_of_the_leaner_peer"] = own["memory_bytes"] / min(p["memory_bytes"] for p in peers)
            entry["cpu_seconds_of_the_quicker_peer"] = own["cpu_seconds"] / min(
                p["cpu_seconds"] for p in peers
            )
    return made


def main() -> None:
    """Run the engines and write what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["gpt2", "qwen", "small"], default="gpt2")
    parser.add_argument("--small", dest="shape", action="store_const", const="small")
    parser.add_argument("--space", choices=["adapter", "merged"], default="adapter")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--products", type=int, default=2, help="timed products; the quickest counts")
    parser.add_argument(
        "--kept",
        type=memory_.parsed,
        metavar="SIZE",
        help="memory from which on to look for one that keeps all graphs, such as 9GB: spares plans, each of "
        "which takes minutes for a large shape",
    )
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--remark", help="on the machine's load, for the results")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        own = (arguments.shape, arguments.space, arguments.tokens, arguments.child, arguments.products)
        found = child(*own, arguments.kept)
        print(json.dumps(found))
        return
    path = arguments.results / "llm.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entry = results.setdefault(f"{arguments.shape}_{arguments.space}_{arguments.tokens}", {})
    if arguments.remark:
        results["remark"] = arguments.remark
    for name in arguments.engines:
        entry[name] = apart(arguments, name) | {"load": os.getloadavg()[0]}
        entry["ratios"] = ratios(entry)
        print(name, entry[name], flush=True)
        record.write("llm", results, arguments.results)


if __name__ == "__main__":
    main()
