"""Executes notebooks and keeps their outputs: python notebooks/execute.py [NOTEBOOK…]."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
#: seconds that a cell may take
TIMEOUT = 300


def execute(path: Path, working_folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in another folder. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(working_folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # `flatbench` is the one beside this interpreter; warnings would show where packages are installed
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    client.execute(env={**os.environ, "PATH": search, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"})
    for cell in notebook.cells:
        # bars and notes on the way are of no use to a reader
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    return notebook


def main() -> None:
    """Execute the named notebooks, or all, in one folder, so that what one makes serves the next."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            nbformat.write(execute(path, Path(folder)), path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
