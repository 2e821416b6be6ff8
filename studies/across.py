"""One figure over studies: what a method's main comparisons with LoRA are in each of them.

    python studies/across.py reports/digits-power reports/fashion-vit-power reports/trec-minilm \\
        reports/sst-minilm

Reads each report's findings.json and draws, with their simultaneous 95 % intervals, the differences in the
test metric and the ratios of the largest Hessian eigenvalue, over all conditions of a study. Writes
reports/figures/studies.png, .pdf and .svg; equal findings give equal bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatbench.errors import InputError
from flatbench.report.figures import style

#: columns of the two main comparisons, with what an axis calls them and where no difference lies
PANELS = {
    "test": ("Test accuracy: points above LoRA", 0.0),
    "hessian_merged.eigenvalue_1": ("Largest Hessian eigenvalue: times LoRA's", 1.0),
}


def main() -> None:
    """Draw the figure. Raises InputError for a report without the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+", help="folders of reports")
    parser.add_argument("--method", default="eflat_lora")
    parser.add_argument("--output", type=Path, default=Path("reports/figures"))
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    with style.styled():
        style.save(draw(chosen.reports, chosen.method), chosen.output, "studies")


def draw(reports: Sequence[Path], method: str) -> Any:
    """A panel a comparison, a row a study; filled where the interval leaves out no difference."""
    figure, axes = style.panels(len(PANELS), 2)
    colour = style.looks([method])[method].colour
    for axis, (column, (name, nothing)) in zip(axes, PANELS.items(), strict=True):
        ends: list[float] = []
        for place, report in enumerate(reports):
            entry = comparison(report, method, column)
            scale = entry["details"]["scale"] if column == "test" else 1.0
            low, middle, high = (entry[key] * scale for key in ("low", "estimate", "high"))
            ends += [low, high]
            axis.plot([low, high], [place, place], color=colour)
            filled = "full" if low > nothing or high < nothing else "none"
            axis.plot([middle], [place], "s", color=colour, fillstyle=filled, markerfacecoloralt="white")
        axis.axvline(nothing, color="0.4", linestyle="--", linewidth=1)
        if nothing:
            style.log_scale(axis, min(ends), max(ends))
        axis.set_yticks(range(len(reports)), [report.name for report in reports])
        axis.set_ylim(len(reports) - 0.5, -0.5)
        axis.set_xlabel(name)
    axes[1].set_yticklabels([])
    style.wrap_labels(axes)
    return figure


def comparison(report: Path, method: str, column: str) -> Mapping[str, Any]:
    """The main comparison of a method with LoRA over all conditions of a study."""
    content = json.loads((report / "findings.json").read_text(encoding="utf-8"))
    found = [
        entry
        for entry in content["statements"]
        if (entry["kind"], entry["subject"], entry["role"]) == ("difference", method, "main")
        and entry["details"]["column"] == column
    ]
    if len(found) != 1:
        raise InputError(f"{report}: {len(found)} main comparisons of {method} in {column}; one is needed")
    return dict(found[0])


if __name__ == "__main__":
    main()
