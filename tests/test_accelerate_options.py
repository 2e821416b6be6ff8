"""What accelerate's configuration files say is taken over, or refused by the name of its field."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

from flatbench import store, study
from flatbench.config.accelerate import AccelerateOptions
from flatbench.config.plain import plain
from flatbench.config.sections import TrainOptions
from flatbench.distributed import processes as distributed
from flatbench.errors import InputError
from flatbench.study import plan
from tests.conftest import SMALL
from tests.fuzzing import HOSTILE

#: what `accelerate config` asks for FSDP, version 2
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "ViTLayer",
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_activation_checkpointing": False,
}


def written(folder: Path, **changes: Any) -> Path:
    """A file as accelerate writes it."""
    content: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "mixed_precision": "no",
        "use_cpu": False,
        "debug": False,
        "num_processes": 2,
        "main_process_port": 29500,
        "gpu_ids": "all",
        "rdzv_backend": "static",
        "same_network": True,
        "fsdp_config": FSDP if changes.get("distributed_type", "FSDP") == "FSDP" else {},
        "tpu_env": [],
    }
    path = folder / "accelerate.yaml"
    ClusterConfig(**content | changes).to_yaml_file(str(path))
    return path


def loaded(folder: Path, accelerate: Path | str, **changes: Any) -> study.Study:
    path = folder / "study.yaml"
    train = {**SMALL["train"], "processes": 2, **changes.pop("train", {}), "accelerate": str(accelerate)}
    path.write_text(json.dumps({**SMALL, **changes, "train": train}))
    return study.load(str(path))


def recorded(found: study.Study) -> dict[str, Any]:
    content: dict[str, Any] = found.conditions[0].methods[0].train.model_dump(mode="json")
    assert TrainOptions.model_validate(content).model_dump(mode="json") == content
    return content


def test_what_accelerate_writes_is_recorded_with_the_run(tmp_path: Path) -> None:
    found = loaded(tmp_path, written(tmp_path))
    assert recorded(found)["accelerate"] == {
        "distributed_type": "FSDP",
        "num_processes": 2,
        "mixed_precision": "no",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "ViTLayer",
            "fsdp_min_num_params": 100_000_000,
            "fsdp_reshard_after_forward": True,
        },
    }
    folder = store.StudyFolder(tmp_path, "small")
    (run, *_) = plan.Plan(found, folder).final([])
    assert run.spec()["config"]["train"] == recorded(found)


@pytest.mark.parametrize("name", ["fsdp.yaml", "deepspeed.yaml"])
def test_the_files_in_the_documentation_are_some(tmp_path: Path, name: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (example,) = (part for part in text.split("```yaml\n") if part.startswith(f"# {name}"))
    path = tmp_path / name
    path.write_text(example.partition("```")[0], encoding="utf-8")
    assert TrainOptions.model_validate(recorded(loaded(tmp_path, path))).sharded


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_data_parallel_files_are_what_processes_does(tmp_path: Path, kind: str) -> None:
    processes = 1 if kind == "NO" else 2
    path = written(tmp_path, distributed_type=kind, num_processes=processes, main_process_port=None)
    options = TrainOptions.model_validate(recorded(loaded(tmp_path, path, train={"processes": processes})))
    assert not options.sharded


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "accelerate.json"
    path.write_text(json.dumps({"distributed_type": "FSDP", "fsdp_config": FSDP}, indent=2))
    assert TrainOptions.model_validate(recorded(loaded(tmp_path, path))).sharded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 4}, r"accelerate\.num_processes: 4, and train\.processes is 2; make them equal"),
        ({"mixed_precision": "bf16"}, r"mixed_precision: 'bf16' is bf16, and train\.precision is fp32"),
        ({"mixed_precision": "fp16"}, r"accelerate\.mixed_precision: training is in float32"),
        ({"num_machines": 2}, r"accelerate\.num_machines: input should be 1, found 2"),
        ({"gpu_ids": "0,1"}, r"accelerate\.gpu_ids: input should be 'all'"),
        ({"debug": True}, r"accelerate\.debug: accelerate's checks"),
        ({"fsdp_config": {}}, r"accelerate\.fsdp_config: missing"),
        (
            {"distributed_type": "MULTI_GPU", "fsdp_config": FSDP},
            r"fsdp_config: needs distributed_type: FSDP",
        ),
        ({"distributed_type": "XLA"}, r"accelerate\.distributed_type: input should be 'NO'"),
        ({"distributed_type": "DEEPSPEED"}, r"accelerate\.deepspeed_config: missing"),
        (
            {"deepspeed_config": {"zero_stage": 3}},
            r"accelerate\.deepspeed_config: needs distributed_type: DEEPSPEED",
        ),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, r"dynamo_config: .* train\.compile"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, r"parallelism_config: tensor"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        loaded(tmp_path, written(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, r"fsdp_config\.fsdp_version: version 1 .*accelerate to-fsdp2"),
        ({"fsdp_version": None}, r"fsdp_config\.fsdp_version"),
        ({"fsdp_offload_params": True}, r"fsdp_offload_params: shards stay on their GPU here"),
        ({"fsdp_activation_checkpointing": True}, r"checkpointing: .*model\.gradient_checkpointing"),
        ({"fsdp_auto_wrap_policy": "ALL"}, r"fsdp_auto_wrap_policy: input should be"),
        ({"fsdp_forward_prefetch": True}, r"fsdp_config\.fsdp_forward_prefetch: unknown key"),
    ],
)
def test_settings_of_fsdp_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, written(tmp_path, fsdp_config={**FSDP, **changes}))


#: what `accelerate config` asks for DeepSpeed
DEEPSPEED = {
    "deepspeed_multinode_launcher": "standard",
    "gradient_accumulation_steps": 1,
    "offload_optimizer_device": "none",
    "offload_param_device": "cpu",
    "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
    "zero_stage": 3,
}


def for_deepspeed(folder: Path, **changes: Any) -> Path:
    own = {**DEEPSPEED, **changes}
    return written(folder, distributed_type="DEEPSPEED", deepspeed_config=own)


def test_what_accelerate_writes_for_deepspeed_is_recorded(tmp_path: Path) -> None:
    options = TrainOptions.model_validate(recorded(loaded(tmp_path, for_deepspeed(tmp_path))))
    assert options.sharded
    assert not options.notes
    assert recorded(loaded(tmp_path, for_deepspeed(tmp_path)))["accelerate"]["deepspeed_config"] == {
        "zero_stage": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": None,
        "offload_optimizer_device": "none",
        "offload_param_device": "cpu",
    }
    clipped = for_deepspeed(tmp_path, gradient_clipping=1.0)
    assert TrainOptions.model_validate(
        recorded(loaded(tmp_path, clipped, train={"max_grad_norm": 1.0}))
    ).sharded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 4}, r"deepspeed_config\.zero_stage: input should be 0, 1, 2 or 3"),
        ({"gradient_accumulation_steps": 2}, r"accumulation_steps: .*train\.micro_batch_size; set 1"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping: 1\.0, and train\.max_grad_norm is None; make them"),
        ({"offload_optimizer_device": "cpu"}, r"offload_optimizer_device: .* set none"),
        ({"offload_param_device": "nvme"}, r"offload_param_device: parts stay on their device"),
        ({"deepspeed_config_file": "ds.json"}, r"deepspeed_config_file: write zero_stage .* here"),
    ],
)
def test_settings_of_deepspeed_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, for_deepspeed(tmp_path, **changes))


def test_deepspeed_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"DEEPSPEED needs the package deepspeed; install it: pip install"):
        loaded(tmp_path, for_deepspeed(tmp_path))


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_divide_what_an_adapter_has_little_of(tmp_path: Path, stage: int) -> None:
    path = for_deepspeed(tmp_path, zero_stage=stage, offload_param_device="none")
    options = TrainOptions.model_validate(recorded(loaded(tmp_path, path, methods=["lora", "sam"])))
    assert not options.sharded
    assert options.notes[0].startswith(f"DeepSpeed's stage {stage} was not run")
    with pytest.raises(InputError, match=rf"zero_stage: {stage} .* method 'full_ft' .*choose stage 3"):
        loaded(tmp_path, path, methods=["lora", "full_ft"])


def test_what_does_not_go_with_shards_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match=r"distributed_type: FSDP .*train\.processes; set it to 2 or more"):
        loaded(tmp_path, written(tmp_path, num_processes=1), train={"processes": 1})
    path = written(tmp_path)
    with pytest.raises(InputError, match=r"FSDP does not go with train\.compile"):
        loaded(tmp_path, path, train={"compile": "aot_eager"})
    with pytest.raises(InputError, match="measure 'hessian_adapter' is to be taken within"):
        loaded(tmp_path, path, measures=[{"name": "hessian", "space": "adapter", "every": 1}])
    whole = {"name": "own", "adapter": "none", "optimizer": {"name": "sam", "m_sharpness": True}}
    with pytest.raises(InputError, match=r"optimizer\.m_sharpness of method 'own' needs each process's own"):
        loaded(tmp_path, path, methods=[whole])


@pytest.mark.parametrize("name", ["none.yaml", "/etc/hostname", "a\0b", "x" * 5000, ".", "\x1f"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"train\.accelerate: ") as caught:
        loaded(tmp_path, name)
    assert str(caught.value).isprintable()


def test_a_file_is_named_in_the_studys_own_section(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"methods\[0\].*accelerate: a file is named in the study's own train"
    ):
        loaded(tmp_path, written(tmp_path), methods=[{"name": "lora", "train": {"accelerate": "a.yaml"}}])


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_what_the_environment_configures_is_refused(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind, process_index=0, num_processes=2)
    with pytest.raises(InputError, match=rf"the environment configures accelerate for {kind.value};"):
        distributed.Processes(accelerator)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"distributed_type": "MULTI_CPU"}, "cuda"),
        ({"distributed_type": "MULTI_GPU"}, "cpu"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP, "use_cpu": True}, "cuda"),
    ],
)
def test_a_file_for_another_device_is_refused(options: dict[str, Any], found: str) -> None:
    asked = AccelerateOptions.model_validate(options).device
    kind = SimpleNamespace(type=found)
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.NO, device=kind, process_index=0, num_processes=1
    )
    with pytest.raises(InputError, match=rf"asks for {asked}, and this run's device is {found}"):
        distributed.Processes(accelerator, asked)
    kind.type = asked
    assert distributed.Processes(accelerator, asked).size == 1


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_refused_in_one_line(tmp_path: Path, value: Any) -> None:
    base = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": FSDP}
    trials = [value, *({**base, key: value} for key in AccelerateOptions.model_fields)]
    trials += [{**base, "fsdp_config": {**FSDP, key: value}} for key in FSDP]
    by_deepspeed = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    trials += [{**by_deepspeed, "deepspeed_config": {**DEEPSPEED, key: value}} for key in DEEPSPEED]
    for trial in trials:
        train = {**SMALL["train"], "processes": 2, "accelerate": trial}
        try:
            study.Study(plain({**SMALL, "train": train}, "study.yaml"), "study.yaml")
        except InputError as error:
            assert "\n" not in str(error)
