"""Methods, measures and quantities in a sentence each.

The one source of docs/glossary.md and of the glossary that every page carries. Names of methods and measures
are those of study files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatbench.report.analysis.results import Results

METHODS: Mapping[str, str] = {
    "full_ft": "Full fine-tuning: every weight of the model is trained, without an adapter.",
    "lora": "LoRA: the model stays as it is, and the product B·A of two thin matrices is added to each "
    "adapted "
    "weight; A and B are trained (arXiv 2106.09685). What other methods are compared with.",
    "plain": "The base optimizer (AdamW, SGD, …) alone, with nothing done for flatness.",
    "sam": "SAM, sharpness-aware minimization: the gradient is taken at the worst point that one step up the "
    "gradient finds, at distance rho; two gradients a step (arXiv 2010.01412). On A and B: LoRA-SAM.",
    "asam": "ASAM: SAM in a ball that grows with each weight, so that rescaled weights count alike; two "
    "gradients "
    "a step (arXiv 2102.11600).",
    "gsam": "GSAM: SAM, less a part of the plain gradient that raises the loss at the worst point only; two "
    "gradients a step (arXiv 2203.08065).",
    "friendly_sam": "Friendly SAM: SAM that steps up only along the part of the gradient that is specific to "
    "the batch; two gradients a step (arXiv 2403.12350).",
    "looksam": "LookSAM: SAM's second gradient every k-th step only, reused in between (arXiv 2203.02714).",
    "msam": "Momentum-SAM: SAM that steps along the momentum instead of a gradient of its own; one gradient "
    "a "
    "step (arXiv 2401.12033).",
    "lora_mgpo": "LoRA-MGPO: LoRA with gradients at a point up the momentum, scaled by past gradients; one "
    "gradient a step (arXiv 2502.14538).",
    "ivon": "IVON: trains a Gaussian over the weights instead of one point, and takes gradients at draws "
    "from it; "
    "one gradient a step (arXiv 2402.17641).",
    "flat_lora": "Flat-LoRA of arXiv 2508.00522 (there also FMLoRA): SAM's worst point in the full weight, "
    "reached through B alone; two gradients a step.",
    "eflat_lora": "EFlat-LoRA of arXiv 2508.00522 (there also EFMLoRA): Flat-LoRA with a moving average of "
    "earlier "
    "perturbations in place of the first gradient; one gradient a step.",
    "flat_lora_rwp": "Flat-LoRA of arXiv 2409.14396, another method of the same name: gradients under "
    "random noise "
    "on the merged weight; one gradient a step.",
    "obar": "oBAR, balancedness-aware regularization: brings the sizes of A and B together by shrinking the "
    "larger "
    "one; one gradient a step (arXiv 2410.14802).",
    "nbar": "nBAR, balancedness-aware regularization by the sizes of the gradients of A and B; one gradient "
    "a step "
    "(arXiv 2410.14802).",
    "bi_lora": "Bi-LoRA: a second adapter climbs the loss while the first descends it, and is dropped at "
    "the end; "
    "one gradient a step (arXiv 2508.19564).",
    "swa": "SWA, stochastic weight averaging: the equal average of the weights over the last part of "
    "training "
    "(arXiv 1803.05407).",
    "ema": "EMA: an exponential moving average of the weights over training.",
    "lora_plus": "LoRA+: LoRA with a larger learning rate for B than for A (arXiv 2402.12354).",
    "lora_fa": "LoRA-FA: LoRA with A frozen, B alone is trained (arXiv 2308.03303).",
    "fmlora": "Another name of flat_lora.",
    "efmlora": "Another name of eflat_lora.",
    "fsam": "Another name of friendly_sam.",
}

ADAPTERS: Mapping[str, str] = {
    "lora": "A and B with the scale alpha / r.",
    "rslora": "Rank-stabilized LoRA: the scale alpha / √r (arXiv 2312.03732).",
    "dora": "DoRA: direction and length of each weight's columns are trained apart (arXiv 2402.09353).",
    "pissa": "PiSSA: A and B start from the weight's largest singular vectors (arXiv 2404.02948).",
    "olora": "OLoRA: A and B start from the weight's QR decomposition (arXiv 2406.01775).",
    "none": "No adapter: full fine-tuning.",
}

MEASURES: Mapping[str, str] = {
    "hessian": "Largest eigenvalues of the Hessian, the matrix of the loss's second derivatives: how fast "
    "the loss "
    "rises in the direction in which it rises fastest. Larger is sharper.",
    "sam_sharpness": "SAM sharpness: the largest rise of the training loss found within distance rho of the "
    "weights; a lower bound of the true one. Larger is sharper.",
    "spectrum": "The Hessian's trace (the sum of its eigenvalues) and spectral density (how many there are "
    "of "
    "which size). A larger trace is sharper.",
    "sharpness": "Worst-case or average rise of the training loss within a ball, plain or scaled with the "
    "weights "
    "(adaptive). Larger is sharper.",
    "slice": "The training loss along random lines through the weights; mean loss rise is its average "
    "height above "
    "the middle. Larger is sharper.",
    "balancedness": "‖B‖² − ‖A‖² of each adapted layer; 0 where the factors are of equal size. No sharpness.",
    "ema_gap": "The loss's rise at EFlat-LoRA's averaged perturbation minus its rise at a fresh one: how "
    "good the average is.",
    "critical_sharpness": "2/η for the smallest step η along an update that raises the loss, by forward "
    "passes. Larger is sharper.",
    "relative_critical_sharpness": "The same for another loss than the update's own: that of other data, or "
    "of the base model's predictions, which tells forgetting.",
    "interference": "How the perturbations of A and B by LoRA-SAM, Flat-LoRA and EFlat-LoRA arrive in "
    "the merged weights: norm of each term, cosine with the gradient, rise of the loss.",
    "cost": "Time, gradients, memory, energy and parameters of training.",
}

#: values that are a measure's answer, with what an axis calls them; all its others say how it was found
ANSWERS: Mapping[str, str] = {
    "critical_sharpness": "critical sharpness",
    "relative_critical_sharpness": "relative critical sharpness",
    "sharpness": "sharpness",
    "eigenvalue_1": "largest eigenvalue",
    "trace": "trace",
    "mean_rise": "mean rise",
    "balancedness": "balancedness",
    "gap": "gap",
}

QUANTITIES: Mapping[str, str] = {
    "test metric": "What a task is judged by (accuracy, F1, Matthews correlation, …) on data that nothing "
    "was chosen "
    "on. Read once, by final runs.",
    "generalization gap": "The metric on the training data minus that on the test data.",
    "flat, sharp": "A minimum is flat where the loss rises slowly around it, sharp where it rises fast.",
    "merged weights": "The weights that inference uses, W0 + s·B·A. Measured there, flatness does not "
    "depend on how "
    "B·A is split into B and A. Other spaces: adapter (A and B themselves), all (every weight).",
    "method": "An adapter with an optimizer and its base optimizer, compared with its hyper-parameters "
    "chosen alike.",
    "configuration": "One choice of hyper-parameters of a method.",
    "condition": "One setting of task and model under which all methods are compared, such as 20 % wrong "
    "labels.",
    "seed": "What draws the data's order, the noise and the start. Runs of one seed are compared with each "
    "other.",
    "tuning run, final run": "Tuning runs choose hyper-parameters on validation data; final runs, with "
    "other seeds, "
    "are what is reported.",
    "[low, high]": "A 95 % interval: made by this procedure, it holds the true value in 95 % of studies. "
    "Simultaneous: all intervals of the comparisons at once do.",
    "× 0.6": "A ratio: 0.6 times that of the reference. Eigenvalues and traces are compared so.",
    "points": "Percentage points: 80 % is 2 points above 78 %.",
    "p": "The probability, if the methods did not differ, of a difference at least this large in either "
    "direction, adjusted for all comparisons that are made together.",
    "not distinguishable": "The interval contains zero (of ratios, 1); a difference smaller than what is "
    "visible at 80 % power may be there all the same.",
    "visible at 80 % power": "The smallest true difference that a study of this size would have shown in 80 "
    "% of "
    "cases.",
    "Kendall's τ": "How well the order of runs by flatness is that by the test metric: +1 the same, 0 "
    "unrelated, "
    "−1 reversed. Positive: sharper minima go with a higher test metric.",
    "granulated": "τ of runs that differ in one hyper-parameter alone, the fairest comparison (Jiang et al. "
    "2019).",
    "within methods, across methods": "τ of runs of one method, and of all runs; where they contradict each "
    "other, "
    "what is seen comes from differences between methods (Simpson's paradox).",
    "gradients per step": "Backward passes that one update takes: SAM takes two, LoRA one.",
    "paired time": "Time of a step over that of plain LoRA, both timed in turns on one machine (`cost: "
    "paired`).",
    "diverged": "The loss became infinite or undefined, and training stopped.",
}

_PARTS = {
    "Methods": METHODS,
    "Adapters": ADAPTERS,
    "Measures": MEASURES,
    "Quantities and words": QUANTITIES,
}


def entries(results: Results) -> dict[str, dict[str, str]]:
    """The entries that a report needs, by part: its own methods and measures, and every word."""
    study: Mapping[str, Any] = results.content["study"]
    written = {m["name"]: m for m in study.get("methods", ()) if isinstance(m, dict) and "name" in m}
    methods = {}
    for name in results.methods:
        text = METHODS.get(name) or _combination(written.get(name, {}))
        if text:
            methods[name] = text
    kinds = {
        str(m.get("name")) for m in results.content.get("measures", {}).values() if isinstance(m, Mapping)
    }
    measures = {name: text for name, text in MEASURES.items() if name in kinds}
    made = {"Methods": methods, "Measures": measures, "Quantities and words": dict(QUANTITIES)}
    return {title: own for title, own in made.items() if own}


def _combination(method: Mapping[str, Any]) -> str:
    """What a method with a name of its own is made of."""
    optimizer, adapter = method.get("optimizer"), method.get("adapter")
    name = optimizer.get("name", "") if isinstance(optimizer, Mapping) else str(optimizer or "")
    parts = []
    if isinstance(adapter, str) and adapter in ADAPTERS:
        parts.append(
            "Without an adapter." if adapter == "none" else f"Adapter {adapter}: {ADAPTERS[adapter]}"
        )
    base = optimizer.get("base") if isinstance(optimizer, Mapping) else None
    base = base.get("name", "") if isinstance(base, Mapping) else base
    if name in METHODS:
        parts.append(f"Optimizer {name}{f' over {base}' if base else ''}: {METHODS[name]}")
    return " ".join(parts)


def document() -> str:
    """The text of docs/glossary.md."""
    from flatbench.report.tables.cells import markdown

    lines = [
        "# Glossary",
        "",
        "Methods and measures by their names in study files, and the words that reports use. Every report's "
        "page",
        "carries what it needs of this. Made by `python tools/glossary.py` from",
        "`flatbench/report/text/glossary.py`; rules and sources of the methods: "
        "[optimizers.md](optimizers.md), how",
        "measures are computed: [curvature.md](curvature.md).",
        "",
    ]
    for title, own in _PARTS.items():
        lines += [f"## {title}", ""]
        lines += [f"- **{markdown(name)}**: {markdown(text)}" for name, text in own.items()]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"
