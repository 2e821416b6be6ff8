"""accelerate as a run needs it: its precision, its parameters that a batch may leave out."""

from __future__ import annotations

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration

from flatbench.config.sections import TrainOptions


def make_accelerator(train: TrainOptions) -> Accelerator:
    """For one run; what accelerate keeps of an earlier one in this process is forgotten."""
    # accelerate keeps one precision a process, and a worker makes runs of several
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if train.precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # a parameter that a batch does not use has no gradient, as in one process
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
