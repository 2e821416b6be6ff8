"""Cells are safe in every format, whatever text they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatbench.report.tables import cells
from flatbench.report.tables.cells import Cell, number


@pytest.mark.parametrize(
    ("mean", "std", "decimals", "expected"),
    [
        (78.94, 1.26, 1, ("78.9", "1.3")),
        (17.958, 6.04, None, ("18.0", "6.0")),
        (0.02616, 0.0031, None, ("0.0262", "0.0031")),
        (0.001, 12.0, None, ("0.0", "12.0")),
        (-0.0004, 0.5, None, ("0.000", "0.500")),
        (1234.6, 20.2, None, ("1235", "20")),
        (1.234e-7, 2e-8, None, ("1.23e-7", "0.20e-7")),
        (2.5e8, None, None, ("2.50e8", "")),
        (5.0, float("nan"), None, ("5.00", "")),
        (0.0, 0.0, None, ("0.00", "0.00")),
    ],
)
def test_mean_and_spread_end_at_the_same_decimal(
    mean: float, std: float | None, decimals: int | None, expected: tuple[str, str]
) -> None:
    assert number(mean, std, decimals) == expected


def test_ranks_and_remarks() -> None:
    cell = Cell("78.9", "1.3", "n = 2", 1)
    assert cell.plain() == "78.9 ± 1.3 (n = 2)"
    assert cell.markdown() == "**78.9** ± 1.3 (n = 2)"
    assert cell.latex() == r"\textbf{78.9} {\small $\pm$ 1.3} (n = 2)"
    assert Cell("1", rank=2).latex() == r"\underline{1}"
    assert Cell("1", rank=2).markdown() == "*1*"


HOSTILE = [
    "a_b%",
    "<script>alert(1)</script>",
    "a | b",
    "| --- |",
    "line\nbreak\r\nand\x00null\u2028",
    "![x](javascript:alert(1))",
    "`code` **bold** _em_ ~~s~~ $x$ \\end{tabular}",
    r"\input{/etc/passwd} #1 ^2 & {",
    "&lt;script&gt;",
    "# heading",
    "1. item",
    "- item",
    "---",
    "===",
    "\u202ereversed",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_is_text(text: str) -> None:
    """Read back by a Markdown parser, the text comes out as it went in, and nothing else does."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    table = f"| h | i |\n|---|---|\n| {cells.markdown(text)} | end |\n"
    tokens = parser.parse(table)
    kinds = [token.type for token in tokens]
    assert kinds.count("tr_open") == 2
    assert kinds.count("td_open") == 2
    inline = [t for t in tokens if t.type == "inline"][2]
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children or []) == cells.one_line(text)
    paragraph = parser.parse(cells.markdown(text))
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_html_is_text(text: str) -> None:
    from html.parser import HTMLParser

    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "td"
            found.append(dict(attrs)["title"] or "")

        def handle_data(self, data: str) -> None:
            found.append(data)

    escaped = cells.markup(text)
    reader = Reader()
    reader.feed(f'<td title="{escaped}">{escaped}</td>')
    reader.close()
    assert found[0] == cells.one_line(text)
    assert "".join(found[1:]) == cells.one_line(text)


@given(st.text())
def test_latex_leaves_no_active_character(text: str) -> None:
    escaped = cells.latex(text)
    for command in (
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "textless",
        "textgreater",
        "textbar",
    ):
        escaped = escaped.replace(f"\\{command}{{}}", "")
    escaped = escaped.replace(r"\dots{}", "")
    for command in ("pm", "times", "leq", "geq", "lambda", "tau", "rho"):
        escaped = escaped.replace(f"$\\{command}$", "")
    escaped = escaped.replace("$-$", "")
    for character in "&%$#_{}":
        escaped = escaped.replace(f"\\{character}", "")
    assert not set(escaped) & set("\\&%$#_{}~^<>\n\r")


@given(st.text(), st.text())
def test_one_line(text: str, more: str) -> None:
    line = cells.one_line(text + more)
    assert len(line) <= 300
    assert line == " ".join(line.split())
    assert cells.one_line(line) == line
