"""The machine and the software that a number came from."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scikit-learn", "pyhessian")
#: named only where they are installed
OPTIONAL = ("bitsandbytes", "deepspeed")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, flatbench and the packages that decide its numbers."""
    found = {"python": platform.python_version()}
    for package in ("flatbench-lora", *PACKAGES, *OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in OPTIONAL:
                found[package] = "not installed"
    return found


@functools.cache  # a process goes on with the code that it has loaded
def git_commit() -> str | None:
    """Commit of the checkout that flatbench runs from, with "-dirty" if it was changed; None outside one."""
    folder = Path(__file__).parent
    try:
        top = _git("rev-parse", "--show-toplevel", at=folder)
        if not (Path(top) / "flatbench" / "machine" / "environment.py").is_file():
            return None  # installed into an environment that happens to lie inside another checkout
        commit = _git("rev-parse", "HEAD", at=folder)
        return commit + ("-dirty" if _git("status", "--porcelain", "-uno", at=folder) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str, at: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def processor() -> str:
    """The processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def place(device: torch.device) -> str:
    """What a device is called by those who made it: the GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def describe() -> dict[str, Any]:
    """Everything that a run's environment.json records; no host name, user or path."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
