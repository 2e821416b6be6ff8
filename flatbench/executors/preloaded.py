"""Import what a run needs, before processes are forked off (see `flatbench.machine.forking`)."""

from __future__ import annotations

import gc

import flatbench.runs.finish  # noqa: F401

# what was imported stays for good: no collector need go through it again, of which the last time, when a
# process ends, takes a second; and the memory stays shared between the forks
gc.collect()
gc.freeze()
