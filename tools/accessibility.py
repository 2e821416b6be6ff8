"""Hold pages of reports against the rules of WCAG 2 A and AA with axe-core, in a headless browser.

    python tools/accessibility.py reports/*/index.html

axe-core comes through npm, into a temporary folder; Chromium has to be installed. Every section of a page is
opened first. Exit code 1 if anything is violated.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

AXE = "axe-core@4.14.1"
WIDTHS = (1280, 390)

_PROBE = """
<script>%s</script>
<script>
for (const section of document.querySelectorAll("details")) section.open = true;
axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}).then(found => {
  const where = violation => violation.nodes.map(node => node.html.slice(0, 200)).slice(0, 5);
  const violations = found.violations.map(v => ({rule: v.id, where: where(v)}));
  const screens = document.documentElement.scrollHeight / 900, passes = found.passes.map(p => p.id);
  document.documentElement.dataset.axe = JSON.stringify({violations, passes, screens});
}, error => { document.documentElement.dataset.axe = JSON.stringify({error: String(error)}); });
</script>
"""


def browser() -> str | None:
    """The program of a browser that is installed here, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def axe(folder: Path) -> str:
    """The text of axe-core, installed through npm. Raises CalledProcessError where npm cannot get it."""
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        subprocess.run(["npm", "install", *quiet, AXE], cwd=folder, check=True, timeout=300)
    return script.read_text(encoding="utf-8")


def check(page: Path, width: int, program: str, script: str) -> dict[str, Any]:
    """What axe-core finds on a page: ``violations``, ``passes`` (rules), ``screens`` (of 900 pixels)."""
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "probed.html"
        probe = _PROBE % script.replace("</script", "<\\/script")
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), "utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={width},900"]
        options += ["--virtual-time-budget=60000", "--host-resolver-rules=MAP * ~NOTFOUND"]
        done = subprocess.run(
            [program, *options, probed.as_uri()], capture_output=True, text=True, check=True, timeout=300
        )
    found = re.search(r'data-axe="([^"]*)"', done.stdout)
    if found is None:
        raise RuntimeError(f"{page}: axe-core gave no answer")
    answer: dict[str, Any] = json.loads(html.unescape(found[1]))
    if "error" in answer:
        raise RuntimeError(f"{page}: {answer['error']}")
    return answer


def main() -> int:
    """Check the pages that the command line names."""
    program = browser()
    if program is None:
        print("no Chromium here")
        return 2
    script = axe(Path(tempfile.gettempdir()) / "flatbench-axe")
    bad = 0
    for page in map(Path, sys.argv[1:]):
        for width in WIDTHS:
            found = check(page, width, program, script)
            print(
                f"{page} at {width}: {len(found['violations'])} violations, {len(found['passes'])} rules "
                f"hold, {found['screens']:.1f} screens with everything open"
            )
            for violation in found["violations"]:
                bad += 1
                print(f"  {violation['rule']}: {violation['where']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
