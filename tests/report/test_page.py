"""The page: complete and safe by itself, and at work in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flatbench.report import Results, write_report
from tests.report.synthetic import make, plain, results

pytestmark = pytest.mark.slow


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")


class Reader(HTMLParser):
    """Every tag with its attributes, and the ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


def lost(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    if (method, seed) == ("flat_lora", 1):
        return {"state": "failed", "error": "ValueError: <img src=x onerror=alert(1)> & more"}
    return plain(method, condition, seed, choice)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    report = write_report(results(root, lost, methods=("lora", "sam", "flat_lora")), root / "out", html=True)
    assert "index.html" in report.files
    return root / "out/index.html"


def test_nothing_is_fetched_and_everything_linked_is_there(page: Path) -> None:
    reader = Reader(page.read_text())
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert len(ids) == len([1 for _, attributes in reader.tags if "id" in attributes])
    for address in reader.attributes("a", "href"):
        assert address is not None
        assert address[1:] in ids if address[0] == "#" else (page.parent / address).is_file()
    sources = [s for s in reader.attributes("img", "src") if s is not None]
    assert len(sources) >= 6
    sources += [s for s in reader.attributes("source", "srcset") if s is not None]
    assert all(source.startswith("data:image/svg+xml,") for source in sources)
    assert all(" " not in s for s in reader.attributes("source", "srcset") if s)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"iframe", "object", "embed", "base"})
    assert all(address == "data:," for address in reader.attributes("link", "href"))


def test_figures_have_words(page: Path) -> None:
    reader = Reader(page.read_text())
    alts = [a["alt"] for tag, a in reader.tags if tag == "img" and "src" in a]
    assert all(alt and len(alt) > 20 for alt in alts)


def test_every_row_of_results_leads_to_its_runs(page: Path) -> None:
    text = page.read_text()
    section = text[text.index('<details id="results"') :]
    section = section[: section.index("</details>")]
    rows = re.findall(r"<tr>(?:(?!</tr>).)*</tr>", section, flags=re.DOTALL)[1:]
    assert len(rows) == 3
    for row in rows:
        assert len(re.findall(r'href="#run-[0-9a-f]{16}"', row)) == 3


def test_text_from_elsewhere_is_text(page: Path) -> None:
    text = page.read_text()
    assert "ValueError: &lt;img src=x onerror=alert(1)&gt; &amp; more" in text
    assert "<img src=x" not in text


def test_hostile_names(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>{{ 7*7 }}'
    folder = make(tmp_path / "r", description=hostile, conditions=("", hostile))
    content = folder.read()
    content["study"]["name"] = hostile
    folder.write(content)
    write_report(Results.load(folder), tmp_path / "out", html=True)
    reader = Reader((tmp_path / "out/index.html").read_text())
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert "{{ 7*7 }}" in (tmp_path / "out/index.html").read_text()


def test_same_results_same_page(tmp_path: Path) -> None:
    folder = make(tmp_path, measures=("cost",))
    for name in ("one", "two"):
        write_report(Results.load(folder), tmp_path / name, html=True)
    assert (tmp_path / "one/index.html").read_bytes() == (tmp_path / "two/index.html").read_bytes()


PROBE = """
<script>
const found = {};
try {
  const box = selector => document.querySelector(selector).getBoundingClientRect();
  found.screen = innerHeight;
  found.answer = box(".found").bottom;
  found.figure = box("#found figure img").bottom;
  const heads = [...document.querySelectorAll("#methods th")];
  const first = heads.find(h => h.textContent.includes("Test accuracy"));
  found.accuracy = first.getBoundingClientRect().right - document.documentElement.clientWidth;
  const search = document.querySelector("#search");
  const look = text => {
    search.value = text;
    search.dispatchEvent(new Event("input"));
    const rows = [...document.querySelectorAll("details[open] tbody tr")];
    return rows.filter(r => !r.hidden).map(r => r.textContent);  // what is off the screen has no boxes yet
  };
  const before = [...document.querySelectorAll("details")].map(d => d.open);
  found.hits = look("failed ValueError");
  found.section = [...document.querySelectorAll("main > details[open]")].map(d => d.id);
  look("");
  document.querySelector(".look").click();  // beside what was lost
  const listed = [...document.querySelectorAll("#runs tbody tr")];
  found.lost = listed.filter(r => !r.hidden).map(r => r.textContent);
  found.none = look("no such words").length;
  look("seed 1");
  const place = [...document.querySelectorAll("#runs th")].findIndex(h => h.textContent.startsWith("Seed"));
  found.seed = [...new Set(listed.filter(r => !r.hidden).map(r => r.cells[place].textContent))];
  look("");
  const after = [...document.querySelectorAll("details")];
  found.restored = after.every((d, i) => d.open === before[i] && !d.hidden);
  const table = document.querySelector("#results table");
  const cells = [...table.tHead.rows[0].cells];
  const column = cells.findIndex(h => h.textContent.trim().startsWith("Test accuracy"));
  const read = i => [...table.tBodies[0].rows].map(r => r.cells[i].textContent.trim());
  cells[column].querySelector("button").click();
  found.ascending = read(column).map(parseFloat);
  found.sorted = cells[column].getAttribute("aria-sort");
  cells[column].querySelector("button").click();
  found.descending = read(column).map(parseFloat);
  cells[0].querySelector("button").click();
  found.names = read(0);
  found.unsorted = cells[column].getAttribute("aria-sort");
  document.querySelector("figure button").click();
  const dialog = document.querySelector("dialog");
  found.open = dialog.open;
  const large = dialog.querySelector("img");
  found.enlarged = large.src === document.querySelector("figure img").currentSrc;
  found.vector = large.src.startsWith("data:image/svg+xml,");
  large.click();
  found.closed = !dialog.open;
  const images = [...document.querySelectorAll("figure img")];
  found.broken = images.filter(i => !(i.complete && i.naturalWidth)).length;
  for (const section of document.querySelectorAll("details")) section.open = true;
  const boxes = [...document.querySelectorAll("details .scroll, details .list")];
  found.unseen = boxes.filter(b => b.getBoundingClientRect().height < 20).map(b => b.ariaLabel);
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
} catch (error) { found.error = String(error); }
document.documentElement.dataset.found = JSON.stringify(found);
</script>
"""


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_in_a_browser(page: Path, tmp_path: Path, width: int, height: int) -> None:
    """The first screen holds answer and figure; search, sorting, enlarging work; no error, no request."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},{height}",
            f"--log-net-log={log}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(
        re.search(r"data-found=\"([^\"]*)\"", done.stdout).group(1).replace("&quot;", '"')  # type: ignore[union-attr]
    )
    assert "error" not in found
    assert found["ascending"] == sorted(found["ascending"])
    assert found["descending"] == sorted(found["ascending"], reverse=True)
    assert len(set(found["ascending"])) > 1
    assert found["sorted"] == "ascending"
    assert found["unsorted"] is None
    assert found["names"] == ["flat_lora", "lora", "sam"]
    assert found["answer"] <= found["screen"]
    assert found["figure"] <= found["screen"]
    assert found["accuracy"] <= 0  # seen without scrolling sideways
    assert found["hits"]
    assert all("ValueError" in row for row in found["hits"])
    assert "runs" in found["section"]
    assert len(found["lost"]) == 1
    assert "ValueError" in found["lost"][0]
    assert found["none"] == 0
    assert found["seed"] == ["1"]  # not 0.1, nor a hash that holds a 1
    assert found["unseen"] == []  # whatever is opened is there, on a phone too
    assert found["restored"]
    assert found["open"]
    assert found["vector"]
    assert found["enlarged"]
    assert found["closed"]
    assert found["broken"] == 0
    assert found["overflow"] <= 0
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    hosts = re.findall(r'"url":"(https?:[^"]*)"', log.read_text())
    own = [h for h in hosts if not re.match(r"https?://[^/]*(google|gvt1|chrom)", h)]
    assert own == []
