"""One run trained by several processes: each takes its share of every batch, and they are started here."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only
from torch.utils.data import Sampler

from flatbench.errors import DivergedError, InputError, StorageError
from flatbench.machine import forking

#: what is raised here as it was raised in a process that trained
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (DivergedError, InputError, StorageError, torch.OutOfMemoryError, MemoryError)
}


class _Batches(Protocol):
    def __iter__(self) -> Iterator[list[int]]: ...
    def __len__(self) -> int: ...


class Share(Sampler[list[int]]):
    """A process's part of each of the batches: every ``size``-th index, beginning with the ``rank``-th.

    Where a batch has fewer examples than there are processes, those without one get the batch's first, to
    take part in the exchange of gradients; `Processes.counted` says that it does not count.
    """

    def __init__(self, batches: _Batches, rank: int, size: int) -> None:
        self.batches, self.rank, self.size = batches, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.size] or batch[:1]

    def __len__(self) -> int:
        return len(self.batches)


class Processes:
    """The processes that train one run together, and this one's place among them.

    Attributes:
        rank: this process's number; the first one, 0, writes results.
        size: how many there are.

    Raises:
        InputError: accelerate was configured for FSDP or DeepSpeed from outside of the study, or for another
            device than there is.
    """

    def __init__(self, accelerator: Accelerator, device: str | None = None) -> None:
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise InputError(
                f"the environment configures accelerate for {kind.value}; start flatbench without "
                "accelerate's launcher, and name its configuration in the study (train.accelerate)"
            )
        found = accelerator.device.type
        if device not in (None, found):
            raise InputError(
                f"train.accelerate: its file asks for {device}, and this run's device is {found}: the GPUs "
                "that it sees, or else the CPU; hide GPUs with CUDA_VISIBLE_DEVICES, or change the file"
            )
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.rank == 0)

    def check(self, model: nn.Module) -> None:
        """Raise InputError for a model that several processes would train as another one does not."""
        if self.size == 1:
            return
        if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
            raise InputError(
                "model.device_map: the model lies on several devices, and each of train.processes needs one "
                "of its own; leave one of the two options out"
            )
        if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules()):
            raise InputError(
                "train.processes: the model normalises by batches, and each process would do so by its own "
                "part; train it in one process"
            )

    def share(self, batches: Any) -> Any:
        """This process's part of each batch; the batches themselves for a single process."""
        return batches if self.size == 1 else Share(batches, self.rank, self.size)

    def counted(self, batches: _Batches) -> Iterator[bool]:
        """Whether this process's part of each of the batches counts; see `Share`."""
        if self.size == 1:
            while True:
                yield True
        for batch in batches:
            yield len(batch) > self.rank

    def weights(self, terms: Sequence[int], counted: bool, device: torch.device) -> list[Any]:
        """What the mean loss of each part is multiplied by; None for by nothing.

        The gradients of all processes are then to be averaged, so that together they are those of the mean
        over all terms of all processes, however unequal the parts are.
        """
        if self.size == 1:
            return [None] if len(terms) == 1 else [count / sum(terms) for count in terms]
        own = torch.tensor(terms, dtype=torch.float64 if device.type != "mps" else torch.float32)
        own = (own if counted else torch.zeros_like(own)).to(device)
        total = own.sum()
        torch.distributed.all_reduce(total)
        return list((own * (self.size / total)).unbind())

    def most(self, count: int, device: torch.device) -> int:
        """The largest of the processes' counts."""
        found = torch.tensor(count, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def gathered(self, state: Any) -> list[Any] | None:
        """Every process's state, its tensors on the CPU, in the order of ranks; None but in the first."""
        found: list[Any] | None = [None] * self.size if self.main else None
        own = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), state)
        torch.distributed.gather_object(own, found)
        return found

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        mean: Tensor = value / self.size
        return mean


def launch(
    work: Callable[[Path], None], path: Path, processes: int, check: Callable[[], None] = lambda: None
) -> None:
    """Have ``work(path)`` done by processes that form one group, and wait for them.

    torch's launcher ends the others if one fails, and they end with this process, however it ends.

    Args:
        work: a function of a module; it is called in each process.
        check: called every second; an exception that it raises ends the processes.

    Raises:
        InputError: fewer GPUs than processes.
        Exception: what was raised in the process that failed first: a DivergedError, an InputError, a
            StorageError or an error of memory as such, everything else as a RuntimeError with its traceback.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise InputError(
            f"train.processes: {processes} processes need a GPU each, and this run sees "
            f"{torch.cuda.device_count()}"
        )
    threads = max(1, torch.get_num_threads() // processes)
    with tempfile.TemporaryDirectory() as failures:
        arguments = (work, str(path), processes, _free_port(), threads, forking.environment(), failures)
        method = forking.context().get_start_method()
        group: Any = start_processes(_process, arguments, processes, join=False, start_method=method)
        try:
            while not group.join(timeout=1):
                check()
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _first_error(Path(failures), error) from None
        finally:
            for process in group.processes:
                if process.is_alive():
                    process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _process(
    rank: int,
    work: Callable[[Path], None],
    path: str,
    processes: int,
    port: int,
    threads: int,
    environment: dict[str, str],
    failures: str,
) -> None:
    forking.begin(environment)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)  # before a model is loaded that is quantised where it is to stay
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(threads)
    try:
        work(Path(path))
    except Exception as error:
        text = {"kind": type(error).__name__, "error": str(error), "trace": traceback.format_exc()}
        (Path(failures) / str(rank)).write_text(json.dumps({"at": time.time(), **text}))
        raise  # and leave the group as it is: taking it down would wait for the others
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # all is written. A thread of torch that meets the interpreter's end would abort the process, and the run
    # would have failed when it was done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _first_error(folder: Path, other: Exception) -> Exception:
    """What went wrong first; the other processes then fail for want of a partner."""
    found = []
    for path in folder.iterdir():
        try:
            found.append(json.loads(path.read_text()))
        except ValueError:  # killed while it wrote
            continue
    if not found:
        return other
    first = min(found, key=lambda failure: float(failure["at"]))
    if first["kind"] in _KINDS:
        return _KINDS[first["kind"]](first["error"])
    return RuntimeError(f"{first['kind']}: {first['error']}\n{first['trace']}")
