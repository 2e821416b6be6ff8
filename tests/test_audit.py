"""The audit of dependencies fails for what it finds, and passes only for a network that is not there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
assert _spec is not None
assert _spec.loader is not None
audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(audit)

FLAW = {"id": "CVE-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}


def said(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.parametrize(
    ("code", "output", "errors", "expected", "text"),
    [
        (1, said({"name": "a", "version": "1", "vulns": [FLAW]}), "", 1, "a 1: CVE-1, fixed in 2.0"),
        (1, said({"name": "a", "version": "1", "vulns": [{**FLAW, "fix_versions": []}]}), "", 1, "none"),
        (0, said({"name": "a", "version": "1", "vulns": []}), "", 0, "no known vulnerability in 1 packages"),
        (0, said({"name": "a", "skip_reason": "?"}), "", 0, "audit skipped"),
        (1, "", "requests.exceptions.ConnectionError: …", 0, "audit skipped: offline"),
        (1, "", "timed out", 0, "audit skipped: offline"),
        (1, "", "TypeError: a bug", 2, "pip-audit failed (exit code 1): TypeError: a bug"),
        (2, "usage: …", "unrecognized arguments", 2, "pip-audit failed"),
    ],
)
def test_verdicts(code: int, output: str, errors: str, expected: int, text: str) -> None:
    found, said = audit.verdict(code, output, errors)
    assert found == expected
    assert text in said


@pytest.mark.slow
def test_pip_audit_understands_the_call(tmp_path: Path) -> None:
    """Whatever the network: a verdict, and no complaint about options or the file."""
    (tmp_path / "constraints.txt").write_text("packaging==25.0\n")
    done = audit.audited(tmp_path / "constraints.txt")
    code, text = audit.verdict(done.returncode, done.stdout, done.stderr)
    assert code == 0, text


def test_every_version_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert len(pinned) > 50
    assert [line for line in pinned if "==" not in line] == []
