"""Looks up known vulnerabilities of the pinned dependencies; without a network it says so and passes.

python tools/audit.py [constraints.txt]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

#: what pip-audit, requests and urllib3 say when the vulnerability service cannot be reached
OFFLINE = (
    "ConnectionError",
    "Connection refused",
    "Max retries exceeded",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Failed to resolve",
    "Network is unreachable",
    "timed out",
    "Timeout",
    "ProxyError",
    "Could not connect",
    "Service Unavailable",
)


def audited(constraints: Path) -> subprocess.CompletedProcess[str]:
    """pip-audit on pinned versions as they stand in the file, with its findings as JSON."""
    options = ["--requirement", str(constraints), "--no-deps", "--disable-pip", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "15", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "timed out")


def verdict(code: int, output: str, errors: str) -> tuple[int, str]:
    """Exit code and a line for each finding: 1 for vulnerabilities, 0 for none or no network, 2 else."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(sign in errors for sign in OFFLINE):
            return 0, "audit skipped: offline, the service that knows vulnerabilities cannot be reached"
        return 2, f"pip-audit failed (exit code {code}): {errors.strip()[-2000:]}"
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]
    if found:
        return 1, "\n".join(found)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return 0, "audit skipped: the package index that is reached from here tells no vulnerabilities"
    note = f"; not known to the service: {', '.join(skipped)}" if skipped else ""
    return 0, f"no known vulnerability in {len(packages) - len(skipped)} packages{note}"


def main() -> None:
    """Print the verdict and exit with its code."""
    done = audited(Path(sys.argv[1] if len(sys.argv) > 1 else "constraints.txt"))
    code, text = verdict(done.returncode, done.stdout, done.stderr)
    print(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
