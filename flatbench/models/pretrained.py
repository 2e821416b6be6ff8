"""Pretrained transformers models by hub name or local folder: checked, loaded, and identified by content."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from pydantic import Field
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from flatbench.config.registry import LATER, Options
from flatbench.config.words import folded
from flatbench.errors import InputError
from flatbench.models import quantization, sizes
from flatbench.models.quantization import Quantization
from flatbench.models.quiet import quiet
from flatbench.security import remote_code
from flatbench.security.paths import PathText
from flatbench.seeding import derive_seed
from flatbench.store.files import known_digest

#: endings of the files in a model folder that decide what is loaded from it
CONTENT = (".json", ".txt", ".model", ".safetensors", ".jinja")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer is made of."""
    return any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


class PretrainedModel(Options):
    """The ``model:`` section of tasks on transformers models.

    Attributes:
        name_or_path: a name on the hub, or a folder that ``save_pretrained`` made. Weights are read from
            safetensors files only.
        revision: branch, tag or commit, for a name on the hub.
        dtype: precision of the weights; an adapter's own are float32 beside a bfloat16 base.
        gradient_checkpointing: activations are computed twice in training instead of being kept.
        device_map: where transformers puts which module (``auto``, or names to devices, as ``{"": "cpu"}``),
            for models that do not fit one GPU; whole on the first device if not given.
        trust_remote_code: the model needs Python code that comes with it. It runs only where the user has
            named the model too (``--trust-remote-code NAME``); name a commit as revision, or it may change.
        quantization: linear layers below the head in ``4bit`` (NF4) or ``8bit``, frozen under an adapter.
    """

    name_or_path: Annotated[PathText, Field(min_length=1)]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device_map: Annotated[
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None, LATER
    ] = None
    trust_remote_code: Annotated[bool, LATER] = False
    quantization: Annotated[Quantization | None, LATER] = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a name on the hub. Raises InputError if a path leads nowhere."""
        path = Path(self.name_or_path).expanduser()
        if path.is_dir():
            return path
        if path.is_absolute() or self.name_or_path.count("/") > 1 or self.name_or_path.startswith((".", "~")):
            raise InputError(f"model.name_or_path: no such folder: {self.name_or_path}")
        return None


def _load(model: PretrainedModel, loader: Any, what: str, **options: Any) -> Any:
    """``loader.from_pretrained`` with the project's terms. Raises InputError with one line."""
    folder = model.folder
    if folder is None:
        options["revision"] = model.revision
    if model.trust_remote_code:
        remote_code.check(model.name_or_path)
    options["trust_remote_code"] = model.trust_remote_code
    try:
        return loader.from_pretrained(str(folder or model.name_or_path), **options)
    except Exception as error:  # whatever transformers, the hub's client or a damaged file raises
        raise refusal(model, what, error) from error


def refusal(model: PretrainedModel, what: str, error: Exception) -> InputError:
    """One line for what keeps a part of a model away, with the remedy."""
    said, start = str(error), f"model.name_or_path: {model.name_or_path}"
    reason = " ".join(said.split())[:300]
    if "trust_remote_code" in said:  # transformers advises what cannot be had here
        reason = (
            "it needs code of its own, which is never run unless the study says "
            "model.trust_remote_code: true and you name the model with --trust-remote-code"
        )
    if "gated repo" in said:
        return InputError(
            f"{start}: it is gated: accept its terms on the hub and log in (`hf auth login`), or name a "
            f"local folder: {reason}"
        )
    if what == "weights" and "does not appear to have a file named" in said:
        return InputError(f"{start}: {no_safetensors(model)}")
    if model.folder:
        return InputError(f"{start}: cannot load its {what}: {reason}")
    if "is not a valid git identifier" in said:
        return InputError(f"{start}: no revision '{model.revision}' on the hub; leave model.revision out")
    return InputError(
        f"{start}: cannot load its {what} (neither a local folder nor to be had from the hub): {reason}; "
        "with no network, name a folder that has it"
    )


def no_safetensors(model: PretrainedModel) -> str:
    """What is wrong with a model that has pickled weights alone, and the remedy."""
    place = "this folder" if model.folder else f"its revision '{model.revision or 'main'}'"
    branch = "" if model.folder else "name one that has them as model.revision, or "
    return (
        f"no *.safetensors in {place}; other formats can carry code and are not read; {branch}convert it "
        f"once: flatbench convert {model.name_or_path} --output DIR, and name DIR"
    )


def config(model: PretrainedModel) -> Any:
    """The model's configuration. Raises InputError if there is none, or no package to quantise with."""
    quantization.check(model.quantization)
    if model.folder and not (model.folder / "config.json").is_file():
        raise InputError(f"model.name_or_path: {model.name_or_path}: no config.json in this folder")
    where = f"model.name_or_path: {model.name_or_path}"
    if model.folder:
        sizes.check_file(model.folder / "config.json", where, _bytes_per_weight(model))
    found = _load(model, AutoConfig, "configuration")
    sizes.check(found.to_dict(), where, _bytes_per_weight(model))
    return found


def _bytes_per_weight(model: PretrainedModel) -> float:
    if model.quantization is not None:
        return 0.5 if model.quantization == "4bit" else 1.0
    return 2.0 if model.dtype == "bfloat16" else 4.0


def size_note(model: PretrainedModel) -> str | None:
    """A line on a model in a folder that is larger than this machine's memory; None for any other."""
    if model.folder is None:
        return None
    return sizes.note(config(model).to_dict(), model.name_or_path, _bytes_per_weight(model))


def tokenizer(model: PretrainedModel) -> Any:
    """The model's tokenizer, padding on the right. Raises InputError if there is none.

    One without a padding token pads with its end-of-sequence token, as is usual for decoders.
    """
    folder = model.folder
    # transformers makes an empty tokenizer, without a word, for a folder that has none
    if folder and not has_tokenizer(folder):
        raise InputError(
            f"model.name_or_path: {model.name_or_path}: no tokenizer in this folder "
            "(tokenizer.json, vocab.txt, vocab.json or *.model); save it there beside the model"
        )
    loaded = _load(model, AutoTokenizer, "tokenizer")
    loaded.padding_side = "right"
    if loaded.pad_token is None:
        if loaded.eos_token is None:
            raise InputError(
                f"model.name_or_path: {model.name_or_path}: its tokenizer has neither a padding nor an "
                "end-of-sequence token"
            )
        loaded.pad_token = loaded.eos_token
    return loaded


def processor(model: PretrainedModel, kind: Any, what: str) -> Any:
    """The model's image or multimodal processor. Raises InputError if there is none.

    Args:
        kind: one of transformers' Auto…Processor classes.
        what: what it is called in messages.
    """
    # newer transformers save a whole processor as the second
    files = ("preprocessor_config.json", "processor_config.json")
    if model.folder and not any((model.folder / name).is_file() for name in files):
        raise InputError(
            f"model.name_or_path: {model.name_or_path}: no {what} (preprocessor_config.json) in this "
            "folder; save it there beside the model"
        )
    with quiet():  # without torchvision, transformers says at length that it uses Pillow
        return _load(model, kind, what)


def longest_input(configuration: Any) -> int | None:
    """Tokens that the model can take, special ones included; None where nothing limits them."""
    positions = getattr(configuration, "max_position_embeddings", None)
    if positions is None or getattr(configuration, "position_embedding_type", "absolute") != "absolute":
        return None
    if configuration.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer"):
        # positions are counted from after the pad's
        return int(positions) - int(configuration.pad_token_id) - 1
    return int(positions)


def check_vocabulary(model: PretrainedModel, configuration: Any, loaded_tokenizer: Any) -> None:
    """Raise InputError if the tokenizer has tokens for which the model has no embedding."""
    tokens, embeddings = len(loaded_tokenizer), configuration.get_text_config().vocab_size
    if tokens > embeddings:
        raise InputError(
            f"model.name_or_path: {model.name_or_path}: its tokenizer has {tokens} tokens, but its "
            f"embedding only {embeddings}; they do not belong together"
        )


def load(
    model: PretrainedModel, kind: Any, configuration: Any, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained model; what the files lack is drawn from the "initialisation" stream.

    Args:
        kind: one of transformers' AutoModel… classes.

    Returns:
        The model, and transformers' loading information (``missing_keys``, ``mismatched_keys``, …).

    Raises:
        InputError: no safetensors files, or weights that do not belong to the configuration.
    """
    if _shapes_only.get():
        return _shape(model, kind, configuration), {"missing_keys": [], "mismatched_keys": []}
    _check_weights(model)
    further: dict[str, Any] = {}
    if model.quantization:
        shape: Any = _shape(model, kind, configuration)
        kept = _heads(shape) if hasattr(shape, shape.base_model_prefix) else None
        further["quantization_config"] = quantization.config(model.quantization, kept)
    if model.device_map is not None:
        further["device_map"] = model.device_map
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(derive_seed(seed, "initialisation"))
        built, info = _load(
            model,
            kind,
            "weights",
            config=configuration,
            use_safetensors=True,
            dtype=getattr(torch, model.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **further,
        )
    if model.quantization:
        missing = missing_modules(built, info)
        built = quantization.prepared(built, missing, model.quantization, model.name_or_path)
    if model.device_map is not None and not hasattr(built, "hf_device_map"):
        # transformers notes down only maps over several devices; nobody is to move this model either
        built.hf_device_map = {"": str(next(built.parameters()).device)}
    if model.gradient_checkpointing:
        # newer transformers deprecate the second name
        enable = (
            getattr(built, "activation_checkpointing_enable", None) or built.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    return built, info


def _check_weights(model: PretrainedModel) -> None:
    if model.folder and not any(path.is_file() for path in model.folder.glob("*.safetensors")):
        raise InputError(f"model.name_or_path: {model.name_or_path}: {no_safetensors(model)}")


_shapes_only = ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, `load` gives models on torch's meta device: their shapes, and no weight is read or fetched."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def _shape(model: PretrainedModel, kind: Any, configuration: Any) -> nn.Module:
    make = getattr(kind, "from_config", None) or kind._from_config  # a class of models has only the second
    with torch.device("meta"), quiet():
        made: nn.Module = make(configuration, dtype=getattr(torch, model.dtype))
    return made


def new_modules(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Names of the modules that start from random weights: the head, and what the files lack below it.

    They are trained in full beside an adapter (peft's ``modules_to_save``).
    """
    heads = _heads(model)
    below = missing_modules(model, info)
    return (*heads, *(name for name in below if not any(f"{name}.".startswith(f"{h}.") for h in heads)))


def _heads(model: nn.Module) -> list[str]:
    """Modules with weights beside the pretrained one."""
    base = getattr(model, "base_model_prefix", "")
    children = [(name, child) for name, child in model.named_children() if name != base]
    return [name for name, child in children if any(True for _ in child.parameters())]


def load_classifier(
    model: PretrainedModel, kind: Any, configuration: Any, classes: Sequence[str], seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """`load` with a head for these classes, drawn anew where the stored one is of others.

    Args:
        configuration: as stored; it is given the classes.
    """
    others = head_of_others(configuration, classes)
    configuration.num_labels = len(classes)
    configuration.problem_type = "single_label_classification"
    configuration.id2label = dict(enumerate(classes))
    configuration.label2id = {name: i for i, name in enumerate(classes)}
    built, info = load(model, kind, configuration, seed)
    if others:
        _renew_head(built, seed)
    return built, info


def head_of_others(configuration: Any, classes: Sequence[str]) -> list[str]:
    """The classes that a stored head was trained for, if they are others than these, or in another order.

    Empty where the head fits, has no names (LABEL_0 …) or another size, and where the classes are numbers.
    """
    named = [str(name) for _, name in sorted((getattr(configuration, "id2label", None) or {}).items())]
    places = [str(i) for i in range(len(named))]
    nameless = named == [f"LABEL_{i}" for i in places]
    alike = [folded(name) for name in named] == [folded(name) for name in classes]
    if len(named) != len(classes) or nameless or alike or list(classes) == places:
        return []
    return named


def _renew_head(model: nn.Module, seed: int) -> None:
    """Draw a head anew, as transformers does: weights from N(0, initializer_range²), biases 0, norms 1."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for name in _heads(model):
        for own, parameter in model.get_submodule(name).named_parameters():
            if parameter.device.type == "meta":
                continue
            with torch.no_grad():
                if parameter.ndim > 1:
                    parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.fill_(0.0 if own.rpartition(".")[2] == "bias" else 1.0)


def missing_modules(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Names of the modules of which the files lack every weight, or have them in another shape.

    A module of which a part is there stays as it is: a language model's head whose bias alone is missing
    holds the embedding's matrix too, and that is not to be trained by the way.
    """
    missing = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    found = []
    for name in sorted({key.rpartition(".")[0] for key in missing} - {""}):
        own = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
        if missing.issuperset(own):
            found.append(name)
    return tuple(found)


def target_modules(configuration: Any) -> Sequence[str]:
    """The modules that peft adapts in a model of this type unless told else (query and value, mostly).

    Raises InputError where peft knows none.
    """
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(configuration.model_type)
    if not isinstance(known, list):
        raise InputError(
            f"adapter.target_modules: peft names no modules to adapt in a model of type "
            f"'{configuration.model_type}'; name them, as target_modules: [q_proj, v_proj]"
        )
    return tuple(known)


def fingerprint(model: PretrainedModel, configuration: Any) -> str:
    """Digest of what is loaded: a folder's files by content, a hub name by its commit.

    Raises InputError for a folder that holds no weights that are read.
    """
    if model.folder is None:
        commit = getattr(configuration, "_commit_hash", None) or model.revision or "main"
        return hashlib.sha256(f"{model.name_or_path}@{commit}".encode()).hexdigest()
    _check_weights(model)
    digest = hashlib.sha256()
    endings = (*CONTENT, ".py") if model.trust_remote_code else CONTENT
    for path in sorted(model.folder.iterdir()):
        if path.is_file() and path.suffix in endings:
            digest.update(f"{path.name}:{known_digest(path)}\n".encode())
    return digest.hexdigest()
