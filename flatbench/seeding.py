"""Separate named random streams, each derived from a run's one seed.

Two methods with the same seed see the same data order, initial weights, label noise and dropout, so
their results can be paired; drawing more numbers from one stream never moves another.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for the stream named ``stream`` of the run seed ``seed``.

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
    True
    >>> derive_seed(0, "order") == derive_seed(0, "dropout")
    False
    """
    text = "/".join([str(seed), *map(str, stream)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
