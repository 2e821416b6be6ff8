"""Peak rates of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from flatbench.errors import InputError, suggest


@dataclass(frozen=True)
class GPU:
    """Peak rates of dense matrix products as in the vendor's data sheet, in 10¹² operations a second.

    Attributes:
        fp32: of float32 proper; torch does not use TF32 unless told to.
    """

    name: str
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """Operations a second in ``fp32`` or ``bf16``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a10", 125, 31.2),
        GPU("a100", 312, 19.5),
        GPU("h100", 989, 66.9),
        GPU("h200", 989, 66.9),
        GPU("l4", 121, 30.3),
        GPU("l40s", 362, 91.6),
        GPU("mi300x", 1307, 163.4),
        GPU("rtx3090", 71, 35.6),
        GPU("rtx4090", 165, 82.6),
    )
}


def gpu(name: str) -> GPU:
    """A GPU by name, or one that does ``name`` times 10¹² operations a second in every precision.

    Raises InputError for what is neither.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    try:
        rate = float(name)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise InputError(
            f"--gpu: unknown GPU '{name}'; {suggest(name.lower(), GPUS)}; or give its peak in TFLOP/s, as "
            "--gpu 300"
        )
    return GPU(f"{rate:g} TFLOP/s", rate, rate)
