"""Draws memory against seconds of one exact Hessian product, from ``benchmarks/results/llm.json``.

python benchmarks/llm_figure.py docs/figures/memory.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import record
from llm import OURS

WORDS = {
    "lean": "no block's graph kept",
    "half": "halfway",
    "fast": "all blocks' graphs kept",
    "whole": "the whole graph",
    "gradient": "one gradient",
    "eigenthings": "hessian-eigenthings",
    "eigenthings_differences": "hessian-eigenthings,\nby differences",
    "curvlinops": "curvlinops",
}


def main() -> None:
    """Draw one shape, space and length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--entry", default="gpt2_adapter_512", help="which entry of the results")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    entry = json.loads((arguments.results / "llm.json").read_text(encoding="utf-8"))[arguments.entry]
    points = {
        name: (found["memory_bytes"] / 2**30, found["cpu_seconds"])
        for name, found in entry.items()
        if "memory_bytes" in found
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    own = [points[name] for name in OURS if name in points]
    axes.plot(*zip(*own, strict=True), "o-", color="#0b62a4", label="flatbench, exact")
    for name, marker in (("eigenthings", "s"), ("curvlinops", "D"), ("eigenthings_differences", "s")):
        if name in points:
            axes.plot(*points[name], marker, color="#b3510c", mfc="w" if "diff" in name else "#b3510c")
    if "gradient" in points:
        axes.plot(*points["gradient"], "*", color="#555555", markersize=11)
    rightmost = max(x for x, _ in points.values())
    for name, place in points.items():
        # ours below their line, which falls; others above their marks
        offset = (-8, -13) if name in OURS else (7, 7) if place[0] < 0.7 * rightmost else (-7, 7)
        if name == "lean":
            offset = (9, 4)
        axes.annotate(
            WORDS[name], place, xytext=offset, textcoords="offset points", fontsize=9,
            ha="right" if offset[0] < 0 else "left", color="#0b62a4" if name in OURS else "#333333",
        )  # fmt: skip
    axes.legend(loc="lower left", frameon=False)
    axes.set_xlim(0, 1.12 * rightmost)
    axes.set_ylim(0, 1.15 * max(y for _, y in points.values()))
    axes.set_xlabel("memory above the model (GiB)")
    axes.set_ylabel("processor seconds a product")
    axes.grid(alpha=0.3)
    figure.savefig(arguments.picture, dpi=150)


if __name__ == "__main__":
    main()
