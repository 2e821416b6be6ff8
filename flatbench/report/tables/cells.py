"""Cells of a table, and their text in Markdown, LaTeX, HTML and on a terminal, safe whatever they hold."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from dataclasses import dataclass

from flatbench.report.numbers import fixed, rounded

ABSENT = "–"
_MOST_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)  # a report may have hundreds of thousands
class Cell:
    """One cell.

    Attributes:
        text: the value.
        spread: standard deviation, shown after ±.
        remark: shown after the value, in brackets.
        rank: 1 for the best of its column, 2 for the second, 0 else.
        value: the number that the cell sorts by.
    """

    text: str
    spread: str = ""
    remark: str = ""
    rank: int = 0
    value: float | None = None

    def plain(self) -> str:
        """Without emphasis."""
        spread = f" ± {self.spread}" if self.spread else ""
        return f"{self.text}{spread} ({self.remark})" if self.remark else self.text + spread

    def markdown(self) -> str:
        """GitHub's Markdown: the best bold, the second in italics."""
        mark = ("", "**", "*")[self.rank] if self.text else ""
        text = f"{mark}{markdown(self.text)}{mark}"
        text += f" ± {markdown(self.spread)}" if self.spread else ""
        return f"{text} ({markdown(self.remark)})" if self.remark else text

    def latex(self) -> str:
        """The best bold, the second underlined, the spread small."""
        command = ("%s", r"\textbf{%s}", r"\underline{%s}")[self.rank]
        text = command % latex(self.text)
        if self.spread:
            text += rf" {{\small $\pm$ {latex(self.spread)}}}"
        return f"{text} ({latex(self.remark)})" if self.remark else text


def number(mean: float, std: float | None = None, decimals: int | None = None) -> tuple[str, str]:
    """A mean and its standard deviation as text, to the same decimal place.

    Args:
        decimals: how many; by default as many as give the larger of the two three significant digits.
    """
    mean = rounded(mean)
    spread = None if std is None or math.isnan(std) else rounded(std)
    if decimals is None:
        size = max(abs(mean), spread or 0.0)
        exponent = math.floor(math.log10(size)) if size > 0 else 0
        if not -4 <= exponent < 6:
            scaled = number(mean / 10**exponent, None if spread is None else spread / 10**exponent, 2)
            return f"{scaled[0]}e{exponent}", f"{scaled[1]}e{exponent}" if scaled[1] else ""
        decimals = max(0, 2 - exponent)
    text = fixed(mean, decimals)
    if float(text) == 0:
        text = text.lstrip("-")
    return text, "" if spread is None else fixed(spread, decimals)


def one_line(text: str, limit: int = 300) -> str:
    """Text from elsewhere on one line: no control characters, no endless length."""
    clean = "".join(
        " " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in str(text)
    )
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new table cell."""
    text = one_line(text, _MOST_CHARACTERS).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~$\[\]])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is no markup
    return re.sub(r"^(\d*)([#+=.)-]+)(?=\s|$)", r"\1\\\2", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "−": r"$-$",
    "–": r"--",
    "…": r"\dots{}",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "ρ": r"$\rho$",
}


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(character, character) for character in one_line(text, _MOST_CHARACTERS))


def markup(text: str) -> str:
    """Text that HTML shows as it is, in an attribute too."""
    return html.escape(one_line(text, _MOST_CHARACTERS), quote=True)
