"""Options that several commands have, and those by which `flatbench measure` knows saved checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatbench.version import __version__

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory budget of curvature, as 2GB; half of what is available if not given.",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        "--scratch",
        metavar="DIR",
        help="Folder for the vectors of eigenvalue searches that the memory does not hold.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE|HUB",
        help="Examples to measure saved checkpoints on: a CSV, TSV, JSON, JSON-lines or parquet file, or "
        "NAME:SPLIT on the hub.",
    ),
]
Other = Annotated[
    str | None,
    typer.Option(
        "--other",
        metavar="FILE|HUB",
        help="Other examples, for '{name: relative_critical_sharpness, against: other}'.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model of adapters, if not the one that they name."),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="TYPE", help="What adapters are for that do not say it: SEQ_CLS, CAUSAL_LM, …"
    ),
]
TextColumns = Annotated[
    str | None,
    typer.Option("--text-columns", metavar="NAMES", help="Column of the text, or two of a pair: a,b."),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="Column of the label.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR", help="Write the table there (CSV, parquet, Markdown), with a figure."
    ),
]

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A predefined study, or a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value of the study, as train.epochs=1."),
]
RootOption = Annotated[
    list[str] | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Let the study read here too, beside its own folder, the working directory and paths in --set.",
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code",
        metavar="MODEL",
        help="Run the Python code that comes with this model, if the study asks for it.",
    ),
]
ResultsOption = Annotated[
    Path, typer.Option("--results", metavar="DIR", help="Where results are: DIR/STUDY/runs/….")
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read every file of finished runs and hold it against its checksum, however it looks.",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flatbench {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
]
