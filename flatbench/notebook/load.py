"""Open a run directory, a saved model or adapter, or a live model as a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatbench.curvature.operators.offloaded import device_of
from flatbench.errors import InputError
from flatbench.labels import uncompiled
from flatbench.landscape.evaluation.collect import LogitsFunction
from flatbench.machine.device import device as own_device
from flatbench.models import factors, folders
from flatbench.models.quiet import quiet
from flatbench.notebook.checkpoint import SPLIT, Checkpoint
from flatbench.notebook.data import described, splits_of
from flatbench.notebook.examples import Named, Taken
from flatbench.notebook.loss_key import loss_key
from flatbench.notebook.losses import checked_loss, metric_of
from flatbench.optim import moments
from flatbench.security import remote_code
from flatbench.seeding import derive_seed
from flatbench.store import RunDirectory


def load_checkpoint(
    source: str | Path | nn.Module,
    data: Any = None,
    *,
    base: str | Path | nn.Module | None = None,
    loss: Callable[..., Any] | None = None,
    metric: LogitsFunction | None = None,
    tokenizer: Any = None,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    target_modules: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    task: str | None = None,
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a run directory of flatbench, a folder with a peft adapter, a folder with a transformers
            model, or a live model, which stays where it is.
        data: batches or examples, or a mapping of splits to them (see `flatbench.notebook.data.splits_of`);
            a run directory brings its own.
        base: the base model of an adapter, if it is not the one that the adapter names.
        loss: ``(outputs, targets) -> mean loss``, or the mean loss and the number of its terms, for models
            that compute none from labels. Outputs are the logits of a transformers model, and whatever any
            other model gives back.
        metric: ``(logits, labels) -> number``; accuracy for classes if None.
        tokenizer: for data that is text, if the checkpoint brings none; it is copied.
        text_columns: of examples, the column of the text, or the two of a pair of texts in their order. Not
            needed where one column alone holds text, or two have the names of a published pair.
        label_column: of examples, the column of the label, if it is called neither ``labels`` nor ``label``.
        labels: names of the classes in the model's order, for labels that are text; the model's own if None.
        max_length: tokens per text, special ones included; what the model takes if None. Longer ones are
            cut, and counted.
        target_modules: names of modules (as peft takes them) that span the ``merged`` space of a model
            without an adapter.
        seed: of random directions and start vectors; a run directory has its own.
        device: a GPU if there is one, else the CPU; a live model's own.
        trust_remote_code: passed to transformers; code from a checkpoint never runs otherwise.
        task: peft's task type of an adapter that names none, such as ``SEQ_CLS`` or ``CAUSAL_LM``.

    Raises:
        InputError: what cannot be opened, with the reason: no checkpoint, a truncated file, pickled weights,
            a base model that does not fit, no tokenizer; columns that must be named, cells without a text or
            with a label that the model has not; a loss that is no mean over terms, or not the same twice.
    """
    named = Named.of(text_columns, label_column, labels, max_length)
    if isinstance(target_modules, str):
        raise InputError(f"target_modules: give a list of names: ['{target_modules}']")
    # peft and tasks draw weights before they load what was trained
    with torch.random.fork_rng(devices=[]), quiet():
        return _load(
            source,
            data,
            base,
            loss,
            metric,
            tokenizer,
            named,
            target_modules,
            seed,
            device,
            trust_remote_code,
            task,
        )


def _load(
    source: str | Path | nn.Module,
    data: Any,
    base: str | Path | nn.Module | None,
    loss: Callable[..., Any] | None,
    metric: LogitsFunction | None,
    tokenizer: Any,
    named: Named,
    target_modules: Sequence[str],
    seed: int,
    device: str | torch.device | None,
    trust_remote_code: bool,
    task: str | None,
) -> Checkpoint:
    if isinstance(source, nn.Module):
        source = uncompiled(source)
        where = next((device_of(source, p) for p in source.parameters()), torch.device("cpu"))
        opened = folders.Opened(source, [], {"kind": "live model", "class": type(source).__name__})
    else:
        path = Path(source)
        where = torch.device(device) if device is not None else own_device()
        if (path / "run.json").is_file():
            if data is not None or base is not None or named != Named():
                raise InputError(f"{path}: a run directory brings its own data and base model")
            model = RunDirectory(path).spec()["config"]["model"]
            with remote_code.granting([model.get("name_or_path", "")] if trust_remote_code else ()):
                return _open_run(path, where)
        opened = folders.open_folder(path, base, trust_remote_code=trust_remote_code, task=task)
        opened.metadata = {"name": path.name, **opened.metadata}
        opened.model.to(where)

    def find_tokenizer() -> Any:
        if tokenizer is not None:
            return tokenizer
        return folders.tokenizer(opened.tokenizers, trust_remote_code)

    adapted = factors.adapted_modules(opened.model, target_modules)
    if target_modules and not adapted:
        raise InputError(f"target_modules: no module of the model is called {', '.join(target_modules)}")
    taken: dict[str, Taken] = {}
    splits = splits_of(
        data, find_tokenizer, opened.model, where, named, own_loss=loss is None, seed=seed, taken=taken
    )
    checked, counted, outputs = checked_loss(opened.model, loss, splits)
    return Checkpoint(
        opened.model,
        splits,
        checked,
        metric_of(splits, outputs) if metric is None else metric,
        adapted,
        seed,
        opened.metadata,
        taken={**described(taken), "loss": f"mean over {counted}"} if splits else {},
        loss_key=loss_key(opened.model, loss, counted) if splits else "",
        optimizer_file=None if isinstance(source, nn.Module) else moments.state_file(Path(source)),
    )


def _open_run(path: Path, device: torch.device) -> Checkpoint:
    from flatbench.runs.open import open_run
    from flatbench.training.trainer import fixed_batches

    directory = RunDirectory(path)
    spec = directory.spec()
    result = directory.trained_result()
    run = open_run(directory, trained=True)
    run.model.to(device).eval()
    examples = {SPLIT: run.splits.train, "validation": run.splits.validation}
    if run.config["stage"] == "final":  # the test split is for final runs
        examples["test"] = run.splits.test
    size = run.train.eval_batch_size
    return Checkpoint(
        model=run.model,
        data={s: list(fixed_batches(run.task, e, size, device)) for s, e in examples.items()},
        loss=lambda model, batch: (run.task.loss(model, batch), run.task.terms(batch)),
        metric=run.task.metrics,
        adapted=factors.adapted_modules(run.model, run.target_modules),
        seed=derive_seed(run.config["seed"], "probes"),
        metadata={
            "name": spec["method"],
            "kind": "flatbench run",
            **{key: spec[key] for key in ("study", "condition", "method") if spec[key]},
            "seed": run.config["seed"],
            **spec["hyper"],
        },
        training=result.get("training", {}),
    )
