"""Electrical energy of a stretch of work, from the counters of GPUs (NVML) or processor packages (RAPL)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

#: where Linux shows the counters of processors
POWERCAP = Path("/sys/class/powercap")
#: a package's counter begins anew after some 260 kJ, which takes minutes at the highest powers
_LOOK_SECONDS = 20.0


class _Counters(Protocol):
    source: str

    def joules(self) -> list[float]: ...

    #: joules after which each counter begins anew; infinite for one that does not
    ranges: list[float]


class _Packages:
    """RAPL's counters of every processor package (without memory), in joules.

    Raises OSError if there are none, or they may not be read.
    """

    source = "rapl packages, whole machine"

    def __init__(self) -> None:
        zones = [p for p in sorted(POWERCAP.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", p.name)]
        # psys, beside the packages, would count them twice
        zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not zones:
            raise OSError("this machine shows no energy counters of its processor (Linux's powercap)")
        self._files = [zone / "energy_uj" for zone in zones]
        self.ranges = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in zones]
        self.joules()

    def joules(self) -> list[float]:
        try:
            return [int(path.read_text()) / 1e6 for path in self._files]
        except PermissionError as error:
            raise OSError(f"{error.filename} is for the administrator only") from None


class _GPUs:
    """NVML's counters of whole GPUs, in joules since the driver was loaded.

    Args:
        devices: as torch numbers them.

    Raises OSError if they cannot be had.
    """

    source = "nvml, whole GPUs"

    def __init__(self, devices: Sequence[int]) -> None:
        try:
            import pynvml
        except ImportError:
            raise OSError(
                "NVML is asked through nvidia-ml-py: pip install 'flatbench-lora[energy]'"
            ) from None
        self._nvml, self._error = pynvml, pynvml.NVMLError
        try:
            pynvml.nvmlInit()
            # by their names, for CUDA_VISIBLE_DEVICES numbers them otherwise than NVML does
            names = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in devices]
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        except self._error as error:
            raise OSError(f"NVML: {error}") from None
        self.ranges = [float("inf")] * len(devices)
        self.joules()

    def joules(self) -> list[float]:
        try:
            return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for h in self._handles]
        except self._error as error:
            raise OSError(f"NVML: {error}") from None


class EnergyMeter:
    """Joules of stretches of work on GPUs, or on the processor.

    The counters are those of whole devices: whatever else runs on them is counted too. Where there are none
    there is no number, but the reason.

    Args:
        device: where the work is done; on the CPU it is all packages of the machine.
        devices: the GPUs that take part, as torch numbers them; ``device`` alone if empty.

    Attributes:
        source: where the number comes from.
        missing: why there is none.
    """

    def __init__(self, device: torch.device, devices: Sequence[int] = ()) -> None:
        self._counters: _Counters | None = None
        self._joules = 0.0
        self._last: list[float] | None = None
        self._last_look = 0.0
        self.source: str | None = None
        self.missing: str | None = None
        try:
            self._counters = _counters(device, devices)
            self.source = self._counters.source
        except (OSError, ValueError) as reason:
            self.missing = str(reason)

    def start(self) -> None:
        """Count from now on."""
        self._count()

    def look(self) -> None:
        """Read the counters if it is time to, lest one begins anew twice in between."""
        if self._last is not None and time.monotonic() - self._last_look > _LOOK_SECONDS:
            self._count()

    def stop(self) -> None:
        """Count no more, until `start`."""
        self._count()
        self._last = None

    def _count(self) -> None:
        """Add what was used since the last look, if it was counting, and go on counting."""
        if self._counters is None:
            return
        self._last_look = time.monotonic()
        try:
            now = self._counters.joules()
        except (OSError, ValueError) as reason:
            self._give_up(str(reason))
            return
        for before, after, size in zip(self._last or now, now, self._counters.ranges, strict=True):
            self._joules += after - before if after >= before else after - before + size
        self._last = now

    def _give_up(self, reason: str) -> None:
        self._counters, self._last, self.missing = None, None, reason

    @property
    def joules(self) -> float | None:
        """What was counted so far; None if a part of it could not be."""
        if self._last is not None:
            self._count()
        return None if self.missing else self._joules

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {"joules": self.joules, "source": self.source, "missing": self.missing}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on counting after an interruption; None stands for work of which nothing was counted."""
        if state is None:
            self._give_up("a part of the training was not metered")
        elif state["missing"]:
            self._give_up(state["missing"])
        elif self.missing is None and self.source != state["source"]:
            self._give_up(f"a part of the training was metered otherwise ({state['source']}, {self.source})")
        elif self.missing is None:
            self._joules += state["joules"]


def _counters(device: torch.device, devices: Sequence[int]) -> _Counters:
    if device.type == "cuda":
        return _GPUs(list(devices) or [device.index or 0])
    if device.type != "cpu":
        raise OSError(f"no energy counters are known for {device.type}")
    return _Packages()
