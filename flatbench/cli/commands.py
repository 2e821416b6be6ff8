"""The command line: one function a command, no logic of its own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from flatbench.cli import options
from flatbench.cli.options import (
    ResultsOption,
    RootOption,
    SetOption,
    StudyArgument,
    TrustOption,
    VerifyOption,
    VersionOption,
)
from flatbench.config.names import plain_name
from flatbench.errors import FlatbenchError, InputError
from flatbench.machine.terminal import Terminal, TerminalHandler, quiet_controls

#: remarks on a study's runs that a terminal shows
MOST_NOTES = 8
#: typer's exit code for Ctrl-C
INTERRUPTED = 130

app = typer.Typer(
    name="flatbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Which way of LoRA fine-tuning finds flatter minima, does flatness buy generalization, "
    "and what does it cost?\n\n"
    "Exit codes: 0 done, 1 some runs failed, 2 bad input, 130 interrupted (Ctrl-C), "
    "143 stopped (SIGTERM); what was trained until then is saved.",
)


@app.callback()
def _common(version: VersionOption = False) -> None:
    """Options of the program itself."""


@app.command(name="list", epilog="Example: flatbench list")
def list_() -> None:
    """Studies, tasks, optimizers and measures, each with a line on what it is."""
    from flatbench.cli import listing

    Terminal().print(listing.everything())


@app.command(epilog="Example: flatbench show quickstart --set seeds=[0]")
def show(
    study: StudyArgument,
    set_: SetOption = None,
    results: ResultsOption = Path("results"),
    listed: Annotated[
        bool, typer.Option("--runs", help="List every run, with its id, seed and hyper-parameters.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Estimate hours on this GPU, memory, disk and download instead of counting runs: h100, "
            "a100, l40s, rtx4090, …, or a peak in TFLOP/s.",
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", help="Share of the peak that training is assumed to reach.")
    ] = 0.2,
    root: RootOption = None,
    trust_remote_code: TrustOption = None,
) -> None:
    """The runs that a study expands to, their states, and how long they will take. Nothing is run.

    Data and models that are not here yet are not downloaded: their sizes are those of the table of sources.
    """
    from flatbench import store
    from flatbench.cli import large
    from flatbench.config import study_files
    from flatbench.security import remote_code

    remote_code.grant(trust_remote_code or ())
    if gpu is None and not listed:
        content, source = study_files.read(study, set_ or (), unset=True)
        name = plain_name(content.get("name"), f"{source}: name")
        told = large.runs(study, set_ or (), store.StudyFolder(results, name))
        if told is not None:
            Terminal().print(told, soft_wrap=True)
            return
    from flatbench.cli import listing
    from flatbench.cli import planned as planning
    from flatbench.study import load

    loaded = load(study, set_ or (), roots=root or (), unset=True)
    folder = store.StudyFolder(results, loaded.name)
    console = Terminal()
    if gpu is not None:
        from flatbench.estimate import gpu_hours, gpus
        from flatbench.estimate.needs import needs

        found = gpu_hours.estimate(loaded, gpus.gpu(gpu), mfu)
        console.print(listing.cost(found, needs(loaded, found.costs)), soft_wrap=True)
        return
    console.print(planning.runs(loaded, folder, listed))
    console.print(planning.time_taken(loaded, folder), soft_wrap=True)


@app.command(epilog="Example: flatbench run quickstart --set train.epochs=1 --jobs 2")
def run(
    study: StudyArgument,
    set_: SetOption = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where results go: DIR/STUDY/runs/….")
    ] = Path("results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs side by side on this machine; 1 if not given.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor", metavar="NAME", help="Where runs run: local, slurm, ray; local if not given."
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site", metavar="FILE", help="YAML with the executor's options, retries, lease, trackers."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier results of these runs.")] = False,
    root: RootOption = None,
    trust_remote_code: TrustOption = None,
) -> None:
    """Train, tune and measure a study. Finished runs are kept, interrupted ones are resumed.

    Runs that failed are tried again; runs that diverged would diverge again and are kept. Started twice at
    once, on one machine or on several that share a folder, the two share the work.
    """
    from flatbench.orchestration import api
    from flatbench.security import remote_code

    remote_code.grant(trust_remote_code or ())
    console = Terminal()
    asked = (study, set_ or (), output, jobs, executor, site, fresh, root or ())
    for outcome in api.outcomes(*asked, console):
        console.print(escape(outcome.summary()))
        if outcome.failed:
            raise typer.Exit(1)


@app.command(epilog="Example: flatbench status quickstart")
def status(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study that was run, by its name or file.")],
    results: ResultsOption = Path("results"),
    json: Annotated[bool, typer.Option("--json", help="A JSON object a run, a line each.")] = False,
    verify: VerifyOption = False,
) -> None:
    """Progress of a study, from its run directories alone: whoever runs it, and wherever."""
    from flatbench.cli import status as found
    from flatbench.store.checksums import verifying

    with verifying(verify):
        runs, note = found.look(study, results)
    if json:
        typer.echo("\n".join(run.line() for run in runs))
    else:
        Terminal().print(found.tables(runs, note))


@app.command(epilog="Example: flatbench measure trained --data held-out.csv --measure critical_sharpness")
def measure(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER…",
            help="Run directories, or results folders of studies, which stand for their final runs. With "
            "--data: peft adapters, transformers models, or a Trainer's output with its checkpoint-*.",
        ),
    ],
    measures: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="A measure by name or label, or YAML such as '{name: hessian, space: adapter}'; "
            "if not given, all measures of the run's study, or critical_sharpness and sam_sharpness.",
        ),
    ] = None,
    memory: options.Memory = None,
    scratch: options.Scratch = None,
    data: options.Data = None,
    other: options.Other = None,
    base: options.Base = None,
    task: options.Task = None,
    text_columns: options.TextColumns = None,
    label_column: options.LabelColumn = None,
    output: options.Output = None,
    trust_remote_code: TrustOption = None,
) -> None:
    """Measure finished runs again or anew, or saved checkpoints of any training on data of yours."""
    import logging

    from flatbench.runs.remeasure import describe_measure, measure
    from flatbench.security import remote_code

    remote_code.grant(trust_remote_code or ())
    # what a long computation will need is said before it begins
    logging.basicConfig(handlers=[TerminalHandler()])
    logging.getLogger("flatbench").setLevel(logging.INFO)
    console = Terminal()
    if data is not None:
        from flatbench.cli.checkpoints import print_measured

        columns = None if text_columns is None else [name.strip() for name in text_columns.split(",")]
        named = {"base": base, "task": task, "text_columns": columns, "label_column": label_column}
        trusted = {"trust_remote_code": bool(trust_remote_code)}
        print_measured(
            console, checkpoints, data, other, measures or (), memory, scratch, output, named | trusted
        )
        return
    given: dict[str, object] = {"--other": other, "--base": base, "--task": task, "--output": output}
    given |= {"--text-columns": text_columns, "--label-column": label_column}
    for option, value in given.items():
        if value is not None:
            raise InputError(
                f"{option}: is for saved checkpoints, with --data; a study's runs bring their own"
            )
    for directory, label, stored in measure(checkpoints, measures or (), memory, scratch):
        console.print(escape(describe_measure(directory, label, stored)), soft_wrap=True)


@app.command(epilog="Example: flatbench report quickstart")
def report(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="A study that was run, by its name or file, or the results.parquet of an earlier report; "
            "or the folder of a training that flatbench.callbacks watched.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Where the report goes: DIR/STUDY/; reports if not given, or local/reports where that would "
            "write over a committed one.",
        ),
    ] = None,
    results: ResultsOption = Path("results"),
    html: Annotated[bool, typer.Option("--html", help="Also one self-contained page, index.html.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show published figures for these tasks beside it.")
    ] = False,
    published_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--published-file", metavar="FILE", help="Take published figures from this YAML file instead."
        ),
    ] = None,
    verify: VerifyOption = False,
) -> None:
    """Answer, tables (Markdown, CSV, LaTeX) and figures (PNG, PDF, SVG) of a study's results."""
    from flatbench import report as reports
    from flatbench.cli import versions
    from flatbench.report import watched
    from flatbench.store.checksums import verifying

    if watched.is_watched(Path(study)):
        from flatbench.cli.checkpoints import print_watched

        print_watched(Terminal(), Path(study), output or Path("reports"))
        return
    with verifying(verify):
        loaded = reports.open_results(study, results)
    folder, moved = reports.destination(output, loaded.name)
    publications = reports.load_publications(published_file or ()) if published or published_file else ()
    made = reports.write_report(loaded, folder, html=html, publications=publications)
    console = Terminal()
    console.print(reports.in_short(loaded))
    for note in made.notes[:MOST_NOTES]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if len(made.notes) > MOST_NOTES:
        console.print(f"note: and {len(made.notes) - MOST_NOTES} more, in the report")
    for line in filter(None, (versions.told(study, results, loaded.content["study"]), moved)):
        console.print(escape(line), soft_wrap=True)
    opens = "index.html" if html else "README.md"
    console.print(
        f"{len(made.files)} files in {escape(str(folder))}; {opens} is the one to open", soft_wrap=True
    )


@app.command(epilog="Example: flatbench compare reports/quickstart quickstart")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Earlier results: a study, a file, a folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Later results.")],
    results: ResultsOption = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Write it there too: Markdown, CSV, LaTeX."),
    ] = None,
) -> None:
    """What differs between two results and by how much, with intervals; settings and versions that differ."""
    from flatbench import report as reports

    found = reports.Comparison(reports.open_results(a, results), reports.open_results(b, results))
    console = Terminal()
    console.print(found.terminal())
    if output is not None:
        console.print(f"{len(found.write(output))} files in {escape(str(output))}")


@app.command(epilog="Example: flatbench doctor paper-glue")
def doctor(
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="Check what this study needs, too.")
    ] = None,
    set_: SetOption = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where results are to go: the disk that is asked.")
    ] = Path("results"),
    root: RootOption = None,
) -> None:
    """Versions, devices, threads, what extras lack; of a study whether its data, models and disk are there.

    Of data on the hub a few rows are fetched, of a model its configuration and tokenizer; nothing whole.
    Exit code 1 where something that the study needs is not to be had.
    """
    from flatbench.cli import listing

    console = Terminal()
    if study is None:
        console.print(listing.machine())
        return
    from flatbench.estimate import checkup
    from flatbench.study import load

    loaded = load(study, set_ or (), roots=root or ())
    found = checkup.check(loaded, output)
    for one in found:
        console.print(escape(f"{one.mark}  {one.line}"), soft_wrap=True)
    if not all(one.good for one in found):
        raise typer.Exit(1)


@app.command(epilog="Example: flatbench convert openai/clip-vit-base-patch16 --output clip")
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="A new folder.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the hub.")
    ] = None,
) -> None:
    """Write a model of pickled weights as safetensors, which studies read. Reads weights only, no code."""
    from flatbench.models.convert import convert

    written = convert(model, output, revision)
    folder = escape(str(output))
    Terminal().print(
        f"{len(written)} files of weights; name it as model.name_or_path: {folder}", soft_wrap=True
    )


def main() -> NoReturn:
    """Entry point: what is wrong with the input ends in one line and exit code 2."""
    from flatbench.machine import stopping
    from flatbench.security.secrets import redacted

    quiet_controls()
    errors = Terminal(stderr=True, soft_wrap=True, highlight=False)
    try:
        app(standalone_mode=True)
    except InputError as error:
        errors.print(f"error: {escape(redacted(str(error)))}")
        sys.exit(2)
    except FlatbenchError as error:
        errors.print(f"error: {escape(redacted(str(error)))}")
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            errors.print("interrupted; run the same command again to go on")
            sys.exit(128 + (stopping.requested() or signal.SIGINT))
        raise
    sys.exit(0)
