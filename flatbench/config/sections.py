"""The sections of a study file that no plug-in owns: adapter, base optimizer, training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flatbench.config.accelerate import AccelerateOptions
from flatbench.config.registry import AT_OPTION, LATER, Options
from flatbench.security.paths import PathText

#: threads of a run, and processes: no machine has more cores
MOST_THREADS = 4096


class AdapterOptions(Options):
    """The ``adapter:`` section. ``name: none`` trains every weight of the model.

    Attributes:
        target: ``qv`` adapts query and value, each with an A of its own, also where a model computes both and
            key by one matrix (GPT-2's ``c_attn``, which is split for it); in place of ``target_modules``.
        init_from: folder of an adapter that peft saved (a finished run's ``adapter``), with whose A and B
            training starts; a head that was trained beside them is not taken, because it is another task's.
    """

    name: Literal["lora", "none"] = "lora"
    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    rslora: bool = False
    dora: bool = False
    init: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = True
    init_from: Annotated[PathText | None, LATER] = None
    target: Annotated[Literal["qv"] | None, LATER] = None

    @model_validator(mode="after")
    def _check_initialisation(self) -> AdapterOptions:
        if self.init_from is not None and (self.name == "none" or self.init is not True or self.dora):
            raise ValueError("init_from gives A and B of plain LoRA; leave out name: none, init and dora")
        if self.target is not None and (self.name == "none" or self.target_modules):
            raise ValueError("target says what LoRA adapts; leave out name: none and target_modules")
        return self


#: shorthands of the adapter section: what peft calls variants of LoRA
ADAPTER_SHORTHANDS: dict[str, dict[str, object]] = {
    "none": {"name": "none"},
    # each says what it is in full, so that it replaces a variant that the study names for all methods
    "lora": {"name": "lora", "rslora": False, "dora": False, "init": True},
    "rslora": {"name": "lora", "rslora": True, "dora": False, "init": True},
    "dora": {"name": "lora", "rslora": False, "dora": True, "init": True},
    "pissa": {"name": "lora", "rslora": False, "dora": False, "init": "pissa"},
    "olora": {"name": "lora", "rslora": False, "dora": False, "init": "olora"},
}


class BaseOptimizerOptions(Options):
    """``optimizer.base``: the torch optimizer; learning rate and decay are in ``train``."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _check_momentum(self) -> BaseOptimizerOptions:
        if self.name != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov are options of sgd; {self.name} has betas")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum")
        return self


class TrainOptions(Options):
    """The ``train:`` section.

    Attributes:
        steps: optimizer steps of the whole training, in place of ``epochs``; the last epoch ends with them.
        batch_size: examples per optimizer step.
        micro_batch_size: at most this many examples in one forward pass; gradients are accumulated.
        warmup: share of all steps in which the learning rate rises from 0.
        weight_decay: applied to matrices, not to biases and normalisation weights.
        max_grad_norm: the gradient that reaches the base optimizer is clipped to this l2 norm.
        evaluate_every: epochs between validations during training; 0 validates only at the end.
        log_every: optimizer steps between rows of the history.
        threads: CPU threads of the run; the cores divided by the jobs if not given.
        processes: how many train the run together, each on its share of every batch and on a GPU of its own
            where there are GPUs; ``batch_size`` stays what all of them make one step with.
        accelerate: a configuration file of accelerate, whose content takes its place when a study is read;
            with FSDP and stage 3 of DeepSpeed, the processes hold what does not train, or all of a model
            without adapter, in shards.
        on_out_of_memory: ``halve_micro_batch`` goes on, once, with half the examples in a forward pass and
            the same batch, which changes the last bits and the time; it is recorded with the run.
        group_by_length: batches of examples of alike length, so that less is padding; texts only.
        workers: processes that make batches beside the training; 0 makes them in between.
        compile: the forward and backward passes of training through torch.compile; ``aot_eager`` traces them
            and compiles nothing, for where there is no compiler.
    """

    epochs: Annotated[int, Field(ge=1)] = 3
    steps: Annotated[int | None, Field(ge=1), LATER] = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    eval_batch_size: Annotated[int, Field(ge=1)] = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    log_every: Annotated[int, Field(ge=1)] = 10
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = None
    processes: Annotated[int, Field(ge=1, le=MOST_THREADS), LATER] = 1
    accelerate: Annotated[AccelerateOptions | None, LATER] = None
    on_out_of_memory: Annotated[Literal["fail", "halve_micro_batch"], LATER] = "fail"
    group_by_length: Annotated[bool, LATER] = False
    workers: Annotated[int, Field(ge=0, le=MOST_THREADS), LATER] = 0
    compile: Annotated[bool | Literal["aot_eager"], LATER] = False

    @property
    def sharded(self) -> bool:
        """Whether the processes hold the model in shards."""
        return self.accelerate is not None and self.accelerate.divides

    @property
    def notes(self) -> list[str]:
        """What is done in another way than the section asks for, in sentences."""
        return [] if self.accelerate is None else self.accelerate.notes

    @model_validator(mode="after")
    def _check_agreement(self) -> TrainOptions:
        """What accelerate's file says is what the section says."""
        if self.accelerate is None:
            return self
        asked, own = self.accelerate.num_processes, self.processes
        if asked not in (None, own):
            raise _contradiction("num_processes", f"{asked}, and train.processes is {own}; make them equal")
        precision = {"no": "fp32", "bf16": "bf16", None: self.precision}[self.accelerate.mixed_precision]
        if precision != self.precision:
            raise _contradiction(
                "mixed_precision",
                f"'{self.accelerate.mixed_precision}' is {precision}, and train.precision is "
                f"{self.precision}; make them equal",
            )
        kind = self.accelerate.distributed_type
        if self.sharded and own == 1:
            raise _contradiction(
                "distributed_type", f"{kind} divides a model among train.processes; set it to 2 or more"
            )
        if self.sharded and self.compile:
            raise _contradiction("distributed_type", f"{kind} does not go with train.compile; leave one out")
        deepspeed = self.accelerate.deepspeed_config
        limit = None if deepspeed is None else deepspeed.gradient_clipping
        if limit not in (None, "auto", self.max_grad_norm):
            raise _contradiction(
                "deepspeed_config.gradient_clipping",
                f"{limit}, and train.max_grad_norm is {self.max_grad_norm}; make them equal",
            )
        return self


def _contradiction(option: str, message: str) -> PydanticCustomError:
    # of the message's braces none is a place for a value
    return PydanticCustomError(AT_OPTION, "{text}", {"option": f"accelerate.{option}", "text": message})
