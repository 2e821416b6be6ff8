"""How Sphinx makes the documentation site; ``make docs`` builds it.

The repository is the source: pages link to each other, to figures and to files exactly as they do where they
are read in the repository, and a link that leads nowhere fails the build.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import re
import shutil
from dataclasses import InitVar
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flatbench.config.registry import _argument_types
from flatbench.version import __version__

project = "flatbench"
author = "The flatbench developers"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/api/*.rst",
    "studies/PROTOCOL.md",
    "notebooks/*.ipynb",
    "reports/**.md",
]

# not looked through
exclude_patterns = [".*", "build", "dist", "flatbench", "local", "results", "tests"]

# the site's table of contents: README.md itself is read elsewhere too
CONTENTS = """

```{toctree}
:hidden:
:caption: Guide
docs/running
docs/tasks
docs/optimizers
docs/curvature
docs/landscape
docs/watching
docs/efficiency
docs/distributed
docs/reports
docs/glossary
docs/security
```

```{toctree}
:hidden:
:caption: Notebooks
:glob:
notebooks/*
```

```{toctree}
:hidden:
:caption: Evidence
docs/figures
docs/papers
studies/PROTOCOL
reports/README
```

```{toctree}
:hidden:
:caption: Reference
docs/api/index
```

```{toctree}
:hidden:
:caption: Taking part
docs/extending
CONTRIBUTING
CHANGELOG
```
"""

# notebooks are shown as they were recorded by notebooks/execute.py
nb_execution_mode = "off"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# names in single backticks lead to the reference where they are in it
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True

html_theme = "furo"
html_title = f"flatbench {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


class Plugins(SphinxDirective):
    """Every plug-in of a package's registry, with the name that a study file knows it by."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """An ``autoclass`` for each."""
        package = importlib.import_module(self.arguments[0])
        registry, lines = package.REGISTRY, []
        for name in registry.names():
            plugin = registry.load(name)
            _readable(plugin)
            place = package.__name__ if hasattr(package, plugin.__name__) else plugin.__module__
            lines += [f".. autoclass:: {place}.{plugin.__name__}", "   :members:", ""]
            lines += [f"   In a study file: {registry.kind} ``{name}``.", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def _readable(plugin: type) -> None:
    """Bounds of options as one reads them: ``Annotated[float, "≥ 0"]``."""
    constructor: Any = next(kind for kind in plugin.__mro__ if "__init__" in vars(kind)).__init__
    for name, found in _argument_types(plugin).items():
        if name in constructor.__annotations__:
            constructor.__annotations__[name] = _bounded(found)


def _bounded(found: Any) -> Any:
    if isinstance(found, InitVar):
        return _bounded(found.type)
    if get_origin(found) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_bounded, get_args(found)))
    if get_origin(found) is not Annotated:
        return found
    kind, *said = get_args(found)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    rules = [rule for field in said for rule in getattr(field, "metadata", ())]
    texts = [f"{signs[k]} {getattr(rule, k)}" for rule in rules for k in signs if hasattr(rule, k)]
    return Annotated[kind, ", ".join(texts)] if texts else kind


def _contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The table of contents; and links to folders, which a site has no pages for, as their texts."""
    if docname == root_doc:
        source[0] += CONTENTS
    elif docname.startswith("reports/") and docname.endswith("/README"):
        pattern = "*/README" if docname == "reports/README" else "*"
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:glob:\n{pattern}\n```\n"
    here = Path(app.env.doc2path(docname)).parent
    if not docname.startswith("notebooks/"):
        source[0] = re.sub(
            r"\[([^\]]*)\]\(([^)#:]+)\)",
            lambda link: link[1] if (here / link[2]).is_dir() else link[0],
            source[0],
        )


def _elsewhere(app: Sphinx, env: Any, node: nodes.Element, text: nodes.Node) -> nodes.Node | None:
    """Names that are not in the reference are texts; one of flatbench's must exist nevertheless."""
    if node.get("refdomain") != "py" or node.get("reftype") not in ("obj", "class"):
        return None
    name = node["reftarget"]
    if not re.fullmatch(r"flatbench(\.\w+)+", name):
        return text
    module, _, attribute = name.rpartition(".")
    while module:
        try:
            operator.attrgetter(attribute)(importlib.import_module(module))
            return text
        except ImportError:
            module, _, part = module.rpartition(".")
            attribute = f"{part}.{attribute}"
        except AttributeError:
            return text if importlib.util.find_spec(f"{module}.{attribute}") else None
    return None


def _property(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon would take what stands before a colon in a property's first line for its type."""
    if what == "property":
        lines.insert(0, "")


def _front_page(app: Sphinx, error: Exception | None) -> None:
    """The front page under the name that servers and browsers look for."""
    if error is None and app.builder.format == "html":
        folder = Path(app.outdir)
        shutil.copyfile(folder / "README.html", folder / "index.html")


def setup(app: Sphinx) -> None:
    """Connect what is above to Sphinx."""
    app.add_directive("plugins", Plugins)
    app.connect("source-read", _contents)
    app.connect("missing-reference", _elsewhere)
    app.connect("autodoc-process-docstring", _property, priority=400)
    app.connect("build-finished", _front_page)
