"""Validate a configuration file of accelerate, field by field, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from flatbench.config.plain import plain
from flatbench.config.registry import AT_OPTION, LATER, Options
from flatbench.config.yaml import parse, read_text
from flatbench.errors import InputError, shown

#: fields for accelerate's own launcher and for TPUs: without effect here, where flatbench starts processes
LAUNCHER = {
    "main_training_function",
    "main_process_ip",
    "main_process_port",
    "rdzv_backend",
    "same_network",
    "machine_rank",
    "downcast_bf16",
    "tpu_name",
    "tpu_zone",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_env",
    "tpu_vm",
    "command_file",
    "commands",
}
#: fields without effect in ``fsdp_config``: a checkpoint is an adapter or a whole model, and a base is in the
#: machine's own memory once in any case, where processes share the pages of its files
WITHOUT_EFFECT = {"fsdp_state_dict_type", "fsdp_cpu_ram_efficient_loading"}

#: the same in ``deepspeed_config``, with what starts processes on several machines
DEEPSPEED_WITHOUT_EFFECT = {
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_multinode_launcher",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
}


def _allow(advice: str, *known: Any) -> AfterValidator:
    def refuse(value: Any) -> Any:
        if value not in known:
            raise ValueError(advice)
        return value

    return AfterValidator(refuse)


_VERSION = (
    "version 1 of FSDP, accelerate's default, flattens parameters; set 2 (accelerate to-fsdp2 converts "
    "a file)"
)
_PRECISION = "training is in float32 ('no') or in bfloat16 ('bf16') here"
_OFFLOAD = "shards stay on their GPU here; set it to false, and train.processes higher"
_CHECKPOINT_ADVICE = (
    "activations are recomputed where the study says model.gradient_checkpointing: true; set false"
)


class FSDPOptions(Options):
    """accelerate's ``fsdp_config``, version 2.

    Attributes:
        fsdp_auto_wrap_policy: which modules are gathered and given up as one: the transformer's layers, those
            with more than ``fsdp_min_num_params`` parameters, or the model as a whole.
        fsdp_transformer_layer_cls_to_wrap: class names of the layers, with commas between; those that the
            model itself names if not given.
        fsdp_reshard_after_forward: weights are given up after the forward pass and gathered again for the
            backward pass.
    """

    fsdp_version: Annotated[int, _allow(_VERSION, 2), Field(validate_default=True)] = 1
    fsdp_auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "NO_WRAP"
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    fsdp_min_num_params: Annotated[int, Field(ge=0)] = 100_000_000
    fsdp_reshard_after_forward: bool = True
    fsdp_offload_params: Annotated[bool, LATER, _allow(_OFFLOAD, False)] = False
    fsdp_activation_checkpointing: Annotated[bool, LATER, _allow(_CHECKPOINT_ADVICE, False)] = False
    fsdp_activation_checkpointing_offload: Annotated[bool, LATER, _allow(_CHECKPOINT_ADVICE, False)] = False

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, content: Any) -> Any:
        return _drop(content, WITHOUT_EFFECT)


_ACCUMULATION = "a batch is divided where the study says train.micro_batch_size; set 1"
_FILE = "write zero_stage and offload_param_device here instead of naming another file"
_OPTIMIZER_STATE = "the optimizer's state stays on its device here; set none"
_PARAMETERS = "parts stay on their device (none) or in the machine's memory (cpu) here"


class DeepSpeedOptions(Options):
    """accelerate's ``deepspeed_config``.

    Attributes:
        zero_stage: stage 3 divides the model among the processes. What stages 1 and 2 divide, the gradients
            and the optimizer's state, is under an adapter next to nothing, and whole in every process here.
        gradient_clipping: has to be what ``train.max_grad_norm`` says.
        offload_param_device: where each process keeps its part, under stage 3.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    gradient_accumulation_steps: Annotated[int | str, _allow(_ACCUMULATION, 1, "auto")] = 1
    gradient_clipping: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    offload_optimizer_device: Annotated[str, _allow(_OPTIMIZER_STATE, "none")] = "none"
    offload_param_device: Annotated[str, _allow(_PARAMETERS, "none", "cpu")] = "none"
    deepspeed_config_file: Annotated[str | None, LATER, _allow(_FILE, None)] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, content: Any) -> Any:
        return _drop(content, DEEPSPEED_WITHOUT_EFFECT)


class AccelerateOptions(Options):
    """``train.accelerate``: the content of a file that ``accelerate config`` wrote.

    Attributes:
        distributed_type: ``FSDP`` and ``DEEPSPEED`` keep a base model in shards, the other types are what
            ``train.processes`` does by itself.
        num_processes: has to be ``train.processes``.
        mixed_precision: has to be what ``train.precision`` says.
        use_cpu: processes train on the CPU, as with ``MULTI_CPU``. Here that is decided by whether a GPU is
            seen; a run on another device than its file says is refused.
    """

    distributed_type: Literal["NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"]
    num_processes: Annotated[int, Field(ge=1)] | None = None
    mixed_precision: Annotated[str | None, _allow(_PRECISION, None, "no", "bf16")] = None
    fsdp_config: FSDPOptions | None = None
    deepspeed_config: Annotated[DeepSpeedOptions | None, LATER] = None
    use_cpu: Annotated[bool, LATER] = False
    compute_environment: Annotated[Literal["LOCAL_MACHINE"], LATER] = "LOCAL_MACHINE"
    num_machines: Annotated[Literal[1], LATER] = 1
    gpu_ids: Annotated[Literal["all"], LATER] = "all"
    debug: Annotated[
        bool, LATER, _allow("accelerate's checks of its own exchanges are not made here", False)
    ] = False
    enable_cpu_affinity: Annotated[bool, LATER, _allow("processes are not bound to cores here", False)] = (
        False
    )

    @property
    def divides(self) -> bool:
        """Whether the processes hold the model in shards."""
        by_deepspeed = self.deepspeed_config is not None and self.deepspeed_config.zero_stage == 3
        return self.fsdp_config is not None or by_deepspeed

    @property
    def notes(self) -> list[str]:
        """What of the file is done in another way than it says, in sentences."""
        stage = self.deepspeed_config.zero_stage if self.deepspeed_config else 0
        if stage not in (1, 2):
            return []
        return [
            f"DeepSpeed's stage {stage} was not run: gradients and the optimizer's state, which it divides, "
            "were those of an adapter, and whole in every process"
        ]

    @property
    def device(self) -> str | None:
        """The kind of device that the file asks for; None for any."""
        if self.use_cpu or self.distributed_type == "MULTI_CPU":
            return "cpu"
        return "cuda" if self.distributed_type == "MULTI_GPU" else None

    @model_validator(mode="before")
    @classmethod
    def _drop_launcher(cls, content: Any) -> Any:
        return _drop(content, LAUNCHER)

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, content: Any) -> Any:
        """Sections of other ways to train are refused by name, and empty ones are as good as none."""
        if isinstance(content, str):
            raise ValueError("a file is named in the study's own train section; write here what it says")
        if not isinstance(content, dict):
            return content
        for name, advice in (
            ("dynamo_config", "torch.compile is asked for with train.compile"),
            ("megatron_lm_config", "Megatron-LM is not run here"),
            ("fp8_config", "training in eight bits is not run here"),
            ("parallelism_config", "tensor, context and pipeline parallelism are not run here"),
            ("mpirun_config", "processes are started by flatbench, not by mpirun"),
        ):
            if content.get(name):
                raise PydanticCustomError(AT_OPTION, advice, {"option": name})
        for section, kind in (("fsdp_config", "FSDP"), ("deepspeed_config", "DEEPSPEED")):
            if content.get(section) and content.get("distributed_type") != kind:
                raise PydanticCustomError(AT_OPTION, f"needs distributed_type: {kind}", {"option": section})
            if content.get("distributed_type") == kind and not content.get(section):
                raise PydanticCustomError(AT_OPTION, "missing", {"option": section})
        return {key: value for key, value in content.items() if value not in (None, {}, [])}


def _drop(content: Any, names: set[str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if key not in names}


def read(name: str) -> Any:
    """The content of a configuration file, YAML or JSON, as it is. Raises InputError if it is neither."""
    path, where = Path(name).expanduser(), f"train.accelerate: {shown(name)}"
    try:
        content = parse(read_text(path))
        return plain(content, where) if isinstance(content, dict) else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: not readable as plain YAML: {shown(error, 500)}") from None
