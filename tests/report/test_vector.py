"""A figure made small is the same figure: every point and word is there, and nothing ends an attribute."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as Tree

import pytest

from flatbench.report.figures import style, vector

ROOT = Path(__file__).parents[2]


def drawn(tmp_path: Path, title: str = "a title") -> str:
    from matplotlib.figure import Figure

    with style.styled():
        figure = Figure(figsize=(3, 2))
        axis = figure.subplots()
        axis.plot(range(50), [i * i for i in range(50)], "o", label="points")
        axis.plot(range(50), range(50), "-", label="a line")
        axis.fill_between(range(50), range(50), [2 * i for i in range(50)], alpha=0.2)
        axis.set_title(title)
        axis.legend()
        figure.savefig(tmp_path / "figure.svg", metadata={"Date": None})
    return (tmp_path / "figure.svg").read_text()


def places(root: Tree.Element) -> list[tuple[float, float]]:
    """Where markers stand, in the order in which they are drawn."""
    uses = [e for e in root.iter() if e.tag.endswith("use")]
    return [(float(e.get("x", 0)), float(e.get("y", 0))) for e in uses]


def test_nothing_but_digits_and_words_for_machines_goes(tmp_path: Path) -> None:
    whole = drawn(tmp_path)
    small = vector.small(whole)
    assert len(small) < 0.4 * len(whole)
    before, after = Tree.fromstring(whole), Tree.fromstring(small)
    assert len(places(after)) >= 50
    for old, new in zip(places(before), places(after), strict=True):
        assert new == pytest.approx(old, abs=0.006)
    words = [[e.text for e in root.iter() if e.tag.endswith("text")] for root in (before, after)]
    assert words[0] == words[1]
    # everything that is pointed at is there, once
    ids = [e.get("id") for e in after.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"#(i\d+)", small)) <= set(ids)
    # every style that was used is a rule now
    rules = next(e for e in after.iter() if e.tag.endswith("style")).text or ""
    for name in {e.get("class") for e in after.iter() if e.get("class")}:
        assert f".{name}{{" in rules
    old_styles = {re.sub(r"\s", "", e.get("style", "")) for e in before.iter() if e.get("style")}
    shapes = [s for s in old_styles if "font" not in s]
    assert all(s.rstrip(";") in rules.replace(" ", "") for s in shapes)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    hostile = "\"><script>alert(1)</script> & 'quoted' #1"
    address = vector.address(vector.small(drawn(tmp_path, hostile)))
    assert not set(address) & set('<>"#&')
    root = Tree.fromstring(unquote(address).removeprefix("data:image/svg+xml,"))
    titles = [e.text for e in root.iter() if e.tag.endswith("text") and "script" in (e.text or "")]
    assert titles
    assert not [e for e in root.iter() if e.tag.endswith("script")]
