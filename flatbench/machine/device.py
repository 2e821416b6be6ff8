"""Choice of the device that models are put on."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The first GPU that this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
