"""Study files of other habits are read as YAML 1.2 says, or refused in a line and in time."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from flatbench import study
from flatbench.config import plain, study_files
from flatbench.config.yaml import parse
from flatbench.errors import (
    DivergedError,
    FlatbenchError,
    InputError,
    NotApplicableError,
    StorageError,
)
from flatbench.machine.terminal import Terminal, TerminalHandler, quiet_controls
from flatbench.security.secrets import looks_like_a_secret, redacted
from flatbench.store import StudyFolder, events
from tests.conftest import SMALL
from tests.test_store import make

CORE: list[tuple[str, Any]] = [
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("-3", -3),
    ("1e-3", 1e-3),
    ("+.5", 0.5),
    ("-1.5E+3", -1500.0),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("yes", "yes"),
    ("off", "off"),
    ("2001-01-01", "2001-01-01"),
    ("true", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
    (
        "a: &x {b: 1}\nb: &y {c: 2}\nd: {<<: [*x, *y], e: 3}",
        {"a": {"b": 1}, "b": {"c": 2}, "d": {"b": 1, "c": 2, "e": 3}},
    ),
]


@pytest.mark.parametrize(("text", "value"), CORE)
def test_the_core_schema(text: str, value: Any) -> None:
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 2}", "'a' is given twice"),
        ("[" + "1, " * 400_000 + "1]", "400000 commas and lines; at most 100000"),
        ("- 1\n" * 200_000, "200000 commas and lines"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("1" * 5000, "digits"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse(text)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [True]}, "seeds: no switch"),
        ({"seeds": ["1:30"]}, "seeds"),
        ({"train": {**SMALL["train"], "epochs": True}}, "train.epochs: no switch"),
        ({"train": {**SMALL["train"], "threads": 10**9}}, "train.threads: .*less than or equal to 4096"),
        ({"train": {**SMALL["train"], "processes": 10**6}}, "train.processes: .*less than or equal to 4096"),
    ],
)
def test_values_beyond_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study.Study({**SMALL, **change}, "small.yaml")


SECRETS = [
    "hf_" + "a1" * 17,
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1" * 20,
    "sk-" + "a1" * 24,
    "AKIA" + "A1" * 8,
    "https://me:password@example.org/data",
    # siblings that the issue does not name
    "glpat-" + "a1" * 10,
    "xoxb-" + "a1" * 12,
    "ASIA" + "A1" * 8,
    "AIza" + "a1" * 17 + "b",
    f"eyJ{'a1' * 10}.eyJ{'b2' * 10}.{'c3' * 10}",
    "-----BEGIN RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_credentials_are_no_values_of_a_study(secret: str, tmp_path: Path) -> None:
    for place in (
        {"variables": {"data": secret}},
        {"description": f"with {secret}"},
        {"model": {**SMALL["model"], "revision": secret}},
    ):
        with pytest.raises(InputError, match="looks like a credential") as refused:
            plain.plain({**SMALL, **place}, "small.yaml")
        assert secret not in str(refused.value)
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(SMALL))
    with pytest.raises(InputError, match=r"variables\.data: looks like a credential"):
        study_files.read(str(file), [f"variables.data={secret}"])
    assert secret.rpartition("@")[0][-8:] not in redacted(f"cannot open {secret}") or "@" not in secret
    assert "redacted" in redacted(f"cannot open {secret}")


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "my_secret", "db.password", "GITHUB_PAT", "api_key", "wandb-key"),
        *("accessToken", "tokens", "apiKey", "secretAccessKey", "passphrase", "credentials"),
    ],
)
def test_names_of_credentials(name: str) -> None:
    assert looks_like_a_secret("anything", name)
    with pytest.raises(InputError, match="looks like a credential"):
        plain.plain({"variables": {name: "anything"}}, "small.yaml")


@pytest.mark.parametrize(
    "name", ["data", "path", "tokenizer", "keyboard", "pattern", "encoder", "compat", "monkey", "secretary"]
)
def test_names_of_other_things(name: str) -> None:
    assert plain.plain({"variables": {name: "data/glue"}}, "small.yaml")


@pytest.mark.parametrize("secret", SECRETS)
def test_credentials_in_what_is_typed_and_recorded(secret: str, tmp_path: Path) -> None:
    """In messages about `--set`, in events whatever their depth, in failures, environments and skips."""
    for typed in (secret, f"train.lr=[{secret}", f"task.name.x={secret}", f"variables.x.y={secret}"):
        with pytest.raises(InputError) as refused:
            study_files.read(write_small(tmp_path), [typed])
        assert secret not in str(refused.value)
    with pytest.raises(InputError) as refused:
        study_files.read(write_small(tmp_path), ["variables.hf_token=[anything"])
    assert "anything" not in str(refused.value)
    run = make(StudyFolder(tmp_path, "s"))
    events.record(run.path, "damaged", files={"a.json": f"holds {secret}", "b": [secret]}, error=secret)
    run.write("failure", {"state": "failed", "error": secret, "traceback": f"a\n{secret}\n"})
    run.write("environment", {"restarted": f"no {secret}", "versions": {"x": secret}})
    run.write("measures/cost", {"config": {}, "skipped": f"cannot open {secret}"})
    for path in run.path.rglob("*.json*"):
        assert secret not in path.read_text(), path


def write_small(folder: Path) -> str:
    (folder / "small.yaml").write_text(json.dumps(SMALL))
    return str(folder / "small.yaml")


HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202etxt.exe\u2066 \x9b31m \r\x08"


def test_nothing_of_a_text_reaches_the_terminal_but_its_letters() -> None:
    table = Table(f"head{HOSTILE}")
    table.add_row(f"cell{HOSTILE}")
    for shown in (f"line{HOSTILE}", table, f"[bold]{HOSTILE}[/bold]"):
        written = io.StringIO()
        Terminal(file=written, width=200, force_terminal=True).print(shown)
        own = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())  # rich's own colours
        assert all(c.isprintable() or c == "\n" for c in own), repr(own)


def test_nothing_of_a_message_reaches_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What libraries log, and what errors quote."""
    handler = TerminalHandler(written := io.StringIO())
    handler.emit(logging.makeLogRecord({"msg": f"reading {HOSTILE}"}))
    assert written.getvalue().removesuffix("\n").isprintable()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    quiet_controls()
    assert "\x1b" not in warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1)
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.makeLogRecord({"msg": HOSTILE, "levelno": logging.WARNING}))
    said = capsys.readouterr().err
    assert "\\x1b" in said
    assert "\x1b" not in said
    for kind in (InputError, NotApplicableError, DivergedError, StorageError, FlatbenchError):
        message = str(kind(f"two\n  lines {HOSTILE}" + "x" * 10_000))
        assert message.isprintable()
        assert message.startswith("two lines ")
        assert len(message) < 3000


@pytest.mark.brief
def test_every_command_shows_it_so(tmp_path: Path) -> None:
    """A description and a label from a file, by `show`; 80,000 characters of it at once, and cut."""
    content = {
        **SMALL,
        "description": HOSTILE + "x" * 80_000,
        "methods": [{"name": "lora", "adapter": "lora"}],
    }
    (tmp_path / "small.yaml").write_text(json.dumps(content))
    from typer.testing import CliRunner

    from flatbench import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = CliRunner().invoke(cli.app, ["show", "small.yaml"])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\u202e" not in done.output
    assert len(done.output) < 20_000
