"""Opens peft adapters and transformers models from folders: safetensors only, no code from the checkpoint."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from flatbench.errors import InputError, shown, suggest
from flatbench.models import sizes, weights
from flatbench.models.pretrained import has_tokenizer
from flatbench.models.quiet import quiet
from flatbench.store.files import read_regular

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
#: peft's task types -> transformers' class
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass
class Opened:
    """A model from a folder.

    Attributes:
        tokenizers: places to look for the tokenizer, the nearest first.
        metadata: what the folder says about itself, JSON-able.
    """

    model: nn.Module
    tokenizers: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)


def open_folder(
    path: Path, base: Any = None, *, trust_remote_code: bool = False, task: str | None = None
) -> Opened:
    """Open an adapter folder or a plain transformers folder.

    Args:
        base: for an adapter, the base model: a folder, a name on the Hub, or a model (it is copied); what the
            adapter names if None.
        task: peft's task type of an adapter that names none.

    Raises:
        InputError: nothing to open here, damaged or pickled weights, a base model that does not fit.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if task is not None and task not in CLASSES:
        raise InputError(f"task: {suggest(task, CLASSES)}")
    with quiet():
        return _open_folder(path, base, trust_remote_code, task)


def _open_folder(path: Path, base: Any, trust_remote_code: bool, task: str | None) -> Opened:
    adapter = _adapter_folder(path)
    if adapter is not None:
        return _open_adapter(adapter, base, trust_remote_code, task)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: not a checkpoint: it holds no run.json (a flatbench run), no {CONFIG_FILE} (a peft "
            "adapter) and no config.json (a transformers model)"
        )
    if base is not None:
        raise InputError(f"{path}: a whole model, not an adapter; leave base= away")
    model, missing = _open_model(str(path), None, trust_remote_code)
    if missing:
        raise InputError(f"{path}: no weights for {_abbreviate(missing)}; they would be random")
    return Opened(model, [str(path)], {"kind": "transformers", "class": type(model).__name__})


def _adapter_folder(path: Path) -> Path | None:
    """The folder that holds adapter_config.json: this one, or the only one in it (an adapter with a name)."""
    if (path / CONFIG_FILE).is_file():
        return path
    inside = sorted(p.parent for p in path.glob(f"*/{CONFIG_FILE}"))
    if len(inside) > 1 and not (path / "config.json").is_file():
        names = ", ".join(p.name for p in inside)
        raise InputError(f"{path}: several adapters here ({names}); open one of these folders")
    return inside[0] if inside and not (path / "config.json").is_file() else None


# -- adapters ---------------------------------------------------------------------------------------------


def _open_adapter(path: Path, base: Any, trust_remote_code: bool, task: str | None) -> Opened:
    if not (path / ADAPTER_FILE).is_file():
        pickled = [p.name for p in path.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            raise InputError(f"{path / pickled[0]}: pickled weights are not opened; save {ADAPTER_FILE}")
        raise InputError(f"{path}: holds {CONFIG_FILE} but no {ADAPTER_FILE}")
    shapes = _shapes(path / ADAPTER_FILE)
    config = _config(path)
    if isinstance(base, nn.Module):
        model, source = copy.deepcopy(base), ""
        missing: list[str] = []
    else:
        source = _base_name(path, config, base)
        model, missing = _open_base(path, source, config, shapes, trust_remote_code, task)
    try:
        # as it was trained: measures look for the factors that train
        adapted = peft.PeftModel.from_pretrained(model, str(path), config=config, is_trainable=True)
    except Exception as error:  # whatever peft raises for a configuration that somebody changed
        raise _mismatch(path, source, shown(" ".join(str(error).split()), 300)) from error
    _check_complete(path, source, adapted, set(shapes), missing)
    if (path / weights.BUFFERS).is_file():
        weights.load_buffers(adapted, path)
    elif source and weights.has_statistics(adapted):
        warnings.warn(
            f"{path}: peft saves no batch statistics; those of {source} are taken, which are not the trained "
            f"ones if training moved them. Give the trained base= as a model, or put {weights.BUFFERS} there",
            stacklevel=2,
        )
    metadata = {
        "kind": "peft",
        "class": type(model).__name__,
        "adapter": str(config.peft_type.value if hasattr(config.peft_type, "value") else config.peft_type),
        "base": source or type(base).__name__,
        "peft_version": _raw_config(path).get("peft_version"),
        **{key: getattr(config, key) for key in ("r", "lora_alpha") if hasattr(config, key)},
    }
    return Opened(adapted.eval(), [str(path), *([source] if source else [])], metadata)


def _raw_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path / CONFIG_FILE).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / CONFIG_FILE}: damaged ({error})") from error
    if not isinstance(content, dict) or "peft_type" not in content:
        raise InputError(f"{path / CONFIG_FILE}: names no peft_type")
    return content


def _config(path: Path) -> Any:
    _raw_config(path)
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except Exception as error:  # whatever peft's classes raise for values that are not theirs
        reason = shown(f"{type(error).__name__}: {error}", 300)
        raise InputError(f"{path / CONFIG_FILE}: peft {peft.__version__} cannot use it ({reason})") from error
    return config


def _base_name(path: Path, config: Any, base: Any) -> str:
    name = config.base_model_name_or_path if base is None else base
    if not name:
        raise InputError(f"{path / CONFIG_FILE}: names no base model; give base=")
    beside = path / str(name)
    return str(beside) if not Path(name).is_dir() and beside.is_dir() else str(name)


def _open_base(
    path: Path,
    source: str,
    config: Any,
    shapes: dict[str, list[int]],
    trust_remote_code: bool,
    task: str | None,
) -> tuple[nn.Module, list[str]]:
    own = config.task_type if config.task_type is not None else task
    wanted = CLASSES.get(str(getattr(own, "value", own)))
    named = (config.auto_mapping or {}).get("base_model_class")
    if wanted is None and named is not None:
        if not hasattr(transformers, named):
            raise InputError(
                f"{path}: its base is a {named}, which is none of transformers'; give it as base="
            )
        wanted = named
    options: dict[str, Any] = {}
    heads = [s[0] for n, s in shapes.items() if n.endswith(HEADS) and len(s) == 2 and ".lora_" not in n]
    if heads and str(wanted).endswith(("ForSequenceClassification", "ForImageClassification")):
        options["num_labels"] = heads[-1]
    try:
        return _open_model(source, wanted, trust_remote_code, **options)
    except InputError as error:
        raise InputError(f"{path}: base model: {error}; give another with base=") from error


#: how the weights of classification heads end
HEADS = ("classifier.weight", "score.weight", "out_proj.weight", "classification_head.weight")


def _check_complete(
    path: Path, source: str, adapted: nn.Module, stored: set[str], missing: Sequence[str]
) -> None:
    """Every weight of the file has its place, every place its weight, and nothing of the model is random."""
    places = set(peft.get_peft_model_state_dict(adapted))
    wrong = sorted(stored ^ places)
    if wrong:
        raise _mismatch(path, source, f"differing weights: {_abbreviate(wrong)}")
    kept = [n for n in adapted.state_dict() if ".modules_to_save." in n]
    covered = [n.replace(".modules_to_save.default.", ".").removeprefix("base_model.model.") for n in kept]
    random = sorted(set(missing) - set(covered))
    if random:
        raise InputError(
            f"{path}: neither the adapter nor its base model {source} has weights for {_abbreviate(random)}; "
            "they would be random"
        )


def _mismatch(path: Path, source: str, reason: str) -> InputError:
    return InputError(f"{path}: the adapter does not fit the base model {source or 'given'}; {reason}")


# -- whole models -----------------------------------------------------------------------------------------


def _open_model(
    source: str, wanted: str | None, trust_remote_code: bool, **options: Any
) -> tuple[nn.Module, list[str]]:
    """A transformers model and the names of its weights that the files lack."""
    if Path(source).is_dir():
        _check_files(Path(source))
        sizes.check_file(Path(source) / "config.json", source)
    try:
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, **options
        )
        reader = _reader(config, wanted, trust_remote_code)
        model, info = reader.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            **({"trust_remote_code": trust_remote_code} if wanted in CLASSES.values() else {}),
        )
    except SafetensorError as error:
        raise InputError(f"{source}: truncated or no safetensors file ({error})") from error
    except Exception as error:  # whatever transformers raises for a configuration that somebody changed
        reason = shown(" ".join(f"{error or type(error).__name__}".split()), 300)
        raise InputError(f"{source}: cannot be opened: {reason}") from error
    return model.eval(), sorted(map(str, info["missing_keys"]))


def _reader(config: Any, wanted: str | None, trust_remote_code: bool) -> Any:
    names = [wanted] if wanted else list(getattr(config, "architectures", None) or [])
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and (
            name.startswith("AutoModel") or issubclass(found, transformers.PreTrainedModel)
        ):
            return found
    raise ValueError(
        f"its config.json names no class of transformers ({', '.join(map(str, names)) or 'no architectures'})"
        + ("" if trust_remote_code else "; give the model itself")
    )


def _check_files(folder: Path) -> None:
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    for file in found:
        _shapes(file)
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if not found and pickled:
        raise InputError(
            f"{folder / pickled[0]}: pickled weights are not opened; save the model as safetensors "
            "(save_pretrained does)"
        )


def _shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a safetensors file. Raises InputError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: list(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error


def tokenizer(places: Sequence[str], trust_remote_code: bool = False) -> Any:
    """The first tokenizer found. Raises InputError if there is none."""
    for place in places:
        folder = Path(place)
        if folder.is_dir() and not has_tokenizer(folder):
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        except Exception:  # whatever transformers raises for files that are no tokenizer
            continue
    where = " or ".join(places) or "this checkpoint"
    raise InputError(f"no tokenizer in {where}, and the data is text; give tokenizer=")


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
