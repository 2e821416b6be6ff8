"""Place of a report: never over one that is committed, unless that is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

#: where reports go, and where they go instead of over a committed one (which git ignores in a checkout)
USUAL, INSTEAD = Path("reports"), Path("local/reports")


def destination(output: str | Path | None, name: str) -> tuple[Path, str]:
    """The folder of a study's report, and a line on why it is not the usual one, or "".

    Args:
        output: the folder that holds reports, as it was asked for; None if it was not.
        name: the study's name.
    """
    if output is not None:
        return Path(output) / name, ""
    if not _is_committed(USUAL / name):
        return USUAL / name, ""
    why = f"{USUAL / name} is committed and stays as it is; --output {USUAL} would write over it"
    return INSTEAD / name, why


def _is_committed(folder: Path) -> bool:
    """Whether git has files of this folder; no git and no checkout have none."""
    if not folder.is_dir():
        return False
    # a checkout's own configuration could name a program to run for the first option
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "--", "."]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(done.stdout.strip())
