"""A process's part of a divided parameter."""

from __future__ import annotations

from torch import nn


class Shard(nn.Parameter):
    """A process's part of a parameter that is divided among the processes of the group, entry by entry.

    Methods on all parameters treat it as any other, and `Buffers` takes norms over all parts.
    """
